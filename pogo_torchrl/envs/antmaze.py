"""AntMaze as D4RL's version 2 tasks saw it, built from Gymnasium's own `ant.xml`.

Source: Fu et al. 2020, "D4RL: Datasets for Deep Data-Driven Reinforcement Learning", section 5, and
the package d4rl 1.1 (`d4rl.locomotion`), from which the mazes, the solver's parameters, the motors'
strength and the distributions of starts and goals are taken.
"""

from __future__ import annotations

from typing import Any

import mujoco
import numpy as np
from gymnasium.envs.mujoco.ant_v4 import AntEnv
from gymnasium.spaces import Box
from gymnasium.utils import EzPickle
from numpy.typing import ArrayLike, NDArray

from pogo_torchrl.envs.base import LegacyMujocoEnv
from pogo_torchrl.envs.mujoco210 import runge_kutta_step

# '#' is a wall, 'r' the cell where the ant starts, 'g' the cell of the goal. Columns lie along x,
# rows along y, and the start cell's centre is the origin.
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

# The solver's impedance and the motors of D4RL's ant; Gymnasium's differ.
_SOLIMP = (0.8, 0.8, 0.01)
_TORQUE = 30.0
_TIMESTEP = 0.02
_FRAME_SKIP = 5


class D4RLAntMaze(LegacyMujocoEnv, EzPickle):
    """A four-legged ant that has to walk to a goal in a maze.

    The observation [29], float64, is `qpos` [15] and `qvel` [14]; the goal is not part of it. The
    action [8] in [-1, 1] is scaled to joint torques of up to 30 Nm; actions beyond are clipped. The
    reward is 1 and the episode ends as soon as a step leads within 0.5 of the goal in the plane;
    elsewhere the reward is 0. Falling over ends nothing.

    Every reset draws, from the environment's own generator, the ant's state

        qpos = qpos_0 + U(-0.1, 0.1)^15,   qvel = 0.1 N(0, I)

    around the start cell's centre, and then a new goal, where g is the goal cell's centre,

        goal = max(g + U(0, 1)^2 + U(0, 0.5)^2, 0).

    `goal` [2] can be read and set, and is in every step's `info["goal"]`.

    Args:
        maze: a name in `MAZES`.
        **kwargs: passed on to Gymnasium's `MujocoEnv`, such as `render_mode`.

    Raises:
        ValueError: for an unknown maze.

    Source: Fu et al. (2020), D4RL; d4rl 1.1, `AntMazeEnv` with `v2_resets`.

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

    def __init__(self, maze: str = "umaze", **kwargs: Any) -> None:
        if maze not in MAZES:
            raise ValueError(f"maze={maze!r} is unknown; use one of {', '.join(MAZES)}")
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
        """Gymnasium's ant with D4RL's parameters, among the walls of the maze `key`."""
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
        """Where to go, x and y [2]; read-only, but a new one may be set."""
        return self._goal

    @goal.setter
    def goal(self, position: ArrayLike) -> None:
        goal = np.array(position, dtype=np.float64)
        if goal.shape != (2,):
            raise ValueError(f"goal has shape {list(goal.shape)}, but must be x and y, [2]")
        goal.flags.writeable = False
        self._goal = goal

    def _step_mujoco_simulation(self, ctrl: NDArray[Any], n_frames: int) -> None:
        self.data.ctrl[:] = ctrl
        for _ in range(n_frames):
            runge_kutta_step(self.model, self.data)

    def _get_obs(self) -> NDArray[np.float64]:
        return np.concatenate([self.data.qpos, self.data.qvel])

    def step(self, action: NDArray[Any]) -> tuple[NDArray[np.float64], Any, bool, bool, dict]:
        self.do_simulation(self.scale(action), self.frame_skip)
        reached = bool(np.linalg.norm(self.data.qpos[:2] - self._goal) <= GOAL_RADIUS)
        if self.render_mode == "human":
            self.render()
        return self._get_obs(), float(reached), reached, False, {"goal": self._goal}

    def reset_model(self) -> NDArray[np.float64]:
        # The state first: as in D4RL under gym 0.23, it is then the seed's first draw.
        qpos = self.init_qpos + self.np_random.uniform(-0.1, 0.1, self.model.nq)
        qvel = self.init_qvel + 0.1 * self.np_random.standard_normal(self.model.nv)
        self.set_state(qpos, qvel)
        noise = self.np_random.uniform(0.0, 1.0, 2) + self.np_random.uniform(0.0, 0.5, 2)
        self.goal = np.maximum(self._goal_cell + noise, 0.0)
        return self._get_obs()

    def _get_reset_info(self) -> dict[str, Any]:
        return {"goal": self._goal}


def is_free(maze: str, positions: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether positions [n, 2] lie inside a maze and not in its walls, [n].

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


def _cells(maze: str, kind: str) -> list[tuple[int, int]]:
    return [
        (row, column)
        for row, line in enumerate(MAZES[maze])
        for column, cell in enumerate(line)
        if cell == kind
    ]


def _camera(maze: str) -> dict[str, Any]:
    """A view of the whole maze, almost from above."""
    rows, columns = len(MAZES[maze]), len(MAZES[maze][0])
    centre = np.mean([_position(maze, 0, 0), _position(maze, rows - 1, columns - 1)], axis=0)
    distance = 1.3 * CELL * max(rows, columns)
    return {"lookat": [*centre, 0.0], "distance": distance, "elevation": -75.0, "azimuth": 90.0}


def _position(maze: str, row: int, column: int) -> tuple[float, float]:
    [(start_row, start_column)] = _cells(maze, "r")
    return CELL * (column - start_column), CELL * (row - start_row)


def _centre(maze: str, kind: str) -> tuple[float, float]:
    [cell] = _cells(maze, kind)
    return _position(maze, *cell)
