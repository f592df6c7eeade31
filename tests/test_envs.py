"""Tests of the environments against transitions recorded in D4RL's own."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import gymnasium
import mujoco
import numpy as np
import pytest

from pogo_torchrl.envs import TASKS, base, check_physics, make_env, score, split_task
from pogo_torchrl.envs.locomotion import D4RLHopper
from pogo_torchrl.envs.mujoco210 import compile_legacy, restore_contact_margin
from pogo_torchrl.envs.selfcheck import ALLOWED_ERROR, warn_if_physics_differ

ENVIRONMENTS = ("halfcheetah", "hopper", "walker2d")
# 40 transitions per environment under random actions, recorded in D4RL's own version 2 environments
# (d4rl 1.1, MuJoCo 2.1.0), in float64.
TRANSITIONS = Path(__file__).parent / "assets" / "d4rl_transitions.npz"


def recorded(environment: str) -> dict[str, np.ndarray]:
    with np.load(TRANSITIONS) as arrays:
        return {
            key.split("/")[1]: arrays[key] for key in arrays if key.startswith(f"{environment}/")
        }


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_steps_match_d4rl(environment):
    env = make_env(f"{environment}-medium-v2")
    rows = recorded(environment)
    errors = {key: [] for key in ("next_qpos", "next_qvel", "next_obs", "reward")}
    for i, action in enumerate(rows["action"]):
        env.reset(seed=0)
        env.unwrapped.set_state(rows["qpos"][i], rows["qvel"][i])
        observation, reward, terminated, truncated, _ = env.step(action)
        data = env.unwrapped.data
        result = (data.qpos, data.qvel, observation, reward)
        for key, value in zip(errors, result, strict=True):
            errors[key].append(np.abs(value - rows[key][i]).max())
        assert terminated == rows["done"][i]
        assert not truncated
    for key, values in errors.items():
        assert np.median(values) <= 1e-12, key
        assert np.max(values) <= 1e-6, key
    if environment != "halfcheetah":
        assert rows["done"].sum() >= 5  # terminations are among them


def test_observation_matches_the_state():
    env = make_env("walker2d-medium-v2")
    rows = recorded("walker2d")
    env.reset(seed=0)
    env.unwrapped.set_state(rows["qpos"][3], rows["qvel"][3])
    np.testing.assert_allclose(env.unwrapped._get_obs(), rows["obs"][3], atol=1e-12)


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_control_cost_uses_clipped_actions(environment):
    steps = []
    for size in (1.0, 5.0):
        env = make_env(f"{environment}-medium-v2")
        env.reset(seed=0)
        steps.append(env.step(np.full(env.action_space.shape, size, dtype=np.float32)))
    np.testing.assert_array_equal(steps[0][0], steps[1][0])
    assert steps[0][1] == steps[1][1]


def test_reset_is_seeded():
    env = make_env("hopper-medium-v2")
    first, again, other = (env.reset(seed=seed)[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_non_finite_state_is_unhealthy():
    env = make_env("hopper-medium-v2").unwrapped
    env.reset(seed=0)
    assert env.is_healthy
    for array in (env.data.qpos[3:4], env.data.qvel[:1]):
        original = array.copy()
        for value in (np.nan, np.inf, -np.inf):
            array[:] = value
            assert not env.is_healthy
        array[:] = original


def test_episodes_are_truncated_after_1000_steps():
    env = make_env("halfcheetah-medium-v2")
    env.reset(seed=0)
    action = np.zeros(6, dtype=np.float32)
    truncated = [env.step(action)[3] for _ in range(1000)]
    assert not any(truncated[:-1])
    assert truncated[-1]


def test_environment_has_only_the_time_limit_wrapper():
    env = make_env("hopper-medium-v2")
    assert isinstance(env, gymnasium.wrappers.TimeLimit)
    assert env.env is env.unwrapped
    assert env.observation_space.shape == (11,)
    np.testing.assert_array_equal(env.action_space.high, np.ones(3))


def test_render_mode_is_passed_on():
    assert make_env("hopper-medium-v2", render_mode="rgb_array").render_mode == "rgb_array"


def test_capsule_inertia_equals_that_of_a_longer_cylinder():
    xml = """<mujoco><worldbody><body><freejoint/>
    <geom type="capsule" {} size="{}" density="1000"/></body></worldbody></mujoco>"""
    radius, length = 0.1, 0.4
    mass = 1000 * np.pi * radius**2 * (length + radius)
    across = mass * (3 * radius**2 + (length + radius) ** 2) / 12
    for shape in (('fromto="0 0 -.2 0 0 .2"', ".1"), ("", ".1 .2")):
        model = compile_legacy(mujoco.MjSpec.from_string(xml.format(*shape)))
        np.testing.assert_allclose(model.body_mass[1], mass)
        np.testing.assert_allclose(
            np.sort(model.body_inertia[1]), [mass * radius**2 / 2, across, across]
        )
        assert model.geom_type[0] == mujoco.mjtGeom.mjGEOM_CAPSULE
        np.testing.assert_allclose(model.geom_size[0, :2], [radius, length / 2])


def test_different_margins_raise(monkeypatch):
    xml = (
        """<mujoco><worldbody><geom size="1" margin="0.1"/><geom size="1"/></worldbody></mujoco>"""
    )
    model = mujoco.MjModel.from_xml_string(xml)
    monkeypatch.setattr(mujoco, "__version__", "3.5.0")
    with pytest.raises(ValueError, match=r"margins are \[0.0, 0.1\]"):
        restore_contact_margin(model)
    monkeypatch.setattr(mujoco, "__version__", "3.4.1")
    restore_contact_margin(model)
    np.testing.assert_array_equal(model.geom_margin, [0.1, 0.0])


def test_mujoco_warnings_are_logged_and_not_written_to_a_file(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    env = make_env("hopper-medium-v2")
    env.reset(seed=0)
    env.unwrapped.data.qvel[0] = np.nan
    with caplog.at_level(logging.WARNING, "pogo_torchrl.envs"):
        env.step(np.zeros(3, dtype=np.float32))
    assert "Nan, Inf or huge value in QVEL" in caplog.text
    assert not list(tmp_path.iterdir())


def test_no_warnings_no_output_and_no_files(tmp_path):
    code = """
import warnings
import numpy as np
import pogo_torchrl  # imports TorchRL, which emits warnings of its own
warnings.simplefilter("error")
from pogo_torchrl.envs import make_env
for name in ("halfcheetah-medium", "hopper-medium", "walker2d-medium", "antmaze-umaze"):
    env = make_env(name)
    env.reset(seed=0)
    env.step(np.zeros(env.action_space.shape, dtype=np.float32))
    env.close()
"""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert not result.stdout + result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("halfcheetah-medium-v2", 10.31140153393164),
        ("hopper-medium-replay-v2", 31.34889040358868),
        ("walker2d-medium-expert", 21.747822785379867),
        ("antmaze-large-diverse-v2", 100000.0),
    ],
)
def test_score_of_1000(task, expected):
    # Recorded from d4rl's `get_normalized_score`.
    assert score(task, 1000.0) == pytest.approx(expected, rel=1e-12)


def test_score_of_an_array():
    scores = score("hopper-medium-v2", np.array([[-20.272305], [3234.3]]))
    np.testing.assert_allclose(scores, [[0.0], [100.0]], atol=1e-12)


@pytest.mark.parametrize("task", TASKS)
def test_split_task(task):
    environment, level = split_task(task)
    assert f"{environment}-{level}-v2" == task
    assert split_task(f"{environment}-{level}") == (environment, level)


@pytest.mark.parametrize("function", [split_task, make_env, lambda task: score(task, 0.0)])
@pytest.mark.parametrize("task", ["hoper-medium-v2", "hopper", ""])
def test_unknown_task(function, task):
    with pytest.raises(ValueError, match="is not a D4RL version 2 task") as error:
        function(task)
    assert repr(task) in str(error.value)
    assert "hopper-" in str(error.value)


@pytest.mark.parametrize("function", [split_task, make_env, lambda task: score(task, 0.0)])
@pytest.mark.parametrize(
    ("task", "answer"), [("hopper-medium-v0", "use hopper-medium-v2"), ("pen-human", "Adroit hand")]
)
def test_other_tasks_of_d4rl(function, task, answer):
    with pytest.raises(ValueError, match=rf"^task={task} is .*{answer}"):
        function(task)


@pytest.mark.parametrize("task", TASKS)
def test_tasks_are_registered_with_gymnasium(task):
    env = gymnasium.make(f"pogo_torchrl/{task}")
    assert isinstance(env, gymnasium.wrappers.TimeLimit)
    assert env.env is env.unwrapped
    ours = make_env(task.removesuffix("-v2"))
    assert type(env.unwrapped) is type(ours.unwrapped)
    assert env.spec.max_episode_steps == ours.spec.max_episode_steps
    np.testing.assert_array_equal(env.reset(seed=4)[0], ours.reset(seed=4)[0])


def test_gymnasium_imports_the_package(tmp_path):
    code = """
import gymnasium
env = gymnasium.make("pogo_torchrl.envs:pogo_torchrl/antmaze-umaze-v2", render_mode="rgb_array")
print(env.spec.max_episode_steps, env.reset(seed=0)[0].shape, env.render_mode)
"""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.stdout == "700 (29,) rgb_array\n", result.stderr


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend='bullet' is unknown; use one of mujoco, d4rl"):
        make_env("hopper-medium-v2", backend="bullet")


@pytest.mark.parametrize("environment", [*ENVIRONMENTS, "antmaze"])
def test_installed_physics_pass_the_check(environment):
    assert check_physics(environment) <= ALLOWED_ERROR / 10


@pytest.fixture
def forget_checks():
    warn_if_physics_differ.cache_clear()
    yield
    warn_if_physics_differ.cache_clear()


def perturb(monkeypatch, environment: str) -> None:
    """Increase gravity by 0.1 % in all models compiled from now on."""
    cls = type(make_env(next(t for t in TASKS if t.startswith(environment))).unwrapped)
    build = cls.build_spec

    def stronger(path, key):
        spec = build(path, key)
        spec.option.gravity[2] *= 1.001
        return spec

    monkeypatch.setattr(cls, "build_spec", staticmethod(stronger))
    base._compiled.cache_clear()


@pytest.mark.parametrize("environment", ["hopper", "antmaze"])
def test_deviating_physics_are_reported_once(environment, monkeypatch, caplog, forget_checks):
    tasks = [task for task in TASKS if task.startswith(environment)][:2]
    try:
        perturb(monkeypatch, environment)
        warn_if_physics_differ.cache_clear()
        with caplog.at_level(logging.WARNING, "pogo_torchrl.envs"):
            for task in tasks * 2:
                make_env(task)
        assert check_physics(environment) > ALLOWED_ERROR
    finally:
        base._compiled.cache_clear()
    [record] = caplog.records
    message = record.getMessage()
    assert "\n" not in message
    for part in (
        environment,
        f"MuJoCo {mujoco.__version__}",
        "allowed 1e-05",
        "pip install 'mujoco>=3.3",
    ):
        assert part in message


def test_matching_physics_are_not_reported(caplog, forget_checks):
    np.random.seed(0)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    with caplog.at_level(logging.DEBUG, "pogo_torchrl.envs"):
        for task in TASKS:
            make_env(task)
    assert not caplog.records
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_failed_simulation_has_infinite_error(monkeypatch):
    monkeypatch.setattr(D4RLHopper, "_get_obs", lambda self: np.zeros(11))
    monkeypatch.setattr(D4RLHopper, "is_healthy", False)
    assert check_physics("hopper") == np.inf
    with pytest.raises(ValueError, match="environment='ant' is unknown"):
        check_physics("ant")
