"""The evaluation environment of a run, or what stands in for it in a run without one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import gymnasium
import torch
from omegaconf import DictConfig, OmegaConf
from torchrl.data import Bounded

from pogo_torchrl.data import OfflineReplayBuffer
from pogo_torchrl.data.minari import read_minari_environment
from pogo_torchrl.envs import (
    BACKENDS,
    is_d4rl_task,
    make_env,
    make_gymnasium_env,
    max_episode_steps,
    split_task,
)
from pogo_torchrl.envs.registration import read_action_bounds
from pogo_torchrl.evaluation import Evaluator
from pogo_torchrl.experiments.own_task import FROM_DATA


def env_fn(
    task: str, cfg: DictConfig, render_mode: str | None = None
) -> Callable[[], gymnasium.Env]:
    """Factory of the evaluation environment.

    Args:
        task: name of a task.
        cfg: an :class:`~pogo_torchrl.experiments.config.EnvConfig`; ``id`` replaces the environment
            of a D4RL task.
        render_mode: Gymnasium's render mode. Defaults to ``None``.

    Returns:
        A function without arguments that makes the environment.

    Raises:
        ValueError: for an unknown backend, options that the backend does not support, or a task of
            one's own without ``id``.
    """
    if cfg.backend not in BACKENDS:
        raise ValueError(
            f"env.backend={cfg.backend} is unknown; choose one of {', '.join(BACKENDS)}."
        )
    own = f"pogo_torchrl/{'-'.join(split_task(task))}-v2" if is_d4rl_task(task) else None
    kwargs: Any = cfg.kwargs
    if OmegaConf.is_config(kwargs):
        kwargs = OmegaConf.to_container(kwargs)
    horizon = cfg.max_episode_steps
    changed = kwargs or cfg.action_bounds is not None
    if own and cfg.id in (None, own) and not changed and horizon in (None, max_episode_steps(task)):
        return partial(make_env, task, backend=cfg.backend, render_mode=render_mode)
    if cfg.backend != "mujoco":
        raise ValueError(
            f"env.backend={cfg.backend} supports only the task's own environment and horizon; "
            "leave out env.id and env.max_episode_steps."
        )
    env_id = cfg.id or own
    if env_id is None:
        raise ValueError(
            f"task={task!r} has no environment: set env.id, or give the name of a D4RL task."
        )
    return partial(
        make_gymnasium_env,
        env_id,
        kwargs=kwargs,
        max_episode_steps=horizon,
        action_bounds=cfg.action_bounds,
        render_mode=render_mode,
    )


def resolve_environment(cfg: DictConfig) -> DictConfig:
    """Return the options with the environment and reference scores that a Minari dataset records.

    Args:
        cfg: a :class:`~pogo_torchrl.experiments.config.RunConfig`.

    Returns:
        The options; unchanged for D4RL tasks and other data. Options that are set are kept.

    Raises:
        ValueError: if ``env.id=minari`` and no environment is recorded, or the data are others.
    """
    if cfg.env.id == FROM_DATA and cfg.data.source != "minari":
        raise ValueError(
            f"env.id={FROM_DATA} is the environment of a Minari dataset, but "
            f"data.source={cfg.data.source}: give the environment's ID."
        )
    if cfg.data.source != "minari" or cfg.data.path is None:
        return cfg
    if is_d4rl_task(cfg.task) and cfg.env.id != FROM_DATA:
        return cfg
    found = read_minari_environment(cfg.data.path)
    resolved = copy.deepcopy(cfg)
    resolved.task = cfg.task  # which may follow from env.id
    if cfg.env.reference_scores is None and not is_d4rl_task(cfg.task):
        resolved.env.reference_scores = found.reference_scores
    if cfg.env.id == FROM_DATA:
        if found.env_id is None and cfg.eval_interval:
            raise ValueError(
                f"data.path={cfg.data.path} records no environment: set env.id, or eval_interval=0 "
                "to train without evaluation."
            )
        resolved.env.id = found.env_id
        resolved.env.kwargs = {**found.kwargs, **cfg.env.kwargs}
        resolved.env.max_episode_steps = cfg.env.max_episode_steps or found.max_episode_steps
    return resolved


def has_simulator(cfg: DictConfig) -> bool:
    """Whether a run is evaluated, which needs an environment.

    Args:
        cfg: a :class:`~pogo_torchrl.experiments.config.RunConfig`.
    """
    return cfg.eval_interval > 0 and cfg.env.id is not None


def make_evaluator(cfg: DictConfig) -> Evaluator:
    """Create the evaluator of a run, whose first environment has passed its check.

    Args:
        cfg: a :class:`~pogo_torchrl.experiments.config.RunConfig` with an environment.

    Raises:
        ValueError: if the environment is unknown or cannot be used.
    """
    evaluator = Evaluator(
        cfg.task,
        episodes=cfg.eval_episodes,
        seed=cfg.seed,
        env_fn=env_fn(cfg.task, cfg.env),
        reference_scores=cfg.env.reference_scores,
        eval_envs=cfg.eval_envs,
    )
    try:
        evaluator.check()
    except ValueError:
        evaluator.close()
        raise
    return evaluator


class DataSpaces(NamedTuple):
    """Sizes and action bounds of a run without an environment, from its data."""

    task: str
    observation_dim: int
    action_dim: int
    action_spec: Bounded

    @classmethod
    def of(cls, cfg: DictConfig, replay_buffer: OfflineReplayBuffer) -> DataSpaces:
        """Read the sizes from the data, and the bounds from ``env.action_bounds``.

        Args:
            cfg: a :class:`~pogo_torchrl.experiments.config.RunConfig`.
            replay_buffer: the data.

        Raises:
            ValueError: if the bounds are not set, and the actions are not in [-1, 1].
        """
        rows = replay_buffer[:]
        size, bounds = rows["action"].shape[-1], cfg.env.action_bounds
        low, high = read_action_bounds((-1.0, 1.0) if bounds is None else bounds, size)
        largest = float(rows["action"].abs().max())
        if bounds is None and not is_d4rl_task(cfg.task) and largest > 1 + 1e-4:
            raise ValueError(
                f"the data have actions up to {largest:.3g}, and without an environment their "
                "bounds are unknown: set env.action_bounds=[low,high]."
            )
        spec = Bounded(torch.from_numpy(low), torch.from_numpy(high), dtype=torch.float32)
        return cls(cfg.task, rows["observation"].shape[-1], size, spec)
