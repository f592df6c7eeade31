"""Tests of the generated data: layout, determinism and cache."""

from __future__ import annotations

import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import mujoco
import numpy as np
import pytest

from pogo_torchrl.data import rollouts
from pogo_torchrl.data.policies import FOLDER, LEVELS, LinearPolicy, load_manifest, load_policies
from pogo_torchrl.data.rollouts import MAX_NOISE, behaviour_dataset
from pogo_torchrl.data.train_policies import (
    RunningMoments,
    Snapshot,
    mean_return,
    pick_levels,
    save,
    search,
)
from pogo_torchrl.envs import make_env

ENVIRONMENTS = ("halfcheetah", "hopper", "walker2d")


def make(folder: Path, task: str = "hopper-medium-v2", size: int = 2000, **kwargs) -> Path:
    return behaviour_dataset(task, size=size, cache_dir=folder, progress=False, **kwargs)


def read(path: Path) -> dict[str, np.ndarray]:
    with h5py.File(path) as file:
        keys = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
        return {key: file[key][()] for key in (*keys, "infos/qpos", "infos/qvel")}


def forbid_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    def generate(*args):
        raise AssertionError("generated although the file exists")

    monkeypatch.setattr(rollouts, "_generate", generate)


@pytest.fixture(scope="module")
def hopper(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("hopper"))


@pytest.fixture(scope="module")
def halfcheetah(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("halfcheetah"), "halfcheetah-medium-v2")


def test_layout(hopper):
    rows = read(hopper)
    widths = {"observations": 11, "next_observations": 11, "actions": 3}
    for key, width in {**widths, "infos/qpos": 6, "infos/qvel": 6}.items():
        assert rows[key].shape == (2000, width)
        assert rows[key].dtype == np.float32
        assert np.isfinite(rows[key]).all()
    assert rows["rewards"].shape == (2000,)
    assert rows["rewards"].dtype == np.float32
    for key in ("terminals", "timeouts"):
        assert rows[key].shape == (2000,)
        assert rows[key].dtype == bool
    assert np.abs(rows["actions"]).max() <= 1.0


@pytest.mark.parametrize("name", ["hopper", "halfcheetah"])
def test_rows_are_contiguous_within_an_episode(name, request):
    rows = read(request.getfixturevalue(name))
    ends = rows["terminals"] | rows["timeouts"]
    assert not (rows["terminals"] & rows["timeouts"]).any()
    assert ends[-1]
    np.testing.assert_array_equal(
        rows["next_observations"][:-1][~ends[:-1]], rows["observations"][1:][~ends[:-1]]
    )
    restarts = rows["next_observations"][:-1][ends[:-1]] != rows["observations"][1:][ends[:-1]]
    assert restarts.any(axis=1).all()


def test_halfcheetah_ends_only_by_time_outs(halfcheetah):
    rows = read(halfcheetah)
    assert not rows["terminals"].any()
    np.testing.assert_array_equal(np.flatnonzero(rows["timeouts"]), [999, 1999])


def test_truncated_row_does_not_bootstrap_across(tmp_path):
    rows = read(make(tmp_path, size=10))
    np.testing.assert_array_equal(np.flatnonzero(rows["timeouts"]), [9])
    assert not rows["terminals"].any()


@pytest.mark.parametrize("name", ["hopper", "halfcheetah"])
def test_rewards_match_the_environment(name, request):
    rows = read(request.getfixturevalue(name))
    env = make_env(f"{name}-medium-v2")
    chosen = np.union1d(np.flatnonzero(rows["terminals"]), np.arange(0, 2000, 50))
    for i in chosen:
        env.reset(seed=0)
        env.unwrapped.set_state(rows["infos/qpos"][i], rows["infos/qvel"][i])
        observation, reward, terminated, _, _ = env.step(rows["actions"][i])
        assert reward == pytest.approx(rows["rewards"][i], abs=1e-4)
        assert terminated == rows["terminals"][i]
        np.testing.assert_allclose(observation, rows["next_observations"][i], atol=5e-3)


def test_metadata(hopper):
    with h5py.File(hopper) as file:
        metadata = {key: item[()] for key, item in file["metadata"].items()}
    assert metadata["seed"] == 0
    assert metadata["max_noise"] == MAX_NOISE["hopper"]
    assert metadata["mujoco_version"].decode() == mujoco.__version__
    assert json.loads(metadata["policies"]) == load_manifest()["hopper"]


def test_data_are_determined_by_task_size_and_seed(hopper, tmp_path):
    again = make(tmp_path, workers=2)
    assert again.name == hopper.name
    assert again.read_bytes() == hopper.read_bytes()
    assert read(make(tmp_path, seed=1))["observations"][0, 0] != read(hopper)["observations"][0, 0]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_tiny_datasets(size, tmp_path):
    rows = read(make(tmp_path, "hopper-medium-expert-v2", size=size))
    assert len(rows["rewards"]) == size
    assert rows["timeouts"][-1]


def test_smaller_dataset_is_a_prefix(hopper, tmp_path):
    small, large = read(make(tmp_path, size=500)), read(hopper)
    np.testing.assert_array_equal(small["observations"], large["observations"][:500])


def test_medium_expert_is_half_and_half(hopper, tmp_path):
    rows = read(make(tmp_path, "hopper-medium-expert-v2", size=4000))
    for key in ("observations", "actions", "timeouts", "terminals"):
        np.testing.assert_array_equal(rows[key][:2000], read(hopper)[key])
    assert rows["timeouts"][1999]
    # The better policy falls less often.
    assert rows["terminals"][2000:].sum() < rows["terminals"][:2000].sum()


def test_medium_replay_mixes_levels(tmp_path):
    rows = read(make(tmp_path, "hopper-medium-replay-v2", size=4000))
    ends = np.flatnonzero(rows["terminals"] | rows["timeouts"])
    returns = np.add.reduceat(rows["rewards"], np.concatenate([[0], ends[:-1] + 1]))
    assert returns.min() < 100
    assert returns.max() > 1000


def test_cache_is_used(hopper, monkeypatch):
    forbid_generation(monkeypatch)
    assert make(hopper.parent) == hopper


@pytest.mark.parametrize("damage", ["truncated", "changed", "empty", "unsigned"])
def test_damaged_file_is_regenerated(hopper, damage, tmp_path, caplog):
    content = hopper.read_bytes()
    path = tmp_path / hopper.name
    if damage == "unsigned":
        path.write_bytes(content)
        with h5py.File(path, "a") as file:
            del file.attrs["sha256"]
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes({"truncated": content[:middle], "changed": flipped, "empty": b""}[damage])
    assert make(tmp_path) == path
    assert path.read_bytes() == content
    assert caplog.messages == [f"{path} is damaged; regenerating it."]


def test_leftover_temporary_files_are_ignored(hopper, tmp_path):
    (tmp_path / f".{hopper.name}.0123.tmp").write_bytes(hopper.read_bytes())
    path = make(tmp_path)
    assert path.read_bytes() == hopper.read_bytes()


def test_concurrent_runs_generate_once(tmp_path, monkeypatch):
    generate, calls = rollouts._generate, []

    def count(*args):
        calls.append(args)
        return generate(*args)

    monkeypatch.setattr(rollouts, "_generate", count)
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: make(tmp_path), range(4)))
    assert len(calls) == 1
    assert list(tmp_path.iterdir()) == list(paths)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_full_disk_leaves_no_files(step, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="No space left on device") as error:
        make(tmp_path, size=10)
    assert str(tmp_path) in str(error.value)
    assert "cache_dir" in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("moment", ["playing", "writing"])
def test_interruption_leaves_no_files(moment, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    if moment == "playing":
        monkeypatch.setattr(rollouts, "rollout", interrupt)
    else:
        monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, size=10)
    assert not list(tmp_path.iterdir())


def test_unwritable_folder_fails_before_generation(tmp_path, monkeypatch):
    forbid_generation(monkeypatch)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write to .*file/cache"):
        make(tmp_path / "file" / "cache")


def test_default_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = behaviour_dataset("hopper-medium-v2", size=10, progress=False)
    assert path.parent == tmp_path / "pogo_torchrl"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    path = behaviour_dataset("hopper-medium-v2", size=10, progress=False)
    assert path.parent == tmp_path / "home" / ".cache" / "pogo_torchrl"


def test_progress_goes_to_stderr(tmp_path, capsys):
    behaviour_dataset("hopper-medium-v2", size=10, cache_dir=tmp_path)
    captured = capsys.readouterr()
    assert "Generating hopper-medium-v2" in captured.err
    assert not captured.out
    behaviour_dataset("hopper-medium-v2", size=11, cache_dir=tmp_path, progress=False)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("task", ["antmaze-umaze-v2", "hopper-expert-v2"])
def test_task_without_policies_lists_supported_tasks(task, tmp_path):
    with pytest.raises(ValueError, match=task) as error:
        make(tmp_path, task)
    assert "hopper-medium-replay-v2" in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("size", 0), ("size", 1.5), ("size", True), ("seed", -1), ("seed", None), ("workers", 0)],
)
def test_arguments_out_of_range(name, value, tmp_path):
    with pytest.raises(ValueError, match=f"{name}={value!r} must be an integer >="):
        make(tmp_path, **{name: value})


def test_new_policies_do_not_reuse_old_data(hopper, tmp_path, monkeypatch):
    policies = load_policies("hopper")
    policies["medium"] = LinearPolicy(policies["medium"].gain * 1.01, policies["medium"].mean)
    monkeypatch.setattr(rollouts, "load_policies", lambda environment: policies)
    assert make(tmp_path, size=10).name.split("_")[-1] != hopper.name.split("_")[-1]


def test_policy_in_closed_form():
    policy = LinearPolicy(np.array([[2.0, 0.0], [0.0, -4.0]]), np.array([1.0, 2.0]))
    np.testing.assert_allclose(policy(np.array([1.25, 3.0])), [0.5, -1.0])


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_scores_of_bundled_policies_match_the_manifest(environment):
    entry = load_manifest()[environment]
    policies = load_policies(environment)
    assert list(policies) == list(entry["levels"]) == list(LEVELS)
    # Scores with noise, which determine the quality of the data.
    noisy = [level["noisy_score"] for level in entry["levels"].values()]
    assert noisy == sorted(noisy)
    env = make_env(f"{environment}-medium-v2")
    level = entry["levels"]["expert"]
    measured = mean_return(env, policies["expert"], episodes=entry["episodes"], max_noise=0.0)
    assert measured == pytest.approx(level["return"], rel=0.3)
    assert level["noisy_return"] < level["return"]


def test_policies_are_small():
    assert sum(path.stat().st_size for path in FOLDER.glob("*.npz")) < 50_000


def test_running_moments():
    values = np.random.default_rng(0).normal(3.0, 2.0, (100, 4))
    moments = RunningMoments(4)
    np.testing.assert_array_equal(moments.std, np.ones(4))
    for part in np.split(values, [10, 11, 60]):
        moments.update(part)
    np.testing.assert_allclose(moments.mean, values.mean(axis=0))
    np.testing.assert_allclose(moments.std, values.std(axis=0))


def test_levels_are_picked_by_fraction_of_the_best_return():
    policy = LinearPolicy(np.zeros((1, 1)), np.zeros(1))
    returns = [0.0, 9.0, 26.0, 55.0, 70.0, 100.0, 50.0]
    snapshots = [Snapshot(steps, policy, value) for steps, value in enumerate(returns)]
    levels = pick_levels(snapshots)
    assert [level.steps for level in levels.values()] == [1, 2, 3, 4, 5]


def test_search_improves():
    snapshots = search("hopper", seed=3, steps=15_000, minutes=np.inf)
    best = max(snapshot.mean_return for snapshot in snapshots)
    assert best > 1.2 * snapshots[0].mean_return


def test_search_is_deterministic_and_saved(tmp_path):
    first, again = (search("hopper", seed=3, steps=2000, minutes=np.inf)[-1] for _ in range(2))
    assert first.steps == again.steps > 0
    np.testing.assert_array_equal(first.policy.gain, again.policy.gain)

    save("hopper", dict.fromkeys(LEVELS, first), {"seed": 3}, tmp_path)
    assert load_manifest(tmp_path) == {"hopper": {"seed": 3}}
    loaded = load_policies("hopper", tmp_path)["expert"]
    np.testing.assert_allclose(loaded.gain, first.policy.gain, rtol=1e-6)
    np.testing.assert_allclose(loaded.mean, first.policy.mean, rtol=1e-6)
