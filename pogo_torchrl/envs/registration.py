"""Register the tasks with Gymnasium and create their environments."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium.spaces import Box
from gymnasium.wrappers import TransformAction
from numpy.typing import NDArray

from pogo_torchrl.envs.flattening import flatten_observations
from pogo_torchrl.envs.probe import check_spaces
from pogo_torchrl.envs.scores import TASKS, max_episode_steps, split_task
from pogo_torchrl.envs.selfcheck import ENVIRONMENTS, warn_if_physics_differ

BACKENDS = ("mujoco", "d4rl")
"""Supported values of ``backend``, see :func:`make_env`."""


def make_env(
    task: str,
    *,
    backend: Literal["mujoco", "d4rl"] = "mujoco",
    render_mode: str | None = None,
) -> gymnasium.Env:
    """Create the environment of a task, with D4RL's physics, rewards and terminations.

    Locomotion tasks that differ only in their level share one environment, and antmaze tasks that
    differ only in their data share one maze. ``env.unwrapped.set_state(qpos, qvel)`` sets the state
    of an environment; ``env.unwrapped.goal`` is the goal of an antmaze environment.

    When an environment is first created in a process, the installed MuJoCo is checked against
    recorded transitions, and a deviation is logged as one warning, see
    :func:`~pogo_torchrl.envs.check_physics`.

    Args:
        task: a D4RL task name, e.g. ``"hopper-medium-v2"`` or ``"antmaze-umaze-v2"``.
        backend: ``"mujoco"`` simulates with the installed MuJoCo; ``"d4rl"`` uses D4RL's own
            environment with MuJoCo 2.1.0, for comparison; see
            :class:`~pogo_torchrl.envs.d4rl_reference.D4RLEnv` for its requirements. Defaults to
            ``"mujoco"``.
        render_mode: Gymnasium's render mode (``"human"``, ``"rgb_array"``, ...), only for
            ``backend="mujoco"``. Defaults to ``None``, no rendering.

    Returns:
        A Gymnasium environment with float64 observations and float32 actions in [-1, 1]; actions
        outside of the bounds are clipped. Episodes are truncated after ``max_episode_steps(task)``
        steps.

    Raises:
        ValueError: for an unknown task or backend, or a ``render_mode`` with ``backend="d4rl"``.
        ImportError: when the packages needed by ``backend="d4rl"`` are not installed.

    Example:
        >>> env = make_env("hopper-medium-v2")
        >>> observation, info = env.reset(seed=0)
        >>> observation.shape
        (11,)
        >>> observation, reward, terminated, truncated, info = env.step(env.action_space.low)
        >>> env.close()

        The same with ``gymnasium.make``:

        >>> gymnasium.make("pogo_torchrl/hopper-medium-v2").spec.max_episode_steps
        1000
    """
    environment, level = split_task(task)
    if backend == "d4rl":
        from pogo_torchrl.envs.d4rl_reference import D4RLEnv

        if render_mode is not None:
            raise ValueError(
                f"render_mode={render_mode!r} needs backend='mujoco'; remove one of the two."
            )
        return D4RLEnv(task)
    if backend != "mujoco":
        raise ValueError(f"backend={backend!r} is unknown; use one of {', '.join(BACKENDS)}.")
    warn_if_physics_differ(environment)
    return gymnasium.make(f"pogo_torchrl/{environment}-{level}-v2", render_mode=render_mode)


def make_gymnasium_env(
    env_id: str,
    *,
    kwargs: Mapping[str, Any] | None = None,
    max_episode_steps: int | None = None,
    action_bounds: Sequence[Any] | None = None,
    render_mode: str | None = None,
) -> gymnasium.Env:
    """Create an environment of one's own with :func:`gymnasium.make`.

    Args:
        env_id: ID of a registered environment, or ``MODULE:ID`` to import the module that registers
            it, which may lie in the current folder.
        kwargs: arguments of the environment. Defaults to none.
        max_episode_steps: number of steps after which an episode is truncated. Defaults to that of
            the registration.
        action_bounds: lower and upper bound of the actions, numbers for all dimensions or one list
            each. Defaults to those of the environment.
        render_mode: Gymnasium's render mode. Defaults to ``None``, no rendering.

    Returns:
        The environment; ``Dict`` observations are flattened, see
        :func:`~pogo_torchrl.envs.flattening.flatten_observations`.

    Raises:
        ValueError: if the environment is unknown or cannot be created, or its episodes have no
            maximum length.

    Example:
        >>> make_gymnasium_env("Pendulum-v1", max_episode_steps=50).spec.max_episode_steps
        50
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that no file here replaces an installed package
    arguments = {**(kwargs or {}), **({"render_mode": render_mode} if render_mode else {})}
    try:
        env = gymnasium.make(
            env_id, max_episode_steps=max_episode_steps, disable_env_checker=True, **arguments
        )
    except (gymnasium.error.Error, ImportError) as error:
        raise ValueError(
            f"env.id={env_id} is not a known Gymnasium environment ({_one_line(error)}): give an "
            "ID for gymnasium.make, or MODULE:ID if the environment is registered by a module."
        ) from error
    except Exception as error:  # anything, from a user's environment
        raise ValueError(
            f"env.id={env_id} could not be created with env.kwargs={dict(kwargs or {})} "
            f"({type(error).__name__}: {_one_line(error)}); where only one may exist at a time, "
            "use eval_envs=1."
        ) from error
    try:
        if action_bounds is not None and isinstance(env.action_space, Box):
            env = _bounded(env, action_bounds)
        env = flatten_observations(env)
        check_spaces(env)
        if env.spec is None or env.spec.max_episode_steps is None:
            raise ValueError(
                f"env.id={env_id} does not say how long an episode may be: set "
                "env.max_episode_steps=N, or a large N if every episode ends by itself."
            )
    except ValueError:
        env.close()
        raise
    return env


def _bounded(env: gymnasium.Env, bounds: Sequence[Any]) -> gymnasium.Env:
    """Replace the bounds of the actions, which are passed on as they are."""
    shape = env.action_space.shape or ()
    low, high = read_action_bounds(bounds, math.prod(shape))
    space = Box(low.reshape(shape), high.reshape(shape), dtype=np.float32)
    return TransformAction(env, lambda action: action, space)


def read_action_bounds(
    bounds: Sequence[Any], size: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Lower and upper bounds of the actions, from the option ``env.action_bounds``.

    Args:
        bounds: ``[low, high]``, numbers for all dimensions or one list each.
        size: number of action dimensions.

    Returns:
        The bounds, ``[size]`` each.

    Raises:
        ValueError: unless the bounds are finite, in ascending order, and as many as dimensions.

    Example:
        >>> read_action_bounds([[-1, -2], [1, 2]], 2)[0].tolist(), read_action_bounds([0, 1], 2)[1]
        ([-1.0, -2.0], array([1., 1.], dtype=float32))
    """
    shown = str(bounds).replace(" ", "")
    try:
        low, high = (np.array(one if np.isscalar(one) else [*one], dtype=float) for one in bounds)
        valid = low.shape == high.shape and low.ndim < 2
        valid = valid and bool(((-np.inf < low) & (low < high) & (high < np.inf)).all())
    except (ValueError, TypeError):
        valid = False
    if not valid:
        raise ValueError(
            f"env.action_bounds={shown} must be the lower and the upper bound of the actions, "
            "e.g. [-2,2], or [[-1,-2],[1,2]] for two dimensions."
        )
    if low.ndim and len(low) != size:
        raise ValueError(
            f"env.action_bounds={shown} has {len(low)} lower bounds, but there are {size} action "
            "dimensions: give one for each, or one number for all."
        )
    low, high = (np.broadcast_to(one, size).astype(np.float32) for one in (low, high))
    return low, high


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _register() -> None:
    for task in TASKS:
        environment, level = split_task(task)
        kwargs = {"maze": level.split("-")[0]} if environment == "antmaze" else {}
        entry = ENVIRONMENTS[environment]
        if f"pogo_torchrl/{task}" not in gymnasium.registry:
            gymnasium.register(
                id=f"pogo_torchrl/{task}",
                entry_point=f"{entry.__module__}:{entry.__qualname__}",
                max_episode_steps=max_episode_steps(task),
                kwargs=kwargs,
                # These wrappers slow down evaluation and are not needed here.
                disable_env_checker=True,
                order_enforce=False,
            )


_register()
