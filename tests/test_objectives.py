"""POGOLoss as a TorchRL loss module: TorchRL's conventions for losses, then POGO's own."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings

import pytest
import torch
import torch._inductor.config
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torch.testing import assert_close
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import MLP, NormalParamExtractor, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import SoftUpdate
from torchrl.objectives.utils import ValueEstimators
from torchrl.objectives.value import TD0Estimator

from pogo_torchrl import POGOLoss, TransportActor, make_actor, make_qvalue
from pogo_torchrl.modules import make_transport_net

ALL_PARAMS = ["actor_network_0_params", "actor_network_1_params", "qvalue_network_params"]
ESTIMATORS = [ValueEstimators.TD0, ValueEstimators.TD1, ValueEstimators.TDLambda]


def seeded(function, *args, seed=1, **kwargs):
    torch.manual_seed(seed)
    return function(*args, **kwargs)


def gradients(loss, name):
    return [p.grad for p in getattr(loss, name).parameters()]


def actor_gradients(loss):
    """Gradients of each actor."""
    return [gradients(loss, f"actor_network_{i}_params") for i in range(loss.num_actors)]


def set_target_values(loss, *values):
    """Make the target critics return constants."""
    params = loss.target_qvalue_network_params.data
    params.zero_()
    params["module", "4", "bias"].copy_(torch.tensor(values)[:, None])


def kwargs_of(batch):
    return {"_".join(k) if isinstance(k, tuple) else k: v for k, v in batch.items(True, True)}


def assert_outputs_equal(a, b):
    assert set(a.keys()) == set(b.keys())
    for key in a.keys():  # noqa: SIM118
        torch.testing.assert_close(a[key], b[key])


class TestTorchRLConventions:
    @pytest.mark.parametrize("delay_actor", [False, True])
    @pytest.mark.parametrize("delay_qvalue", [False, True])
    def test_state_dict_round_trip(self, make_loss, make_batch, delay_actor, delay_qvalue):
        first, second = (
            make_loss(delay_actor=delay_actor, delay_qvalue=delay_qvalue) for _ in range(2)
        )
        batch = make_batch()
        first(batch.clone()), second(batch.clone())  # a used loss can load a state dict too
        second.load_state_dict(first.state_dict())
        out = [seeded(loss, batch.clone()) for loss in (first, second)]
        assert_outputs_equal(*out)

    @pytest.mark.parametrize("index", [0, 1, 2])
    def test_actor_loss_trains_its_own_actor_only(self, make_loss, make_batch, index):
        loss = make_loss(w2_weights=(0.2, 0.3, 0.4), delay_actor=True)
        loss.actor_loss(make_batch(), index)[0].backward()
        for i, found in enumerate(actor_gradients(loss)):
            assert [g is not None and bool(g.abs().sum() > 0) for g in found] == [i == index] * 6
        assert gradients(loss, "qvalue_network_params") == [None] * 6
        assert not any(p.requires_grad for p in loss.target_actor_network_0_params.values(1, 1))

    def test_qvalue_loss_trains_both_critics_and_nothing_else(self, make_loss, make_batch):
        loss = make_loss(delay_actor=True)
        loss.qvalue_loss(make_batch())[0].backward()
        for gradient in gradients(loss, "qvalue_network_params"):
            assert (gradient.flatten(1).abs().sum(1) > 0).all()
        assert actor_gradients(loss) == [[None] * 6] * 2
        assert not any(p.requires_grad for p in loss.target_qvalue_network_params.values(1, 1))

    def test_forward_separates_the_gradients_of_the_terms(self, make_loss, make_batch):
        loss, batch = make_loss(), make_batch()
        out = seeded(loss, batch)
        (out["loss_actor"] + out["loss_qvalue"]).backward()
        joint = [g.clone() for name in ALL_PARAMS for g in gradients(loss, name)]
        loss.zero_grad()
        out = seeded(loss, batch)
        out["loss_actor"].backward()
        out["loss_qvalue"].backward()
        separate = [g for name in ALL_PARAMS for g in gradients(loss, name)]
        assert all(g.abs().sum() > 0 for g in joint)
        torch.testing.assert_close(joint, separate)

    def test_default_keys(self, make_loss):
        assert dataclasses.asdict(POGOLoss.default_keys()) == {
            "action": "action",
            "state_action_value": "state_action_value",
            "priority": "td_error",
            "reward": "reward",
            "done": "done",
            "terminated": "terminated",
            "priority_weight": "priority_weight",
            "trajectory_weight": "trajectory_weight",
        }
        assert make_loss().tensor_keys == POGOLoss.default_keys()
        with pytest.raises(ValueError, match="not an accepted"):
            make_loss().set_keys(nonsense="action")

    @pytest.mark.parametrize("estimator", ESTIMATORS)
    @pytest.mark.parametrize("set_first", [False, True])
    def test_renamed_keys_give_the_same_losses(self, unit_spec, make_batch, estimator, set_first):
        def build(obs, action, value):
            torch.manual_seed(3)
            actor = TransportActor(
                make_transport_net(3, 2, (8,)),
                Composite(**{action: unit_spec}),
                in_keys=[obs],
                out_keys=[action],
            )
            qvalue = ValueOperator(
                make_qvalue(3, 2, (8,)).module, in_keys=[obs, action], out_keys=[value]
            )
            # the same seed, so that the second actor and critic are equal as well
            return POGOLoss(actor, qvalue, w2_weights=(0.2, 0.5))

        batch = make_batch(4, 3).set("priority_weight", torch.rand(4, 3))
        names = {
            "action": "act",
            "state_action_value": "value",
            "priority": "priority",
            "reward": "gain",
            "done": "over",
            "terminated": "dead",
            "priority_weight": "importance",
        }
        renamed = batch.clone()
        renamed.rename_key_("observation", "obs").rename_key_("action", "act")
        renamed.rename_key_("priority_weight", "importance")
        for old, new in {"observation": "obs", **names}.items():
            if old in batch["next"].keys():  # noqa: SIM118
                renamed.rename_key_(("next", old), ("next", new))
        plain, other = (
            build("observation", "action", "state_action_value"),
            build("obs", "act", "value"),
        )
        plain.make_value_estimator(estimator, gamma=0.8)
        if set_first:
            other.set_keys(**names)
        other.make_value_estimator(estimator, gamma=0.8)
        if not set_first:
            other.set_keys(**names)
        assert_outputs_equal(seeded(plain, batch), seeded(other, renamed))
        torch.testing.assert_close(batch["td_error"], renamed["priority"])
        assert set(other.in_keys) == {
            "act", "obs", ("next", "obs"), ("next", "gain"), ("next", "over"), ("next", "dead"),
        }  # fmt: skip

    def test_in_keys(self, make_loss):
        assert set(make_loss().in_keys) == {
            "action",
            "observation",
            ("next", "observation"),
            ("next", "reward"),
            ("next", "done"),
            ("next", "terminated"),
        }

    @pytest.mark.parametrize("length", [1, 3])
    def test_out_keys_are_the_keys_of_the_output(self, make_loss, make_batch, length):
        loss = make_loss(w2_weights=[0.2] * length)
        out = loss(make_batch())
        assert set(out.keys()) == set(loss.out_keys)
        assert len(loss.out_keys) == 5 + 4 * length
        last = f"w2_{length - 1}" if length > 1 else "bc_mse"
        assert {"loss_actor", "loss_qvalue", last, "q_actor_0"} <= set(out.keys())
        for key, value in out.items():
            assert value.shape == ()
            assert torch.isfinite(value)
            assert value.requires_grad == (key in ("loss_actor", "loss_qvalue"))

    def test_dispatch_without_a_tensordict(self, make_loss, make_batch):
        loss, batch = make_loss(), make_batch()
        with_tensordict = seeded(loss, batch.clone())
        values = seeded(loss, **kwargs_of(batch))
        assert len(values) == len(loss.out_keys)
        for key, value in zip(loss.out_keys, values):
            torch.testing.assert_close(value, with_tensordict[key])

    def test_dispatch_with_selected_out_keys(self, make_loss, make_batch):
        loss, batch = make_loss(), make_batch()
        expected = seeded(loss, batch.clone())
        loss.select_out_keys("loss_actor", "loss_qvalue")
        loss_actor, loss_qvalue = seeded(loss, **kwargs_of(batch))
        torch.testing.assert_close(loss_actor, expected["loss_actor"])
        torch.testing.assert_close(loss_qvalue, expected["loss_qvalue"])

    @pytest.mark.parametrize("batch_size", [(8,), (4, 3)])
    def test_reductions_agree(self, make_loss, make_batch, batch_size):
        losses = {
            r: seeded(make_loss, reduction=r, seed=2, w2_weights=(0.2, 0.3, 0.4))
            for r in ("none", "mean", "sum")
        }
        batch = make_batch(*batch_size)
        out = {r: seeded(loss, batch.clone()) for r, loss in losses.items()}
        for key in ("loss_actor", "loss_qvalue"):
            assert out["none"][key].shape == batch_size
            torch.testing.assert_close(out["none"][key].mean(), out["mean"][key])
            torch.testing.assert_close(out["none"][key].sum(), out["sum"][key])
        assert_outputs_equal(
            *(out[r].select("q_actor_2", "w2_1", "pred_value") for r in out if r != "sum")
        )

    def test_reset_parameters_recursive_reinitialises_all_networks(self, make_loss):
        loss = make_loss(w2_weights=(0.2, 0.3, 0.4), delay_actor=True)
        for p in loss.parameters():
            p.data.fill_(7.0)
        loss.reset_parameters_recursive()
        actors = torch.stack([getattr(loss, f"actor_network_{i}_params").data for i in range(3)])
        for params in (actors, loss.qvalue_network_params.data):
            for key, value in params.items(True, True):
                if key[-1] not in ("weight", "bias"):
                    continue
                assert all(len(p.unique()) == p.numel() for p in value)
                assert len(value.flatten(1).unique(dim=0)) == len(value)
                fan_in = params[(*key[:-1], "weight")].shape[-1]
                assert value.abs().max() <= 1 / math.sqrt(fan_in)
                if value[0].numel() >= 16:
                    assert value.abs().max() > 0.7 / math.sqrt(fan_in)
        for name in ("actor_network_0_params", "qvalue_network_params"):
            target = getattr(loss, f"target_{name}")
            for key, value in getattr(loss, name).items(True, True):
                assert torch.equal(value, target[key])

    def test_reset_keeps_buffers_and_parameter_objects(self, make_loss, wide_spec):
        loss = make_loss(wide_spec)
        before = list(loss.parameters())
        loss.reset_parameters_recursive()
        assert all(a is b for a, b in zip(before, loss.parameters(), strict=True))
        for i in range(2):
            scale = getattr(loss, f"actor_network_{i}_params")["action_scale"]
            torch.testing.assert_close(scale, torch.tensor([2.0, 0.75]))


class TestConstructor:
    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"w2_weights": ()}, "w2_weights"),
            ({"w2_weights": 0.2}, "w2_weights"),
            ({"w2_weights": (0.2, -0.1)}, "w2_weights"),
            ({"w2_weights": (0.2, math.nan)}, "w2_weights"),
            ({"num_samples": 0}, "num_samples"),
            ({"num_samples": 2.5}, "num_samples"),
            ({"num_qvalue_nets": 0}, "num_qvalue_nets"),
            ({"blur": 0.0}, "blur"),
            ({"w2_fraction": 0.0}, "w2_fraction"),
            ({"w2_fraction": 1.5}, "w2_fraction"),
            ({"data_weight": -0.1}, "data_weight"),
            ({"data_weight": 1.5}, "data_weight"),
            ({"critic_bc_weight": -1.0}, "critic_bc_weight"),
            ({"target_action": "clean"}, "target_action"),
            ({"actor_q": "min"}, "actor_q"),
            ({"advantage_temperature": 0.0}, "advantage_temperature"),
            ({"alpha": -1.0}, "alpha"),
            ({"policy_noise": -0.1}, "policy_noise"),
            ({"noise_clip": math.inf}, "noise_clip"),
            ({"w2_backend": "fancy"}, "w2_backend"),
            ({"q_normalization": "max"}, "q_normalization"),
            ({"loss_function": "l3"}, "loss_function"),
            ({"reduction": "median"}, "reduction"),
            ({"bounds": (1.0, -1.0)}, "bounds"),
            ({"bounds": (-math.inf, math.inf)}, "bounds"),
            ({"bounds": (-1.0, 1.0), "action_spec": Bounded(-1, 1, (2,))}, "not both"),
            ({"action_spec": Unbounded((2,))}, "Bounded"),
        ],
    )
    def test_settings_out_of_range_raise(self, make_loss, kwargs, message):
        with pytest.raises(ValueError, match=message):
            make_loss(**kwargs)

    def test_bounds_are_required_if_the_actor_has_no_spec(self):
        actor = TensorDictModule(MLP(in_features=3, out_features=2), ["observation"], ["action"])
        with pytest.raises(ValueError, match="bounds"):
            POGOLoss(actor, make_qvalue(3, 2))

    @pytest.mark.parametrize(
        "kwargs",
        [
            {},
            {"action_spec": Bounded(low=torch.tensor([-1.0, 0.5]), high=torch.tensor([3.0, 2.0]))},
            {"bounds": (torch.tensor([-1.0, 0.5]), torch.tensor([3.0, 2.0]))},
            {"bounds": ([-1.0, 0.5], [3.0, 2.0])},
        ],
        ids=["actor's", "spec", "tensors", "lists"],
    )
    def test_ways_to_pass_bounds(self, make_loss, wide_spec, kwargs):
        loss = make_loss(wide_spec, **kwargs)
        assert torch.equal(loss.min_action, wide_spec.space.low)
        assert torch.equal(loss.max_action, wide_spec.space.high)

    def test_scalar_bounds(self, make_loss, make_batch):
        loss, same = (seeded(make_loss, **k) for k in ({"bounds": (-1, 1)}, {}))
        batch = make_batch()
        assert_outputs_equal(seeded(loss, batch.clone()), seeded(same, batch.clone()))

    @pytest.mark.parametrize("count", [1, 2, 4])
    def test_lists_of_wrong_length_raise(self, unit_spec, count):
        actors = [make_actor(3, unit_spec, (8,)) for _ in range(count)]
        with pytest.raises(ValueError, match=rf"got {count} actors but needs 3"):
            POGOLoss(actors, make_qvalue(3, 2, (8,)))
        if count != 2:
            qvalues = [make_qvalue(3, 2, (8,)) for _ in range(count)]
            with pytest.raises(ValueError, match=rf"got {count} qvalue_networks but needs 2"):
                POGOLoss(actors[0], qvalues)

    @pytest.mark.parametrize("case", ["width", "depth", "layer", "bounds"])
    def test_actors_of_different_architecture_raise(self, unit_spec, wide_spec, case):
        other = {
            "width": lambda: make_actor(3, unit_spec, (9, 8)),
            "depth": lambda: make_actor(3, unit_spec, (8,)),
            "layer": lambda: TransportActor(make_transport_net(3, 2, (8, 8)), unit_spec),
            "bounds": lambda: make_actor(3, wide_spec, (8, 8)),
        }[case]()
        if case == "layer":
            other.module.mlp[1] = nn.Tanh()
        actors = [make_actor(3, unit_spec, (8, 8)), other]
        with pytest.raises(ValueError, match="actor"):
            POGOLoss(actors, make_qvalue(3, 2, (8,)), w2_weights=(0.2, 0.5))

    def test_critics_of_different_architecture_raise(self, unit_spec):
        qvalues = [make_qvalue(3, 2, (8,)), make_qvalue(3, 2, (8,), layer_norm=True)]
        with pytest.raises(ValueError, match="qvalue_network"):
            POGOLoss(make_actor(3, unit_spec, (8,)), qvalues)

    @pytest.mark.parametrize("repeat", ["single", "same three times", "three"])
    def test_all_actors_start_different(self, unit_spec, repeat):
        actor = make_actor(3, unit_spec, (8,))
        given = {
            "single": actor,
            "same three times": [actor] * 3,
            "three": [make_actor(3, unit_spec, (8,)) for _ in range(3)],
        }[repeat]
        loss = POGOLoss(given, make_qvalue(3, 2, (8,)))
        actors = [torch.stack(each) for each in zip(*map(loss.actor_params, range(3)))]
        for p in [*actors, *loss.qvalue_params()]:
            assert len(p.data.flatten(1).unique(dim=0)) == len(p)
        assert len(actors) == 4
        assert loss.qvalue_network_params.shape == loss.target_qvalue_network_params.shape == (2,)

    def test_passed_actors_keep_their_weights_and_order(self, unit_spec):
        actors = [make_actor(3, unit_spec, (8,)) for _ in range(3)]
        loss = POGOLoss(actors, make_qvalue(3, 2, (8,)))
        s, z = torch.randn(5, 3), torch.randn(5, 2)
        for i, actor in enumerate(actors):
            torch.testing.assert_close(loss.actor(i)(s, z), actor(s, z))

    @pytest.mark.parametrize("several", [False, True])
    def test_passed_actors_share_the_trained_parameters(self, unit_spec, make_batch, several):
        actors = [make_actor(3, unit_spec, (8,)) for _ in range(2)]
        given = actors if several else actors[0]
        loss = POGOLoss(given, make_qvalue(3, 2, (8,)), w2_weights=(0.2, 0.5))
        s, z = torch.randn(5, 3), torch.randn(5, 2)
        before = actors[0](s, z)
        loss.actor_loss(make_batch())[0].backward()
        torch.optim.SGD(loss.parameters(), lr=1.0).step()
        assert not torch.equal(actors[0](s, z), before)
        for i, actor in enumerate(actors if several else actors[:1]):
            assert torch.equal(actor(s, z), loss.actor(i)(s, z))

    def test_a_repeated_actor_gives_independent_actors(self, unit_spec, make_batch):
        loss = POGOLoss([make_actor(3, unit_spec, (8,))] * 3, make_qvalue(3, 2, (8,)))
        before = [loss.actor_params(i)[0].data.clone() for i in range(3)]
        loss.actor_loss(make_batch())[0].backward()
        torch.optim.SGD(loss.parameters(), lr=1.0).step()
        steps = torch.stack([loss.actor_params(i)[0].data - before[i] for i in range(3)])
        assert (steps.flatten(1).norm(dim=1) > 0).all()
        assert len(steps.flatten(1).unique(dim=0)) == 3


class TestTargets:
    @pytest.mark.parametrize("delay_actor", [False, True])
    def test_soft_update_moves_the_targets_without_a_warning(
        self, make_loss, make_batch, delay_actor
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loss = make_loss(delay_actor=delay_actor)
            updater = SoftUpdate(loss, tau=0.25)
            old = {k: v.clone() for k, v in loss.state_dict().items() if k.startswith("target")}
            for p in loss.parameters():
                p.data.add_(1.0)
            loss(make_batch())
            updater.step()
        names = {k.split(".")[0] for k in old}
        assert ("target_actor_network_0_params" in names) == delay_actor
        for key, value in loss.state_dict().items():
            if key in old and key.endswith(("weight", "bias")):
                torch.testing.assert_close(value, old[key] + 0.25)
            elif key in old:  # bounds
                torch.testing.assert_close(value, old[key])

    @pytest.mark.parametrize("delay_actor", [False, True])
    @pytest.mark.parametrize("changed", ["online 0", "online 1", "target 0"])
    def test_the_td_target_uses_actor_0_or_its_copy(
        self, make_loss, make_batch, delay_actor, changed
    ):
        if changed == "target 0" and not delay_actor:
            pytest.skip("no target copy")
        loss, batch = make_loss(delay_actor=delay_actor), make_batch()
        before = seeded(loss.qvalue_loss, batch)[1]["next_state_value"]
        kind, index = changed.split()
        name = f"{'target_' if kind == 'target' else ''}actor_network_{index}_params"
        for key, value in getattr(loss, name).items(True, True):
            if key[-1] == "bias":
                value.data += 3.0
        after = seeded(loss.qvalue_loss, batch)[1]["next_state_value"]
        follows = changed == ("target 0" if delay_actor else "online 0")
        assert (after != before) == follows

    @pytest.mark.parametrize("delay_qvalue", [False, True])
    def test_the_target_values_come_from_the_delayed_critics(
        self, make_loss, make_batch, delay_qvalue
    ):
        loss, batch = make_loss(delay_qvalue=delay_qvalue), make_batch()
        before = seeded(loss.qvalue_loss, batch)[1]
        for p in loss.qvalue_network_params.parameters():
            p.data.add_(1.0)
        after = seeded(loss.qvalue_loss, batch)[1]
        assert (after["next_state_value"] != before["next_state_value"]) == (not delay_qvalue)
        assert after["pred_value"] != before["pred_value"]

    def test_without_delayed_critics_the_targets_carry_no_gradient(self, make_loss, make_batch):
        loss, batch = make_loss(delay_qvalue=False), make_batch()
        value, metadata = loss.qvalue_loss(batch)
        assert not metadata["target_value"].requires_grad
        value.backward()
        assert all(g is not None for g in gradients(loss, "qvalue_network_params"))

    def test_the_target_uses_the_minimum_and_bootstraps_at_time_outs(self, make_loss, make_batch):
        loss, batch = make_loss(), make_batch()  # gamma = 0.9
        set_target_values(loss, 5.0, 2.0)
        target = batch["next", "reward"] + 0.9 * 2.0 * (~batch["next", "terminated"])
        _, metadata = loss.qvalue_loss(batch)
        assert metadata["next_state_value"] == 2.0
        torch.testing.assert_close(metadata["target_value"], target.mean())


class TestValueEstimators:
    @pytest.mark.parametrize("gamma", [0.5, 0.9])
    @pytest.mark.parametrize(
        ("estimator", "lmbda"),
        [
            (None, 0),
            (ValueEstimators.TD0, 0),
            (ValueEstimators.TD1, 1),
            (ValueEstimators.TDLambda, 0.7),
        ],
    )
    def test_targets_of_each_estimator(self, make_loss, make_batch, estimator, lmbda, gamma):
        loss, batch = make_loss(), make_batch(4, 3)
        kwargs = {"lmbda": lmbda} if estimator is ValueEstimators.TDLambda else {}
        assert loss.make_value_estimator(estimator, gamma=gamma, **kwargs) is loss
        set_target_values(loss, 5.0, 2.0)
        reward, going = batch["next", "reward"], 1.0 - batch["next", "terminated"].float()
        cut = batch["next", "done"].clone()
        cut[:, -1] = True  # the trajectory continues outside the batch
        step = torch.zeros(4, 1)
        targets = []
        for t in reversed(range(3)):
            weight = lmbda * ~cut[:, t]
            step = reward[:, t] + gamma * going[:, t] * ((1 - weight) * 2.0 + weight * step)
            targets.append(step)
        _, metadata = loss.qvalue_loss(batch)
        torch.testing.assert_close(metadata["target_value"], torch.stack(targets).mean())

    @pytest.mark.parametrize("as_instance", [False, True])
    def test_an_estimator_class_or_instance_reads_the_keys_of_the_loss(
        self, make_loss, make_batch, as_instance
    ):
        loss, batch = make_loss(), make_batch()
        expected = seeded(loss.qvalue_loss, batch)[0]  # TD(0), gamma 0.9
        if as_instance:
            loss.make_value_estimator(TD0Estimator(gamma=0.9, value_network=None))
        else:
            loss.make_value_estimator(TD0Estimator, gamma=0.9, value_network=None)
        torch.testing.assert_close(seeded(loss.qvalue_loss, batch)[0], expected)

    def test_the_default_is_td0(self, make_loss, make_batch):
        batch = make_batch()
        default, td0 = (seeded(make_loss, seed=2) for _ in range(2))
        default.make_value_estimator(gamma=0.7)
        td0.make_value_estimator(ValueEstimators.TD0, gamma=0.7)
        assert_outputs_equal(seeded(default, batch.clone()), seeded(td0, batch.clone()))

    def test_advantage_estimators_raise(self, make_loss):
        with pytest.raises(NotImplementedError):
            make_loss().make_value_estimator(ValueEstimators.GAE)


class TestPrioritizedReplay:
    def test_td_error_is_the_larger_squared_error_of_each_sample(self, make_loss, make_batch):
        loss, batch = make_loss(), make_batch()
        seeded(loss, batch)
        torch.manual_seed(1)
        loss.actor_loss(batch)  # forward draws the noise of the actors first
        metadata = loss.qvalue_loss(batch)[1]
        assert batch["td_error"].shape == (8,)
        assert not batch["td_error"].requires_grad
        torch.testing.assert_close(batch["td_error"], metadata["td_error"].max(0)[0])

    def test_priority_weights_give_a_weighted_mean(self, make_loss, make_batch):
        loss, batch = make_loss(), make_batch()
        weights = torch.rand(8)
        weighted = seeded(loss, batch.clone().set("priority_weight", weights))
        loss.reduction = "none"
        per_sample = seeded(loss, batch.clone())
        for key in ("loss_actor", "loss_qvalue"):
            expected = (weights * per_sample[key]).sum() / weights.sum()
            torch.testing.assert_close(weighted[key], expected)

    def test_priority_weights_can_be_disabled(self, make_loss, make_batch):
        loss, batch = make_loss(use_prioritized_weights=False), make_batch()
        out = seeded(loss, batch.clone().set("priority_weight", torch.rand(8)))
        assert_outputs_equal(out, seeded(loss, batch.clone()))


class TestChain:
    @pytest.mark.parametrize("length", [1, 5])
    @pytest.mark.parametrize("batch_size", [(8,), (4, 3), (1,)])
    def test_lengths_and_batch_shapes(self, make_loss, make_batch, length, batch_size):
        loss = make_loss(w2_weights=[0.1 * (i + 1) for i in range(length)])
        out = loss(make_batch(*batch_size))
        assert loss.num_actors == length
        assert (out["loss_actor"] + out["loss_qvalue"]).isfinite()
        losses = sum(out[f"actor_loss_{i}"] for i in range(length))
        torch.testing.assert_close(out["loss_actor"].detach(), losses)

    def test_a_single_actor_computes_no_divergence(self, make_loss, make_batch, monkeypatch):
        def fail(*args, **kwargs):
            raise AssertionError

        monkeypatch.setattr("pogo_torchrl.objectives.distances.sinkhorn_divergence", fail)
        assert make_loss(w2_weights=(0.2,))(make_batch())["loss_actor"].isfinite()
        with pytest.raises(AssertionError):
            make_loss()(make_batch())

    @pytest.mark.parametrize("delay_actor", [False, True])
    def test_a_single_actor_and_critic_are_stacked_and_trained(
        self, unit_spec, make_batch, delay_actor
    ):
        actor, qvalue = make_actor(3, unit_spec, (8,)), make_qvalue(3, 2, (8,))
        loss = POGOLoss(
            [actor], qvalue, w2_weights=(0.2,), num_qvalue_nets=1, delay_actor=delay_actor
        ).make_value_estimator(gamma=0.9)
        for params in (loss.qvalue_network_params, loss.target_qvalue_network_params):
            assert params.batch_size == (1,)
        # the networks of a list keep their parameters
        observation = torch.randn(5, 3)
        given = actor(observation, torch.ones(5, 2))
        torch.testing.assert_close(loss.actor(0)(observation, torch.ones(5, 2)), given)
        losses = loss(make_batch())
        (losses["loss_actor"] + losses["loss_qvalue"]).backward()
        parameters = dict(loss.named_parameters())
        assert len(parameters) == 4 + 4
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters.values())

    def test_each_weight_scales_its_own_distance(self, make_loss, make_batch):
        batch = make_batch()
        out = [
            seeded(seeded(make_loss, w2_weights=w, seed=2), batch.clone())
            for w in ((0.2, 0.5), (1.2, 0.5), (0.2, 2.5))
        ]
        for i, (other, extra) in enumerate(((out[1], 1.0), (out[2], 2.0))):
            expected = out[0]["loss_actor"] + extra * out[0][f"w2_{i}" if i else "bc_mse"]
            torch.testing.assert_close(other["loss_actor"], expected)

    def test_the_loss_of_the_chain_is_the_sum_over_actors(self, make_loss, make_batch):
        loss, batch = make_loss(w2_weights=(0.2, 0.3, 0.4)), make_batch()
        total, metadata = seeded(loss.actor_loss, batch)
        torch.manual_seed(1)
        parts = [loss.actor_loss(batch, i) for i in range(3)]
        torch.testing.assert_close(total, sum(value for value, _ in parts))
        assert metadata == {k: v for _, part in parts for k, v in part.items()}

    @pytest.mark.parametrize("batch_size", [(8,), (4, 3)])
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_w2_fraction_keeps_the_mean_of_the_divergence(
        self, make_loss, make_batch, batch_size, reduction
    ):
        loss = make_loss(w2_backend="fast", reduction=reduction)
        batch, half = make_batch(*batch_size), batch_size[0] // 2
        noise = loss.draw_noise(batch, critic=False)
        # The same batch with its halves swapped.
        swapped = torch.cat([batch[half:], batch[:half]])
        swapped_noise = {k: torch.cat([z[half:], z[:half]]) for k, z in noise.items()}

        def terms(fraction, batch, noise):
            loss.w2_fraction = fraction
            rest = loss.params("actor_network_0"), loss.params("qvalue_network"), 0.5, 1.0
            value, found = loss.jko_terms(
                loss.params("actor_network_1"), batch, noise, *rest, index=1
            )
            gradients = torch.autograd.grad(value.mean(), loss.actor_params(1))
            return value.mean(), found["w2_1"], found["q_actor_1"], *gradients

        whole = terms(1.0, batch, noise)
        shares = terms(0.5, batch, noise), terms(0.5, swapped, swapped_noise)
        assert abs(shares[0][1] - shares[1][1]) > 1e-4  # they use different states
        assert_close([(a + b) / 2 for a, b in zip(*shares)], list(whole))

    @pytest.mark.parametrize("index", [-1, 2, 7])
    def test_actor_loss_with_an_invalid_index_raises(self, make_loss, make_batch, index):
        with pytest.raises(IndexError, match=r"0\.\.1"):
            make_loss().actor_loss(make_batch(), index)

    def test_actor_losses_do_not_need_the_next_state(self, make_loss, make_batch):
        loss, batch = make_loss(), make_batch()
        assert loss.actor_loss(batch.exclude("next"))[0].isfinite()
        assert loss.actor_loss(batch.select("observation"), 1)[0].isfinite()

    def test_the_losses_do_not_modify_the_batch(self, make_loss, make_batch):
        loss, batch = make_loss(), make_batch()
        before = batch.clone()
        loss.qvalue_loss(batch)
        loss.actor_loss(batch)
        assert set(batch.keys(True, True)) == set(before.keys(True, True))
        assert (batch == before).all()
        loss(batch)
        assert set(batch.keys(True)) - set(before.keys(True)) == {"td_error"}

    @pytest.mark.parametrize("kind", [None, *ExplorationType])
    def test_losses_draw_noise_for_any_exploration_type(self, make_loss, make_batch, kind):
        loss, batch = make_loss(), make_batch()
        reference = seeded(loss, batch.clone())
        with set_exploration_type(kind):
            out = seeded(loss, batch.clone())
            other = seeded(loss, batch.clone(), seed=2)
        assert_outputs_equal(out, reference)
        for key in ("w2_1", "q_actor_0", "q_actor_1", "next_state_value"):
            assert other[key] != out[key]

    @pytest.mark.parametrize("kind", ["probabilistic", "deterministic"])
    def test_other_torchrl_actors_are_supported(self, unit_spec, make_batch, kind):
        if kind == "probabilistic":
            net = nn.Sequential(MLP(in_features=3, out_features=4, depth=1), NormalParamExtractor())
            actor = ProbabilisticActor(
                TensorDictModule(net, ["observation"], ["loc", "scale"]),
                spec=Composite(action=unit_spec),
                in_keys=["loc", "scale"],
                distribution_class=TanhNormal,
            )
        else:
            net = nn.Sequential(MLP(in_features=3, out_features=2, depth=1), nn.Tanh())
            actor = TensorDictModule(net, ["observation"], ["action"])
        loss = POGOLoss(actor, make_qvalue(3, 2, (8,)), action_spec=unit_spec)
        out = loss(make_batch())
        out["loss_actor"].backward()
        for found in actor_gradients(loss):
            assert all(gradient.abs().sum() > 0 for gradient in found)
        td = loss.actor(-1)(TensorDict({"observation": torch.zeros(4, 3)}, [4]))
        assert td["action"].shape == (4, 2)

    @pytest.mark.parametrize("loss_function", ["l1", "smooth_l1", "l2"])
    def test_loss_functions(self, make_loss, make_batch, loss_function):
        loss, batch = make_loss(loss_function=loss_function), make_batch()
        for p in loss.qvalue_network_params.parameters():
            p.data.zero_()
        set_target_values(loss, 0.0, 0.0)
        function = {"l2": nn.MSELoss(), "l1": nn.L1Loss(), "smooth_l1": nn.SmoothL1Loss()}
        reward = batch["next", "reward"]
        expected = 2 * function[loss_function](reward, torch.zeros_like(reward))
        torch.testing.assert_close(loss.qvalue_loss(batch)[0].detach(), expected)

    @pytest.mark.parametrize("count", [1, 3])
    def test_number_of_critics_with_loop_or_vmap(self, make_loss, make_batch, count):
        batch, out = make_batch(), []
        for deactivate_vmap in (False, True):
            loss = seeded(make_loss, num_qvalue_nets=count, deactivate_vmap=deactivate_vmap)
            out.append(seeded(loss, batch.clone()))
            assert loss.qvalue_network_params.shape == (count,)
        assert_outputs_equal(*out)


class TestActor:
    def test_it_shares_the_trained_parameters(self, make_loss, make_batch):
        loss, s = make_loss(), torch.randn(4, 5, 3)
        policy = loss.actor(1)
        assert isinstance(policy, TransportActor)
        before = policy(s)
        assert before.shape == (4, 5, 2)
        loss(make_batch())["loss_actor"].backward()
        torch.optim.Adam(loss.parameters(), lr=0.1).step()
        after = policy(s)
        assert not torch.equal(after, before)
        assert torch.equal(after, loss.actor(1)(s))
        assert policy.module.mlp[0].weight is loss.actor_params(1)[0]

    def test_each_actor_can_have_its_own_optimizer(self, make_loss, make_batch):
        loss, batch = make_loss(), make_batch()
        optimizers = [torch.optim.Adam(loss.actor_params(i), lr=1e-2) for i in range(2)]
        for index in (1, 0):
            loss.actor_loss(batch, index)[0].backward()
            others = [p.clone() for p in loss.actor_params(1 - index)]
            optimizers[index].step()
            # momentum must not move the other actor
            assert all(map(torch.equal, others, loss.actor_params(1 - index)))
        assert [id(p) for p in loss.actor_params(-1)] == [id(p) for p in loss.actor_params(1)]
        with pytest.raises(IndexError, match=r"0\.\.1"):
            loss.actor_params(2)

    @pytest.mark.parametrize("change", ["cast", "load"])
    def test_it_follows_a_cast_and_assigned_parameters(self, make_loss, change):
        loss, other, s = make_loss(), make_loss(), torch.randn(5, 3)
        policy = loss.actor(1)
        if change == "cast":
            loss.double().float()
            for p in loss.actor_params(1):
                p.data.add_(1.0)
        else:
            loss.load_state_dict(other.state_dict(), assign=True)
        assert torch.equal(policy(s), loss.actor(1)(s))

    def test_it_follows_a_loaded_state_dict(self, make_loss):
        loss, other, s = make_loss(), make_loss(), torch.randn(5, 3)
        policy = loss.actor(0)
        loss.load_state_dict(other.state_dict())
        assert torch.equal(policy(s), other.actor(0)(s))

    def test_a_deepcopy_is_a_snapshot(self, make_loss):
        loss, s = make_loss(), torch.randn(5, 3)
        snapshot = copy.deepcopy(loss.actor(0))
        before = snapshot(s)
        for p in loss.parameters():
            p.data.add_(1.0)
        assert torch.equal(snapshot(s), before)

    def test_acting_between_losses_has_no_side_effects(self, make_loss, make_batch):
        loss, batch = make_loss(), make_batch()
        before = seeded(loss, batch.clone())
        with torch.no_grad():
            loss.actor(0)(batch.clone())
        assert_outputs_equal(seeded(loss, batch.clone()), before)

    def test_negative_indices_count_from_the_end(self, make_loss):
        loss, s = make_loss(), torch.randn(5, 3)
        assert torch.equal(loss.actor(-1)(s), loss.actor(1)(s))
        assert torch.equal(loss.actor(-2)(s), loss.actor(0)(s))
        assert not torch.equal(loss.actor(0)(s), loss.actor(1)(s))

    @pytest.mark.parametrize("index", [2, -3])
    def test_an_invalid_index_raises(self, make_loss, index):
        with pytest.raises(IndexError, match=r"0\.\.1"):
            make_loss().actor(index)


class TestCopiesAndCasts:
    @pytest.mark.parametrize("used", [False, True])
    def test_a_deepcopy_is_equal_and_independent(self, make_loss, make_batch, used):
        loss, batch = make_loss(), make_batch()
        if used:
            loss(batch.clone())
        twin = copy.deepcopy(loss)
        before = seeded(loss, batch.clone())
        assert_outputs_equal(seeded(twin, batch.clone()), before)
        for p in twin.parameters():
            p.data.add_(1.0)
        assert_outputs_equal(seeded(loss, batch.clone()), before)
        fresh = make_loss()
        fresh.load_state_dict(twin.state_dict())
        assert_outputs_equal(seeded(twin, batch.clone()), seeded(fresh, batch.clone()))

    @pytest.mark.parametrize("used", [False, True])
    @pytest.mark.parametrize("delay_qvalue", [False, True])
    def test_a_cast_to_float64(self, make_loss, make_batch, used, delay_qvalue):
        loss, batch = make_loss(delay_actor=True, delay_qvalue=delay_qvalue), make_batch()
        if used:
            loss(batch.clone())
        loss = loss.to(torch.float64)
        double = batch.apply(lambda x: x.double() if x.is_floating_point() else x)
        out = loss(double)
        assert {v.dtype for v in out.values()} == {torch.float64}
        assert loss.min_action.dtype == torch.float64
        (out["loss_actor"] + out["loss_qvalue"]).backward()
        assert loss.actor(0)(double["observation"]).dtype == torch.float64

    @pytest.mark.parametrize("index", [0, 1])
    def test_actor_losses_follow_the_critic(self, make_loss, make_batch, index):
        loss, batch = make_loss(q_normalization=None), make_batch()
        before = seeded(loss.actor_loss, batch, index)[1][f"q_actor_{index}"]
        loss.qvalue_network_params["module", "4", "bias"].data.copy_(torch.tensor([[2.0], [9.0]]))
        loss.qvalue_network_params["module", "4", "weight"].data.zero_()
        assert seeded(loss.actor_loss, batch, index)[1][f"q_actor_{index}"] == 2.0 != before

    def test_repr_and_names(self, make_loss):
        loss = make_loss(delay_actor=True)
        assert "POGOLoss" in repr(loss)
        prefixes = {name.split(".")[0] for name, _ in loss.named_parameters()}
        assert prefixes == set(ALL_PARAMS)
        assert len(list(loss.parameters())) == 18


class TestCompile:
    """Compiled losses have the values and gradients of eager losses."""

    def check(self, loss, batch, method, args, backend, trained=6):
        torch._dynamo.reset()
        eager = getattr(loss, method)
        compiled = torch.compile(eager, backend=backend)
        for _ in range(2):
            results = []
            for function in (eager, compiled):
                loss.zero_grad()
                value, metadata = seeded(function, batch, *args)
                value.backward()
                grads = [p.grad.clone() for p in loss.parameters() if p.grad is not None]
                results.append((value.detach(), metadata, grads))
            assert len(results[0][2]) == trained
            torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)
            for p in loss.parameters():  # the second iteration uses other weights
                p.data.add_(0.01)

    @pytest.mark.parametrize(("method", "args"), [("qvalue_loss", ()), ("actor_loss", (0,))])
    def test_traced(self, make_loss, make_batch, method, args):
        self.check(make_loss(), make_batch(), method, args, "eager")

    @pytest.mark.slow
    @pytest.mark.parametrize("method", ["qvalue_loss", "actor_loss"])
    def test_compiled(self, make_loss, make_batch, method):
        # by default, inductor draws different random numbers than eager code
        with torch._inductor.config.patch(fallback_random=True):
            trained = 12 if method == "actor_loss" else 6
            self.check(make_loss(), make_batch(), method, (), "inductor", trained)


class TestStepSizes:
    def test_weights_follow_from_step_sizes_dimensions_and_alpha(self, make_loss):
        loss = make_loss(step_sizes=(0.5, 0.25, 0.25), alpha=0.5)
        assert loss.num_actors == 3
        assert loss.w2_weights == (0.5, 1.0, 1.0)

    def test_a_single_number_applies_to_all_actors(self, make_loss):
        loss = make_loss(step_sizes=0.5, w2_weights=(0.1, 0.1, 0.1, 0.1))
        assert loss.w2_weights == (1.0, 1.0, 1.0, 1.0)

    @pytest.mark.parametrize("sizes", [0.0, (), (0.5, -1.0), (float("inf"),), "0.5", (None,)])
    def test_invalid_step_sizes(self, make_loss, sizes):
        with pytest.raises(ValueError, match=r"step_sizes=.* must be a positive number, or a seq"):
            make_loss(step_sizes=sizes)

    def test_scalar_bounds_do_not_tell_the_number_of_dimensions(self, unit_spec):
        networks = make_actor(3, unit_spec, (8,)), make_qvalue(3, 2, (8,))
        with pytest.raises(ValueError, match=r"step_sizes depend on .* pass action_spec"):
            POGOLoss(*networks, step_sizes=0.5, bounds=(-1, 1))


class TestChainInit:
    def actors(self, loss):
        return [loss.params(f"actor_network_{i}") for i in range(loss.num_actors)]

    @pytest.mark.parametrize("reset", [False, True])
    def test_copies_start_equal_and_train_apart(self, make_loss, make_batch, reset):
        loss = make_loss(chain_init="copy", w2_weights=(0.2, 0.5, 0.5))
        if reset:
            loss.reset_parameters_recursive()
        first, *others = self.actors(loss)
        for params in others:
            for name, values in params.items():
                assert torch.equal(values, first[name])
                assert values.data_ptr() != first[name].data_ptr()
        loss.actor_loss(make_batch(), 1)[0].backward()
        assert all(p.grad is None for p in loss.actor_params(0))
        assert any(p.grad.abs().max() > 0 for p in loss.actor_params(1))

    def test_independent_actors_differ(self, make_loss):
        first, second = self.actors(make_loss())
        assert any(not torch.equal(values, first[name]) for name, values in second.items())

    def test_an_unknown_choice(self, make_loss):
        with pytest.raises(ValueError, match="chain_init='same'"):
            make_loss(chain_init="same")


class TestDataWeight:
    """The distance term of later actors is a mixture of the divergence and the data term."""

    @pytest.mark.parametrize("w2_fraction", [1.0, 0.5])
    @pytest.mark.parametrize("share", [0.25, 1.0])
    @pytest.mark.parametrize("weights", [None, (8,), (8, 1)])
    def test_the_distance_is_the_mixture(self, make_loss, make_batch, share, w2_fraction, weights):
        """The data term is a mean over the batch, or with trajectory_weights a weighted one."""
        batch, weight = make_batch(), torch.ones(8)
        if weights is not None:
            batch["trajectory_weight"] = weight = torch.rand(weights)
        plain = make_loss(w2_fraction=w2_fraction)
        mixed = make_loss(
            w2_fraction=w2_fraction, data_weight=share, trajectory_weights=weights is not None
        )
        mixed.load_state_dict(plain.state_dict())
        noise = plain.draw_noise(batch)
        arguments = (
            plain.params("actor_network_1"), batch, noise, plain.params("actor_network_0"),
            plain.params("qvalue_network"), 0.5, 1.0,
        )  # fmt: skip
        loss, found = plain.jko_terms(*arguments, index=1)
        expected, got = found, mixed.jko_terms(*arguments, index=1)
        inputs = batch.select("observation")
        action = plain.actor(1)(inputs.set("noise", noise["actor_1"][:, 0]))["action"]
        to_data = (weight.reshape(8) * (action - batch["action"]).square().mean(-1)).mean()
        distance = (1 - share) * expected["w2_1"] + share * to_data
        torch.testing.assert_close(got[1]["w2_1"], distance.detach())
        torch.testing.assert_close(got[0], loss + 0.5 * (distance - expected["w2_1"]))

    def test_with_all_weight_the_previous_actor_does_not_matter(self, make_loss, make_batch):
        loss, batch = make_loss(data_weight=1.0), make_batch()
        gradients = []
        for _ in range(2):
            torch.manual_seed(1)
            loss.actor_loss(batch, 1)[0].backward()
            gradients.append([p.grad.clone() for p in loss.actor_params(1)])
            for p in loss.actor_params(1):
                p.grad = None
            for p in loss.actor_params(0):
                p.data.add_(1.0)
        for first, second in zip(*gradients):
            torch.testing.assert_close(first, second)

    def test_later_actors_need_the_actions_of_the_data(self, make_loss, make_batch):
        batch = make_batch().exclude("action")
        make_loss().actor_loss(batch, 1)
        with pytest.raises(KeyError, match="action"):
            make_loss(data_weight=0.5).actor_loss(batch, 1)


class TestTargetOptions:
    """``target_action`` and ``critic_bc_weight`` against the equations of their docstrings."""

    @pytest.fixture
    def values(self, wide_spec, make_loss, make_batch):
        """The target value of a loss, and its parts, for fixed noise."""

        def values(bounds=wide_spec, **settings):
            torch.manual_seed(0)
            loss = make_loss(bounds, policy_noise=1.0, num_qvalue_nets=3, **settings)
            batch = make_batch(spec=bounds)
            batch["next", "action"] = bounds.rand(batch.batch_size)
            batch["next", "action"][3] = math.nan
            noise = loss.draw_noise(batch)
            state, low, high = batch["next"], loss.min_action, loss.max_action
            inputs = state.select("observation").set("noise", noise["target"])
            clean = loss.actor(0)(inputs)["action"]
            moved = clean + (high - low) / 2 * noise["smoothing"].clamp(-0.5, 0.5)
            noisy = torch.maximum(torch.minimum(moved, high), low)
            target = loss.params("target_qvalue_network")
            q_noisy, q_clean = (loss._qvalues(target, state, a) for a in (noisy, clean))
            got, _ = loss._target_value(batch, noise, loss.params("actor_network_0"), target)
            return batch, got, noisy, q_noisy, q_clean

        return values

    def target(self, batch, next_value):
        alive = 1 - batch["next", "terminated"].float().squeeze(-1)
        return batch["next", "reward"].squeeze(-1) + 0.9 * alive * next_value

    def test_the_minimum_is_over_critics_and_both_actions(self, values):
        batch, got, _, q_noisy, q_clean = values(target_action="min_clean_noisy")
        smallest = torch.cat([q_noisy, q_clean]).amin(0)
        alive = ~batch["next", "terminated"].squeeze(-1)
        assert (smallest < q_noisy.amin(0))[alive].any()
        assert (smallest < q_clean.amin(0))[alive].any()
        assert_close(got, self.target(batch, smallest))
        batch, got, _, q_noisy, _ = values()
        assert_close(got, self.target(batch, q_noisy.amin(0)))

    def test_the_penalty_is_the_squared_distance_in_the_unit_box(self, values, wide_spec):
        batch, got, noisy, q_noisy, _ = values(critic_bc_weight=0.7)
        half_range = (wide_spec.space.high - wide_spec.space.low) / 2
        penalty = ((noisy - batch["next", "action"]) / half_range).square().sum(-1)
        assert penalty.isnan().tolist() == [i == 3 for i in range(8)]
        penalty[3] = 0.0  # no next action
        assert_close(got, self.target(batch, q_noisy.amin(0) - 0.7 * penalty))

    def test_a_batch_without_next_actions(self, make_loss, make_batch):
        batch = make_batch()
        loss = make_loss(critic_bc_weight=0.5)
        assert ("next", "action") in loss.in_keys
        assert ("next", "action") not in make_loss().in_keys
        with pytest.raises(KeyError, match=r"critic_bc_weight.*'next', 'action'.*next_action=True"):
            loss.qvalue_loss(batch)
        loss.actor_loss(batch)  # the actors do not need it
        batch["next", "action"] = torch.zeros(8, 3)
        with pytest.raises(ValueError, match=r"\(8, 3\).*\(8, 2\)"):
            loss.qvalue_loss(batch)
        loss.set_keys(action="act")
        assert ("next", "act") in loss.in_keys


@pytest.mark.parametrize("deactivate_vmap", [False, True])
def test_the_mean_over_critics_in_the_losses_of_the_actors(make_loss, make_batch, deactivate_vmap):
    loss = make_loss(num_qvalue_nets=3, actor_q="mean", deactivate_vmap=deactivate_vmap)
    batch, critics = make_batch(), loss.params("qvalue_network")
    for i in range(2):
        torch.manual_seed(2)
        total, found = loss.actor_loss(batch, i)
        torch.manual_seed(2)
        noise = loss.draw_noise(batch, critic=False, actors=(i,))[f"actor_{i}"]
        inputs = batch.select("observation").set("noise", noise if i == 0 else noise[:, 0])
        q = loss._qvalues(critics, batch, loss.actor(i)(inputs)["action"]).mean(0)
        assert_close(found[f"q_actor_{i}"], q.mean().detach())
        assert_close(found[f"lmbd_{i}"], 1 / q.detach().abs().mean())
        distance = found["w2_1" if i else "bc_mse"]
        expected = -q.mean() * found[f"lmbd_{i}"] + loss.w2_weights[i] * distance
        assert_close(total, expected)
        total.backward()
        assert all(p.grad is None for p in loss.qvalue_params())


class TestAdvantageTemperature:
    def test_the_distance_of_actor_0_is_weighted(self, wide_spec, make_loss, make_batch):
        loss = make_loss(wide_spec, advantage_temperature=0.3)
        batch = make_batch(spec=wide_spec)
        torch.manual_seed(2)
        total, found = loss.actor_loss(batch, 0)
        gradient = torch.autograd.grad(total, loss.actor_params(0))
        torch.manual_seed(2)
        noise = loss.draw_noise(batch, critic=False, actors=(0,))["actor_0"]
        action = loss.actor(0)(batch.select("observation").set("noise", noise))["action"]
        critics = loss.params("qvalue_network")
        q_data, q_policy = (loss._qvalues(critics, batch, a) for a in (batch["action"], action))
        advantage = (q_data.amin(0) - q_policy.amin(0)) / q_policy.amin(0).abs().mean()
        weights = (advantage / 0.3).exp().clamp_max(10)
        weights = (weights / weights.mean()).detach()
        assert weights.std() > 0.01
        half_range = (wide_spec.space.high - wide_spec.space.low) / 2
        distances = ((action - batch["action"]) / half_range).square().mean(-1)
        assert_close(found["bc_mse"], (weights * distances).mean().detach())
        expected = -q_policy[0].mean() * found["lmbd_0"] + 0.2 * (weights * distances).mean()
        assert_close(total, expected)
        assert_close(gradient, torch.autograd.grad(expected, loss.actor_params(0)))

    def test_other_losses_and_random_draws_are_unchanged(self, make_loss, make_batch):
        plain, weighted = make_loss(), make_loss(advantage_temperature=0.3)
        weighted.load_state_dict(plain.state_dict())
        batch = make_batch()
        first, second = (seeded(loss, batch.clone()) for loss in (plain, weighted))
        changed = {key for key in first.keys() if not torch.equal(first[key], second[key])}  # noqa: SIM118
        assert changed == {"loss_actor", "actor_loss_0", "bc_mse"}

    def test_actors_that_draw_their_own_noise(self, make_batch, unit_spec):
        network = nn.Sequential(MLP(in_features=3, out_features=4), NormalParamExtractor())
        actor = ProbabilisticActor(
            TensorDictModule(network, ["observation"], ["loc", "scale"]),
            in_keys=["loc", "scale"],
            distribution_class=TanhNormal,
            spec=unit_spec,
        )
        settings = {"action_spec": unit_spec, "w2_weights": (0.2,)}
        loss = POGOLoss(actor, make_qvalue(3, 2), advantage_temperature=0.3, **settings)
        plain = POGOLoss(actor, make_qvalue(3, 2), **settings)
        plain.load_state_dict(loss.state_dict())
        batch = make_batch()
        found = [seeded(one.actor_loss, batch, 0)[1] for one in (loss, plain)]
        assert_close(found[0]["q_actor_0"], found[1]["q_actor_0"], rtol=0, atol=0)
        assert found[0]["bc_mse"] != found[1]["bc_mse"]
