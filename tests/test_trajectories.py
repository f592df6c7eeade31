"""Weights of trajectories by their returns: in the data, the loss and runs."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensordict import TensorDict

from pogo_torchrl import POGOLoss
from pogo_torchrl.configs import compose
from pogo_torchrl.data import make_replay_buffer
from pogo_torchrl.data.trajectories import trajectory_returns, trajectory_weights
from pogo_torchrl.experiments.algorithms import resolve
from pogo_torchrl.experiments.run import run

LENGTHS, REWARDS = (3, 2, 4), (1.0, 4.0, 0.5)  # returns 3, 8 and 2


def rows() -> TensorDict:
    """Three trajectories, of which the first terminates and the second is cut."""
    parts = []
    for i, (length, reward) in enumerate(zip(LENGTHS, REWARDS)):
        states = 10 * i + torch.arange(length + 1.0).unsqueeze(-1)
        done = torch.zeros(length, 1, dtype=torch.bool)
        done[-1] = i == 0
        following = {"observation": states[1:], "reward": torch.full((length, 1), reward)}
        parts.append({"observation": states[:-1], "next": {**following, "done": done}})
    return torch.cat([TensorDict(part, [len(part["observation"])]) for part in parts])


def test_returns_are_those_of_the_trajectory_of_each_row():
    assert trajectory_returns(rows()).tolist() == 3 * [3.0] + 2 * [8.0] + 4 * [2.0]


@pytest.mark.parametrize("temperature", [0.1, 1.0, 1e-4])
def test_weights_by_closed_form(temperature):
    returns = torch.tensor([3.0, 8.0, 2.0, 2.0], dtype=torch.float64)
    weights = trajectory_weights(returns, temperature)
    expected = np.exp((np.array([1, 6, 0, 0]) / 6 - 1) / temperature)
    np.testing.assert_allclose(weights, expected / expected.mean(), rtol=1e-12)
    # Units of rewards do not matter.
    torch.testing.assert_close(trajectory_weights(50 * returns - 7, temperature), weights)


def test_equal_returns_have_equal_weights():
    assert trajectory_weights(torch.full((5,), 2.0), 0.1).tolist() == 5 * [1.0]


@pytest.fixture
def file(tmp_path):
    """Two hopper trajectories of 20 rows, with rewards 1 and 3."""
    rng = np.random.default_rng(0)
    with h5py.File(tmp_path / "data.hdf5", "w") as data:
        data["observations"] = rng.standard_normal((40, 11), dtype=np.float32)
        data["actions"] = rng.uniform(-1, 1, (40, 3)).astype(np.float32)
        data["rewards"] = np.repeat(np.float32([1, 3]), 20)
        data["terminals"] = np.arange(40) % 20 == 19
        data["timeouts"] = np.zeros(40, dtype=bool)
    return tmp_path / "data.hdf5"


def test_weights_of_a_replay_buffer(file):
    settings = {"source": "hdf5", "path": file, "batch_size": 8}
    weighted = make_replay_buffer("hopper-medium-v2", return_temperature=0.5, **settings)[:]
    # The last row of a file is dropped.
    expected = trajectory_weights(torch.tensor(20 * [20.0] + 19 * [57.0]), 0.5)
    torch.testing.assert_close(weighted["trajectory_weight"], expected)
    assert "trajectory_weight" not in make_replay_buffer("hopper-medium-v2", **settings)[:]


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_temperatures_that_are_not_positive(file, temperature):
    with pytest.raises(ValueError, match=r"return_temperature=.* must be a finite number > 0"):
        make_replay_buffer(
            "hopper-medium-v2", source="hdf5", path=file, batch_size=8,
            return_temperature=temperature,
        )  # fmt: skip


def test_single_transitions_have_no_returns(tmp_path, file):
    order = np.random.default_rng(0).permutation(40)
    shuffled = tmp_path / "shuffled.hdf5"
    with h5py.File(file) as data, h5py.File(shuffled, "w") as found:
        for key in data:
            found[key] = data[key][:][order]
        found["next_observations"] = np.roll(data["observations"][:], -1, 0)[order]
    settings = {"source": "hdf5", "path": shuffled, "batch_size": 8}
    assert not len(make_replay_buffer("hopper-medium-v2", **settings).episode_returns)
    with pytest.raises(ValueError, match=r"return_temperature=0.1 .* single transitions"):
        make_replay_buffer("hopper-medium-v2", return_temperature=0.1, **settings)


class TestLoss:
    """Its weighted data term: test_objectives.py, TestDataWeight."""

    def test_actor_0_is_not_weighted(self, make_loss, make_batch):
        batch = make_batch(8).set("trajectory_weight", torch.rand(8))
        plain = make_loss(data_weight=1.0)
        weighted = make_loss(data_weight=1.0, trajectory_weights=True)
        weighted.load_state_dict(plain.state_dict())
        values = []
        for loss in (plain, weighted):
            torch.manual_seed(1)
            values.append(loss.actor_loss(batch, 0)[0])
        assert values[0] == values[1]

    def test_a_batch_without_weights(self, make_loss, make_batch):
        loss = make_loss(data_weight=0.5, trajectory_weights=True)
        assert "trajectory_weight" in loss.in_keys
        for call in (loss, lambda batch: loss.actor_loss(batch, 1)):
            with pytest.raises(KeyError, match="'trajectory_weight'"):
                call(make_batch())
        loss.set_keys(trajectory_weight="w")
        assert loss(make_batch().set("w", torch.ones(8)))["loss_actor"].isfinite()

    def test_weights_without_a_data_term(self, make_loss):
        with pytest.raises(ValueError, match=r"trajectory_weights=True .* data_weight=0 "):
            make_loss(trajectory_weights=True)

    def test_settings_of_checkpoints(self, make_loss):
        def settings(loss: POGOLoss) -> dict:
            loss.make_value_estimator(gamma=0.99)
            return loss.settings()

        assert "trajectory_weights" not in settings(make_loss(data_weight=1.0))
        assert settings(make_loss(data_weight=1.0, trajectory_weights=True))["trajectory_weights"]


class TestRuns:
    WEIGHTED = ("return_temperature=0.1", "data_weight=1", "freeze_critics_at=null")

    def test_a_run_and_its_resumption(self, make_cfg, tmp_path):
        def train(name: str, *options: str) -> dict[str, torch.Tensor]:
            options = (*options, f"log_dir={tmp_path / name}", "resume=true")
            run(make_cfg("freeze_critics_at=null", *options))
            (found,) = (tmp_path / name).rglob("policy.safetensors")
            return load_file(found)

        whole = train("whole", *self.WEIGHTED)
        train("resumed", *self.WEIGHTED, "total_steps=3")
        resumed = train("resumed", *self.WEIGHTED)
        equal = train("equal", "data_weight=1")
        assert whole.keys() == resumed.keys() == equal.keys()
        assert all(torch.equal(values, resumed[name]) for name, values in whole.items())
        assert not all(torch.equal(values, equal[name]) for name, values in whole.items())

    def test_a_single_actor_needs_no_returns(self):
        preset = resolve(compose(["task=walker2d-medium-v2"]))
        single = resolve(compose(["task=walker2d-medium-v2", "w2_weights=[1]"]))
        assert (preset.return_temperature, single.return_temperature) == (0.1, None)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["return_temperature=0.1"], "none with data_weight=0: set"),
            (["return_temperature=0", "data_weight=1"], "return_temperature=0.* > 0"),
            ([*WEIGHTED, "algorithm=td3_bc"], "no meaning for algorithm=td3_bc"),
        ],
    )
    def test_options_that_do_not_fit(self, options, message):
        with pytest.raises(ValueError, match=message):
            resolve(compose(["task=hopper-medium-v2", "w2_weights=[1,1,1]", *options]))
