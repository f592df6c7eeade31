"""Register every task with Gymnasium, and make its environment."""

from __future__ import annotations

import gymnasium

from pogo_torchrl.envs.scores import TASKS, max_episode_steps, split_task
from pogo_torchrl.envs.selfcheck import ENVIRONMENTS, warn_if_physics_differ

BACKENDS = ("mujoco", "d4rl")
"""What `make_env` can simulate with."""


def make_env(
    task: str, *, backend: str = "mujoco", render_mode: str | None = None
) -> gymnasium.Env:
    """Make a task's environment, with the physics, rewards and terminations of D4RL version 2.

    Locomotion tasks that differ only in their level share one environment, and antmaze tasks that
    differ only in their data share one maze. `env.unwrapped.set_state(qpos, qvel)` puts an
    environment into a recorded state; `env.unwrapped.goal` is antmaze's goal.

    The first time that an environment is made in a process, the installed MuJoCo is checked against
    recorded transitions (see `check_physics`); if it deviates, one warning is logged.

    Args:
        task: a D4RL task name, such as `"hopper-medium-v2"` or `"antmaze-umaze-v2"`.
        backend: `"mujoco"`, the default, simulates with the installed MuJoCo; `"d4rl"` with D4RL's
            own environment and MuJoCo 2.1.0, for comparison (see `D4RLEnv` for what it needs).
        render_mode: passed on to Gymnasium (`"human"`, `"rgb_array"`, ...); default: no rendering.
            Only for `backend="mujoco"`.

    Returns:
        A Gymnasium environment with float64 observations and float32 actions in [-1, 1]; actions
        beyond are clipped. Episodes are truncated after `max_episode_steps(task)` steps.

    Raises:
        ValueError: for an unknown task or backend, or a `render_mode` with `backend="d4rl"`.
        ImportError: if `backend="d4rl"` lacks its packages.

    Example:
        >>> env = make_env("hopper-medium-v2")
        >>> observation, info = env.reset(seed=0)
        >>> observation.shape
        (11,)
        >>> observation, reward, terminated, truncated, info = env.step(env.action_space.low)
        >>> env.close()

        The same from Gymnasium:

        >>> gymnasium.make("pogo_torchrl/hopper-medium-v2").spec.max_episode_steps
        1000
    """
    environment, level = split_task(task)
    if backend == "d4rl":
        from pogo_torchrl.envs.d4rl_reference import D4RLEnv

        if render_mode is not None:
            raise ValueError(
                f"render_mode={render_mode!r} needs backend='mujoco'; leave one of the two out"
            )
        return D4RLEnv(task)
    if backend != "mujoco":
        raise ValueError(f"backend={backend!r} is unknown; use one of {', '.join(BACKENDS)}")
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
                # Both slow evaluation down, and add wrappers that hide nothing but speed.
                disable_env_checker=True,
                order_enforce=False,
            )


_register()
