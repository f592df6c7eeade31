"""GaussianPOGOLoss, the paper's POGO: values by hand, gradients, and both phases of a chain."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.data import Bounded, Unbounded
from torchrl.modules import MLP, IndependentNormal, ProbabilisticActor, TanhNormal
from torchrl.objectives import SoftUpdate

from pogo_torchrl import GaussianPOGOLoss, JKOChain, make_gaussian_actor, make_qvalue

OBSERVATION, ACTION, ROWS = 3, 2, 16
BOX = Bounded(low=torch.zeros(2), high=torch.tensor([4.0, 2.0]))
"""Half the ranges are 2 and 1."""


class Constant(nn.Module):
    def __init__(self, loc, scale):
        super().__init__()
        self.loc, self.scale = (nn.Parameter(torch.tensor(x)) for x in (loc, scale))

    def forward(self, observation):
        shape = (*observation.shape[:-1], ACTION)
        return self.loc.expand(shape), self.scale.expand(shape)


class Affine(nn.Module):
    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.tensor(x)) for x in (weight, bias))

    def forward(self, observation, action):
        return (action * self.weight).sum(-1, keepdim=True) + self.bias


def gaussian(net, distribution=IndependentNormal):
    return ProbabilisticActor(
        TensorDictModule(net, ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=distribution,
    )


def by_hand(weights=((0.0, 0.0), (0.0, 0.0)), **settings):
    """Actor (3, 1) and behaviour (2, 0.5), of which the critics are 6 and 4 plus a linear term."""
    critics = [
        TensorDictModule(Affine(list(w), b), ["observation", "action"], ["state_action_value"])
        for w, b in zip(weights, (6.0, 4.0))
    ]
    return GaussianPOGOLoss(
        gaussian(Constant([3.0, 1.0], [0.4, 0.2])),
        critics,
        behaviour_network=gaussian(Constant([2.0, 0.5], [1.2, 0.2])),
        action_spec=BOX,
        **settings,
    )


def network():
    net = MLP(in_features=OBSERVATION, out_features=2 * ACTION, num_cells=[8])
    return gaussian(nn.Sequential(net, NormalParamExtractor()))


def make_loss(**settings):
    torch.manual_seed(0)
    qvalue = make_qvalue(OBSERVATION, ACTION, (8,))
    return GaussianPOGOLoss(network(), qvalue, **{"action_spec": BOX, **settings})


def make_batch(rows=ROWS):
    torch.manual_seed(1)
    done = torch.zeros(rows, 1, dtype=torch.bool)
    state, following = torch.randn(2, rows, OBSERVATION)
    return TensorDict(
        {
            "observation": state,
            "action": BOX.rand([rows]),
            "next": {
                "observation": following,
                "reward": torch.ones(rows, 1),
                "done": done,
                "terminated": done.clone(),
            },
        },
        [rows],
    )


ENTROPY = math.log(0.2) + math.log(0.2) + math.log(2 * math.pi * math.e)
"""In the box, both deviations of the actor are 0.2."""


def test_loss_of_the_actor_by_hand():
    loss = by_hand(w2_weight=0.4, entropy_weight=0.1)
    value, metadata = loss.actor_loss(make_batch())
    # In the box, means differ by (0.5, 0.5), deviations by (-0.4, 0).
    distance = (0.25 + 0.25 + 0.16) / 2
    assert {k: v.item() for k, v in metadata.items()} == pytest.approx(
        {"q_actor": 6.0, "w2_behaviour": distance, "entropy": ENTROPY, "lmbd": 1 / 6}
    )
    assert value.item() == pytest.approx(-1 + 0.4 * distance - 0.1 * ENTROPY)


@pytest.mark.parametrize(
    ("distance", "expected"),
    [
        ("kl", sum(math.log(r) + (1 + 6.25) / (2 * r**2) - 0.5 for r in (3, 1))),
        (
            "fisher_rao",
            math.acosh(1 + (0.125 + 0.16) / (2 * 0.2 * 0.6)) ** 2
            + math.acosh(1 + 0.125 / (2 * 0.2 * 0.2)) ** 2,
        ),
    ],
)
def test_other_geometries_by_hand(distance, expected):
    _, metadata = by_hand(distance=distance).actor_loss(make_batch())
    assert metadata["w2_behaviour"].item() == pytest.approx(expected, rel=1e-4)


def test_the_minimum_of_the_loss_is_where_the_gradients_say():
    slope, weight, bonus, alpha = torch.tensor([0.3, -0.2]), 0.5, 0.04, 2.0
    settings = {"w2_weight": weight, "entropy_weight": bonus, "alpha": alpha}
    loss = by_hand([slope.tolist(), [9.0, 9.0]], q_normalization=None, **settings)
    half = torch.tensor([2.0, 1.0])
    loc, scale = _parameters(loss)
    with torch.no_grad():
        # In the box, Q has the slope half * slope, and w (mean - reference) = alpha slope.
        loc.copy_(torch.tensor([2.0, 0.5]) + half * alpha * half * slope / weight)
        # Where Q does not count: w (sigma - reference) = eta / sigma.
        reference = torch.tensor([0.6, 0.2])
        scale.copy_(half * (reference + (reference**2 + 4 * bonus / weight).sqrt()) / 2)
    value, _ = loss.actor_loss(make_batch())
    torch.testing.assert_close(
        torch.autograd.grad(value, loc)[0], torch.zeros(2), atol=1e-5, rtol=0
    )
    flat = by_hand(q_normalization=None, **settings)
    _parameters(flat)[1].data.copy_(scale.data)
    value, _ = flat.actor_loss(make_batch())
    found = torch.autograd.grad(value, _parameters(flat)[1])[0]
    torch.testing.assert_close(found, torch.zeros(2), atol=1e-5, rtol=0)


def _parameters(loss, name="actor"):
    """Mean and standard deviation of the policy of by_hand()."""
    found = dict(getattr(loss, f"{name}_network_params").named_parameters())
    return [next(p for key, p in found.items() if key.endswith(k)) for k in ("loc", "scale")]


def test_the_behaviour_policy_is_that_of_maximum_likelihood():
    loss, batch = by_hand(), make_batch()
    value, metadata = loss.behaviour_loss(batch)
    loc, scale = torch.tensor([2.0, 0.5]), torch.tensor([1.2, 0.2])
    terms = ((batch["action"] - loc) / scale).square() / 2 + (scale * math.sqrt(2 * math.pi)).log()
    torch.testing.assert_close(value, terms.sum(-1).mean())
    assert metadata["behaviour_std"].item() == pytest.approx((0.6 + 0.2) / 2)
    parameters = _parameters(loss, "behaviour")
    with torch.no_grad():
        parameters[0].copy_(batch["action"].mean(0))
        parameters[1].copy_(batch["action"].std(0, correction=0))
    for slope in torch.autograd.grad(loss.behaviour_loss(batch)[0], parameters):
        torch.testing.assert_close(slope, torch.zeros(2), atol=1e-5, rtol=0)


def test_the_polyak_actor_draws_the_actions_of_the_target():
    weights = ([1.0, 2.0], [2.0, -1.0])
    loss = by_hand(weights, policy_noise=0.0)
    loss.make_value_estimator(gamma=0.5)
    batch = make_batch(20_000)
    with torch.no_grad():
        _parameters(loss)[0].add_(100.0)  # the online actor does not count
    _, metadata = loss.qvalue_loss(batch)
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(200_000, 2, generator=generator) * torch.tensor([0.4, 0.2])
    action = (torch.tensor([3.0, 1.0]) + draws).clamp(BOX.low, BOX.high)
    q = torch.minimum(action @ torch.tensor(weights[0]) + 6, action @ torch.tensor(weights[1]) + 4)
    assert metadata["next_state_value"].item() == pytest.approx(q.mean().item(), abs=0.03)
    assert metadata["target_value"].item() == pytest.approx(1 + 0.5 * q.mean().item(), abs=0.03)


def test_each_loss_reaches_its_own_parameters():
    loss, batch = make_loss(), make_batch()
    out = loss(batch)
    assert list(out.keys()) == loss.out_keys
    assert all(out[key].dim() == 0 for key in loss.out_keys)
    names = dict(loss.named_parameters())
    for name in ("actor", "qvalue", "behaviour"):
        found = torch.autograd.grad(out[f"loss_{name}"], list(names.values()), allow_unused=True)
        reached = {key.split(".")[0] for key, g in zip(names, found) if g is not None}
        assert reached == {f"{name}_network_params"}


def test_actor_0_starts_at_the_behaviour_policy():
    loss = make_loss()
    assert loss.actor_loss(make_batch())[1]["w2_behaviour"].item() == 0
    mine = {p.data_ptr() for p in loss.actor_network_params.parameters()}
    assert not mine & {p.data_ptr() for p in loss.behaviour_network_params.parameters()}


def test_dispatch_and_keys():
    loss, batch = make_loss(), make_batch()
    torch.manual_seed(5)
    out = loss(batch.clone())
    torch.manual_seed(5)
    inputs = {"_".join(k) if isinstance(k, tuple) else k: batch[k] for k in loss.in_keys}
    for key, item in zip(loss.out_keys, loss(**inputs)):
        torch.testing.assert_close(item, out[key])
    loss.set_keys(reward="gain")
    assert ("next", "gain") in loss.in_keys


def test_two_phases_of_the_paper():
    loss, batch = make_loss(step_size=0.1), make_batch()
    settings = {"distance": "gaussian_w2", "entropy_weight": 0.01}
    chain = JKOChain(loss, step_sizes=[1.0, 1.0], **settings)
    chain.make_value_estimator(gamma=0.9)
    targets = SoftUpdate(chain, tau=0.1)
    optimizer = torch.optim.Adam(loss.parameters(), 1e-2)
    for _ in range(3):
        out = loss(batch)
        optimizer.zero_grad()
        sum(out[f"loss_{name}"] for name in ("actor", "qvalue", "behaviour")).backward()
        optimizer.step()
        targets.step()
    chain.restart()
    state = batch.select("observation")
    first = chain.actor(0)(state.clone())
    for i in (1, 2):
        torch.testing.assert_close(chain.actor(i)(state.clone()), first)
    frozen = copy.deepcopy(loss.state_dict())
    optimizer = torch.optim.Adam(chain.chain_params(), 1e-2)
    for _ in range(100):
        value, _ = chain.actor_loss(batch)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    means = [chain.actor(i)(state.clone())["action"] for i in range(3)]
    critic = loss.qvalue_network_params.data[:1]
    q = [loss.qvalues(critic, state, action).mean().item() for action in means]
    assert q[0] < q[1] < q[2]
    for key, item in loss.state_dict().items():
        torch.testing.assert_close(item, frozen[key], rtol=0, atol=0)


def test_the_default_gaussian_actor():
    actor = make_gaussian_actor(OBSERVATION, BOX, (8,))
    batch = make_batch().exclude("action")
    policy = actor.get_dist(batch)
    assert bool(((policy.mean > BOX.low) & (policy.mean < BOX.high)).all())
    torch.testing.assert_close(policy.stddev, torch.tensor([2.0, 1.0]).expand(ROWS, 2))
    assert torch.equal(actor(batch)["action"], policy.mean)
    loss = GaussianPOGOLoss(actor, make_qvalue(OBSERVATION, ACTION, (8,)), action_spec=BOX)
    _, metadata = loss.behaviour_loss(make_batch())
    assert metadata["behaviour_std"].item() == pytest.approx(1)
    with pytest.raises(ValueError, match="hidden_sizes="):
        make_gaussian_actor(OBSERVATION, BOX, ())
    with pytest.raises(ValueError, match="Bounded spec"):
        make_gaussian_actor(OBSERVATION, Unbounded(2))


def test_step_size_sets_the_weight():
    assert make_loss(step_size=0.25, alpha=2.0).w2_weight == 2.0 / (0.25 * ACTION)
    assert make_loss().w2_weight == 0.2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"w2_weight": -1.0}, "w2_weight=-1.0 must be a finite number >= 0"),
        ({"step_size": 0.0}, "step_size=0.0 must be a finite number > 0"),
        ({"step_size": 0.1, "w2_weight": 0.1}, "step_size=0.1 sets w2_weight=0.1; give one"),
        ({"step_size": 0.1, "action_spec": None, "bounds": (0, 1)}, "step_size depends on"),
        ({"entropy_weight": -0.1}, "entropy_weight=-0.1 must be"),
        ({"alpha": 0.0}, "alpha=0.0 must be a finite number > 0"),
        ({"distance": "sinkhorn"}, "distance='sinkhorn' is unknown; choose one of"),
        (
            {"behaviour_network": TensorDictModule(nn.Linear(3, 2), ["observation"], ["action"])},
            "an IndependentNormal in the behaviour_network, not TensorDictModule",
        ),
        (
            {"behaviour_network": gaussian(Constant([0.0, 0.0], [1.0, 1.0]), TanhNormal)},
            "an IndependentNormal in the behaviour_network, not TanhNormal: pass",
        ),
    ],
)
def test_errors_name_what_is_wrong(settings, message):
    with pytest.raises(ValueError, match=message):
        make_loss(**settings)


def test_errors_of_actors():
    qvalue = make_qvalue(OBSERVATION, ACTION, (8,))
    with pytest.raises(ValueError, match="an IndependentNormal in the actor, not TanhNormal"):
        GaussianPOGOLoss(gaussian(Constant([0.0, 0.0], [1.0, 1.0]), TanhNormal), qvalue)
    other = network()
    other[0].in_keys = ["state"]
    other.in_keys = ["state"]
    with pytest.raises(ValueError, match=r"reads \['state'\], but the actor reads \['observ"):
        make_loss(behaviour_network=other)
