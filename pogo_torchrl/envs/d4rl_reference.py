"""D4RL's own environments, with MuJoCo 2.1.0, behind Gymnasium's interface.

They require Python 3.10, ``pip install "pogo_torchrl[d4rl]"`` and some Debian packages, which the
error message of :class:`D4RLEnv` lists.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box
from numpy.typing import ArrayLike, NDArray

from pogo_torchrl.envs.scores import split_task

_DEBIAN_PACKAGES = "libosmesa6-dev libgl1-mesa-dev libglew-dev patchelf"


class D4RLEnv(gymnasium.Env):
    """D4RL's own environment of a task, for comparison: ``make_env(task, backend="d4rl")``.

    The interface (spaces, ``unwrapped.set_state``, ``unwrapped.data``, ``unwrapped.goal``,
    ``info["goal"]``) is the same as with ``backend="mujoco"``; physics, rewards, terminations and
    truncations are D4RL's. D4RL's antmaze draws its goals from NumPy's global generator. Here each
    environment has a separate generator state, so no global random state is modified and
    ``reset(seed=)`` determines both start states and goals.

    Args:
        task: a D4RL task name.

    Raises:
        ValueError: for an unknown task.
        ImportError: when D4RL's packages are missing; the message says what to install.

    Source: d4rl 1.1, gym 0.23.1, free-mujoco-py 2.1.6.

    Example:
        >>> D4RLEnv("hopper-medium-v2").reset(seed=0)[0].shape  # doctest: +SKIP
        (11,)
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012

    def __init__(self, task: str) -> None:
        environment, level = split_task(task)
        gym = _import_gym()
        self._numpy_state = np.random.RandomState().get_state()
        with self._own_numpy_random(), _quiet():
            self._env = gym.make(f"{environment}-{level}-v2")
        self._has_goal = environment == "antmaze"
        ones = np.ones(self._env.action_space.shape, dtype=np.float32)
        self.action_space = Box(-ones, ones, dtype=np.float32)
        shape = self._env.observation_space.shape
        self.observation_space = Box(-np.inf, np.inf, shape, dtype=np.float64)

    @property
    def data(self) -> Any:
        """State of the simulation, with ``qpos`` and ``qvel``."""
        return self._env.unwrapped.sim.data

    @property
    def goal(self) -> NDArray[np.float64]:
        """Position of antmaze's goal, x and y, ``[2]``."""
        return np.array(self._env.unwrapped.target_goal, dtype=np.float64)

    @goal.setter
    def goal(self, position: ArrayLike) -> None:
        with _quiet():
            self._env.unwrapped.set_target(tuple(np.asarray(position, dtype=np.float64)))

    def set_state(self, qpos: ArrayLike, qvel: ArrayLike) -> None:
        """Set the state of the simulation.

        Args:
            qpos: positions, ``[nq]``.
            qvel: velocities, ``[nv]``.
        """
        self.data.qacc_warmstart[:] = 0.0
        self._env.unwrapped.set_state(np.asarray(qpos), np.asarray(qvel))

    def normalized_score(self, returns: float) -> float:
        """Compute d4rl's normalised score, which is 0 for a random policy and 1 for an expert.

        Args:
            returns: undiscounted return of an episode.
        """
        return self._env.get_normalized_score(returns)

    @property
    def max_episode_steps(self) -> int:
        """Number of steps after which the episode is truncated."""
        return self._env._max_episode_steps

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float64], dict[str, Any]]:
        """Start an episode.

        Args:
            seed: determines start states and goals of this and later episodes. Defaults to
                ``None``, which continues the current random streams.
            options: ignored.

        Returns:
            The observation and the info.
        """
        if seed is not None:
            # Two streams, so that start states match env.seed(seed) in D4RL.
            goals = np.random.SeedSequence(seed, spawn_key=(0,)).generate_state(4)
            self._numpy_state = np.random.RandomState(goals).get_state()
        with self._own_numpy_random(), _quiet():
            if seed is not None:
                # d4rl's antmaze wrapper does not forward the seed, so seed the wrapped environment.
                self._env.unwrapped.wrapped_env.seed(seed)
            observation = self._env.reset()
        return np.asarray(observation, dtype=np.float64), self._info()

    def step(
        self, action: NDArray[Any]
    ) -> tuple[NDArray[np.float64], float, bool, bool, dict[str, Any]]:
        """Step with an action ``[d]``.

        ``truncated`` is gym's ``TimeLimit.truncated``, which is false if the state is terminal.
        """
        observation, reward, done, info = self._env.step(action)
        truncated = bool(info.pop("TimeLimit.truncated", False))
        observation = np.asarray(observation, dtype=np.float64)
        return observation, reward, bool(done) and not truncated, truncated, info | self._info()

    def close(self) -> None:
        """Close D4RL's environment."""
        self._env.close()

    def _info(self) -> dict[str, Any]:
        return {"goal": self.goal} if self._has_goal else {}

    @contextlib.contextmanager
    def _own_numpy_random(self) -> Iterator[None]:
        before = np.random.get_state()  # noqa: NPY002
        np.random.set_state(self._numpy_state)  # noqa: NPY002
        try:
            yield
        finally:
            self._numpy_state = np.random.get_state()  # noqa: NPY002
            np.random.set_state(before)  # noqa: NPY002


def _import_gym() -> Any:
    """Import gym and d4rl, which registers its environments, suppressing their output."""
    handlers = list(logging.root.handlers)
    try:
        with _silent_process(), _quiet():
            import d4rl
            import d4rl.gym_mujoco  # noqa: F401
            import gym
    except Exception as error:  # a failed build of mujoco_py can raise anything
        reason = " ".join(str(error).split())[:200]
        raise ImportError(
            f"backend='d4rl' needs D4RL's environments, which could not be imported ({reason}). "
            f'On Python 3.10 run: pip install "pogo_torchrl[d4rl]" and, on Debian: apt-get install '
            f"{_DEBIAN_PACKAGES}"
        ) from error
    finally:
        logging.root.handlers[:] = handlers  # a dependency installs its own handlers
    return gym


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress gym's deprecation warnings and the goals that d4rl prints."""
    # Not a file closed on exit: whoever kept a reference to it may still write to it later.
    null = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(null):
        warnings.simplefilter("ignore")
        with contextlib.redirect_stderr(null):
            yield


@contextlib.contextmanager
def _silent_process() -> Iterator[None]:
    """Silence stdout and stderr, including output from C: pybullet prints when imported."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 1)
        os.dup2(null, 2)
        yield
    finally:
        for descriptor, copy in zip((1, 2), saved):
            os.dup2(copy, descriptor)
            os.close(copy)
        os.close(null)
