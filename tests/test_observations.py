"""Observations under several keys and as images: actors, losses, the trainer and the evaluator."""

from __future__ import annotations

import pytest
import torch
from runs import Rows
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import MLP, ConvNet

from pogo_torchrl import POGOLoss, POGOTrainer, TransportActor, make_actor, make_qvalue
from pogo_torchrl.evaluation import Evaluator
from pogo_torchrl.export import on_raw_observations, save_actors
from pogo_torchrl.modules import QValueOperator, make_transport_net, noise_reader
from pogo_torchrl.trainers.hooks import LogMetrics

KEYS = ["observation", "goal"]


def with_goal(batch):
    """Add a goal of size 2 to a batch of ``make_batch``."""
    for td in (batch, batch["next"]):
        td["goal"] = torch.randn(*batch.batch_size, 2)
    return batch


def with_pixels(batch):
    """Replace the observations of a batch by images."""
    for td in (batch, batch["next"]):
        td["pixels"] = torch.rand(*batch.batch_size, 1, 8, 8)
    return batch.exclude("observation", ("next", "observation"))


def encoder():
    net = ConvNet(in_features=1, num_cells=[2], kernel_sizes=4, strides=4)
    return TensorDictModule(net, ["pixels"], ["code"])


@pytest.fixture
def goal_actor(unit_spec):
    return TransportActor(make_transport_net(5, 2, (8,)), unit_spec, in_keys=KEYS)


@pytest.fixture
def pixel_actor(unit_spec):
    head = TransportActor(make_transport_net(8, 2, (8,)), unit_spec, in_keys=["code"])
    return TensorDictSequential(encoder(), head)


@pytest.fixture
def make_pixel_loss(pixel_actor):
    def make(**kwargs):
        head = QValueOperator(MLP(10, 1, num_cells=[8]), in_keys=["code", "action"])
        loss = POGOLoss(
            pixel_actor, TensorDictSequential(encoder(), head), w2_weights=(0.2, 0.5), **kwargs
        )
        return loss.make_value_estimator(gamma=0.9)

    return make


class TestSeveralKeys:
    @pytest.mark.parametrize("batch_size", [(), (4,), (2, 3)])
    def test_all_observations_are_concatenated_in_order(self, goal_actor, batch_size):
        s, g, z = (torch.randn(*batch_size, n) for n in (3, 2, 2))
        expected = goal_actor.module.mlp(torch.cat([s, g, z], -1)).tanh()
        td = TensorDict({"observation": s, "goal": g, "noise": z}, batch_size)
        torch.testing.assert_close(goal_actor(td)["action"], expected)
        torch.testing.assert_close(goal_actor(s, g, z), expected)
        torch.testing.assert_close(goal_actor(observation=s, goal=g, noise=z), expected)

    def test_torchrls_mlp_and_own_modules_receive_them_in_order(self, unit_spec):
        s, g, z = torch.randn(4, 3), torch.randn(4, 2), torch.randn(4, 2)
        mlp = MLP(in_features=7, out_features=2, num_cells=[8])
        action = TransportActor(mlp, unit_spec, in_keys=KEYS)(s, g, z)
        torch.testing.assert_close(action, mlp(torch.cat([s, g, z], -1)).tanh())

        class Sum(nn.Module):
            def forward(self, observation, goal, noise):
                return observation[..., :2] + 10 * goal + 100 * noise

        action = TransportActor(Sum(), unit_spec, in_keys=KEYS)(s, g, z)
        torch.testing.assert_close(action, (s[:, :2] + 10 * g + 100 * z).tanh())

    def test_a_missing_key_is_named(self, goal_actor):
        with pytest.raises(KeyError, match="needs the key 'goal'"):
            goal_actor(observation=torch.zeros(4, 3))

    @pytest.mark.parametrize(
        ("goal", "message"),
        [
            (torch.zeros(4, 3), r"\(4, 3\) and \(4, 3\), but .* \[\*B, 5\] in total"),
            (torch.zeros(5, 2), r"\(4, 3\) and \(5, 2\)"),
            (torch.zeros(4, 2, dtype=torch.float64), r"float64, .* expects torch\.float32"),
            (torch.zeros(4, 2, dtype=torch.int64), r"int64, .* expects torch\.float32"),
        ],
        ids=["size", "batch", "float64", "integers"],
    )
    def test_observations_that_do_not_fit_raise(self, goal_actor, goal, message):
        with pytest.raises(ValueError, match=message):
            goal_actor(observation=torch.zeros(4, 3), goal=goal)

    def test_random_noise_has_the_type_of_the_first_floats(self, unit_spec):
        seen = []

        class Spy(nn.Module):
            def forward(self, observation, goal, noise):
                seen.append(noise)
                return noise

        actor = TransportActor(Spy(), unit_spec.to(torch.float64), in_keys=KEYS)
        with set_exploration_type(ExplorationType.RANDOM):
            actor(torch.zeros(4, 3, dtype=torch.uint8), torch.zeros(4, 2))
            actor(torch.zeros(4, 3, dtype=torch.uint8), torch.zeros(4, 2, dtype=torch.uint8))
        assert [z.dtype for z in seen] == [torch.float32, torch.float64]

    def test_raw_observations_are_normalised_one_after_the_other(self, goal_actor):
        mean, std = torch.randn(5), torch.rand(5) + 0.5
        s, g, z = torch.randn(4, 3), torch.randn(4, 2), torch.randn(4, 2)
        raw = on_raw_observations(goal_actor, mean, std)
        expected = goal_actor((s - mean[:3]) / std[:3], (g - mean[3:]) / std[3:], z)
        torch.testing.assert_close(raw(s, g, z), expected)

    def test_the_losses_read_every_key(self, goal_actor, make_batch):
        qvalue = QValueOperator(MLP(7, 1, num_cells=[8]), in_keys=[*KEYS, "action"])
        loss = POGOLoss(goal_actor, qvalue, w2_weights=(0.2, 0.5)).make_value_estimator(gamma=0.9)
        assert {"goal", ("next", "goal")} <= set(loss.in_keys)
        batch = with_goal(make_batch())
        elsewhere = batch.clone()
        elsewhere["goal"] = batch["goal"] + 1
        for index in (0, 1):
            torch.manual_seed(0)
            here = loss.actor_loss(batch, index)[0]
            torch.manual_seed(0)
            assert loss.actor_loss(elsewhere, index)[0] != here
        with pytest.raises(KeyError, match="goal"):
            loss(batch.exclude("goal"))

    def test_the_log_covers_them(self, goal_actor, make_batch):
        row = train(POGOLoss(goal_actor, make_qvalue(3, 2, (8,))), with_goal(make_batch(32)))
        assert {"std_0", "std_2", "data_mse_0", "step_mse_2"} <= set(row)

    def test_an_evaluator_and_exported_files_know_one_key_only(self, goal_actor, tmp_path):
        with pytest.raises(ValueError, match=r"actor 0 reads in_keys=\['observation', 'goal'\]"):
            Evaluator("hopper-medium-v2", episodes=1)([goal_actor])
        raw = on_raw_observations(goal_actor, torch.zeros(5), torch.ones(5))
        with pytest.raises(ValueError, match=r"actor 0 reads in_keys=\['observation', 'goal'\]"):
            save_actors(tmp_path / "policy.safetensors", [raw], hidden_sizes=(8,))


def train(loss, rows):
    """Train for two updates on rows and return the logged metrics."""
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(len(rows)), batch_size=8)
    buffer.extend(rows)
    sink = Rows()
    hooks = [LogMetrics([sink], interval=2)]
    POGOTrainer(loss, buffer, total_steps=2, progress_bar=False, hooks=hooks).train()
    return sink.rows[-1][1]


class TestImages:
    @pytest.mark.parametrize("batch_size", [(), (4,), (2, 3)])
    def test_an_encoder_comes_before_the_transport_map(self, pixel_actor, batch_size):
        pixels, z = torch.rand(*batch_size, 1, 8, 8), torch.randn(*batch_size, 2)
        td = TensorDict({"pixels": pixels, "noise": z}, batch_size)
        code = pixel_actor[0](pixels=pixels)
        torch.testing.assert_close(pixel_actor(td)["action"], pixel_actor[1](code=code, noise=z))

    @pytest.mark.parametrize("batch_size", [(8,), (2, 3)])
    def test_losses_train_the_encoder(self, make_pixel_loss, make_batch, batch_size):
        loss = make_pixel_loss()
        out = loss(with_pixels(make_batch(*batch_size)))
        (out["loss_actor"] + out["loss_qvalue"]).backward()
        for name in ("actor_network_0_params", "actor_network_1_params", "qvalue_network_params"):
            for parameter in getattr(loss, name).parameters():
                assert parameter.grad.abs().sum() > 0

    def test_bounds_and_noise_are_those_of_the_transport_map(self, make_pixel_loss, make_batch):
        loss, batch = make_pixel_loss(), make_batch()
        assert torch.equal(loss.max_action, torch.ones(2))
        assert {"target", "actor_0", "actor_1", "reference_1"} < set(loss.draw_noise(batch))

    def test_equal_policies_have_no_distance_with_shared_noise(self, make_pixel_loss, make_batch):
        batch, distances = with_pixels(make_batch()), {}
        for shared in (True, False):
            loss = make_pixel_loss(shared_noise=shared, chain_init="copy")
            distances[shared] = loss.actor_loss(batch, 1)[1]["w2_1"].item()
        assert abs(distances[True]) < 1e-6 < distances[False]

    def test_the_trainer_learns_and_logs(self, make_pixel_loss, make_batch):
        loss = make_pixel_loss(shared_noise=True)
        before = [p.detach().clone() for p in loss.actor(1)[0].parameters()]
        row = train(loss, with_pixels(make_batch(32)))
        after = list(loss.actor(1)[0].parameters())
        assert all((a != b).any() for a, b in zip(before, after))
        assert row["std_1"] > 0
        assert row["step_mse_1"] > 0

    def test_an_encoder_of_vectors_can_be_evaluated(self):
        evaluator = Evaluator("hopper-medium-v2", episodes=1)
        head = make_actor(11, evaluator.action_spec, (8,))
        identity = TensorDictModule(nn.Identity(), ["state"], ["observation"])
        one, two = evaluator([head]), evaluator([TensorDictSequential(identity, head)])
        assert [e.returns.tolist() for e in one] == [e.returns.tolist() for e in two]


def test_one_of_several_noise_readers_is_not_chosen(pixel_actor, unit_spec):
    assert noise_reader(pixel_actor) is pixel_actor[1]
    assert noise_reader(pixel_actor[1]) is pixel_actor[1]
    assert noise_reader(encoder()) is None
    twice = TensorDictSequential(pixel_actor, make_actor(3, unit_spec, (8,)))
    assert noise_reader(twice) is None
    with pytest.raises(ValueError, match="shared_noise=True requires"):
        POGOLoss(twice, make_qvalue(3, 2, (8,)), shared_noise=True)
