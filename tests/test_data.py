"""Tests of the HDF5 reader and the replay buffers."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import RewardScaling

from pogo_torchrl.data import Normalization, OfflineReplayBuffer, make_replay_buffer, read_hdf5
from pogo_torchrl.experiments.build import check_data
from pogo_torchrl.experiments.config import DataConfig

ROWS = 40
HORIZON = 5


def random_rows(
    seed: int = 0, terminals_dtype: type = bool, timeouts: bool = True
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    rows = {
        "observations": rng.normal(size=(ROWS, 3)),
        "actions": rng.uniform(-1, 1, size=(ROWS, 2)),
        "rewards": rng.normal(size=ROWS),
        "terminals": (rng.random(ROWS) < 0.15).astype(terminals_dtype),
    }
    if timeouts:
        rows["timeouts"] = rng.random(ROWS) < 0.15
        rows["terminals"][7], rows["timeouts"][7] = 1, True  # a row marked as both
    return rows


def write(path: Path, rows: dict[str, np.ndarray]) -> Path:
    with h5py.File(path, "w") as file:
        for key, array in rows.items():
            file[key] = array
    return path


def qlearning_dataset(rows: dict[str, np.ndarray], max_episode_steps: int) -> dict[str, np.ndarray]:
    """Reference implementation of D4RL's loop, with the default ``terminate_on_end=False``."""
    out: dict[str, list] = {key: [] for key in ("obs", "next_obs", "action", "reward", "done")}
    episode_step = 0
    for i in range(len(rows["rewards"]) - 1):
        done = bool(rows["terminals"][i])
        if "timeouts" in rows:
            final_timestep = rows["timeouts"][i]
        else:
            final_timestep = episode_step == max_episode_steps - 1
        if final_timestep:
            episode_step = 0
            continue
        if done:
            episode_step = 0
        out["obs"].append(rows["observations"][i].astype(np.float32))
        out["next_obs"].append(rows["observations"][i + 1].astype(np.float32))
        out["action"].append(rows["actions"][i].astype(np.float32))
        out["reward"].append(rows["rewards"][i].astype(np.float32))
        out["done"].append(done)
        # D4RL resets the counter and then still counts this row.
        episode_step += 1
    return {key: np.array(values) for key, values in out.items()}


@pytest.fixture
def file(tmp_path) -> Path:
    return write(tmp_path / "data.hdf5", random_rows())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [bool, np.float32, np.uint8])
@pytest.mark.parametrize("timeouts", [True, False])
def test_rows_match_qlearning_dataset(tmp_path, seed, dtype, timeouts):
    rows = random_rows(seed, dtype, timeouts)
    expected = qlearning_dataset(rows, HORIZON)
    path = write(tmp_path / "data.hdf5", rows)
    data = read_hdf5(path, max_episode_steps=HORIZON).transitions
    for key, name in {
        "observation": "obs",
        "action": "action",
        ("next", "observation"): "next_obs",
        ("next", "reward"): "reward",
        ("next", "terminated"): "done",
    }.items():
        values = data[key].numpy()
        np.testing.assert_array_equal(values.reshape(expected[name].shape), expected[name])
    for key in ("done", "terminated", "truncated"):
        assert data["next", key].shape == (len(data), 1)
        assert data["next", key].dtype == torch.bool
    assert torch.equal(data["next", "done"], data["next", "terminated"])
    assert not data["next", "truncated"].any()
    floats = (data["observation"], data["action"], data["next", "observation"])
    assert {t.dtype for t in (*floats, data["next", "reward"])} == {torch.float32}


def test_last_row_is_dropped(tmp_path):
    rows = random_rows(timeouts=False)
    rows["terminals"][:] = False
    data = read_hdf5(write(tmp_path / "data.hdf5", rows)).transitions
    assert len(data) == ROWS - 1


def test_no_row_crosses_episodes(tmp_path):
    rows = random_rows()
    rows["observations"][:, 0] = np.cumsum(rows["terminals"] | rows["timeouts"])
    data = read_hdf5(write(tmp_path / "data.hdf5", rows)).transitions
    alive = ~data["next", "terminated"].squeeze(-1)
    # The counter increases in the row that ends an episode, as seen by the row before it.
    rise = (data["next", "observation"] - data["observation"])[alive, 0]
    ends = rows["terminals"] | rows["timeouts"]
    kept = ~rows["timeouts"][:-1]
    next_ends = ends[1:][kept][alive.numpy()]
    np.testing.assert_array_equal(rise.numpy().astype(bool), next_ends)


def test_returns_of_complete_episodes(tmp_path):
    rows = random_rows()
    rows["rewards"] = np.arange(1.0, ROWS + 1)
    for key, ends in (("terminals", [9]), ("timeouts", [3, 20])):
        rows[key] = np.isin(np.arange(ROWS), ends)
    returns = read_hdf5(write(tmp_path / "data.hdf5", rows)).episode_returns
    assert returns.tolist() == [sum(range(1, 5)), sum(range(5, 11)), sum(range(11, 22))]
    assert returns.dtype == np.float64


def test_return_of_a_single_unfinished_episode(tmp_path):
    rows = random_rows(timeouts=False)
    rows["terminals"][:] = False
    returns = read_hdf5(write(tmp_path / "data.hdf5", rows)).episode_returns
    np.testing.assert_allclose(returns, [rows["rewards"].sum()])


@pytest.mark.parametrize("key", ["observations", "actions", "rewards", "terminals"])
def test_missing_key(tmp_path, key):
    rows = random_rows()
    del rows[key]
    with pytest.raises(ValueError, match=rf"bad\.hdf5 lacks {key}"):
        read_hdf5(write(tmp_path / "bad.hdf5", rows))


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("actions", (ROWS - 1, 2)),
        ("actions", (ROWS,)),
        ("rewards", (ROWS, 2)),
        ("rewards", (ROWS + 1,)),
        ("terminals", (1,)),
        ("timeouts", (ROWS - 1,)),
    ],
)
def test_mismatched_shapes(tmp_path, key, shape):
    rows = random_rows()
    rows[key] = np.zeros(shape)
    with pytest.raises(ValueError, match=rf"bad\.hdf5: {key} has shape"):
        read_hdf5(write(tmp_path / "bad.hdf5", rows))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("key", ["observations", "actions", "rewards"])
def test_non_finite_values(tmp_path, key, value):
    rows = random_rows()
    rows[key][11] = value
    with pytest.raises(ValueError, match=rf"bad\.hdf5: {key}\[11.*not finite"):
        read_hdf5(write(tmp_path / "bad.hdf5", rows))


def test_column_vectors_are_accepted(tmp_path, file):
    rows = random_rows()
    for key in ("rewards", "terminals", "timeouts"):
        rows[key] = rows[key][:, None]
    columns = read_hdf5(write(tmp_path / "columns.hdf5", rows)).transitions
    assert (columns == read_hdf5(file).transitions).all()


@pytest.mark.parametrize("content", ["truncated", "text", "empty"])
def test_damaged_files(tmp_path, file, content):
    path = tmp_path / "bad.hdf5"
    intact = file.read_bytes()
    damaged = {"truncated": intact[: len(intact) // 2], "text": b"no", "empty": b""}
    path.write_bytes(damaged[content])
    with pytest.raises(ValueError, match=r"bad\.hdf5 is not a readable HDF5 file"):
        read_hdf5(path)


def test_no_usable_row(tmp_path):
    rows = {key: array[:1] for key, array in random_rows().items()}
    with pytest.raises(ValueError, match=r"bad\.hdf5 has 1 rows"):
        read_hdf5(write(tmp_path / "bad.hdf5", rows))
    rows = random_rows()
    rows["timeouts"][:] = True
    with pytest.raises(ValueError, match="no transition"):
        read_hdf5(write(tmp_path / "bad.hdf5", rows))


@pytest.mark.parametrize("path", ["missing.hdf5", "."])
def test_missing_file(tmp_path, path):
    with pytest.raises(FileNotFoundError, match=r"data\.path="):
        read_hdf5(tmp_path / path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "csv"}, r"data\.source='csv' is unknown.*local.*hdf5"),
        ({"source": "hdf5"}, r"data\.path"),
        (
            {"source": "local", "path": "x.hdf5"},
            r"data\.path='x\.hdf5'.*only used with data\.source=hdf5 or minari",
        ),
        ({"batch_size": 0}, "batch_size=0"),
        ({"reward_shift": math.nan}, "data.reward_shift=nan must be a finite number"),
    ],
)
def test_incompatible_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        make_replay_buffer("hopper-medium-v2", **settings)


@pytest.fixture
def rb(file):
    return make_replay_buffer("hopper-medium-v2", source="hdf5", path=file, batch_size=8)


def test_normalisation(rb, file):
    raw = read_hdf5(file).transitions
    mean = raw["observation"].numpy().astype(np.float64).mean(0)
    std = raw["observation"].numpy().astype(np.float64).std(0) + 1e-3
    np.testing.assert_allclose(rb.normalization.mean, mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(rb.normalization.std, std, rtol=1e-5)
    # Next observations are normalised with the statistics of the observations, not their own.
    for key in ("observation", ("next", "observation")):
        np.testing.assert_allclose(rb[:][key], (raw[key].numpy() - mean) / std, atol=1e-5)
        assert rb[:][key].dtype == torch.float32
    for key in ("action", ("next", "reward"), ("next", "terminated")):
        assert torch.equal(rb[:][key], raw[key])


def test_statistics_of_large_offsets():
    observation = torch.full((10_000, 1), 1000.0) + torch.arange(10_000).reshape(-1, 1) % 2
    mean, std = Normalization.of(observation)
    assert mean.item() == pytest.approx(1000.5)
    assert std.item() == pytest.approx(0.501, rel=1e-5)


def test_rows_are_unchanged_without_normalisation(file):
    rb = make_replay_buffer(
        "hopper-medium-v2", source="hdf5", path=file, normalize=False, batch_size=8
    )
    data = read_hdf5(file)
    assert (rb[:] == data.transitions).all()
    assert torch.equal(rb.normalization.mean, torch.zeros(3))
    assert torch.equal(rb.normalization.std, torch.ones(3))
    np.testing.assert_array_equal(rb.episode_returns, data.episode_returns)


def test_samples(rb):
    assert len(rb) == len(rb[:])
    sample = rb.sample()
    assert sample.batch_size == (8,)
    keys = ("observation", "action", *(("next", k) for k in ("observation", "reward")))
    assert [sample[key].shape[-1] for key in keys] == [3, 2, 3, 1]
    seen = torch.cat([rb.sample()["observation"] for _ in range(200)])
    assert len(seen.unique(dim=0)) == len(rb)  # all rows are drawn, with replacement
    torch.manual_seed(3)
    first = rb.sample()["observation"]
    torch.manual_seed(3)
    assert torch.equal(rb.sample()["observation"], first)


@pytest.mark.parametrize("method", ["add", "extend"])
def test_data_are_immutable(rb, method):
    row = rb[:1] if method == "extend" else rb[0]
    with pytest.raises(RuntimeError):
        getattr(rb, method)(row)


def test_local_source_reads_generated_file(tmp_path):
    settings = {"size": 100, "cache_dir": tmp_path, "normalize": False, "batch_size": 8}
    rb = make_replay_buffer("hopper-medium-v2", **settings)
    (path,) = tmp_path.glob("*.hdf5")
    assert (rb[:] == read_hdf5(path).transitions).all()
    again = make_replay_buffer("hopper-medium-v2", **settings)
    assert (rb[:] == again[:]).all()
    other = make_replay_buffer("hopper-medium-v2", seed=1, **settings)
    assert not torch.equal(other[0]["observation"], rb[0]["observation"])


@pytest.mark.parametrize("timeouts", [True, False])
def test_next_actions_are_those_of_the_next_row_of_the_episode(tmp_path, timeouts):
    """NaN after a terminal state, before a row that was dropped, and at the end of the file."""
    rows = random_rows(timeouts=timeouts)
    terminals = rows["terminals"].astype(bool)
    ends = rows.get("timeouts", np.zeros(ROWS, dtype=bool))
    ends[-1] = True  # the last row of a file is dropped, as one that timed out is
    file = write(tmp_path / "data.hdf5", rows)
    settings = {"source": "hdf5", "path": file, "batch_size": 8}
    plain = make_replay_buffer("hopper-medium-v2", **settings)
    rb = make_replay_buffer("hopper-medium-v2", next_action=True, **settings)
    expected = np.full((ROWS, 2), np.nan, dtype=np.float32)
    for i in range(ROWS - 1):
        if not terminals[i] and not ends[i + 1]:
            expected[i] = rows["actions"][i + 1]
    found = rb[:]["next", "action"].numpy()
    np.testing.assert_array_equal(found, expected[~ends])
    assert 0 < np.isnan(found).sum() < found.size
    assert (rb[:].exclude(("next", "action")) == plain[:]).all()
    assert ("next", "action") not in plain[:].keys(include_nested=True)
    assert rb.fingerprint() != plain.fingerprint()


def test_clipped_actions(tmp_path):
    rows = random_rows()
    rows["actions"] *= 3
    file = write(tmp_path / "data.hdf5", rows)
    settings = {"source": "hdf5", "path": file, "batch_size": 8, "next_action": True}
    raw = make_replay_buffer("hopper-medium-v2", **settings)[:]
    one = make_replay_buffer("hopper-medium-v2", clip_actions=True, **settings)[:]
    bounds = torch.tensor([-0.5, -2.0]), torch.tensor([0.25, 1.5])
    other = make_replay_buffer("hopper-medium-v2", clip_actions=bounds, **settings)[:]
    for key in ("action", ("next", "action")):  # NaN stays NaN
        np.testing.assert_array_equal(one[key], raw[key].clamp(-1, 1))
        np.testing.assert_array_equal(other[key], raw[key].clamp(*bounds))
    assert (
        one.exclude("action", ("next", "action")) == raw.exclude("action", ("next", "action"))
    ).all()


def test_actions_are_checked_in_each_dimension(tmp_path):
    rows = random_rows()
    rows["actions"] *= [0.02, 50]
    file = write(tmp_path / "data.hdf5", rows)
    rb = make_replay_buffer("hopper-medium-v2", source="hdf5", path=file, batch_size=8)
    space = SimpleNamespace(low=torch.tensor([-0.001, -100.0]), high=torch.tensor([0.001, 100.0]))
    evaluator = SimpleNamespace(
        observation_dim=3, action_dim=2, task="own", action_spec=SimpleNamespace(space=space)
    )
    with pytest.raises(
        ValueError, match=r"\(-0\.001 to 0\.001\) in dimension 0.*clip_actions=true"
    ):
        check_data(rb, evaluator, DataConfig())
    space.high[0] = torch.inf
    with pytest.raises(ValueError, match=r"\(-0\.001 to inf\) in dimension 0"):
        check_data(rb, evaluator, DataConfig())
    space.low[0] = -torch.inf
    check_data(rb, evaluator, DataConfig())


def test_transforms_leave_the_stored_rows():
    """Reading rows twice transforms them once each: TorchRL's transforms write into slices."""
    rows = TensorDict({"next": {"reward": torch.ones(4, 1)}}, [4])
    identity = Normalization(torch.zeros(1), torch.ones(1))
    buffer = OfflineReplayBuffer(rows, normalization=identity, episode_returns=np.zeros(0))
    buffer.append_transform(RewardScaling(loc=0.0, scale=3.0, in_keys=[("next", "reward")]))
    for _ in range(2):
        assert buffer[:]["next", "reward"].unique().tolist() == [3.0]
        assert buffer.sample(8)["next", "reward"].unique().tolist() == [3.0]
    assert buffer.storage[:]["next", "reward"].unique().tolist() == [1.0]
