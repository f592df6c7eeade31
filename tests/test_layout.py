"""Tests of what the reader makes of a file's next states, ends and trajectories."""

from __future__ import annotations

import logging
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from pogo_torchrl.data import make_replay_buffer, read_hdf5
from pogo_torchrl.hdf5_files import NAMES
from pogo_torchrl.report.one_run import plot_curves, score_table

EPISODES, LENGTH = 8, 25
ROWS = EPISODES * LENGTH
LAST = np.arange(ROWS) % LENGTH == LENGTH - 1
LAST.flags.writeable = False


def rows(seed: int = 0) -> dict[str, np.ndarray]:
    """Episodes of equal length: odd ones end by a time-out, even ones in a terminal state."""
    rng = np.random.default_rng(seed)
    terminal = np.arange(ROWS) // LENGTH % 2 == 0
    return {
        "observations": rng.normal(size=(ROWS, 3)).astype(np.float32),
        "actions": rng.uniform(-1, 1, size=(ROWS, 2)).astype(np.float32),
        "rewards": rng.normal(size=ROWS).astype(np.float32),
        "terminals": LAST & terminal,
        "timeouts": LAST & ~terminal,
    }


def with_next(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    following = np.roll(arrays["observations"], -1, axis=0)
    following[LAST] = arrays["observations"][LAST] + 0.5
    return {**arrays, "next_observations": following}


def write(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    with h5py.File(path, "w") as file:
        for key, array in arrays.items():
            file[key] = array
    return path


def renamed(arrays: dict[str, np.ndarray], **names: str) -> dict[str, np.ndarray]:
    return {names.get(key, key): array for key, array in arrays.items()}


def assert_next(data, arrays: dict[str, np.ndarray]) -> None:
    """Every row has the next observation that is stored with it."""
    stored = {o.tobytes(): n for o, n in zip(arrays["observations"], arrays["next_observations"])}
    for observation, following in zip(data["observation"], data["next", "observation"]):
        np.testing.assert_array_equal(following.numpy(), stored[observation.numpy().tobytes()])


@pytest.mark.parametrize("drop", [(), ("timeouts",)])
@pytest.mark.parametrize("name", ["next_observations", "next_obs", "observations_next"])
def test_shuffled_transitions_have_their_stored_next_states(tmp_path, name, drop):
    order = np.random.default_rng(1).permutation(ROWS)
    arrays = {k: v[order] for k, v in with_next(rows()).items() if k not in drop}
    path = write(tmp_path / "data.hdf5", renamed(arrays, next_observations=name))
    data = read_hdf5(path, max_episode_steps=10)  # says nothing of shuffled rows
    assert len(data.transitions) == ROWS
    assert_next(data.transitions, arrays)
    following = data.transitions["next"]
    np.testing.assert_array_equal(following["terminated"][:, 0], arrays["terminals"])
    cut = arrays.get("timeouts", np.zeros(ROWS, dtype=bool))
    np.testing.assert_array_equal(following["truncated"][:, 0], cut)
    np.testing.assert_array_equal(following["done"][:, 0], arrays["terminals"] | cut)
    assert data.episode_returns.shape == (0,)  # episodes are unknown


def test_saved_qlearning_dataset_is_read_as_transitions(tmp_path):
    """The rows before a time-out are followed by rows of the next episode."""
    arrays = with_next(rows())
    keep = ~arrays.pop("timeouts")
    keep[-1] = False
    # d4rl takes every next state from the following row, also in terminal rows.
    arrays["next_observations"] = np.roll(arrays["observations"], -1, axis=0)
    dump = {key: array[keep] for key, array in arrays.items()}
    data = read_hdf5(write(tmp_path / "data.hdf5", dump), max_episode_steps=10)
    assert len(data.transitions) == keep.sum()
    assert_next(data.transitions, dump)
    assert len(data.episode_returns) == 0


def test_in_order_files_with_next_states_keep_d4rls_rows(tmp_path):
    plain = read_hdf5(write(tmp_path / "plain.hdf5", rows()))
    stored = read_hdf5(write(tmp_path / "stored.hdf5", with_next(rows())))
    assert (plain.transitions == stored.transitions).all()
    np.testing.assert_array_equal(plain.episode_returns, stored.episode_returns)
    assert len(stored.episode_returns) == EPISODES


def test_unmarked_cuts_are_seen_by_the_stored_next_states(tmp_path):
    arrays = with_next(rows())
    arrays["timeouts"][2 * LENGTH - 1] = False
    data = read_hdf5(write(tmp_path / "data.hdf5", arrays))
    assert_next(data.transitions, arrays)
    assert len(data.episode_returns) == 0


def test_next_actions_belong_to_the_same_trajectory(tmp_path):
    arrays = with_next(rows())
    arrays["timeouts"][2 * LENGTH - 1] = False
    path = write(tmp_path / "data.hdf5", arrays)
    rb = make_replay_buffer(
        "hopper-medium-v2", source="hdf5", path=path, next_action=True, batch_size=8
    )
    expected = np.roll(arrays["actions"], -1, axis=0)
    expected[LAST] = np.nan
    np.testing.assert_array_equal(rb[:]["next", "action"].numpy(), expected)


@pytest.mark.parametrize("terminals", NAMES["terminals"])
@pytest.mark.parametrize("timeouts", NAMES["timeouts"])
def test_common_names_of_ends(tmp_path, terminals, timeouts):
    expected = read_hdf5(write(tmp_path / "d4rl.hdf5", rows()))
    path = write(tmp_path / "data.hdf5", renamed(rows(), terminals=terminals, timeouts=timeouts))
    data = read_hdf5(path)
    assert (data.transitions == expected.transitions).all()
    np.testing.assert_array_equal(data.episode_returns, expected.episode_returns)


@pytest.mark.parametrize("name", NAMES["dones"])
@pytest.mark.parametrize("kept", ["terminals", "timeouts"])
def test_ends_of_either_kind_beside_one_kind(tmp_path, name, kept):
    expected = read_hdf5(write(tmp_path / "d4rl.hdf5", rows()))
    arrays = rows()
    arrays[name] = LAST
    del arrays["timeouts" if kept == "terminals" else "terminals"]
    data = read_hdf5(write(tmp_path / "data.hdf5", arrays))
    assert (data.transitions == expected.transitions).all()
    np.testing.assert_array_equal(data.episode_returns, expected.episode_returns)


@pytest.mark.parametrize("name", [*NAMES["starts"], *NAMES["episodes"]])
@pytest.mark.parametrize("stored", [True, False])
def test_first_rows_or_numbers_of_episodes(tmp_path, name, stored):
    arrays = with_next(rows()) if stored else rows()
    expected = read_hdf5(write(tmp_path / "d4rl.hdf5", arrays))
    del arrays["timeouts"]
    number = np.arange(ROWS) // LENGTH
    arrays[name] = np.arange(ROWS) % LENGTH == 0 if name in NAMES["starts"] else 7 - number
    data = read_hdf5(write(tmp_path / "data.hdf5", arrays))
    assert (data.transitions == expected.transitions).all()
    np.testing.assert_array_equal(data.episode_returns, expected.episode_returns)
    # Shuffled, they tell nothing.
    order = np.random.default_rng(1).permutation(ROWS)
    shuffled = {key: values[order] for key, values in arrays.items()}
    path = write(tmp_path / "shuffled.hdf5", shuffled)
    if stored:
        data = read_hdf5(path)
        assert_next(data.transitions, arrays)
        assert not data.transitions["next", "truncated"].any()
        assert len(data.transitions) == ROWS
    elif name in NAMES["episodes"]:
        with pytest.raises(ValueError, match="rows of an episode are not successive"):
            read_hdf5(path)


def dones(*last: int) -> dict[str, np.ndarray]:
    arrays = rows()
    del arrays["terminals"], arrays["timeouts"]
    return {**arrays, "dones": np.isin(np.arange(ROWS), last)}


def test_dones_alone_end_in_time_outs_at_the_horizon(tmp_path, caplog):
    path = write(tmp_path / "data.hdf5", dones(9, 59, 99))  # after 10, 50 and 40 steps
    with caplog.at_level(logging.WARNING):
        data = read_hdf5(path, max_episode_steps=50)
    assert "does not tell terminations from time limits" in caplog.text
    assert len(data.transitions) == ROWS - 2  # the time-out and the last row
    assert torch.nonzero(data.transitions["next", "terminated"][:, 0]).flatten().tolist() == [9, 98]
    assert len(data.episode_returns) == 3


def test_dones_alone_that_look_like_a_time_limit_are_refused(tmp_path):
    path = write(tmp_path / "data.hdf5", dones(*np.flatnonzero(LAST)))
    with pytest.raises(ValueError, match=r"after exactly 25 steps.*store .*terminals and timeouts"):
        read_hdf5(path)


def test_unknown_horizon(tmp_path):
    arrays = rows()
    del arrays["timeouts"]
    with pytest.raises(ValueError, match=r"no timeouts, and the horizon .* is unknown: set env"):
        read_hdf5(write(tmp_path / "data.hdf5", arrays), max_episode_steps=None)
    data = read_hdf5(write(tmp_path / "data.hdf5", dones(9, 59, 99)), max_episode_steps=None)
    assert data.transitions["next", "terminated"].sum() == 3


def test_rlds(tmp_path):
    """The last row of an episode holds its last observation, and no action or reward."""
    arrays = renamed(rows(), terminals="is_terminal", timeouts="is_last")
    ended = arrays["is_terminal"]
    arrays["is_last"] = LAST
    path = write(tmp_path / "data.hdf5", arrays)
    with pytest.raises(ValueError, match=r"RLDS.*rewards has values there"):
        read_hdf5(path)
    arrays["rewards"][LAST] = 0
    data = read_hdf5(write(tmp_path / "data.hdf5", arrays))
    kept = ~LAST[:-1]
    np.testing.assert_array_equal(data.transitions["action"], arrays["actions"][:-1][kept])
    np.testing.assert_array_equal(data.transitions["next", "terminated"][:, 0], ended[1:][kept])
    expected = arrays["rewards"].reshape(EPISODES, LENGTH).sum(axis=1, dtype=np.float64)
    np.testing.assert_allclose(data.episode_returns, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timeouts": "truncated_flags"}, "truncated_flags may tell .*not known.*timeouts"),
        ({"timeouts": "episode_ends"}, "episode_ends may tell"),
        ({"terminals": "masks"}, "lacks terminals: .*the meaning of masks is not known"),
        ({"terminals": "end_flags"}, "lacks terminals: .*end_flags"),
    ],
)
def test_unknown_names_of_ends_are_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=rf"bad\.hdf5:? {message}"):
        read_hdf5(write(tmp_path / "bad.hdf5", renamed(rows(), **change)))


def test_unknown_names_of_next_states_are_named(tmp_path):
    arrays = renamed(with_next(rows()), next_observations="next_o")
    with pytest.raises(ValueError, match=r"next_o may tell next states.*next_observations"):
        read_hdf5(write(tmp_path / "bad.hdf5", arrays))


def test_two_names_of_one_meaning_must_agree(tmp_path):
    arrays = rows()
    agreeing = {**arrays, "terminations": arrays["terminals"]}
    assert len(read_hdf5(write(tmp_path / "data.hdf5", agreeing)).episode_returns) == EPISODES
    contrary = {**arrays, "terminations": LAST}
    with pytest.raises(ValueError, match="terminals and terminations have the same meaning"):
        read_hdf5(write(tmp_path / "bad.hdf5", contrary))


def test_groups_and_second_names_beside_the_arrays(tmp_path):
    path = write(tmp_path / "data.hdf5", rows())
    expected = read_hdf5(path)
    with h5py.File(path, "a") as file:
        file["states/simulator"] = np.zeros(3)
        file["obs"] = h5py.SoftLink("/observations")
        file["dones"] = h5py.SoftLink("/timeouts")
    assert (read_hdf5(path).transitions == expected.transitions).all()
    with h5py.File(path, "a") as file:
        del file["actions"]
        file["act"] = h5py.ExternalLink("other.hdf5", "actions")
    with pytest.raises(ValueError, match="act is a link"):
        read_hdf5(path)


def test_groups_of_episodes_are_named(tmp_path):
    path = write(tmp_path / "bad.hdf5", {f"episode_{i}/actions": np.zeros(3) for i in range(3)})
    with pytest.raises(ValueError, match=r"holds groups \(episode_0, episode_1, \.\.\.\)"):
        read_hdf5(path)


def visits(smooth: bool) -> dict[str, np.ndarray]:
    """Trajectories cut by time-outs, which visit a goal twice for several steps, as in antmaze."""
    arrays = rows()
    step = np.arange(ROWS) % LENGTH
    if smooth:
        arrays["observations"][:, 0] = step
    arrays["terminals"] = np.isin(step, [8, 9, 10, 11, 17, 18, 19])
    arrays["rewards"] = arrays["terminals"].astype(np.float32)
    arrays["timeouts"] = LAST.copy()
    return arrays


@pytest.mark.parametrize("smooth", [True, False])
def test_rows_of_one_trajectory_marked_terminal_are_one_episode(tmp_path, smooth):
    data = read_hdf5(write(tmp_path / "data.hdf5", visits(smooth)))
    assert data.episode_returns.tolist() == [1.0] * EPISODES
    assert len(data.transitions) == ROWS - EPISODES
    assert data.transitions["next", "terminated"].sum() == 7 * EPISODES  # the rows are d4rl's


@pytest.mark.parametrize("smooth", [True, False])
def test_runs_of_terminal_rows_end_trajectories_without_time_outs(tmp_path, smooth):
    arrays = visits(smooth)
    arrays["timeouts"][:] = False
    arrays["terminals"] = np.arange(ROWS) % LENGTH >= LENGTH - 3
    arrays["rewards"] = arrays["terminals"].astype(np.float32)
    data = read_hdf5(write(tmp_path / "data.hdf5", arrays))
    assert data.episode_returns.tolist() == [1.0] * EPISODES


def test_single_terminal_rows_within_smooth_trajectories(tmp_path):
    arrays = visits(smooth=True)
    arrays["terminals"] = arrays["observations"][:, 0] == 8
    data = read_hdf5(write(tmp_path / "data.hdf5", arrays))
    assert len(data.episode_returns) == EPISODES


def test_terminal_rows_before_a_jump_end_episodes(tmp_path):
    arrays = rows()
    arrays["observations"][:, 0] = np.arange(ROWS) % LENGTH
    assert len(read_hdf5(write(tmp_path / "data.hdf5", arrays)).episode_returns) == EPISODES


def test_steps_that_all_time_out_need_their_stored_next_states(tmp_path):
    arrays = with_next(rows())
    arrays["terminals"][:], arrays["timeouts"][:] = False, True
    data = read_hdf5(write(tmp_path / "data.hdf5", arrays))
    assert_next(data.transitions, arrays)
    np.testing.assert_allclose(data.episode_returns, arrays["rewards"], rtol=1e-4, atol=1e-6)


def test_episodes_of_one_step(tmp_path):
    arrays = rows()
    arrays["terminals"][:] = True
    arrays["timeouts"][:] = False
    returns = read_hdf5(write(tmp_path / "data.hdf5", arrays)).episode_returns
    np.testing.assert_allclose(returns, arrays["rewards"], rtol=1e-4, atol=1e-6)


def test_generated_episodes_end_at_terminal_rows(tmp_path):
    """Falling, then standing again, is a jump in every environment."""
    rb = make_replay_buffer("hopper-medium-v2", size=500, cache_dir=tmp_path, batch_size=8)
    (path,) = tmp_path.glob("*.hdf5")
    with h5py.File(path) as file:
        ends = file["terminals"][:] | file["timeouts"][:]
    assert len(rb.episode_returns) == ends.sum() > 2


def test_reports_of_unknown_scores(tmp_path):
    path = tmp_path / "evaluations.csv"
    path.write_text("step,actor,mode,score\n1,0,deterministic,40\n1,0,stochastic,38\n")
    table = score_table(path, float("nan"))
    assert "dataset" not in table
    assert "nan" not in table
    plot_curves(path, tmp_path / "curves.png", title="", behaviour_score=float("nan"))
    assert (tmp_path / "curves.png").stat().st_size > 0


@pytest.mark.parametrize("number", [5, 13, 28, 37, 38, 95])
def test_files_that_the_system_refuses_are_not_called_damaged(tmp_path, monkeypatch, number):
    path = write(tmp_path / "data.hdf5", rows())

    def refuse(*args, **kwargs):
        raise OSError(number, "refused")

    monkeypatch.setattr(h5py, "File", refuse)
    with pytest.raises(OSError, match="cannot be read") as caught:
        read_hdf5(path)
    assert "download" not in str(caught.value)
    assert isinstance(caught.value, PermissionError) == (number == 13)


def test_files_are_read_without_locks(tmp_path, monkeypatch):
    path = write(tmp_path / "data.hdf5", rows())
    opened, original = [], h5py.File

    def record(*args, **kwargs):
        opened.append(kwargs.get("locking"))
        return original(*args, **kwargs)

    monkeypatch.setattr(h5py, "File", record)
    read_hdf5(path)
    assert opened == [False]
