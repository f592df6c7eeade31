"""Tests of antmaze: transitions recorded in D4RL's own, start states, goals and horizons."""

from __future__ import annotations

import copy
import pickle
import random
from pathlib import Path

import mujoco
import numpy as np
import pytest
import torch

from pogo_torchrl.envs import MAZES, TASKS, make_env, max_episode_steps
from pogo_torchrl.envs.antmaze import D4RLAntMaze
from pogo_torchrl.envs.transitions import replay, replay_errors

ANTMAZES = [task for task in TASKS if task.startswith("antmaze")]
# 22 transitions per maze under random actions, recorded in float64 in D4RL's own version 2
# environments (d4rl 1.1, MuJoCo 2.1.0) by benchmarks/d4rl_oracle.py. They include contacts with
# walls, some deeper than a leg is thick, and steps into and just outside the goal. The walls are
# stored as positions and half sizes, [n, 6].
TRANSITIONS = Path(__file__).parent / "assets" / "antmaze_transitions.npz"
GOAL_CELLS = {"umaze": (0.0, 8.0), "medium": (20.0, 20.0), "large": (32.0, 24.0)}


def recorded(maze: str) -> dict[str, np.ndarray]:
    with np.load(TRANSITIONS) as arrays:
        rows = {key.split("/")[1]: arrays[key] for key in arrays if key.startswith(f"{maze}/")}
    rows.pop("walls")
    return rows


@pytest.mark.parametrize("task", ANTMAZES)
def test_steps_match_d4rl(task):
    rows = recorded(task.split("-")[1])
    errors = replay_errors(make_env(task), rows)
    for key in ("qpos", "qvel"):
        assert np.median(errors[key]) <= 1e-9
        assert errors[key].max() <= 1e-6
    assert not errors["reward"].any()
    assert not errors["terminated"].any()
    distances = np.linalg.norm(rows["next_qpos"][:, :2] - rows["goal"], axis=1)
    assert ((distances <= 0.5) == rows["terminated"]).all()
    assert rows["terminated"].sum() >= 4
    assert ((distances > 0.5) & (distances < 0.8)).any()


@pytest.mark.parametrize("maze", MAZES)
def test_walls_match_d4rl(maze):
    model = D4RLAntMaze(maze).model
    boxes = model.geom_type == mujoco.mjtGeom.mjGEOM_BOX
    with np.load(TRANSITIONS) as arrays:
        walls = arrays[f"{maze}/walls"]
    np.testing.assert_array_equal(np.hstack([model.geom_pos, model.geom_size])[boxes], walls)


@pytest.mark.parametrize("maze", MAZES)
def test_recorded_transitions_touch_walls(maze):
    """The recorded rows depend on the walls, or the tests above would not detect wrong walls."""
    other = "large" if maze == "umaze" else "umaze"
    errors = replay_errors(D4RLAntMaze(other), recorded(maze))
    assert (errors["qvel"] > 1e-3).sum() >= 3


def test_observation_equals_the_state():
    env = make_env("antmaze-umaze-v2")
    env.reset(seed=0)
    observation, _, _, _, info = env.step(np.ones(8, dtype=np.float32))
    data = env.unwrapped.data
    np.testing.assert_array_equal(observation, np.concatenate([data.qpos, data.qvel]))
    assert observation.dtype == np.float64
    assert env.observation_space.shape == (29,)
    assert env.observation_space.dtype == np.float64
    np.testing.assert_array_equal(info["goal"], env.unwrapped.goal)


def test_actions_are_clipped():
    states = []
    for size in (1.0, 5.0):
        env = make_env("antmaze-umaze-v2")
        env.reset(seed=0)
        states.append(env.step(np.full(8, size, dtype=np.float32))[0])
    np.testing.assert_array_equal(*states)
    np.testing.assert_array_equal(env.action_space.high, np.ones(8))


def test_falling_over_does_not_end_the_episode():
    env = make_env("antmaze-umaze-v2").unwrapped
    env.reset(seed=0)
    qpos = env.data.qpos.copy()
    qpos[3:7] = 0.0, 1.0, 0.0, 0.0  # on its back
    env.set_state(qpos, env.data.qvel.copy())
    assert env.step(np.zeros(8, dtype=np.float32))[1:4] == (0.0, False, False)


@pytest.mark.parametrize(("distance", "reached"), [(0.499, True), (0.501, False)])
def test_goal_is_checked_after_the_step(distance, reached):
    env = make_env("antmaze-umaze-v2").unwrapped
    env.reset(seed=0)
    qpos, qvel, action = env.data.qpos.copy(), env.data.qvel.copy(), np.ones(8, dtype=np.float32)
    after = env.step(action)[0][:2]
    env.set_state(qpos, qvel)
    env.goal = after + np.array([0.0, distance])
    assert env.step(action)[1:4] == (float(reached), reached, False)


@pytest.mark.parametrize("task", ANTMAZES)
def test_starts_and_goals(task):
    """As in D4RL: noise around the start cell and zero velocity; each reset draws a goal."""
    env = make_env(task)
    observations, goals = [], []
    for i in range(400):
        observation, info = env.reset(seed=0 if i == 0 else None)
        observations.append(observation)
        goals.append(info["goal"])
    positions, velocities = np.split(np.array(observations), [15], axis=1)
    offsets = positions - [0, 0, 0.75, 1, *np.zeros(11)]
    free = np.delete(offsets, slice(3, 7), axis=1)
    assert np.abs(free).max() <= 0.1
    np.testing.assert_allclose(free.std(), 0.1 / np.sqrt(3), rtol=0.05)
    np.testing.assert_allclose(np.linalg.norm(positions[:, 3:7], axis=1), 1.0, rtol=1e-12)
    np.testing.assert_allclose(velocities.std(), 0.1, rtol=0.05)
    # U(0, 1) + U(0, 0.5) on each axis
    noise = np.array(goals) - GOAL_CELLS[task.split("-")[1]]
    assert (noise >= 0).all()
    assert (noise <= 1.5).all()
    np.testing.assert_allclose(noise.mean(axis=0), 0.75, atol=0.05)
    np.testing.assert_allclose(noise.var(axis=0), (1 + 0.25) / 12, atol=0.02)
    assert len(np.unique(goals, axis=0)) == 400
    assert abs(np.corrcoef(noise.T)[0, 1]) < 0.2


def test_seed_determines_episodes_and_global_random_state_does_not():
    def draws(seed: int) -> np.ndarray:
        env = make_env("antmaze-medium-play-v2")
        first, info = env.reset(seed=seed)
        second, again = env.reset()
        return np.concatenate([first, info["goal"], second, again["goal"]])

    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    first = draws(0)
    random.seed(2), np.random.seed(2), torch.manual_seed(2)  # noqa: NPY002
    before = random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    np.testing.assert_array_equal(first, draws(0))
    assert random.getstate() == before[0]
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert (first != draws(1)).all()


@pytest.mark.parametrize(
    ("task", "steps"), [("antmaze-umaze-v2", 700), ("antmaze-large-diverse-v2", 1000)]
)
def test_episodes_are_truncated_at_the_horizon(task, steps):
    env = make_env(task)
    env.reset(seed=0)
    env.unwrapped.goal = [1e3, 1e3]
    action = np.zeros(8, dtype=np.float32)
    truncated = [env.step(action)[3] for _ in range(steps)]
    assert not any(truncated[:-1])
    assert truncated[-1]


@pytest.mark.parametrize("task", TASKS)
def test_max_episode_steps(task):
    steps = 700 if task.startswith("antmaze-umaze") else 1000
    assert max_episode_steps(task) == make_env(task).spec.max_episode_steps == steps


def test_steps_depend_only_on_the_state():
    """A replayed transition does not depend on what was simulated before."""
    env = make_env("antmaze-umaze-v2").unwrapped
    rows = recorded("umaze")
    forwards = replay(env, rows)
    backwards = replay(env, {key: values[::-1] for key, values in rows.items()})
    np.testing.assert_array_equal(forwards["qvel"], backwards["qvel"][::-1])


def test_environments_share_no_state():
    first, second = (make_env("antmaze-umaze-v2").unwrapped for _ in range(2))
    first.reset(seed=0)
    second.reset(seed=0)
    first.model.opt.gravity[:] = 0.0
    first.goal = [1.0, 2.0]
    assert second.model.opt.gravity[2] == pytest.approx(-9.81)
    assert (second.goal != first.goal).all()


def test_goal_is_validated_and_read_only():
    env = make_env("antmaze-umaze-v2").unwrapped
    position = np.array([1.0, 2.0])
    env.goal = position
    position[:] = 0.0
    np.testing.assert_array_equal(env.goal, [1.0, 2.0])
    with pytest.raises(ValueError, match="read-only"):
        env.goal[0] = 3.0
    with pytest.raises(ValueError, match=r"goal has shape \[3\]"):
        env.goal = [1.0, 2.0, 3.0]
    with pytest.raises(ValueError, match="maze='tiny' is unknown; use one of umaze, medium, large"):
        D4RLAntMaze("tiny")


def test_copies():
    env = D4RLAntMaze("medium")
    for twin in (copy.deepcopy(env), pickle.loads(pickle.dumps(env))):
        first, second = env.reset(seed=3)[0], twin.reset(seed=3)[0]
        np.testing.assert_array_equal(first, second)
        assert twin.model.ngeom == env.model.ngeom
