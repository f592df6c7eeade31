"""Tests of replaying recorded transitions and of the command ``pogo check-dataset``."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from pogo_torchrl.cli import main
from pogo_torchrl.envs import make_env, replay_errors
from pogo_torchrl.envs.dataset_check import check, find_task, read_rows
from pogo_torchrl.envs.transitions import replay

ENVIRONMENTS = {
    "hopper": "hopper-medium-v2",
    "halfcheetah": "halfcheetah-medium-v2",
    "walker2d": "walker2d-medium-v2",
    "umaze": "antmaze-umaze-v2",
    "medium": "antmaze-medium-play-v2",
    "large": "antmaze-large-play-v2",
}


def exit_code(*arguments: str) -> int:
    """The exit code of the command line."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    return end.value.code


def record(task: str, steps: int, dtype=np.float64, horizon: int = 40, gravity: float = 1.0):
    """Record a dataset in D4RL's layout with random actions in our environment."""
    env = make_env(task)
    core = env.unwrapped
    core.model.opt.gravity[:] *= gravity
    rng = np.random.default_rng(0)
    columns: dict[str, list] = {}
    env.reset(seed=0)
    length = 0
    for _ in range(steps):
        action = rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
        states = {"infos/qpos": core.data.qpos, "infos/qvel": core.data.qvel}
        row = {key: np.array(value, dtype=dtype) for key, value in states.items()}
        row["actions"] = action
        if task.startswith("antmaze"):
            row["infos/goal"] = core.goal
        _, reward, terminated, _, _ = env.step(action)
        length += 1
        row |= {"rewards": reward, "terminals": terminated, "timeouts": length == horizon}
        for key, value in row.items():
            columns.setdefault(key, []).append(value)
        if terminated or length == horizon:
            env.reset()
            length = 0
            if task.startswith("antmaze"):  # where the other mazes have walls
                qpos, start = core.data.qpos.copy(), {"umaze": (8, 4), "medium": (4, 20)}
                qpos[:2] = start.get(task.split("-")[1], (16, 8))
                core.set_state(qpos, core.data.qvel.copy())
    return {key: np.array(values) for key, values in columns.items()}


def write(path: Path, columns: dict[str, np.ndarray]) -> Path:
    with h5py.File(path, "w") as file:
        for key, values in columns.items():
            file[key] = values
    return path


@pytest.mark.parametrize("task", ENVIRONMENTS.values())
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_recorded_file_matches(task, dtype, tmp_path, capsys):
    path = write(tmp_path / "data.hdf5", record(task, 200, dtype))
    assert exit_code("check-dataset", str(path)) == 0
    output = capsys.readouterr().out
    assert f"200 rows in the environment of {task}" in output
    assert "The file matches" in output
    assert "terminations agree on 100.00 %" in output
    assert ("float32" in output) == (dtype == np.float32)
    errors = check(read_rows(path)).errors
    largest = 1e-12 if dtype == np.float64 else 1e-2
    assert all(np.nanmax(values) <= largest for values in errors.values())


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_other_physics_do_not_match(dtype, tmp_path, capsys):
    path = write(tmp_path / "data.hdf5", record("hopper-medium-v2", 200, dtype, gravity=1.01))
    assert exit_code("check-dataset", str(path)) == 1
    assert "does not match" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("rewards", lambda values: values + 0.01),
        ("terminals", lambda values: ~values),
        ("actions", lambda values: values[::-1]),
    ],
)
def test_other_rewards_terminations_or_actions_do_not_match(key, change, tmp_path):
    columns = record("walker2d-medium-v2", 100)
    columns[key] = change(columns[key])
    assert exit_code("check-dataset", str(write(tmp_path / "data.hdf5", columns))) == 1


def test_rows_are_evenly_spaced_and_have_no_next_state_at_episode_ends(tmp_path):
    columns = record("halfcheetah-medium-v2", 100)
    path = write(tmp_path / "data.hdf5", columns)
    rows = read_rows(path, limit=12)
    np.testing.assert_array_equal(rows["qpos"], columns["infos/qpos"][::9])
    rows = read_rows(path)
    ends = np.flatnonzero(np.isnan(rows["next_qpos"]).any(axis=1))
    np.testing.assert_array_equal(ends, [39, 79, 99])
    np.testing.assert_array_equal(rows["next_qvel"][:39], columns["infos/qvel"][1:40])


def test_file_without_timeouts_or_goals(tmp_path, capsys):
    columns = record("antmaze-umaze-v2", 60, horizon=1000)
    del columns["timeouts"], columns["infos/goal"]
    assert exit_code("check-dataset", str(write(tmp_path / "data.hdf5", columns))) == 0
    output = capsys.readouterr().out
    assert "not compared: the file has no infos/goal" in output
    assert "terminations agree" not in output


@pytest.mark.parametrize("names", [("terminations", "truncations"), ("terminated", "dones")])
def test_common_names_of_ends(tmp_path, names):
    columns = record("halfcheetah-medium-v2", 100)
    for old, new in zip(("terminals", "timeouts"), names):
        columns[new] = columns.pop(old)
    rows = read_rows(write(tmp_path / "data.hdf5", columns))
    ends = np.flatnonzero(np.isnan(rows["next_qpos"]).any(axis=1))
    np.testing.assert_array_equal(ends, [39, 79, 99])


@pytest.mark.parametrize("maze", ["umaze", "medium", "large"])
def test_mazes_are_distinguished(maze):
    """Mazes are distinguished by recorded contacts with walls."""
    with np.load(Path(__file__).parent / "assets" / "antmaze_transitions.npz") as arrays:
        rows = {k.split("/")[1]: arrays[k] for k in arrays if k.startswith(f"{maze}/")}
    rows.pop("walls")
    assert find_task(rows) == ENVIRONMENTS[maze]


def test_task_option(tmp_path, capsys):
    path = write(tmp_path / "data.hdf5", record("hopper-medium-v2", 50))
    assert exit_code("check-dataset", str(path), "--task", "hopper-expert-v2", "--limit", "20") == 0
    assert "20 rows in the environment of hopper-expert-v2" in capsys.readouterr().out
    assert exit_code("check-dataset", str(path), "--task", "walker2d-medium-v2") == 2
    assert "task='walker2d-medium-v2' has positions" in capsys.readouterr().err
    assert exit_code("check-dataset", str(path), "--task", "hoper") == 2
    assert "task='hoper' is not a D4RL version 2 task" in capsys.readouterr().err


def test_bad_input(tmp_path, capsys):
    def message(path: Path, *options: str) -> str:
        assert exit_code("check-dataset", str(path), *options) == 2
        captured = capsys.readouterr()
        assert not captured.out
        assert captured.err.count("\n") == 1
        assert str(path) in captured.err or "--" not in captured.err
        return captured.err

    assert "does not exist" in message(tmp_path / "none.hdf5")
    assert "is not a file" in message(tmp_path)
    text = tmp_path / "text.hdf5"
    text.write_text("not HDF5")
    assert "is not a readable HDF5 file" in message(text)

    columns = record("hopper-medium-v2", 20)
    path = write(tmp_path / "data.hdf5", columns)
    assert "limit=0" in message(path, "--limit", "0")
    without = {key: values for key, values in columns.items() if "infos" not in key}
    error = message(write(tmp_path / "without.hdf5", without))
    assert "lacks infos/qpos, infos/qvel" in error
    uneven = columns | {"actions": columns["actions"][:-1]}
    assert "must have the same number" in message(write(tmp_path / "uneven.hdf5", uneven))
    empty = {key: values[:0] for key, values in columns.items()}
    assert "at least 1" in message(write(tmp_path / "empty.hdf5", empty))
    other = columns | {"actions": np.zeros((20, 7))}
    error = message(write(tmp_path / "other.hdf5", other))
    assert "no environment has 6 positions, 6 velocities and 7 actions" in error


@pytest.mark.parametrize(
    ("key", "values", "message"),
    [
        ("rewards", np.float64(1), "must have the same number"),
        ("rewards", h5py.Empty("f4"), "must have the same number"),
        ("rewards", np.full(20, b"a"), "rewards has dtype"),
        ("terminals", np.full(20, b"True"), "terminals has dtype"),
        ("rewards", np.zeros(20, complex), "rewards has dtype complex128"),
        ("rewards", np.full(20, np.inf), r"rewards\[0\] is inf"),
        ("timeouts", np.zeros((20, 2)), r"timeouts has shape \(20, 2\).*shape \(20,\)"),
        ("timeouts", np.zeros(3), "must have the same number"),
        ("actions", np.zeros(20), r"actions has shape \(20,\).*shape \(20, dim\)"),
        ("actions", np.zeros((20, 0)), "actions has shape"),
        ("infos/qpos", np.zeros((20, 2, 3)), "qpos has shape"),
        ("infos/qpos", np.full((20, 6), 1e300), r"qpos\[0, 0\] is 1e\+300.*cannot be simulated"),
        ("infos/qvel", np.full((20, 6), np.nan), r"qvel\[0, 0\] is nan"),
        ("infos/goal", np.zeros((20, 3)), r"goal has shape \(20, 3\).*shape \(20, 2\)"),
        ("infos/goal", np.zeros((4, 2)), "must have the same number"),
    ],
)
def test_odd_arrays(tmp_path, capsys, key, values, message):
    path = write(tmp_path / "odd.hdf5", record("hopper-medium-v2", 20) | {key: values})
    assert exit_code("check-dataset", str(path)) == 2
    error = capsys.readouterr().err
    assert re.search(rf"odd\.hdf5.* {message}|odd\.hdf5.*{message}", error)
    assert error.count("\n") == 1


@pytest.mark.parametrize("kind", ["huge", "link", "group"])
def test_hostile_files(tmp_path, capsys, kind):
    columns = record("hopper-medium-v2", 20)
    del columns["rewards"]
    path = write(tmp_path / "odd.hdf5", columns if kind != "huge" else {})
    with h5py.File(path, "a") as file:
        if kind == "link":
            file["rewards"] = h5py.ExternalLink("/etc/passwd", "rewards")
        elif kind == "group":
            file.create_group("rewards")
        else:
            shapes = {"infos/qpos": (6,), "infos/qvel": (6,), "actions": (3,)}
            for key in (*shapes, "rewards", "terminals"):
                file.create_dataset(key, (10**11, *shapes.get(key, ())), "f4", chunks=True)
    assert exit_code("check-dataset", str(path)) == 2
    error = capsys.readouterr().err
    assert re.search("declares .* GB|is a link|is not an array", error)
    assert error.count("\n") == 1


def test_documented_command(tmp_path):
    path = write(tmp_path / "data.hdf5", record("hopper-medium-v2", 50))
    result = subprocess.run(
        [sys.executable, "-m", "pogo_torchrl", "check-dataset", str(path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "RuntimeWarning" not in result.stderr


def test_unknown_and_non_finite_values():
    env = make_env("hopper-medium-v2")
    rows = {
        "qpos": np.tile([0, 1.25, 0, 0, 0, 0], (2, 1)),
        "qvel": np.zeros((2, 6)),
        "action": np.zeros((2, 3), dtype=np.float32),
    }
    after = replay(env, rows)
    known = after["qpos"].copy()
    known[0, 2] = np.nan
    errors = replay_errors(env, rows | {"next_qpos": known, "reward": after["reward"] - 1})
    assert list(errors) == ["qpos", "reward"]
    np.testing.assert_array_equal(errors["qpos"], [np.nan, 0.0])
    np.testing.assert_allclose(errors["reward"], 1.0)
    rows["action"][1] = np.nan
    assert np.isinf(replay_errors(env, rows | {"reward": after["reward"]})["reward"][1])
