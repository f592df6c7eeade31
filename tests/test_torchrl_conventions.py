"""Conventions of TorchRL's losses, checked on POGOLoss and on TorchRL's own TD3BCLoss alike.

What holds for both is what a user of TorchRL may rely on; ``TestDifferences`` lists the rest.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from tensordict import TensorDict, unravel_key_list
from tensordict.nn import TensorDictModule
from torch import nn
from torch.testing import assert_close
from torchrl.data import Bounded, Composite
from torchrl.data.postprocs import MultiStep
from torchrl.modules import MLP, ValueOperator
from torchrl.objectives import HardUpdate, SoftUpdate, TD3BCLoss
from torchrl.objectives.utils import ValueEstimators

from pogo_torchrl import POGOLoss, TransportActor, make_actor, make_qvalue
from pogo_torchrl.modules import make_transport_net

SUPPORTED = (ValueEstimators.TD0, ValueEstimators.TD1, ValueEstimators.TDLambda)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

pytestmark = pytest.mark.filterwarnings("ignore:No target network updater")


def spec() -> Bounded:
    return Bounded(low=-torch.ones(2), high=torch.ones(2))


class Guest:
    """A loss of one class and how it names its networks."""

    def __init__(self, kind: type) -> None:
        self.kind = kind
        count = 3 if kind is POGOLoss else 1
        names = [f"actor_network_{i}" for i in range(count)] if count > 1 else ["actor_network"]
        self.actors = [f"{name}_params" for name in names]
        self.networks = [*self.actors, "qvalue_network_params"]
        self.targets = [f"target_{self.actors[0]}", "target_qvalue_network_params"]

    def make(self, actor=None, qvalue=None, **settings):
        settings.setdefault("action_spec", None if "bounds" in settings else spec())
        return self.kind(
            make_actor(3, spec(), (8,)) if actor is None else actor,
            make_qvalue(3, 2, (8,)) if qvalue is None else qvalue,
            **settings,
        )

    def tensors(self, loss) -> dict[str, torch.Tensor]:
        """Copies of all parameters, targets and buffers."""
        return {name: value.clone() for name, value in loss.state_dict().items()}


@pytest.fixture(params=[TD3BCLoss, POGOLoss], ids=["TD3BC", "POGO"])
def guest(request):
    return Guest(request.param)


def seeded(function, *args, **kwargs):
    torch.manual_seed(1)
    return function(*args, **kwargs)


def sum_of_losses(out: TensorDict) -> torch.Tensor:
    """What TorchRL's trainer minimises."""
    return sum(value.sum() for key, value in out.items() if key.startswith("loss"))


def flat(batch: TensorDict) -> dict[str, torch.Tensor]:
    """Keyword arguments of a loss that is called without a tensordict."""
    return {"_".join(k) if isinstance(k, tuple) else k: v for k, v in batch.items(True, True)}


def assert_same(a: TensorDict, b: TensorDict) -> None:
    assert_close(a.to_dict(), b.to_dict())


def cast(batch: TensorDict, dtype: torch.dtype) -> TensorDict:
    return batch.apply(lambda x: x.to(dtype) if x.is_floating_point() else x)


class TestForward:
    @pytest.mark.parametrize("estimator", [None, *SUPPORTED])
    @pytest.mark.parametrize("delay_actor", [False, True])
    @pytest.mark.parametrize("delay_qvalue", [False, True])
    @pytest.mark.parametrize("deactivate_vmap", [False, True])
    def test_each_loss_trains_its_own_networks(
        self, guest, make_batch, estimator, delay_actor, delay_qvalue, deactivate_vmap
    ):
        loss = guest.make(
            delay_actor=delay_actor, delay_qvalue=delay_qvalue, deactivate_vmap=deactivate_vmap
        )
        if estimator is not None:
            loss.make_value_estimator(estimator)
        batch = make_batch(4, 3)
        before = batch.clone()
        out = loss(batch)
        assert_same(batch.exclude("td_error"), before)
        assert batch["td_error"].shape == (4, 3)
        assert {key for key in out.keys() if key.startswith("loss")} == {  # noqa: SIM118
            "loss_actor",
            "loss_qvalue",
        }
        owned = {"loss_actor": guest.actors, "loss_qvalue": ["qvalue_network_params"]}
        for key, networks in owned.items():
            loss.zero_grad(set_to_none=True)
            out[key].backward(retain_graph=True)
            for name, parameter in loss.named_parameters():
                trained = name.split(".")[0] in networks
                assert (parameter.grad is not None and bool(parameter.grad.any())) == trained, name
        loss.zero_grad(set_to_none=True)
        sum_of_losses(out).backward()
        assert all(p.grad.norm() > 0 for p in loss.parameters())

    @pytest.mark.parametrize("reduction", [None, "none", "mean", "sum"])
    def test_reduction(self, guest, make_batch, reduction):
        loss, plain = (seeded(guest.make, reduction=r) for r in (reduction, "none"))
        batch = make_batch()
        out, each = (seeded(one, batch.clone()) for one in (loss, plain))
        for key in ("loss_actor", "loss_qvalue"):
            assert each[key].shape == (8,)
            expected = {"none": each[key], "sum": each[key].sum()}
            assert_close(out[key], expected.get(reduction, each[key].mean()))

    def test_the_losses_of_all_actors_count_once(self, make_batch):
        for reduction in ("mean", "sum", "none"):
            out = Guest(POGOLoss).make(reduction=reduction)(make_batch())
            parts = sum(out[f"actor_loss_{i}"] for i in range(3))
            whole = out["loss_actor"].mean() if reduction == "none" else out["loss_actor"]
            assert_close(whole.detach(), parts)
            expected = (out["loss_actor"] + out["loss_qvalue"]).sum()
            assert_close(sum_of_losses(out), expected)

    def test_dropout_in_the_critics(self, guest, make_batch):
        net = MLP(in_features=5, out_features=1, num_cells=[16], dropout=0.5)
        qvalue = ValueOperator(net, in_keys=["observation", "action"])
        loss, batch = guest.make(qvalue=qvalue), make_batch()
        values = [seeded(loss.qvalue_loss, batch)[0], loss.qvalue_loss(batch)[0]]
        assert values[0] != values[1]
        assert values[0] == seeded(loss.qvalue_loss, batch)[0]

    def test_only_one_of_spec_and_bounds(self, guest, make_batch):
        with pytest.raises(ValueError, match="bounds"):
            guest.make(bounds=(-1.0, 1.0), action_spec=spec())
        loss, same = seeded(guest.make, bounds=(-1.0, 1.0)), seeded(guest.make)
        batch = make_batch()
        assert_same(seeded(loss, batch.clone()), seeded(same, batch.clone()))

    @pytest.mark.parametrize("steps", [1, 2, 3])
    def test_multi_step_targets(self, guest, make_batch, steps):
        batch = make_batch(4, 5)
        batch["next", "done"][:] = batch["next", "terminated"][:] = False
        loss = guest.make()
        loss.make_value_estimator(gamma=0.5)
        for params in (loss.target_qvalue_network_params, loss.qvalue_network_params):
            params.data.zero_()
            params.data["module", "2", "bias"].fill_(3.0)
        batch["collector", "traj_ids"] = torch.arange(4)[:, None].expand(4, 5)
        found = MultiStep(gamma=0.5, n_steps=steps)(batch)
        target = loss.qvalue_loss(found)[1]["target_value"]
        reward = batch["next", "reward"][..., 0]
        expected = torch.zeros(4, 5)
        for t in range(5):
            ahead = min(steps, 5 - t)
            expected[:, t] = sum(0.5**k * reward[:, t + k] for k in range(ahead))
            expected[:, t] += 0.5**ahead * 3.0
        assert_close(target.mean(), expected.mean())


class TestValueEstimators:
    @pytest.mark.parametrize("estimator", [*ValueEstimators, "td0", "td1", "tdlambda", "gae"])
    def test_each_works_or_is_refused_with_a_sentence(self, guest, make_batch, estimator):
        loss, batch = guest.make(), make_batch(2, 4)
        names = {"td0": "TD0", "td1": "TD1", "tdlambda": "TDLambda", "gae": "GAE"}
        member = ValueEstimators[names[estimator]] if estimator in names else estimator
        if member in SUPPORTED:
            loss.make_value_estimator(estimator, gamma=0.9)
            assert loss.qvalue_loss(batch)[0].isfinite()
        else:
            with pytest.raises(NotImplementedError) as refused:
                loss.make_value_estimator(estimator, gamma=0.9)
            if guest.kind is POGOLoss:
                supported = r"not implemented for loss POGOLoss.*'TD0', 'TD1', 'TDLambda'"
                assert refused.match(supported)


DEFAULTS = {
    "action": "action",
    "state_action_value": "state_action_value",
    "priority": "td_error",
    "reward": "reward",
    "done": "done",
    "terminated": "terminated",
    "priority_weight": "priority_weight",
}


def defaults(loss):
    """Keys of TorchRL's losses, and the only one that POGOLoss adds."""
    own = {"trajectory_weight": "trajectory_weight"} if isinstance(loss, POGOLoss) else {}
    return DEFAULTS | own


class TestKeys:
    def test_defaults(self, guest):
        loss = guest.make()
        assert vars(loss.tensor_keys) == defaults(loss)
        with pytest.raises(ValueError, match="unknown_key is not an accepted tensordict key"):
            loss.set_keys(unknown_key="other")

    @pytest.mark.parametrize("new", ["other", ("some", "other")])
    @pytest.mark.parametrize("name", DEFAULTS)
    def test_each_key_can_be_set_and_reset(self, guest, name, new):
        loss = guest.make()
        before = list(loss.in_keys)
        loss.set_keys(**{name: new})
        assert vars(loss.tensor_keys) == {**defaults(loss), name: new}
        loss.set_keys(**{name: None})
        assert vars(loss.tensor_keys) == defaults(loss)
        assert set(loss.in_keys) == set(before)

    @pytest.mark.parametrize("estimator", SUPPORTED)
    @pytest.mark.parametrize("set_first", [False, True])
    def test_the_estimator_gets_the_keys(self, guest, estimator, set_first):
        loss = guest.make()
        names = {"state_action_value": "value", "reward": "gain", "done": "over"}
        if set_first:
            loss.set_keys(**names)
        loss.make_value_estimator(estimator)
        loss.set_keys(**names, terminated="dead")
        keys = loss.value_estimator.tensor_keys
        assert (keys.value, keys.reward, keys.done, keys.terminated) == (
            *names.values(),
            "dead",
        )

    @pytest.mark.parametrize("done", ["done", "over"])
    @pytest.mark.parametrize("reward", ["reward", ("agent", "gain")])
    @pytest.mark.parametrize("observation", ["observation", ("agent", "view")])
    def test_without_a_tensordict(self, guest, make_batch, observation, reward, done):
        net = make_transport_net(3, 2, (8,))
        actor = TransportActor(net, spec(), in_keys=[observation])
        critic = make_qvalue(3, 2, (8,)).module
        qvalue = ValueOperator(critic, in_keys=[observation, "action"])
        loss = guest.make(actor, qvalue)
        loss.set_keys(reward=reward, done=done)
        batch = make_batch()
        for old, new in {"observation": observation, "reward": reward, "done": done}.items():
            if old == "observation":
                batch.rename_key_(old, new)
            batch.rename_key_(("next", old), ("next", *((new,) if isinstance(new, str) else new)))
        assert set(unravel_key_list(loss.in_keys)) == set(batch.keys(True, True))
        expected = seeded(loss, batch.clone())
        values = seeded(loss, **flat(batch))
        assert len(values) == len(loss.out_keys)
        for key, value in zip(loss.out_keys, values):
            assert_close(value, expected[key])
        loss.select_out_keys("loss_qvalue", "loss_actor")
        assert loss.out_keys == ["loss_qvalue", "loss_actor"]
        chosen = seeded(loss, **flat(batch))
        assert_close(chosen, (expected["loss_qvalue"], expected["loss_actor"]))

    def test_selected_out_keys(self, guest, make_batch):
        loss = guest.make()
        every = list(loss.out_keys)
        assert set(loss(make_batch()).keys()) == set(every)
        with pytest.raises(ValueError, match="non existent key: nothing"):
            loss.select_out_keys("nothing")
        loss.select_out_keys("loss_actor")
        assert set(loss(make_batch()).keys()) == {"loss_actor"}
        loss.reset_out_keys()
        assert loss.out_keys == every

    @pytest.mark.parametrize("end", ["done", "terminated"])
    def test_one_of_done_and_terminated_is_enough(self, guest, make_batch, end):
        batch = make_batch()
        loss = guest.make()
        found = seeded(loss, batch.exclude(("next", end)))
        both = batch.clone()
        other = "done" if end == "terminated" else "terminated"
        both["next", end] = both["next", other].clone()
        assert_same(found, seeded(loss, both))
        without = {k: v for k, v in flat(batch).items() if k != f"next_{end}"}
        assert_close(seeded(loss, **without)[0], found["loss_actor"])

    def test_nested_keys_in_and_out(self, guest, make_batch):
        action, value = ("agent", "action"), ("agent", "value")
        actor = TransportActor(
            make_transport_net(3, 2, (8,)),
            Composite(agent=Composite(action=spec())),
            in_keys=[("agent", "view")],
            out_keys=[action],
        )
        critic = make_qvalue(3, 2, (8,)).module
        qvalue = ValueOperator(critic, in_keys=[("agent", "view"), action], out_keys=[value])
        loss = guest.make(actor, qvalue)
        names = ["action", "state_action_value", "reward", "done", "terminated", "priority"]
        loss.set_keys(**{name: ("agent", name) for name in names}, priority_weight="w")
        loss.set_keys(state_action_value=value)
        plain = make_batch()
        batch = TensorDict({"agent": plain.exclude("next"), "next": {"agent": plain["next"]}}, [8])
        for root in ((), ("next",)):
            batch.rename_key_((*root, "agent", "observation"), (*root, "agent", "view"))
        assert set(unravel_key_list(loss.in_keys)) == set(batch.keys(True, True))
        out = seeded(loss, batch)
        sum_of_losses(out).backward()
        assert all(p.grad.norm() > 0 for p in loss.parameters())
        assert batch["agent", "priority"].shape == (8,)
        weighted = batch.clone().set("w", torch.arange(8.0))
        assert seeded(loss, weighted)["loss_qvalue"] != out["loss_qvalue"]


class TestParameters:
    def test_reset_parameters_recursive(self, guest):
        loss = guest.make(delay_actor=True)
        for values in loss.state_dict().values():
            if values.is_floating_point() and values.dim():
                values.add_(1000)
        before = guest.tensors(loss)
        loss.reset_parameters_recursive()
        for name, value in loss.state_dict().items():
            if name.endswith(("weight", "bias")):
                assert (value != before[name]).all(), name
                assert value.abs().max() < 100

    @pytest.mark.parametrize("delay_actor", [False, True])
    @pytest.mark.parametrize("delay_qvalue", [False, True])
    def test_names_and_targets(self, guest, delay_actor, delay_qvalue):
        loss = guest.make(delay_actor=delay_actor, delay_qvalue=delay_qvalue)
        named = dict(loss.named_parameters())
        assert [id(p) for p in named.values()] == [id(p) for p in loss.parameters()]
        assert len({id(p) for p in named.values()}) == len(named)
        assert len({p.data_ptr() for p in named.values()}) == len(named)
        assert {name.split(".")[0] for name in named} == set(guest.networks)
        assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in named.values())
        saved = {name.split(".")[0] for name in loss.state_dict()}
        assert {name in saved for name in guest.targets} <= {delay_actor, delay_qvalue}
        for name, delayed in zip(guest.targets, (delay_actor, delay_qvalue)):
            assert (name in saved) == delayed
            online = getattr(loss, name.removeprefix("target_"))
            for key, target in getattr(loss, name).items(True, True):
                assert not target.requires_grad
                assert (target.data_ptr() == online[key].data_ptr()) == (not delayed)

    @pytest.mark.parametrize("delay_actor", [False, True])
    @pytest.mark.parametrize("delay_qvalue", [False, True])
    def test_state_dict_round_trip(self, guest, make_batch, delay_actor, delay_qvalue):
        settings = {"delay_actor": delay_actor, "delay_qvalue": delay_qvalue}
        loss, other = guest.make(**settings), guest.make(**settings)
        batch = make_batch()
        optimizer = torch.optim.SGD(loss.parameters(), 0.1)
        sum_of_losses(loss(batch.clone())).backward()
        optimizer.step()  # the targets now differ from the networks
        other(batch.clone())
        assert other.load_state_dict(loss.state_dict()) == ([], [])
        assert_same(seeded(loss, batch.clone()), seeded(other, batch.clone()))

    def test_the_module_that_was_passed_in_is_trained(self, guest, make_batch):
        actor, qvalue = make_actor(3, spec(), (8,)), make_qvalue(3, 2, (8,))
        loss = guest.make(actor, qvalue)
        held = {id(p) for p in getattr(loss, guest.actors[0]).parameters()}
        assert {id(p) for p in actor.parameters()} == held
        before = [p.clone() for p in actor.parameters()]
        sum_of_losses(loss(make_batch())).backward()
        torch.optim.SGD(loss.parameters(), 1.0).step()
        assert not any(map(torch.equal, before, actor.parameters()))

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("used", [False, True])
    def test_to(self, guest, make_batch, device, dtype, used):
        loss, batch = guest.make(delay_actor=True), make_batch()
        if used:
            loss(batch.clone())
        assert loss.to(device, dtype) is loss
        floating = [v for v in loss.state_dict().values() if v.is_floating_point() and v.dim()]
        assert {(v.dtype, v.device.type) for v in floating} == {(dtype, device)}
        out = loss(cast(batch, dtype).to(device))
        sum_of_losses(out).backward()
        assert {p.grad.dtype for p in loss.parameters()} == {dtype}
        SoftUpdate(loss, tau=0.5).step()

    @pytest.mark.parametrize("used", [False, True])
    @pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
    def test_copies(self, guest, make_batch, how, used):
        if guest.kind is TD3BCLoss and how != "deepcopy":
            pytest.skip("TD3BCLoss cannot be pickled")
        loss, batch = guest.make(delay_actor=True), make_batch()
        if used:
            sum_of_losses(loss(batch.clone())).backward()
        if how == "deepcopy":
            twin = copy.deepcopy(loss)
        elif how == "pickle":
            twin = pickle.loads(pickle.dumps(loss))
        else:
            file = io.BytesIO()
            torch.save(loss, file)
            file.seek(0)
            twin = torch.load(file, weights_only=False)
        before = seeded(loss, batch.clone())
        assert_same(seeded(twin, batch.clone()), before)
        with torch.no_grad():
            for p in twin.parameters():
                p.add_(1.0)
        assert_same(seeded(loss, batch.clone()), before)
        assert not torch.equal(seeded(twin, batch.clone())["loss_actor"], before["loss_actor"])


class TestUpdaters:
    @pytest.mark.parametrize(("delay_actor", "delay_qvalue"), [(True, False), (False, True)])
    @pytest.mark.parametrize("settings", [{"tau": 0.25}, {"eps": 0.75}])
    def test_soft_update(self, guest, delay_actor, delay_qvalue, settings):
        loss = guest.make(delay_actor=delay_actor, delay_qvalue=delay_qvalue)
        updater = SoftUpdate(loss, **settings)
        name = guest.targets[0 if delay_actor else 1]
        target, online = (getattr(loss, n) for n in (name, name.removeprefix("target_")))
        before = target.data.clone()
        with torch.no_grad():
            for p in loss.parameters():
                p.add_(1.0)
        updater.step()
        for key, value in target.data.items(True, True):
            if key[-1] in ("weight", "bias"):
                assert_close(value, 0.75 * before[key] + 0.25 * online.data[key])

    def test_hard_update(self, guest):
        loss = guest.make(delay_actor=True)
        updater = HardUpdate(loss, value_network_update_interval=2)
        with torch.no_grad():
            for p in loss.parameters():
                p.add_(1.0)
        for copied in (False, False, True):  # TorchRL copies once the interval has passed
            updater.step()
            for name in guest.targets:
                online = getattr(loss, name.removeprefix("target_")).data
                key = next(k for k in online.keys(True, True) if k[-1] == "weight")
                assert torch.equal(getattr(loss, name).data[key], online[key]) == copied

    def test_a_forgotten_updater_is_reported(self, guest, make_batch):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserWarning, match="No target network updater"):
                guest.make()(make_batch())
            loss = guest.make()
            SoftUpdate(loss, tau=0.1)
            loss(make_batch())

    def test_without_targets_there_is_nothing_to_update(self, guest):
        loss = guest.make(delay_actor=False, delay_qvalue=False)
        with pytest.raises(RuntimeError, match="Did not find any target parameters"):
            SoftUpdate(loss, tau=0.1)


class TestPriorities:
    def test_td_errors_and_weights(self, guest, make_batch):
        loss, batch = guest.make(), make_batch()
        seeded(loss, batch)
        assert (batch["td_error"] >= 0).all()
        assert not batch["td_error"].requires_grad
        loss.reduction = "none"
        each = seeded(loss, batch.clone())["loss_qvalue"]
        loss.reduction = "mean"
        weights = torch.rand(8)
        weighted = seeded(loss, batch.clone().set("priority_weight", weights))["loss_qvalue"]
        assert_close(weighted, (weights * each).sum() / weights.sum())
        loss.use_prioritized_weights = False
        plain = seeded(loss, batch.clone().set("priority_weight", weights))["loss_qvalue"]
        assert_close(plain, each.mean())


class TestPadding:
    @pytest.mark.parametrize("shape", [(4, 3), (4, 3, 1)])
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_padded_steps_do_not_count(self, guest, make_batch, reduction, shape):
        loss, each = (seeded(guest.make, reduction=r) for r in (reduction, "none"))
        batch = make_batch(4, 3)
        values = seeded(each.qvalue_loss, batch)[0]
        valid = (torch.arange(12) % 3 < 2).view(4, 3)
        batch["collector", "mask"] = valid.view(shape)
        expected = {
            "mean": values[valid].mean(),
            "sum": values[valid].sum(),
            "none": values * valid,
        }
        assert_close(seeded(loss.qvalue_loss, batch)[0], expected[reduction])
        sum_of_losses(loss(batch)).backward()
        assert all(p.grad.isfinite().all() for p in loss.parameters())


class TestDifferences:
    """Where POGOLoss deliberately does not do what TD3BCLoss does."""

    def test_actors_and_critics_do_not_share_layers(self):
        """There is no separate_losses."""
        with pytest.raises(TypeError, match="separate_losses"):
            Guest(POGOLoss).make(separate_losses=True)

    def test_metrics_are_scalars(self, make_batch):
        """Means over the batch, of which a trainer can log every one."""
        out = Guest(POGOLoss).make()(make_batch())
        assert {value.shape for value in out.values()} == {()}
        assert len(Guest(TD3BCLoss).make()(make_batch())["pred_value"].shape) == 2

    def test_losses_sample_actions(self, make_batch):
        """TD3BCLoss acts deterministically; a transport map would then ignore its noise."""
        batch = make_batch()
        for kind, random in ((POGOLoss, True), (TD3BCLoss, False)):
            loss = Guest(kind).make(policy_noise=0.0)
            values = [loss.actor_loss(batch)[0] for _ in range(2)]
            assert (values[0] != values[1]) == random

    def test_the_actor_of_the_target_is_not_delayed_by_default(self):
        assert not Guest(POGOLoss).make().delay_actor
        assert Guest(TD3BCLoss).make().delay_actor

    def test_wrong_shapes_are_refused(self, make_batch):
        """A reward of shape [B] would broadcast against values of shape [B, 1]."""
        batch = make_batch()
        batch["next", "reward"] = batch["next", "reward"].squeeze(-1)
        with pytest.raises(ValueError, match=r"must be \(8, 1\)"):
            Guest(POGOLoss).make()(batch)

    def test_a_loss_can_be_pickled(self):
        """TD3BCLoss holds a local function."""
        assert isinstance(pickle.loads(pickle.dumps(Guest(POGOLoss).make())), POGOLoss)
        with pytest.raises(AttributeError, match="pickle"):
            pickle.dumps(Guest(TD3BCLoss).make())

    def test_a_nested_key_of_the_weights(self, make_batch):
        """TD3BCLoss raises in tensordict."""
        loss, batch = Guest(POGOLoss).make(), make_batch()
        plain = seeded(loss, batch.clone())["loss_qvalue"]
        loss.set_keys(priority_weight=("replay", "weight"))
        batch["replay", "weight"] = torch.arange(8.0)
        assert seeded(loss, batch)["loss_qvalue"] != plain

    def test_a_composite_spec(self):
        """The action is looked up in it, whatever its key; TD3BCLoss finds "action" only."""
        actor = TransportActor(
            make_transport_net(3, 2, (8,)),
            Composite(agent=Composite(action=spec())),
            out_keys=[("agent", "action")],
        )
        loss = Guest(POGOLoss).make(actor, action_spec=None)
        assert torch.equal(loss.max_action, torch.ones(2))

    def test_a_plain_module_as_actor(self, make_batch):
        """Both accept deterministic actors."""
        for kind in (POGOLoss, TD3BCLoss):
            net = nn.Sequential(nn.Linear(3, 2), nn.Tanh())
            actor = TensorDictModule(net, ["observation"], ["action"])
            sum_of_losses(Guest(kind).make(actor)(make_batch())).backward()
