"""Components of a run, built from its options."""

from __future__ import annotations

import copy
import math
import os
import random
import shutil
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from pogo_torchrl.data import OfflineReplayBuffer
from pogo_torchrl.data.hdf5 import read_action_dim
from pogo_torchrl.data.minari import read_minari_action_dim
from pogo_torchrl.evaluation import Evaluator
from pogo_torchrl.experiments.console import LOGGER
from pogo_torchrl.experiments.simulator import (
    DataSpaces,
    env_fn,
    has_simulator,
    resolve_environment,
)
from pogo_torchrl.functional import step_sizes_to_weights
from pogo_torchrl.machine import physical_memory
from pogo_torchrl.modules import make_actor, make_qvalue
from pogo_torchrl.objectives import POGOLoss
from pogo_torchrl.objectives.settings import check_step_sizes
from pogo_torchrl.trainers import LR_SCHEDULES, lr_scheduler
from pogo_torchrl.trainers.fused.compilation import COMPILABLE
from pogo_torchrl.trainers.optimizers import adam
from pogo_torchrl.trainers.step_control import GrowSteps, HoldDisplacement, StepControl


def choose_device(name: str) -> torch.device:
    """Resolve the option ``device``.

    Args:
        name: ``"auto"`` (a GPU if available), ``"cpu"`` or ``"cuda"``.

    Raises:
        ValueError: if the name is unknown or the device is not available.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(
            f"device={name} is unknown; choose one of auto, cpu, cuda (the environment variable "
            "CUDA_VISIBLE_DEVICES selects the GPU)."
        )
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch sees no GPU; use device=cpu or device=auto.")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def choose_compile(choice: str, total_steps: int, w2_backend: str = "fast") -> bool:
    """Resolve the option ``compile``.

    Args:
        choice: ``"auto"`` (compile long runs where possible), ``"true"`` or ``"false"``.
        total_steps: number of updates of the run.
        w2_backend: solver of the distance; only some can be compiled. Defaults to ``"fast"``.

    Returns:
        Whether to compile the update.

    Raises:
        ValueError: if the choice is unknown, or ``"true"`` is not possible.
    """
    if str(choice).lower() not in ("auto", "true", "false"):
        raise ValueError(f"compile={choice} is unknown; choose one of auto, true, false.")
    if str(choice).lower() != "auto":
        wanted = str(choice).lower() == "true"
        if wanted and w2_backend not in COMPILABLE:
            raise ValueError(
                f"compile=true needs w2_backend={' or '.join(COMPILABLE)}; w2_backend={w2_backend} "
                "reads values on the host and cannot be compiled."
            )
    else:
        # Compilation pays off after 3,000 to 6,000 updates (docs/speed.md).
        wanted = total_steps >= 10_000 and w2_backend in COMPILABLE
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    headers = Path(sysconfig.get_path("include"), "Python.h").exists()
    if not wanted or (compiler and headers):
        return wanted
    missing = "Python's headers (python3-dev)" if compiler else "a C++ compiler (g++)"
    if str(choice).lower() == "true":
        raise ValueError(f"compile=true needs {missing}: install it, or use compile=false.")
    LOGGER.warning("The update runs uncompiled and slower: %s is missing.", missing)
    return False


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """Use deterministic algorithms within a ``with`` block, if ``on``.

    Some operations on a GPU are nondeterministic by default; torch replaces them or raises.
    """
    before = torch.are_deterministic_algorithms_enabled()
    if on:
        # Required by cuBLAS, which reads it when its first handle is created.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - third-party code may use it
    torch.manual_seed(seed)


def resolve_step_sizes(cfg: DictConfig) -> DictConfig:
    """Return the options with ``step_sizes``, if given, replaced by the ``w2_weights`` they imply.

    Args:
        cfg: a :class:`~pogo_torchrl.experiments.config.RunConfig`.

    Raises:
        ValueError: for step sizes that are not positive.
    """
    if cfg.step_sizes is None:
        return cfg
    sizes = check_step_sizes(list(cfg.step_sizes), len(cfg.step_sizes))
    weights = step_sizes_to_weights(sizes, action_dim(cfg), cfg.alpha)
    resolved = copy.deepcopy(cfg)
    resolved.w2_weights, resolved.step_sizes = list(weights), None
    return resolved


def action_dim(cfg: DictConfig) -> int:
    """Number of action dimensions of the environment or, in a run without one, of its data."""
    cfg = resolve_environment(cfg)
    if not has_simulator(cfg) and cfg.data.path is not None:
        read = {"hdf5": read_action_dim, "minari": read_minari_action_dim}.get(cfg.data.source)
        if read is not None:
            return read(cfg.data.path)
    env = env_fn(cfg.task, cfg.env)()
    try:
        shape = env.action_space.shape
    finally:
        env.close()
    return shape[-1] if shape else 1


def check_memory(cfg: DictConfig, evaluator: Evaluator | DataSpaces) -> None:
    """Check that networks and batches fit into memory, before any is allocated.

    Args:
        cfg: a :class:`~pogo_torchrl.experiments.config.RunConfig`.
        evaluator: provides the sizes of observations and actions.

    Raises:
        ValueError: if they need more than the physical memory of the machine.
    """
    inputs = evaluator.observation_dim + evaluator.action_dim
    widths = [inputs, *cfg.hidden_sizes, evaluator.action_dim]
    critic_widths = [inputs, *critic_sizes(cfg), 1]
    # Actors, critics and their targets, each counted with gradient and Adam's two moments in
    # float32: 4 x 4 bytes per weight.
    count = len(cfg.w2_weights) if cfg.chain is None else 1 + cfg.chain
    actors = 16 * count * sum(n * m for n, m in pairwise(widths))
    critics = 16 * 2 * cfg.num_critics * sum(n * m for n, m in pairwise(critic_widths))
    costs = cfg.num_samples if cfg.w2_backend in ("tensorized", "fast") else 1
    batch = 4 * cfg.batch_size * (1 + cfg.num_samples) * (sum(widths) + costs)
    for needed, what in (
        (actors, f"hidden_sizes={cfg.hidden_sizes} with {count} actors"),
        (critics, f"critic_hidden_sizes={critic_sizes(cfg)} with num_critics={cfg.num_critics}"),
        (batch, f"num_samples={cfg.num_samples} with batch_size={cfg.batch_size}"),
    ):
        if needed > physical_memory():
            raise ValueError(
                f"{what} would need {needed / 1e9:.3g} GB, but this machine has "
                f"{physical_memory() / 1e9:.3g} GB: choose smaller values."
            )


def critic_sizes(cfg: DictConfig) -> list[int]:
    """Widths of the hidden layers of the critics."""
    return list(cfg.hidden_sizes if cfg.critic_hidden_sizes is None else cfg.critic_hidden_sizes)


def make_loss(cfg: DictConfig, evaluator: Evaluator | DataSpaces, device: torch.device) -> POGOLoss:
    """Initialise the loss with its chain of actors and its critics.

    Args:
        cfg: a :class:`~pogo_torchrl.experiments.config.RunConfig`.
        evaluator: provides the sizes of observations and actions, and the action spec.
        device: device of the networks.
    """
    actor = make_actor(evaluator.observation_dim, evaluator.action_spec, cfg.hidden_sizes)
    qvalue = make_qvalue(
        evaluator.observation_dim,
        evaluator.action_dim,
        critic_sizes(cfg),
        cfg.critic_layer_norm,
    )
    loss = POGOLoss(
        actor,
        qvalue,
        w2_weights=list(cfg.w2_weights),
        num_qvalue_nets=cfg.num_critics,
        data_weight=cfg.data_weight,
        trajectory_weights=cfg.return_temperature is not None,
        critic_bc_weight=cfg.critic_bc_weight,
        target_action=cfg.target_action,
        actor_q=cfg.actor_q,
        advantage_temperature=cfg.advantage_temperature,
        chain_init=cfg.chain_init,
        average_actors=cfg.average_actors,
        num_samples=cfg.num_samples,
        blur=cfg.blur,
        w2_backend=cfg.w2_backend,
        w2_fraction=cfg.w2_fraction,
        shared_noise=cfg.shared_noise,
        policy_noise=cfg.policy_noise,
        noise_clip=cfg.noise_clip,
        q_normalization=cfg.q_normalization,
        alpha=cfg.alpha,
        delay_actor=cfg.delay_actor,
    ).to(device)
    loss.make_value_estimator(gamma=cfg.gamma)
    return loss


def optimizer_settings(cfg: DictConfig, device: torch.device) -> dict[str, Any]:
    """Optimizers, schedules and gradient clipping of a run.

    Args:
        cfg: a :class:`~pogo_torchrl.experiments.config.RunConfig`.
        device: device of the networks.

    Returns:
        Keyword arguments of :class:`~pogo_torchrl.POGOTrainer`.

    Raises:
        ValueError: for a learning rate or weight decay out of range, or an unknown schedule.
    """
    found: dict[str, Any] = {"clip_grad_norm": cfg.clip_grad_norm}
    if not (0 <= cfg.weight_decay < math.inf):
        raise ValueError(f"weight_decay={cfg.weight_decay} must be a number >= 0, e.g. 0.01.")
    for option, name in (("critic", "qvalue"), ("actor", "actor")):
        rate, schedule = cfg[f"lr_{option}"], cfg[f"lr_schedule_{option}"]
        rate, key = (cfg.lr, "lr") if rate is None else (rate, f"lr_{option}")
        if not 0 < rate < math.inf:
            raise ValueError(f"{key}={rate} must be a positive number, e.g. 3e-4.")
        schedule, own = (cfg.lr_schedule, "") if schedule is None else (schedule, f"_{option}")
        if schedule not in LR_SCHEDULES:
            raise ValueError(
                f"lr_schedule{own}={schedule} is unknown; choose one of {', '.join(LR_SCHEDULES)}."
            )
        found[f"{name}_optimizer"] = adam(rate, cfg.weight_decay, device=device)
        found[f"{name}_lr_scheduler"] = lr_scheduler(schedule, cfg.total_steps)
    return found


def step_control(cfg: DictConfig) -> StepControl | None:
    """Trainer hook that changes ``alpha`` during training.

    Args:
        cfg: a :class:`~pogo_torchrl.experiments.config.RunConfig`.

    Returns:
        The hook; ``None`` if ``alpha`` is constant.

    Raises:
        ValueError: if an option is out of range, or if both options are given.
    """
    grow = GrowSteps(cfg.alpha_growth)
    if cfg.displacement is None:
        return None if cfg.alpha_growth == 1 else grow
    if cfg.alpha_growth != 1:
        raise ValueError(
            f"displacement={cfg.displacement} and alpha_growth={cfg.alpha_growth} both change "
            "alpha: give one of them."
        )
    return HoldDisplacement(cfg.displacement)


def check_data(
    replay_buffer: OfflineReplayBuffer, evaluator: Evaluator | DataSpaces, cfg: DictConfig
) -> None:
    """Check that the data match the environment.

    Args:
        replay_buffer: the data.
        evaluator: provides the sizes of observations and actions, and the bounds of actions.
        cfg: a :class:`~pogo_torchrl.experiments.config.DataConfig`, named in error messages.

    Raises:
        ValueError: if sizes differ, or actions are out of bounds.
    """
    origin = f"data.path={cfg.path}" if cfg.path else f"data.source={cfg.source}"
    row = replay_buffer[0]
    data = row["observation"].shape[-1], row["action"].shape[-1]
    task = evaluator.observation_dim, evaluator.action_dim
    if data != task:
        raise ValueError(
            f"{origin} has observations and actions of size {data}, but task={evaluator.task} has "
            f"{task}: use data of this task, or set task (or env.id) to match the data."
        )
    space = evaluator.action_spec.space
    low, high = space.low.cpu(), space.high.cpu()
    actions = replay_buffer[:]["action"].cpu()
    beyond = torch.maximum(low - actions, actions - high).amax(dim=0)
    width = torch.where((high - low).isfinite(), high - low, 1.0)
    worst = int((beyond / width).argmax())
    if beyond[worst] > 1e-4 * width[worst]:
        raise ValueError(
            f"{origin} has actions up to {beyond[worst]:.3g} beyond the bounds of task="
            f"{evaluator.task} ({low[worst]:g} to {high[worst]:g}) in dimension {worst}: rescale "
            "them in the file, or clip them with data.clip_actions=true."
        )
    if isinstance(evaluator, Evaluator):
        _warn_of_other_observations(replay_buffer, evaluator, origin)


def _warn_of_other_observations(
    replay_buffer: OfflineReplayBuffer, evaluator: Evaluator, origin: str
) -> None:
    """Warn of observations outside of the environment's space, as of another environment."""
    mean, std = replay_buffer.normalization
    rows = replay_buffer[:]["observation"]
    lowest, highest = ((rows.amin(0) * std + mean).cpu(), (rows.amax(0) * std + mean).cpu())
    low, high = map(
        torch.as_tensor, (evaluator.observation_space.low, evaluator.observation_space.high)
    )
    slack = 1e-3 * (1 + torch.maximum(low.abs(), high.abs()).nan_to_num(posinf=0.0))
    outside = ((lowest < low - slack) | (highest > high + slack)).nonzero()
    if len(outside):
        i = int(outside[0])
        LOGGER.warning(
            "%s has observations that the environment of task=%s does not have (entry %d: %g to "
            "%g, expected %g to %g): are they of this environment?",
            origin, evaluator.task, i, lowest[i], highest[i], low[i], high[i],
        )  # fmt: skip
