"""HalfCheetah, Hopper and Walker2d as D4RL's version 2 tasks saw them.

Gymnasium's `-v4` environments have D4RL's observations, rewards and terminations (the `-v5` ones do
not). What remains is to restore the physics of MuJoCo 2.1.0 and to clip actions as D4RL's
`NormalizedBoxEnv` does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mujoco
import numpy as np
from gymnasium.envs.mujoco import MujocoEnv
from gymnasium.envs.mujoco.half_cheetah_v4 import HalfCheetahEnv
from gymnasium.envs.mujoco.hopper_v4 import HopperEnv
from gymnasium.envs.mujoco.walker2d_v4 import Walker2dEnv
from gymnasium.spaces import Box
from numpy.typing import NDArray

from pogo_torchrl.envs.physics import compile_legacy


class _D4RLPhysics(MujocoEnv):
    """MuJoCo 2.1.0 physics and clipped actions for the Gymnasium class next in the bases."""

    action_space: Box

    def _initialize_simulation(self) -> tuple[mujoco.MjModel, mujoco.MjData]:
        model = compile_legacy(mujoco.MjSpec.from_file(self.fullpath))
        # As in Gymnasium: room for images of the requested size.
        model.vis.global_.offwidth = max(model.vis.global_.offwidth, self.width)
        model.vis.global_.offheight = max(model.vis.global_.offheight, self.height)
        return model, mujoco.MjData(model)

    def _step_mujoco_simulation(self, ctrl: NDArray[Any], n_frames: int) -> None:
        # Gymnasium also computes contact forces on the bodies here, which these tasks do not use.
        self.data.ctrl[:] = ctrl
        mujoco.mj_step(self.model, self.data, nstep=n_frames)

    def step(self, action: NDArray[Any]) -> tuple[NDArray[np.float64], Any, bool, bool, dict]:
        # Clip before the step, so that the control cost is that of the action which acts.
        return super().step(clip(action, self.action_space.low, self.action_space.high))


class _Falling(_D4RLPhysics):
    """What Hopper and Walker2d share; the same numbers as Gymnasium's, in a third of the time."""

    _healthy_reward: float

    @property
    def healthy_reward(self) -> float:
        return self._healthy_reward  # also in the step in which it falls

    def _get_obs(self) -> NDArray[np.float64]:
        return np.concatenate([self.data.qpos[1:], clip(self.data.qvel, -10.0, 10.0)])


class D4RLHalfCheetah(_D4RLPhysics, HalfCheetahEnv):
    """HalfCheetah: observation [17], action [6] in [-1, 1]; reward is speed minus control cost."""


class D4RLHopper(_Falling, HopperEnv):
    """Hopper: observation [11], action [3] in [-1, 1]; ends when the hopper falls."""

    @property
    def is_healthy(self) -> bool:
        qpos, qvel = self.data.qpos, self.data.qvel
        _, height, angle = qpos[:3].tolist()
        # A NaN fails these comparisons, as it should.
        bounded = np.abs(qpos[2:]).max() < 100.0 and np.abs(qvel).max() < 100.0
        return height > 0.7 and -0.2 < angle < 0.2 and bool(bounded)


class D4RLWalker2d(_Falling, Walker2dEnv):
    """Walker2d: observation [17], action [6] in [-1, 1]; ends when the walker falls."""


def clip(values: NDArray[Any], low: Any, high: Any) -> NDArray[Any]:
    """`numpy.clip`, which spends most of its time on other things than clipping short vectors."""
    return np.minimum(np.maximum(values, low), high)


LOCOMOTION: dict[str, Callable[..., MujocoEnv]] = {
    "halfcheetah": D4RLHalfCheetah,
    "hopper": D4RLHopper,
    "walker2d": D4RLWalker2d,
}
