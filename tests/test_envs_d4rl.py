"""Tests of the adapter for D4RL's environments, with a fake and, if installed, the real one."""

from __future__ import annotations

import importlib.util
import logging
import sys
import types

import numpy as np
import pytest

from pogo_torchrl.envs import make_env, max_episode_steps, score
from pogo_torchrl.envs.antmaze import D4RLAntMaze

TASKS = ("hopper-medium-v2", "antmaze-umaze-v2")
real = pytest.mark.skipif(
    importlib.util.find_spec("mujoco_py") is None,
    reason="D4RL's own environments are not installed",
)


class FakeInner:
    """The environment wrapped by d4rl: own generator, but goals from NumPy's global one."""

    def __init__(self):
        self.sim = types.SimpleNamespace(
            data=types.SimpleNamespace(
                qpos=np.zeros(2), qvel=np.zeros(2), qacc_warmstart=np.ones(2)
            )
        )
        self.seed(None)
        self.set_target()

    def seed(self, seed):
        self.rng = np.random.default_rng(seed)

    def set_target(self, goal=None):
        self.target_goal = np.random.uniform(size=2) if goal is None else goal  # noqa: NPY002
        print("Target Goal: ", self.target_goal)

    def set_state(self, qpos, qvel):
        self.sim.data.qpos[:], self.sim.data.qvel[:] = qpos, qvel


class FakeEnv:
    """gym 0.23's interface: ``reset`` returns an observation, ``step`` four values."""

    observation_space = types.SimpleNamespace(shape=(4,))
    action_space = types.SimpleNamespace(shape=(2,))
    _max_episode_steps = 3

    def __init__(self):
        self.wrapped_env = FakeInner()
        self.unwrapped = self
        self.sim = self.wrapped_env.sim
        self.set_state, self.set_target = self.wrapped_env.set_state, self.wrapped_env.set_target
        self.closed = False

    target_goal = property(lambda self: self.wrapped_env.target_goal)

    def seed(self, seed):
        raise AssertionError("d4rl's antmaze ignores this seed")

    def observe(self):
        return np.concatenate([self.sim.data.qpos, self.sim.data.qvel]).astype(np.float32)

    def reset(self):
        self.steps = 0
        self.set_target()
        self.set_state(self.wrapped_env.rng.uniform(size=2), np.zeros(2))
        return self.observe()

    def step(self, action):
        self.steps += 1
        self.sim.data.qpos[:] += action
        fell = bool(self.sim.data.qpos[0] > 5)
        late = self.steps >= self._max_episode_steps
        info = {"TimeLimit.truncated": not fell} if late else {}
        return self.observe(), 0.5, fell or late, info

    def get_normalized_score(self, returns):
        return returns / 2

    def close(self):
        self.closed = True


@pytest.fixture
def fake(monkeypatch):
    made = []

    def make(name):
        print("made", name)
        made.append((name, FakeEnv()))
        return made[-1][1]

    modules = {name: types.ModuleType(name) for name in ("gym", "d4rl", "d4rl.gym_mujoco")}
    modules["gym"].make = make
    modules["d4rl"].gym_mujoco = modules["d4rl.gym_mujoco"]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return made


def test_gymnasium_interface(fake, capfd):
    env = make_env("hopper-medium", backend="d4rl")
    [(name, inner)] = fake
    assert name == "hopper-medium-v2"
    assert env.unwrapped is env
    observation, info = env.reset(seed=0)
    assert observation.dtype == np.float64
    assert observation.shape == env.observation_space.shape == (4,)
    assert info == {}
    assert env.action_space.dtype == np.float32
    np.testing.assert_array_equal(env.action_space.low, -np.ones(2))
    steps = [env.step(np.ones(2, dtype=np.float32)) for _ in range(3)]
    assert [step[1:] for step in steps] == [
        (0.5, False, False, {}),
        (0.5, False, False, {}),
        (0.5, False, True, {}),
    ]
    env.reset()
    assert env.step(np.full(2, 9.0))[2:4] == (True, False)
    assert env.normalized_score(1.0) == 0.5
    assert env.max_episode_steps == 3
    env.close()
    assert inner.closed
    captured = capfd.readouterr()
    assert not captured.out + captured.err


def test_terminal_state_at_the_horizon_is_terminal(fake):
    env = make_env("hopper-medium-v2", backend="d4rl")
    env.reset(seed=0)
    for action in (0.0, 0.0, 9.0):
        step = env.step(np.full(2, action))
    assert step[2:4] == (True, False)


def test_states_and_goals_can_be_set(fake, capfd):
    env = make_env("antmaze-umaze-v2", backend="d4rl")
    env.reset(seed=0)
    env.unwrapped.set_state(np.array([1.0, 2.0]), np.array([3.0, 4.0]))
    np.testing.assert_array_equal(env.unwrapped.data.qpos, [1.0, 2.0])
    assert not env.unwrapped.data.qacc_warmstart.any()
    env.unwrapped.goal = [7.0, 8.0]
    np.testing.assert_array_equal(env.unwrapped.goal, [7.0, 8.0])
    np.testing.assert_array_equal(env.step(np.zeros(2))[4]["goal"], [7.0, 8.0])
    assert not capfd.readouterr().out


def test_seed_determines_episodes_and_global_random_state_does_not(fake):
    check_seeding("antmaze-umaze-v2")


def check_seeding(task: str) -> None:
    def draws(seed: int) -> np.ndarray:
        env = make_env(task, backend="d4rl")
        results = []
        for one in (seed, None):
            observation, info = env.reset(seed=one)
            results += [observation, info.get("goal", np.zeros(0))]
        env.close()
        return np.concatenate(results)

    np.random.seed(1)  # noqa: NPY002
    first = draws(0)
    np.random.seed(2)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    np.testing.assert_array_equal(first, draws(0))
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002
    assert (first != draws(1)).mean() > 0.4


def test_missing_packages(monkeypatch):
    monkeypatch.setitem(sys.modules, "d4rl", None)
    with pytest.raises(ImportError) as error:
        make_env("hopper-medium-v2", backend="d4rl")
    message = str(error.value)
    assert "\n" not in message
    for part in ('pip install "pogo_torchrl[d4rl]"', "Python 3.10", "apt-get install libosmesa6"):
        assert part in message


def test_rendering_needs_the_mujoco_backend():
    with pytest.raises(ValueError, match="render_mode='human' needs backend='mujoco'"):
        make_env("hopper-medium-v2", backend="d4rl", render_mode="human")


@real
@pytest.mark.parametrize("task", TASKS)
def test_matches_the_real_environment(task, capfd):
    handlers = list(logging.root.handlers)
    theirs, ours = make_env(task, backend="d4rl"), make_env(task)
    assert theirs.observation_space == ours.observation_space
    assert theirs.action_space == ours.action_space
    assert theirs.max_episode_steps == max_episode_steps(task)
    assert 100 * theirs.normalized_score(1000.0) == pytest.approx(score(task, 1000.0), rel=1e-12)
    np.testing.assert_allclose(theirs.reset(seed=3)[0], ours.reset(seed=3)[0], atol=1e-14)
    if isinstance(ours.unwrapped, D4RLAntMaze):
        ours.unwrapped.goal = theirs.unwrapped.goal
    rng = np.random.default_rng(0)
    for _ in range(20):
        action = rng.uniform(-1.2, 1.2, ours.action_space.shape).astype(np.float32)
        a, b = theirs.step(action), ours.step(action)
        np.testing.assert_allclose(a[0], b[0], atol=1e-6)
        assert a[1] == pytest.approx(b[1], abs=1e-6)
        assert a[2:4] == b[2:4]
        if a[2]:
            break
    captured = capfd.readouterr()
    assert not captured.out + captured.err
    assert logging.root.handlers == handlers


@real
@pytest.mark.parametrize("task", TASKS)
def test_seeding_of_the_real_environment(task):
    check_seeding(task)
