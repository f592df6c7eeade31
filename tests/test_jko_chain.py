"""JKOChain: a chain on top of TorchRL's actor-critic losses, which it leaves as they are."""

from __future__ import annotations

import copy

import pytest
import torch
import torchrl
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.data import Bounded
from torchrl.modules import (
    MLP,
    IndependentNormal,
    LSTMModule,
    OneHotCategorical,
    ProbabilisticActor,
    TanhDelta,
    TanhNormal,
    ValueOperator,
)
from torchrl.objectives import (
    CQLLoss,
    DiscreteSACLoss,
    IQLLoss,
    PPOLoss,
    REDQLoss,
    SACLoss,
    SoftUpdate,
    TD3BCLoss,
    TD3Loss,
)

from pogo_torchrl import (
    GaussianPOGOLoss,
    JKOChain,
    POGOLoss,
    ReBRACLoss,
    functional,
    make_actor,
    make_qvalue,
)
from pogo_torchrl.ot import sinkhorn_divergence

OBSERVATION, ACTION, ROWS = 3, 2, 16
SPEC = Bounded(low=-2 * torch.ones(ACTION), high=torch.ones(ACTION))


def deterministic_actor():
    net = MLP(in_features=OBSERVATION, out_features=ACTION, num_cells=[8])
    return TensorDictModule(net, ["observation"], ["action"])


def probabilistic_actor(distribution=TanhNormal):
    if distribution is TanhDelta:
        net = MLP(in_features=OBSERVATION, out_features=ACTION, num_cells=[8])
        keys = ["param"]
    else:
        net = nn.Sequential(
            MLP(in_features=OBSERVATION, out_features=2 * ACTION, num_cells=[8]),
            NormalParamExtractor(),
        )
        keys = ["loc", "scale"]
    kwargs = {} if distribution is IndependentNormal else {"low": SPEC.low, "high": SPEC.high}
    return ProbabilisticActor(
        TensorDictModule(net, ["observation"], keys),
        in_keys=keys,
        spec=SPEC,
        distribution_class=distribution,
        distribution_kwargs=kwargs,
    )


def critic():
    return make_qvalue(OBSERVATION, ACTION, (8,))


def value():
    return ValueOperator(MLP(in_features=OBSERVATION, out_features=1, num_cells=[8]))


BASES = {
    "td3_bc": lambda: TD3BCLoss(deterministic_actor(), critic(), action_spec=SPEC),
    "td3": lambda: TD3Loss(deterministic_actor(), critic(), action_spec=SPEC),
    "iql": lambda: IQLLoss(probabilistic_actor(), critic(), value(), num_qvalue_nets=2),
    "iql-normal": lambda: IQLLoss(probabilistic_actor(IndependentNormal), critic(), value()),
    "cql": lambda: CQLLoss(probabilistic_actor(), critic(), action_spec=SPEC),
    "sac": lambda: SACLoss(probabilistic_actor(), critic(), action_spec=SPEC),
    "redq": lambda: REDQLoss(probabilistic_actor(), critic(), action_spec=SPEC, num_qvalue_nets=4),
    "rebrac": lambda: ReBRACLoss(deterministic_actor(), critic(), action_spec=SPEC),
    "paper": lambda: GaussianPOGOLoss(
        probabilistic_actor(IndependentNormal), critic(), action_spec=SPEC
    ),
    "pogo": lambda: POGOLoss(make_actor(OBSERVATION, SPEC, (8,)), critic(), w2_weights=[0.3]),
}

if hasattr(torchrl.objectives, "FQLLoss"):  # TorchRL 0.15

    def fql():
        flow = MLP(in_features=OBSERVATION + ACTION + 1, out_features=ACTION, num_cells=[8])
        one_step = MLP(in_features=OBSERVATION + ACTION, out_features=ACTION, num_cells=[8])
        return torchrl.objectives.FQLLoss(
            torchrl.modules.FlowMatchingPolicy(flow, ACTION, num_steps=2),
            torchrl.modules.OneStepPolicy(one_step, ACTION),
            critic(),
        )

    BASES["fql"] = fql


def make_batch(rows=ROWS):
    done = torch.zeros(rows, 1, dtype=torch.bool)
    state, following = torch.randn(2, rows, OBSERVATION)
    return TensorDict(
        {
            "observation": state,
            "action": SPEC.rand([rows]),
            "action_log_prob": torch.zeros(rows),  # an in_key of REDQLoss
            "next": {
                "observation": following,
                "reward": torch.randn(rows, 1),
                "done": done,
                "terminated": done.clone(),
                "action": SPEC.rand([rows]),  # an in_key of ReBRACLoss
            },
        },
        [rows],
    )


@pytest.fixture(params=BASES)
def base(request):
    torch.manual_seed(0)
    loss = BASES[request.param]()
    loss.make_value_estimator(gamma=0.9)
    return loss


def losses(out):
    return {k: v for k, v in out.items() if k.startswith("loss_") and k != "loss_chain"}


def gradients(module, total):
    named = {n: p for n, p in module.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    return dict(zip(named, found))


def test_the_base_is_as_without_the_chain_and_gradients_are_apart(base):
    alone, chain = copy.deepcopy(base), JKOChain(base, w2_weights=[0.5, 0.4], action_spec=SPEC)
    batch = make_batch()
    torch.manual_seed(1)
    expected = alone(batch.clone())
    torch.manual_seed(1)
    out = chain(batch.clone())
    for key, item in expected.items():
        torch.testing.assert_close(out[key], item, rtol=0, atol=0)
    wanted = gradients(alone, sum(losses(expected).values()))
    found = gradients(base, sum(losses(out).values()))
    assert {n for n, g in wanted.items() if g is not None}
    for name, gradient in wanted.items():
        assert (gradient is None) == (found[name] is None)
        if gradient is not None:
            assert torch.equal(gradient, found[name]), name

    out = chain(batch.clone())
    own = gradients(chain, out["loss_chain"])
    reached = {name for name, g in own.items() if g is not None and g.abs().sum() > 0}
    assert reached
    assert all(name.startswith("chain_actor_") for name in reached)
    assert {name.split(".")[0] for name in reached} == {
        "chain_actor_1_params", "chain_actor_2_params",
    }  # fmt: skip


def test_training_moves_the_chain_only_by_its_own_loss(base):
    chain = JKOChain(base, step_sizes=[0.5, 0.5], action_spec=SPEC, num_samples=2)
    updater = SoftUpdate(chain, tau=0.5)
    source = chain.qvalue_network_params
    before = {i: [p.clone() for p in chain.actor_params(i)] for i in (1, 2)}
    actor = [p.clone() for p in chain._params(0).parameters()]
    optimizer = torch.optim.Adam(chain.chain_params(), 1e-2)
    for _ in range(3):
        loss = chain(make_batch())["loss_chain"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for i in (1, 2):
        assert any(not torch.equal(p, q) for p, q in zip(before[i], chain.actor_params(i)))
    assert all(torch.equal(p, q) for p, q in zip(actor, chain._params(0).parameters()))
    # the target networks of the base follow through the chain
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(1.0)
    target = {k: v.clone() for k, v in chain.target_qvalue_network_params.items(True, True)}
    updater.step()
    for key, values in chain.target_qvalue_network_params.items(True, True):
        torch.testing.assert_close(values, (target[key] + source[key].data) / 2)


def test_new_actors_start_as_copies_that_cost_no_distance(base):
    chain = JKOChain(base, w2_weights=[1.0, 1.0], action_spec=SPEC)
    batch = make_batch()
    torch.manual_seed(3)
    pogo = isinstance(base, POGOLoss)
    expected = base.actor(0) if pogo else base.get_stateful_net("actor_network")
    for i in (0, 1, -1):
        policy = chain.actor(i)
        torch.manual_seed(3)
        action = policy(batch.select("observation"))["action"]
        torch.manual_seed(3)
        assert torch.equal(action, expected(batch.select("observation"))["action"])
    if chain.deterministic:
        _, metadata = chain.actor_loss(batch)
        assert float(metadata["w2_1"]) == pytest.approx(0, abs=1e-6)
    assert not {p.data_ptr() for p in chain.actor_params(1)} & {
        p.data_ptr() for p in chain._params(0).parameters()
    }


def test_dispatch_state_dict_and_keys(base):
    chain = JKOChain(base, w2_weights=[0.5], action_spec=SPEC)
    batch = make_batch()
    assert set(chain.in_keys) == set(base.in_keys)
    torch.manual_seed(5)
    out = chain(batch.clone())
    unnamed = set(base(batch.clone()).keys()) - set(base.out_keys)  # FQLLoss returns such scalars
    assert set(out.keys()) - unnamed <= set(chain.out_keys)
    torch.manual_seed(5)
    inputs = {"_".join(k) if isinstance(k, tuple) else k: batch[k] for k in chain.in_keys}
    values = chain(**inputs)
    for key, item in zip(chain.out_keys, values):
        torch.testing.assert_close(item, out[key], msg=str(key))
    other = copy.deepcopy(chain)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    other.load_state_dict(chain.state_dict())
    torch.manual_seed(5)
    torch.testing.assert_close(other(batch.clone()), out)
    chain.set_keys(reward="gain")
    assert base.tensor_keys.reward == "gain"
    assert ("next", "gain") in chain.in_keys


def test_it_equals_pogo_with_pogos_critic_and_actor_0():
    torch.manual_seed(0)
    actor, qvalue = make_actor(OBSERVATION, SPEC, (8,)), critic()
    weights = (0.3, 0.5, 0.4)
    pogo = POGOLoss(actor, qvalue, w2_weights=weights, chain_init="copy")
    base = POGOLoss(copy.deepcopy(actor), copy.deepcopy(qvalue), w2_weights=weights[:1])
    chain = JKOChain(base, w2_weights=weights[1:])
    base.qvalue_network_params.data.update_(pogo.qvalue_network_params.data)
    for i in range(3):
        params = chain._params(i)
        params.data.update_(getattr(pogo, f"actor_network_{i}_params").data)
        with torch.no_grad():  # distinct actors
            for mine, theirs in zip(chain._params(i).parameters(), pogo.actor_params(i)):
                theirs.add_(0.1 * (i + 1))
                mine.copy_(theirs)
    batch = make_batch()
    for i in (1, 2):
        torch.manual_seed(i)
        expected, metadata = pogo.actor_loss(batch, i)
        torch.manual_seed(i)
        found, own = chain.actor_loss(batch, i)
        # the same draws: first K actions of actor i, then those of its reference
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(own[f"w2_{i}"], metadata[f"w2_{i}"], rtol=1e-5, atol=1e-6)


def test_distances_agree_with_closed_forms():
    torch.manual_seed(0)
    batch = make_batch(4)
    base = TD3BCLoss(deterministic_actor(), critic(), action_spec=SPEC)
    chain = JKOChain(base, w2_weights=[1.0])
    with torch.no_grad():
        for parameter in chain.actor_params(1):
            parameter.add_(0.1)
    _, metadata = chain.actor_loss(batch)
    half = (SPEC.high - SPEC.low) / 2
    a, b = (chain.actor(i)(batch.select("observation"))["action"] / half for i in (1, 0))
    torch.testing.assert_close(metadata["w2_1"], (a - b).square().sum(-1).mean() / 2)

    # many samples of two Gaussians of equal spread, whose Sinkhorn divergence is that of the means
    base = IQLLoss(probabilistic_actor(IndependentNormal), critic(), value())
    closed = JKOChain(base, w2_weights=[1.0], action_spec=SPEC, distance="gaussian_w2")
    sampled = JKOChain(base, w2_weights=[1.0], action_spec=SPEC, num_samples=400, blur=0.01)
    for each in (closed, sampled):
        last = each.actor_params(1)[-1]
        with torch.no_grad():
            last[:ACTION].add_(1.5)
    found = [float(each.actor_loss(batch)[1]["w2_1"]) for each in (closed, sampled)]
    assert found[0] == pytest.approx(float((1.5 / half).square().sum() / 2), rel=1e-5)
    assert found[1] == pytest.approx(found[0], rel=0.15)


def test_gaussian_w2_of_means_and_spreads():
    loc, scale = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 2.0]])
    other, wider = torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 4.0]])
    assert float(functional.gaussian_w2(loc, scale, other, wider)) == (9 + 4) / 2
    assert float(functional.gaussian_w2(loc, scale, loc, scale)) == 0
    # half the squared W2 of samples, in one dimension that of sorted samples
    x = torch.randn(20_000, 1, dtype=torch.float64).sort(0)[0]
    y = (0.5 + 1.5 * torch.randn(20_000, 1, dtype=torch.float64)).sort(0)[0]
    one = torch.ones(1, dtype=torch.float64)
    closed = functional.gaussian_w2(0 * one, one, 0.5 * one, 1.5 * one)
    assert float((x - y).square().mean() / 2) == pytest.approx(float(closed), rel=0.05)
    few = sinkhorn_divergence(x[None, ::40], y[None, ::40], blur=0.01)
    assert float(few) == pytest.approx(float(closed), rel=0.1)


@pytest.mark.parametrize("actor_q", ["first", "mean", "min", "advantage"])
def test_q_in_the_objective(actor_q):
    torch.manual_seed(0)
    base = IQLLoss(probabilistic_actor(TanhDelta), critic(), value(), num_qvalue_nets=3)
    chain = JKOChain(
        base,
        w2_weights=[0.0],
        action_spec=SPEC,
        actor_q=actor_q,
        q_normalization=None,
        alpha=2.0,
    )
    assert chain.deterministic
    batch = make_batch()
    action = chain.actor(1)(batch.select("observation"))["action"]
    state = TensorDict({"observation": batch["observation"], "action": action}, [ROWS])
    q = []
    for j in range(3):
        net = copy.deepcopy(base.qvalue_network)
        base.qvalue_network_params[j].to_module(net)
        q.append(net(state.clone())["state_action_value"].squeeze(-1))
    q = torch.stack(q)
    v = base.get_stateful_net("value_network")(state.clone())["state_value"].squeeze(-1)
    wanted = {
        "first": q[0], "mean": q.mean(0), "min": q.min(0)[0], "advantage": q.min(0)[0] - v,
    }[actor_q]  # fmt: skip
    loss, metadata = chain.actor_loss(batch)
    torch.testing.assert_close(loss, -2 * wanted.mean())
    torch.testing.assert_close(metadata["q_actor_1"], wanted.mean())


def test_step_sizes_are_proximal_steps_along_a_linear_q():
    class Linear(nn.Module):
        def forward(self, observation, action):
            return (3.0 + 0.01 * action).sum(-1, keepdim=True) * self.one

        def __init__(self):
            super().__init__()
            self.one = nn.Parameter(torch.ones(()))

    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.action = nn.Parameter(torch.zeros(ACTION))

        def forward(self, observation):
            return self.action.expand(*observation.shape[:-1], ACTION)

    box = Bounded(low=-torch.ones(ACTION), high=torch.ones(ACTION))
    base = TD3BCLoss(
        TensorDictModule(Constant(), ["observation"], ["action"]),
        TensorDictModule(Linear(), ["observation", "action"], ["state_action_value"]),
        action_spec=box,
    )
    sizes = [2.0, 5.0]
    chain = JKOChain(base, step_sizes=sizes)
    optimizer = torch.optim.SGD(chain.chain_params(), 0.5)
    for _ in range(300):
        loss = chain.actor_loss(make_batch())[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    slope = 0.01 / 6.0  # lambda / alpha times the gradient of Q
    first, second = (chain.actor_params(i)[0] for i in (1, 2))
    for moved, h in ((first, sizes[0]), (second - first, sizes[1])):
        expected = torch.full((ACTION,), h * ACTION * slope)
        torch.testing.assert_close(moved, expected, rtol=0.02, atol=0)


def test_weights_of_prioritised_samples_scale_the_losses_of_the_chain():
    torch.manual_seed(0)
    base = TD3BCLoss(deterministic_actor(), critic(), action_spec=SPEC)
    chain = JKOChain(base, w2_weights=[0.0], q_normalization=None)
    batch = make_batch(4)
    weights = torch.tensor([1.0, 0.0, 3.0, 0.0])
    kept = batch[weights > 0]
    loss = chain.actor_loss(batch.set("priority_weight", weights))[0]
    rows = [chain.actor_loss(kept[i : i + 1].exclude("priority_weight"))[0] for i in range(2)]
    torch.testing.assert_close(loss, (rows[0] + 3 * rows[1]) / 4)


def test_masks_of_padded_steps_are_those_of_the_base():
    torch.manual_seed(0)
    base = TD3BCLoss(deterministic_actor(), critic(), action_spec=SPEC)
    chain = JKOChain(base, w2_weights=[0.0], q_normalization=None)
    batch = make_batch(4)
    expected = chain.actor_loss(batch[:3])[0]
    batch["valid"] = torch.tensor([True, True, True, False])
    chain.loss_mask_key = "valid"
    assert base.loss_mask_key == "valid"
    torch.testing.assert_close(chain.actor_loss(batch)[0], expected)
    base.reduction = "sum"
    torch.testing.assert_close(chain.actor_loss(batch)[0], 3 * expected)


def test_restart_copies_the_actor_of_the_base():
    base = TD3BCLoss(deterministic_actor(), critic(), action_spec=SPEC)
    chain = JKOChain(base, w2_weights=[0.5, 0.5])
    with torch.no_grad():
        for parameter in base.actor_network_params.parameters():
            parameter.add_(1.0)
    chain.restart()
    for i in (1, 2):
        for mine, theirs in zip(chain.actor_params(i), base.actor_network_params.parameters()):
            assert torch.equal(mine, theirs)


def td3_bc():
    return TD3BCLoss(deterministic_actor(), critic(), action_spec=SPEC)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: PPOLoss(probabilistic_actor(), value()), {}, "PPOLoss .*has no qvalue_network"),
        (td3_bc, {"w2_weights": None}, "needs either w2_weights or step_sizes"),
        (td3_bc, {"step_sizes": [0.5]}, "needs either w2_weights or step_sizes"),
        (td3_bc, {"w2_weights": [-1.0]}, r"w2_weights=\[-1.0\] must be"),
        (td3_bc, {"actor_q": "max"}, "actor_q='max' is unknown"),
        (td3_bc, {"actor_q": "advantage"}, "TD3BCLoss does not have"),
        (td3_bc, {"distance": "js"}, "distance='js' is unknown"),
        (td3_bc, {"w2_backend": "slow"}, "w2_backend='slow' is unknown"),
        (td3_bc, {"num_samples": 0}, "num_samples=0 must be"),
        (td3_bc, {"alpha": 0}, "alpha=0 must be"),
        (td3_bc, {"blur": -1}, "blur=-1 must be"),
        (td3_bc, {"q_normalization": "max"}, "q_normalization='max' is unknown"),
        (
            lambda: SACLoss(probabilistic_actor(IndependentNormal), critic(), action_spec=SPEC),
            {"bounds": (0.0, 0.0)},
            "bounds=",
        ),
    ],
)
def test_errors_name_what_is_wrong(make, options, message):
    with pytest.raises(ValueError, match=message):
        JKOChain(make(), **{"w2_weights": [0.5], **options})


def test_a_base_must_be_a_loss():
    with pytest.raises(TypeError, match="must be a TorchRL LossModule, not Linear"):
        JKOChain(nn.Linear(1, 1), w2_weights=[0.5])


def test_gaussian_w2_needs_gaussians():
    with pytest.raises(ValueError, match="needs an actor with an IndependentNormal"):
        JKOChain(td3_bc(), w2_weights=[0.5], distance="gaussian_w2")


def test_discrete_actions_are_refused():
    net = TensorDictModule(nn.Linear(OBSERVATION, 4), ["observation"], ["logits"])
    actor = ProbabilisticActor(net, in_keys=["logits"], distribution_class=OneHotCategorical)
    qvalue = TensorDictModule(nn.Linear(OBSERVATION, 4), ["observation"], ["action_value"])
    base = DiscreteSACLoss(actor, qvalue, num_actions=4, action_space="one-hot")
    with pytest.raises(ValueError, match="DiscreteSACLoss has discrete actions"):
        JKOChain(base, w2_weights=[0.5])


def test_recurrent_actors_are_refused():
    lstm = LSTMModule(OBSERVATION, ACTION, in_key="observation", out_key="action")
    base = TD3BCLoss(lstm, critic(), action_spec=SPEC)
    with pytest.raises(ValueError, match="is recurrent"):
        JKOChain(base, w2_weights=[0.5])


def test_actor_indices():
    chain = JKOChain(td3_bc(), w2_weights=[0.5])
    assert chain.num_actors == 2
    for call in (lambda: chain.actor(2), lambda: chain.actor_loss(make_batch(), 0)):
        with pytest.raises(IndexError, match="out of range"):
            call()
    with pytest.raises(IndexError, match="belongs to the base loss"):
        chain.actor_params(0)
