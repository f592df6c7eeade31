"""Entries of TorchRL's Hydra config groups: ``loss: pogo`` and ``trainer: pogo``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torchrl.trainers.algorithms.configs.objectives import LossConfig
from torchrl.trainers.algorithms.configs.trainers import TrainerConfig


@dataclass
class POGOLossConfig(LossConfig):
    """Config ``loss: pogo``: all keyword arguments of :class:`~pogo_torchrl.POGOLoss`."""

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
    critic_bc_weight: float = 0.0
    target_action: str = "noisy"
    actor_q: str = "first"
    advantage_temperature: float | None = None
    chain_init: str = "independent"
    average_actors: float | None = None
    deactivate_vmap: bool = False
    use_prioritized_weights: Any = "auto"
    _target_: str = "pogo_torchrl.POGOLoss"

    def __post_init__(self) -> None:
        super().__post_init__()


@dataclass
class POGOTrainerConfig(TrainerConfig):
    """Config ``trainer: pogo``: keyword arguments of :class:`~pogo_torchrl.POGOTrainer`."""

    loss_module: Any = None
    replay_buffer: Any = None
    total_steps: int = 1_000_000
    lr: float = 3e-4
    qvalue_optimizer: Any = None
    actor_optimizer: Any = None
    qvalue_lr_scheduler: Any = None
    actor_lr_scheduler: Any = None
    clip_grad_norm: float | None = None
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
    _target_: str = "pogo_torchrl.POGOTrainer"

    def __post_init__(self) -> None:
        super().__post_init__()
