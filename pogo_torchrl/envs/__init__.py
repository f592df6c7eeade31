"""Evaluation environments with the physics of D4RL's version 2 tasks, and D4RL's scores."""

from __future__ import annotations

import logging

import gymnasium
import mujoco
from gymnasium.wrappers import TimeLimit

from pogo_torchrl.envs.locomotion import LOCOMOTION
from pogo_torchrl.envs.scores import REFERENCE_RETURNS, TASKS, score, split_task

__all__ = ["REFERENCE_RETURNS", "TASKS", "make_env", "score", "split_task"]

_LOGGER = logging.getLogger(__name__)
_EPISODE_STEPS = 1000


def make_env(task: str, *, render_mode: str | None = None) -> gymnasium.Env:
    """Make a task's environment, with the physics, rewards and terminations of D4RL version 2.

    Tasks that differ only in their level share one environment. `env.unwrapped.set_state(qpos,
    qvel)` puts it into a recorded state.

    Args:
        task: a D4RL locomotion task name, such as `"hopper-medium-v2"`.
        render_mode: passed on to Gymnasium (`"human"`, `"rgb_array"`, ...); default: no rendering.

    Returns:
        A Gymnasium environment with float64 observations and float32 actions in [-1, 1]; actions
        beyond are clipped. Episodes are truncated after 1,000 steps.

    Raises:
        ValueError: for an unknown task.
        NotImplementedError: for an antmaze task.

    Example:
        >>> env = make_env("hopper-medium-v2")
        >>> observation, info = env.reset(seed=0)
        >>> observation.shape
        (11,)
        >>> observation, reward, terminated, truncated, info = env.step(env.action_space.low)
        >>> env.close()
    """
    environment, _ = split_task(task)
    if environment not in LOCOMOTION:
        raise NotImplementedError(
            f"task={task!r} has no evaluation environment in this version; use a task of "
            f"{', '.join(LOCOMOTION)}"
        )
    # Without a handler MuJoCo appends warnings to MUJOCO_LOG.TXT in the working directory.
    if mujoco.get_mju_user_warning() is None:
        mujoco.set_mju_user_warning(_log_mujoco_warning)
    return TimeLimit(LOCOMOTION[environment](render_mode=render_mode), _EPISODE_STEPS)


def _log_mujoco_warning(message: str) -> None:
    _LOGGER.warning("MuJoCo: %s", message)
