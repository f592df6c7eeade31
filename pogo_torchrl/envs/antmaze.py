"""AntMaze as in D4RL's version 2 tasks, built from Gymnasium's ``ant.xml``.

Source: Fu et al., *D4RL: Datasets for Deep Data-Driven Reinforcement Learning*, 2020,
arXiv:2004.07219, section 5, and the package d4rl 1.1 (``d4rl.locomotion``) for the mazes, solver
parameters, motor strength and distributions of start states and goals.
"""

from __future__ import annotations

from typing import Any, Literal

import mujoco
import numpy as np
from gymnasium.envs.mujoco.ant_v4 import AntEnv
from gymnasium.spaces import Box
from gymnasium.utils import EzPickle
from numpy.typing import ArrayLike, NDArray

from pogo_torchrl.envs.base import LegacyMujocoEnv
from pogo_torchrl.envs.mujoco210 import runge_kutta_step

# '#' is a wall, 'r' the start cell of the ant, 'g' the goal cell. Columns run along x, rows along
# y; the origin is the centre of the start cell.
MAZES: dict[str, tuple[str, ...]] = {
    "umaze": (
        "#####",
        "#r  #",
        "### #",
        "#g  #",
        "#####",
    ),
    "medium": (
        "########",
        "#r ##  #",
        "#  #   #",
        "##   ###",
        "#  #   #",
        "# #  # #",
        "#   # g#",
        "########",
    ),
    "large": (
        "############",
        "#r   #     #",
        "# ## # # # #",
        "#      #   #",
        "# #### ### #",
        "#  # #     #",
        "## # # # ###",
        "#  #   # g #",
        "############",
    ),
}
CELL = 4.0
"""Width of a cell; walls are half as high."""
GOAL_RADIUS = 0.5
"""Distance in the plane at which the goal counts as reached."""

# Solver impedance and motor strength of D4RL's ant, which differ from Gymnasium's.
_SOLIMP = (0.8, 0.8, 0.01)
_TORQUE = 30.0
_TIMESTEP = 0.02
_FRAME_SKIP = 5


class D4RLAntMaze(LegacyMujocoEnv, EzPickle):
    """A four-legged ant that has to reach a goal in a maze.

    The observation ``[29]``, float64, is ``qpos [15]`` and ``qvel [14]`` and does not include the
    goal. The action ``[8]`` in [-1, 1] is scaled to joint torques of at most 30 Nm; actions outside
    of the bounds are clipped. When a step ends within 0.5 of the goal in the plane, the reward is 1
    and the episode terminates; otherwise the reward is 0. Falling over does not end an episode.

    Every reset draws the state of the ant, around the centre of the start cell, from the
    environment's own generator,

        qpos = qpos_0 + U(-0.1, 0.1)^15,   qvel = 0.1 N(0, I),

    and then a new goal, where g is the centre of the goal cell,

        goal = max(g + U(0, 1)^2 + U(0, 0.5)^2, 0).

    The goal is available as :attr:`goal`, which can be set, and as ``info["goal"]``.

    Args:
        maze: ``"umaze"``, ``"medium"`` or ``"large"``. Defaults to ``"umaze"``.
        **kwargs: keyword arguments of Gymnasium's ``MujocoEnv``, such as ``render_mode``.

    Raises:
        ValueError: for an unknown maze.

    Source: Fu et al., *D4RL: Datasets for Deep Data-Driven Reinforcement Learning*, 2020,
    arXiv:2004.07219; d4rl 1.1, ``AntMazeEnv`` with ``v2_resets``.

    Example:
        >>> env = D4RLAntMaze("umaze")
        >>> observation, info = env.reset(seed=0)
        >>> observation.shape, bool((np.abs(info["goal"] - [0.75, 8.75]) <= 0.75).all())
        ((29,), True)
        >>> env.goal = observation[:2]
        >>> env.step(np.zeros(8, dtype=np.float32))[1:3]
        (1.0, True)
    """

    metadata = {  # noqa: RUF012
        **AntEnv.metadata,
        "render_fps": round(1 / (_TIMESTEP * _FRAME_SKIP)),
    }

    def __init__(self, maze: Literal["umaze", "medium", "large"] = "umaze", **kwargs: Any) -> None:
        if maze not in MAZES:
            raise ValueError(f"maze={maze!r} is unknown; use one of {', '.join(MAZES)}.")
        EzPickle.__init__(self, maze, **kwargs)
        self._model_key = maze
        self._goal_cell = _centre(maze, "g")
        self.goal = self._goal_cell
        kwargs.setdefault("default_camera_config", _camera(maze))
        super().__init__(
            "ant.xml",
            _FRAME_SKIP,
            observation_space=Box(-np.inf, np.inf, (29,), np.float64),
            **kwargs,
        )

    @classmethod
    def build_spec(cls, fullpath: str, key: str) -> mujoco.MjSpec:
        """Build the specification: Gymnasium's ant with D4RL's parameters, inside a maze.

        Args:
            fullpath: path of Gymnasium's ``ant.xml``.
            key: name of the maze.

        Returns:
            The specification.
        """
        spec = mujoco.MjSpec.from_file(fullpath)
        spec.option.timestep = _TIMESTEP
        for geom in spec.geoms:
            geom.solimp[:3] = _SOLIMP
        for motor in spec.actuators:
            motor.gear[0] = 1.0
            motor.ctrlrange = [-_TORQUE, _TORQUE]
        for row, column in _cells(key, "#"):
            x, y = _position(key, row, column)
            spec.worldbody.add_geom(
                name=f"block_{row}_{column}",
                type=mujoco.mjtGeom.mjGEOM_BOX,
                pos=[x, y, CELL / 4],
                size=[CELL / 2, CELL / 2, CELL / 4],
                contype=1,
                conaffinity=1,
                condim=3,
                friction=[1.0, 0.5, 0.5],
                margin=0.01,
                solimp=[*_SOLIMP, 0.5, 2.0],
                rgba=[0.7, 0.5, 0.3, 1.0],
            )
        return spec

    @property
    def goal(self) -> NDArray[np.float64]:
        """Position of the goal, x and y, ``[2]``; assign a new array to change it."""
        return self._goal

    @goal.setter
    def goal(self, position: ArrayLike) -> None:
        goal = np.array(position, dtype=np.float64)
        if goal.shape != (2,):
            raise ValueError(f"goal has shape {list(goal.shape)}, expected [2] (x and y).")
        goal.flags.writeable = False
        self._goal = goal

    def _step_mujoco_simulation(self, ctrl: NDArray[Any], n_frames: int) -> None:
        self.data.ctrl[:] = ctrl
        for _ in range(n_frames):
            runge_kutta_step(self.model, self.data)

    def _get_obs(self) -> NDArray[np.float64]:
        return np.concatenate([self.data.qpos, self.data.qvel])

    def step(self, action: NDArray[Any]) -> tuple[NDArray[np.float64], Any, bool, bool, dict]:
        """Step with an action ``[8]`` in [-1, 1]; ``info["goal"]`` is the goal."""
        self.do_simulation(self.scale(action), self.frame_skip)
        reached = bool(np.linalg.norm(self.data.qpos[:2] - self._goal) <= GOAL_RADIUS)
        if self.render_mode == "human":
            self.render()
        return self._get_obs(), float(reached), reached, False, {"goal": self._goal}

    def reset_model(self) -> NDArray[np.float64]:
        """Draw a start state and a goal; returns the observation ``[29]``."""
        # State before goal: as in D4RL with gym 0.23, it is the first draw after seeding.
        qpos = self.init_qpos + self.np_random.uniform(-0.1, 0.1, self.model.nq)
        qvel = self.init_qvel + 0.1 * self.np_random.standard_normal(self.model.nv)
        self.set_state(qpos, qvel)
        noise = self.np_random.uniform(0.0, 1.0, 2) + self.np_random.uniform(0.0, 0.5, 2)
        self.goal = np.maximum(self._goal_cell + noise, 0.0)
        return self._get_obs()

    def _get_reset_info(self) -> dict[str, Any]:
        return {"goal": self._goal}


def is_free(maze: str, positions: NDArray[Any]) -> NDArray[np.bool_]:
    """Check which positions are inside a maze and not inside a wall.

    Args:
        maze: name of a maze, see :data:`MAZES`.
        positions: x and y, ``[n, 2]``.

    Returns:
        Whether each position is free, ``[n]``, bool.

    Example:
        >>> is_free("umaze", np.array([[0.0, 0.0], [0.0, 4.0], [0.0, 99.0]]))
        array([ True, False, False])
    """
    free = np.array([[cell != "#" for cell in line] for line in MAZES[maze]])
    [(start_row, start_column)] = _cells(maze, "r")
    columns, rows = np.rint(np.asarray(positions) / CELL).astype(int).T
    rows, columns = rows + start_row, columns + start_column
    inside = (rows >= 0) & (rows < free.shape[0]) & (columns >= 0) & (columns < free.shape[1])
    return inside & free[rows.clip(0, free.shape[0] - 1), columns.clip(0, free.shape[1] - 1)]


def _cells(maze: str, symbol: str) -> list[tuple[int, int]]:
    return [
        (row, column)
        for row, line in enumerate(MAZES[maze])
        for column, cell in enumerate(line)
        if cell == symbol
    ]


def _camera(maze: str) -> dict[str, Any]:
    """Camera that shows the entire maze, almost from above."""
    rows, columns = len(MAZES[maze]), len(MAZES[maze][0])
    centre = np.mean([_position(maze, 0, 0), _position(maze, rows - 1, columns - 1)], axis=0)
    distance = 1.3 * CELL * max(rows, columns)
    return {"lookat": [*centre, 0.0], "distance": distance, "elevation": -75.0, "azimuth": 90.0}


def _position(maze: str, row: int, column: int) -> tuple[float, float]:
    [(start_row, start_column)] = _cells(maze, "r")
    return CELL * (column - start_column), CELL * (row - start_row)


def _centre(maze: str, symbol: str) -> tuple[float, float]:
    [cell] = _cells(maze, symbol)
    return _position(maze, *cell)
