"""POGO's entries of TorchRL's Hydra config groups, see ``docs/hydra.md``.

``loss: pogo``, ``trainer: pogo``, ``network: transport``, ``model: transport_actor``,
``model: pogo_qvalue`` and ``replay_buffer: pogo_data``. Importing this module registers them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from torchrl.trainers.algorithms.configs.common import ConfigBase
from torchrl.trainers.algorithms.configs.modules import ModelConfig, NetworkConfig
from torchrl.trainers.algorithms.configs.objectives import LossConfig
from torchrl.trainers.algorithms.configs.trainers import TrainerConfig

_BUILDERS = "pogo_torchrl.experiments.torchrl_builders"


@dataclass
class TransportNetConfig(NetworkConfig):
    """Config ``network: transport``: arguments of :func:`~pogo_torchrl.modules.make_transport_net`.

    Sizes that are not given are those of the actor.
    """

    observation_dim: int | None = None
    action_dim: int | None = None
    hidden_sizes: list[int] = field(default_factory=lambda: [256, 256])
    _target_: str = "pogo_torchrl.modules.make_transport_net"
    _partial_: bool = True


@dataclass
class TransportActorConfig(ModelConfig):
    """Config ``model: transport_actor``: a :class:`~pogo_torchrl.TransportActor`.

    ``network`` is a network of two inputs, s and z, by default ``network: transport``. ``trainer:
    pogo`` supplies sizes and bounds that are not given.
    """

    network: Any = None
    observation_dim: int | None = None
    action_dim: int | None = None
    low: Any = None
    high: Any = None
    action_spec: Any = None
    noise_key: Any = "noise"
    _target_: str = f"{_BUILDERS}.make_transport_actor"
    _partial_: bool = True


@dataclass
class QValueConfig(ConfigBase):
    """Config ``model: pogo_qvalue``: arguments of :func:`~pogo_torchrl.make_qvalue`.

    ``trainer: pogo`` supplies sizes that are not given.
    """

    observation_dim: int | None = None
    action_dim: int | None = None
    hidden_sizes: list[int] = field(default_factory=lambda: [256, 256])
    layer_norm: bool = False
    _target_: str = "pogo_torchrl.make_qvalue"
    _partial_: bool = True

    def __post_init__(self) -> None:
        """Do nothing; TorchRL's base class requires this method."""


@dataclass
class POGODataConfig(ConfigBase):
    """Config ``replay_buffer: pogo_data``.

    All arguments of :func:`~pogo_torchrl.data.make_replay_buffer`.
    """

    task: str = "hopper-medium-v2"
    source: str = "local"
    path: str | None = None
    mirror: str | None = None
    batch_size: int = 256
    normalize: bool = True
    reward_shift: float = 0.0
    size: int = 100_000
    seed: int = 0
    cache_dir: str | None = None
    next_action: bool = False
    return_temperature: float | None = None
    clip_actions: bool = False
    max_episode_steps: int | None = None
    dict_space: Any = None
    device: str = "cpu"
    progress: bool = True
    _target_: str = "pogo_torchrl.data.make_replay_buffer"

    def __post_init__(self) -> None:
        """Do nothing; TorchRL's base class requires this method."""


@dataclass
class POGOLossConfig(LossConfig):
    """Config ``loss: pogo``: all keyword arguments of :class:`~pogo_torchrl.POGOLoss`.

    ``gamma`` is the discount factor of the value estimator, as in TorchRL's configs.
    """

    actor_network: Any = None
    qvalue_network: Any = None
    w2_weights: list[float] = field(default_factory=lambda: [0.2, 0.2, 0.2])
    step_sizes: Any = None
    action_spec: Any = None
    bounds: Any = None
    num_qvalue_nets: int = 2
    num_samples: int = 4
    blur: float = 0.05
    w2_backend: str = "tensorized"
    w2_fraction: float = 1.0
    shared_noise: bool = False
    policy_noise: float = 0.2
    noise_clip: float = 0.5
    q_normalization: str | None = "mean_abs"
    alpha: float = 1.0
    delay_actor: bool = False
    delay_qvalue: bool = True
    loss_function: str = "l2"
    reduction: str = "mean"
    data_weight: float = 0.0
    trajectory_weights: bool = False
    critic_bc_weight: float = 0.0
    target_action: str = "noisy"
    actor_q: str = "first"
    advantage_temperature: float | None = None
    chain_init: str = "independent"
    average_actors: float | None = None
    deactivate_vmap: bool = False
    use_prioritized_weights: Any = "auto"
    gamma: float | None = None
    _target_: str = f"{_BUILDERS}.make_pogo_loss"
    _convert_: str = "all"

    def __post_init__(self) -> None:
        super().__post_init__()


@dataclass
class POGOTrainerConfig(TrainerConfig):
    """Config ``trainer: pogo``: keyword arguments of :class:`~pogo_torchrl.POGOTrainer`.

    In addition, as in TorchRL's trainer configs:

    * ``loss_module`` may be partial (``loss._partial_: true``). The trainer then builds it from
      ``actor_network`` and ``qvalue_network``, with sizes from the replay buffer and action bounds
      from ``create_env_fn``, an environment or a function that makes one.
    * ``optimizer`` applies to the critics and to each actor, unless they have their own.
    * ``clip_grad_norm: true`` takes the maximum norm from ``clip_norm``.
    * ``logger`` receives the metrics every ``log_interval`` updates.
    * ``seed`` seeds training, and the initial parameters of networks that are built here.
    """

    loss_module: Any = None
    replay_buffer: Any = None
    total_steps: int = 1_000_000
    actor_network: Any = None
    qvalue_network: Any = None
    create_env_fn: Any = None
    lr: float = 3e-4
    optimizer: Any = None
    qvalue_optimizer: Any = None
    actor_optimizer: Any = None
    qvalue_lr_scheduler: Any = None
    actor_lr_scheduler: Any = None
    clip_grad_norm: Any = None
    clip_norm: float | None = None
    policy_freq: int = 1
    freeze_critics_at: float | None = None
    tau: float = 0.005
    target_net_updater: Any = None
    compile: bool = False
    bf16: bool = False
    checkpoint_dir: str | None = None
    checkpoint_interval: int = 50_000
    keep_checkpoints: int = 2
    fingerprint: Any = None
    progress_bar: bool = True
    hooks: list[Any] = field(default_factory=list)
    logger: Any = None
    log_interval: int = 10_000
    seed: int | None = None
    _target_: str = f"{_BUILDERS}.make_pogo_trainer"
    _convert_: str = "all"

    def __post_init__(self) -> None:
        super().__post_init__()


def _register() -> None:
    store = ConfigStore.instance()
    for group, name, node in (
        ("loss", "pogo", POGOLossConfig),
        ("trainer", "pogo", POGOTrainerConfig),
        ("network", "transport", TransportNetConfig),
        ("model", "transport_actor", TransportActorConfig),
        ("model", "pogo_qvalue", QValueConfig),
        ("replay_buffer", "pogo_data", POGODataConfig),
    ):
        store.store(group=group, name=name, node=node)


_register()
