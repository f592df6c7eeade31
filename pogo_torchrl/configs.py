"""Options and Hydra config groups of POGO, re-exported from :mod:`pogo_torchrl.experiments`.

Importing this module adds POGO to TorchRL's Hydra config groups (``docs/hydra.md``).
"""

from pogo_torchrl.experiments.config import (
    DataConfig,
    EnvConfig,
    LoggerConfig,
    RunConfig,
    SlurmConfig,
    SweepConfig,
    options,
    tasks,
)
from pogo_torchrl.experiments.overrides import (
    check_options,
    check_overrides,
    compose,
    sweep_options,
)
from pogo_torchrl.experiments.torchrl_configs import (
    POGODataConfig,
    POGOLossConfig,
    POGOTrainerConfig,
    QValueConfig,
    TransportActorConfig,
    TransportNetConfig,
)

__all__ = [
    "DataConfig",
    "EnvConfig",
    "LoggerConfig",
    "POGODataConfig",
    "POGOLossConfig",
    "POGOTrainerConfig",
    "QValueConfig",
    "RunConfig",
    "SlurmConfig",
    "SweepConfig",
    "TransportActorConfig",
    "TransportNetConfig",
    "check_options",
    "check_overrides",
    "compose",
    "options",
    "sweep_options",
    "tasks",
]
