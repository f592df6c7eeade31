"""Base class of the environments: D4RL's action scaling and a cache of compiled models."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable
from typing import Any

import mujoco
import numpy as np
from gymnasium.envs.mujoco import MujocoEnv
from gymnasium.spaces import Box
from numpy.typing import NDArray

from pogo_torchrl.envs.mujoco210 import compile_legacy

_LOGGER = logging.getLogger("pogo_torchrl.envs")


class LegacyMujocoEnv(MujocoEnv):
    """Mixin that adds MuJoCo 2.1.0 physics and D4RL's actions to a Gymnasium environment.

    It must precede the Gymnasium class in the bases. The model is compiled once per
    :meth:`build_spec` and ``_model_key``; each environment owns a copy.
    """

    action_space: Box
    _model_key: str = ""

    @classmethod
    def build_spec(cls, fullpath: str, key: str) -> mujoco.MjSpec:
        """Build the specification of the model.

        Args:
            fullpath: path of the XML file.
            key: distinguishes the models of a class that has several.

        Returns:
            The specification.
        """
        return mujoco.MjSpec.from_file(fullpath)

    def _initialize_simulation(self) -> tuple[mujoco.MjModel, mujoco.MjData]:
        # Without a handler MuJoCo appends warnings to MUJOCO_LOG.TXT in the working directory.
        if mujoco.get_mju_user_warning() is None:
            mujoco.set_mju_user_warning(_log_mujoco_warning)
        model = copy.copy(_compiled(type(self).build_spec, self.fullpath, self._model_key))
        # As in Gymnasium: make the off-screen buffer large enough for the requested images.
        model.vis.global_.offwidth = max(model.vis.global_.offwidth, self.width)
        model.vis.global_.offheight = max(model.vis.global_.offheight, self.height)
        return model, mujoco.MjData(model)

    def _set_action_space(self) -> Box:
        self._low, self._high = self.model.actuator_ctrlrange.astype(np.float32).T
        ones = np.ones(self.model.nu, dtype=np.float32)
        self.action_space = Box(-ones, ones, dtype=np.float32)
        return self.action_space

    def set_state(self, qpos: NDArray[np.float64], qvel: NDArray[np.float64]) -> None:
        """Set the state of the simulation, which then does not depend on its history.

        Args:
            qpos: positions, ``[nq]``. Quaternions are normalised, as in MuJoCo 2.1.0.
            qvel: velocities, ``[nv]``.
        """
        qpos = np.array(qpos, dtype=np.float64)
        mujoco.mj_normalizeQuat(self.model, qpos)
        self.data.qacc_warmstart[:] = 0.0
        super().set_state(qpos, np.asarray(qvel))

    def _step_mujoco_simulation(self, ctrl: NDArray[Any], n_frames: int) -> None:
        # Gymnasium also computes contact forces on the bodies here; these tasks do not need them.
        self.data.ctrl[:] = ctrl
        mujoco.mj_step(self.model, self.data, nstep=n_frames)

    def scale(self, action: NDArray[Any]) -> NDArray[Any]:
        """Map an action from [-1, 1] to the motors' range and clip it.

        Equivalent to D4RL's ``NormalizedBoxEnv``, including the rounding of float32 actions.

        Args:
            action: the action, ``[d]``.

        Returns:
            The controls of the motors, ``[d]``.
        """
        control = self._low + (action + 1.0) * 0.5 * (self._high - self._low)
        return clip(control, self._low, self._high)

    def step(self, action: NDArray[Any]) -> tuple[NDArray[np.float64], Any, bool, bool, dict]:
        """Step with an action ``[d]`` in [-1, 1]; actions outside of the bounds are clipped."""
        # Scale first, so that the control cost is computed from the applied controls.
        return super().step(self.scale(action))


@functools.cache
def _compiled(
    build_spec: Callable[[str, str], mujoco.MjSpec], fullpath: str, key: str
) -> mujoco.MjModel:
    return compile_legacy(build_spec(fullpath, key))


def clip(values: NDArray[Any], low: Any, high: Any) -> NDArray[Any]:
    """Equivalent to :func:`numpy.clip`, without its overhead on short vectors.

    Args:
        values: values of any shape.
        low: lower bound, broadcast to ``values``.
        high: upper bound, broadcast to ``values``.
    """
    return np.minimum(np.maximum(values, low), high)


def _log_mujoco_warning(message: str) -> None:
    _LOGGER.warning("MuJoCo: %s", message)
