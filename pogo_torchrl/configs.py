"""Options and Hydra config groups of POGO, re-exported from :mod:`pogo_torchrl.experiments`."""

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
from pogo_torchrl.experiments.torchrl_configs import POGOLossConfig, POGOTrainerConfig

__all__ = [
    "DataConfig",
    "EnvConfig",
    "LoggerConfig",
    "POGOLossConfig",
    "POGOTrainerConfig",
    "RunConfig",
    "SlurmConfig",
    "SweepConfig",
    "check_options",
    "check_overrides",
    "compose",
    "options",
    "sweep_options",
    "tasks",
]
