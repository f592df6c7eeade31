"""HalfCheetah, Hopper and Walker2d as in D4RL's version 2 tasks.

Gymnasium's ``-v4`` environments have D4RL's observations, rewards and terminations; the ``-v5``
environments do not. :class:`~pogo_torchrl.envs.base.LegacyMujocoEnv` restores the physics of MuJoCo
2.1.0 and D4RL's action scaling.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from gymnasium.envs.mujoco.half_cheetah_v4 import HalfCheetahEnv
from gymnasium.envs.mujoco.hopper_v4 import HopperEnv
from gymnasium.envs.mujoco.walker2d_v4 import Walker2dEnv
from numpy.typing import NDArray

from pogo_torchrl.envs.base import LegacyMujocoEnv, clip


class _Locomotion(LegacyMujocoEnv):
    """Base class of the three environments."""

    _ctrl_cost_weight: float

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # NumPy 2 rounds the cost of a float32 action to float32, which D4RL's NumPy did not.
        self._ctrl_cost_weight = np.float64(self._ctrl_cost_weight)


class _TerminatingLocomotion(_Locomotion):
    """Base class of Hopper and Walker2d; same values as Gymnasium's, in a third of the time."""

    _healthy_reward: float

    @property
    def healthy_reward(self) -> float:
        """Reward per step, including the step in which the agent falls."""
        return self._healthy_reward

    def _get_obs(self) -> NDArray[np.float64]:
        return np.concatenate([self.data.qpos[1:], clip(self.data.qvel, -10.0, 10.0)])


class D4RLHalfCheetah(_Locomotion, HalfCheetahEnv):
    """HalfCheetah: observation ``[17]``, action ``[6]`` in [-1, 1]; never terminates.

    Reward is the forward velocity minus the control cost.
    """


class D4RLHopper(_TerminatingLocomotion, HopperEnv):
    """Hopper: observation ``[11]``, action ``[3]`` in [-1, 1]; terminates when the hopper falls."""

    @property
    def is_healthy(self) -> bool:
        """Whether height, angle and state are within Gymnasium's bounds."""
        qpos, qvel = self.data.qpos, self.data.qvel
        _, height, angle = qpos[:3].tolist()
        # A NaN fails these comparisons, as it should.
        bounded = np.abs(qpos[2:]).max() < 100.0 and np.abs(qvel).max() < 100.0
        return height > 0.7 and -0.2 < angle < 0.2 and bool(bounded)


class D4RLWalker2d(_TerminatingLocomotion, Walker2dEnv):
    """Walker2d: observation ``[17]``, action ``[6]`` in [-1, 1]; terminates when it falls."""


LOCOMOTION: dict[str, Callable[..., LegacyMujocoEnv]] = {
    "halfcheetah": D4RLHalfCheetah,
    "hopper": D4RLHopper,
    "walker2d": D4RLWalker2d,
}
