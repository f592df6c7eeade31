"""Observations in HDF5 files that are groups of arrays."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, flatten

from pogo_torchrl.data import convert, make_replay_buffer
from pogo_torchrl.data.hdf5 import read_hdf5

ROWS = 6
RNG = np.random.default_rng(0)
VELOCITY, POSITION = RNG.normal(size=ROWS), RNG.normal(size=(ROWS, 2))
GOAL = RNG.integers(0, 3, ROWS)
SPACE = Dict(velocity=Box(-9, 9, (1,)), goal=Discrete(3), position=Box(-9, 9, (2,)))


def arrays(**observations) -> dict[str, np.ndarray]:
    given = {"velocity": VELOCITY, "position": POSITION, **observations}
    return {
        **{f"observations/{key}": values for key, values in given.items()},
        "actions": np.zeros((ROWS, 1)),
        "rewards": np.ones(ROWS),
        "terminals": np.zeros(ROWS),
        "timeouts": np.arange(ROWS) == ROWS - 1,
    }


def write(path: Path, content: dict[str, np.ndarray]) -> Path:
    with h5py.File(path, "w") as file:
        for key, values in content.items():
            file[key] = values
    return path


def assert_rows(found, expected: np.ndarray) -> None:
    expected = torch.from_numpy(expected.astype(np.float32))
    torch.testing.assert_close(found["observation"], expected[:-1], rtol=0, atol=0)
    torch.testing.assert_close(found["next", "observation"], expected[1:], rtol=0, atol=0)


def test_entries_are_sorted_as_gymnasium_sorts_them(tmp_path):
    data = read_hdf5(write(tmp_path / "a.hdf5", arrays()))
    space = Dict({"velocity": Box(-9, 9, (1,)), "position": Box(-9, 9, (2,))})
    samples = [{"velocity": v[None], "position": p} for v, p in zip(VELOCITY, POSITION)]
    assert_rows(data.transitions, np.stack([flatten(space, sample) for sample in samples]))
    assert data.episode_returns.tolist() == [ROWS]


def test_nested_groups_under_other_names(tmp_path):
    content = arrays()
    for key in ("velocity", "position"):
        content[f"obs/body/{key}"] = content.pop(f"observations/{key}")
    content["obs/arm"] = GOAL
    found = read_hdf5(write(tmp_path / "a.hdf5", content)).transitions
    assert_rows(found, np.c_[GOAL, POSITION, VELOCITY])


def test_stored_next_observations(tmp_path):
    """Shuffled transitions, whose next observations are a group as well."""
    order, content = np.array([3, 0, 2, 1, 4]), arrays()
    shuffled = {key: values[order] for key, values in content.items() if key != "timeouts"}
    for key in ("velocity", "position"):
        shuffled[f"next_observations/{key}"] = content[f"observations/{key}"][order + 1]
    found = read_hdf5(write(tmp_path / "a.hdf5", shuffled)).transitions
    expected = np.c_[POSITION, VELOCITY].astype(np.float32)
    np.testing.assert_array_equal(found["observation"], expected[order])
    np.testing.assert_array_equal(found["next", "observation"], expected[order + 1])


def test_the_order_and_the_entries_of_the_environment(tmp_path):
    path = write(tmp_path / "a.hdf5", arrays(goal=GOAL, image=np.zeros((ROWS, 4, 4, 3), np.uint8)))
    buffer = make_replay_buffer(
        "mine", source="hdf5", path=path, dict_space=SPACE, normalize=False, batch_size=2
    )
    samples = [
        {"velocity": v[None], "goal": g, "position": p} for v, g, p in zip(VELOCITY, GOAL, POSITION)
    ]
    assert_rows(buffer[:], np.stack([flatten(SPACE, sample) for sample in samples]))


@pytest.mark.parametrize(
    ("observations", "space", "message"),
    [
        ({}, SPACE, "lacks observations/goal, which is part of the environment's observations"),
        ({"goal": GOAL[:3]}, None, "observations/goal has 3 rows, but observations/position has 6"),
        ({"goal": np.zeros((ROWS, 2))}, SPACE, r"goal has shape \(6, 2\), .* match Discrete\(3\)"),
        (
            {"goal": GOAL + 3},
            SPACE,
            r"goal: observations have values .* not in Discrete\(3\)",
        ),
        ({"goal": GOAL + 0.5}, SPACE, "goal: observations have values that are not in"),
        ({"goal/a": GOAL}, SPACE, r"observations/goal is a group, but .* Discrete\(3\)"),
        ({"image": np.zeros((ROWS, 2, 2), np.uint8)}, None, "image: .* cannot be part of a vector"),
        ({"name": np.full(ROWS, b"a")}, None, r"observations/name has dtype \|S1"),
        ({"nan": np.full(ROWS, np.nan)}, None, r"observations\[0, 0\] is not finite"),
        ({"scalar": 1.0}, None, "observations/scalar is a single value"),
    ],
)
def test_entries_that_do_not_fit(tmp_path, observations, space, message):
    path = write(tmp_path / "a.hdf5", arrays(**observations))
    with pytest.raises(ValueError, match=message):
        read_hdf5(path, dict_space=space)


def test_links_and_empty_groups(tmp_path):
    path = write(tmp_path / "a.hdf5", arrays())
    with h5py.File(path, "a") as file:
        file["observations/self"] = file["observations"]
    with pytest.raises(ValueError, match="observations/self is a group that is stored twice"):
        read_hdf5(path)
    with h5py.File(path, "a") as file:
        del file["observations/self"]
        file["observations/other"] = h5py.SoftLink("/actions")
    with pytest.raises(ValueError, match=r"observations/other is a link .* not followed"):
        read_hdf5(path)
    with h5py.File(path, "a") as file:
        for key in list(file["observations"]):
            del file["observations"][key]
    with pytest.raises(ValueError, match="the group observations is empty"):
        read_hdf5(path)


def test_dictionaries_in_dictionaries_are_converted_to_groups(tmp_path):
    content = {key: values for key, values in arrays().items() if "/" not in key}
    content["obs"] = {"velocity": VELOCITY, "position": POSITION}
    path, data = convert(content, tmp_path / "a.hdf5")
    assert_rows(data.transitions, np.c_[POSITION, VELOCITY])
    with h5py.File(path) as file:
        assert set(file["obs"]) == {"velocity", "position"}
