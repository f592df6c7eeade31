"""Register the tasks with Gymnasium and create their environments."""

from __future__ import annotations

from typing import Literal

import gymnasium

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
