"""Distances between actors: closed forms, their common scale, and the actors that they fit."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torchrl.modules
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torch.distributions import Independent, Normal, kl_divergence
from torchrl.data import Bounded
from torchrl.modules import (
    Actor,
    DiffusionActor,
    IndependentNormal,
    ProbabilisticActor,
    TanhDelta,
    TanhNormal,
    ValueOperator,
)
from torchrl.objectives import TD3BCLoss

from pogo_torchrl import JKOChain, TransportActor, functional, make_actor, make_qvalue
from pogo_torchrl.objectives.chain_base import is_deterministic
from pogo_torchrl.objectives.distances import DISTANCES, OF_GAUSSIANS, sample_distance
from pogo_torchrl.policy_nets import make_deterministic_net

OBSERVATION, ACTION, ROWS = 3, 2, 6
SPEC = Bounded(low=torch.tensor([0.0, -1.0]), high=torch.tensor([4.0, 1.0]))
HALF = torch.tensor([2.0, 1.0])
"""Half the ranges of the actions."""
BATCH = TensorDict({"observation": torch.zeros(ROWS, OBSERVATION)}, [ROWS])


class Constant(nn.Module):
    """The same numbers for every state."""

    def __init__(self, *numbers):
        super().__init__()
        self.numbers = nn.ParameterList(map(torch.tensor, numbers))

    def forward(self, observation):
        shape = observation.shape[:-1]
        found = tuple(one.expand(*shape, ACTION) for one in self.numbers)
        return found if len(found) > 1 else found[0]


class Affine(nn.Module):
    """The sum of the action and of a parameter."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.ones(1))

    def forward(self, observation, action):
        return action.sum(-1, keepdim=True) + self.bias


def make_chain(distribution, spread=None, **settings):
    """A chain over an actor whose action is the middle of the bounds."""
    middle = (SPEC.low + SPEC.high) / 2 if distribution is not TanhNormal else torch.zeros(ACTION)
    keys = ["loc"] if spread is None else ["loc", "scale"]
    numbers = [middle.tolist()]
    numbers += [] if spread is None else [(spread * HALF).tolist()]
    if distribution is TanhDelta:
        numbers, keys = [[0.0, 0.0]], ["param"]
    if distribution is None:
        actor = TensorDictModule(Constant(*numbers), ["observation"], ["action"])
    else:
        bounded = distribution in (TanhNormal, TanhDelta)
        actor = ProbabilisticActor(
            TensorDictModule(Constant(*numbers), ["observation"], keys),
            in_keys=keys,
            distribution_class=distribution,
            distribution_kwargs={"low": SPEC.low, "high": SPEC.high} if bounded else {},
        )
    base = TD3BCLoss(actor, make_qvalue(OBSERVATION, ACTION, (4,)), action_spec=SPEC)
    return JKOChain(base, **{"w2_weights": [1.0], "action_spec": SPEC, **settings})


def shift(chain, displacement):
    """Displace the mean of actor 1, in units of half the range of the actions."""
    with torch.no_grad():
        chain.actor_params(1)[0].add_(torch.tensor(displacement) * HALF)


def gaussians(seed=0, count=50):
    generator = torch.Generator().manual_seed(seed)
    loc, other_loc = torch.randn(2, count, 3, dtype=torch.float64, generator=generator)
    drawn = torch.randn(2, count, 3, dtype=torch.float64, generator=generator)
    scale, other_scale = drawn.exp()
    return loc, scale, other_loc, other_scale


# ------------------------------------------------------------------ closed forms


def test_kl_and_entropy_are_those_of_torch():
    loc, scale, other_loc, other_scale = gaussians()
    first, second = (Independent(Normal(*p), 1) for p in ((loc, scale), (other_loc, other_scale)))
    found = functional.gaussian_kl(loc, scale, other_loc, other_scale)
    torch.testing.assert_close(found, kl_divergence(first, second))
    torch.testing.assert_close(functional.gaussian_entropy(scale), first.entropy())


def test_fisher_rao_along_a_vertical_geodesic_is_a_logarithm():
    loc, scale, _, other = gaussians()
    found = functional.fisher_rao(loc, scale, loc, other)
    torch.testing.assert_close(found, (scale / other).log().square().sum(-1))


def test_fisher_rao_is_the_length_of_a_half_circle():
    # Between equal deviations, the geodesic is a half circle in (mean / sqrt(2), deviation).
    gap, deviation = 1.5, 0.4
    half = gap / math.sqrt(2) / 2
    radius = math.hypot(half, deviation)
    start = math.atan2(deviation, half)
    angle = torch.linspace(start, math.pi - start, 20_001, dtype=torch.float64)
    mean, sigma = math.sqrt(2) * radius * angle.cos(), radius * angle.sin()
    steps = mean.diff().square() + 2 * sigma.diff().square()
    length = (steps.sqrt() / ((sigma[1:] + sigma[:-1]) / 2)).sum()
    one = torch.ones(1, dtype=torch.float64)
    found = functional.fisher_rao(0 * one, deviation * one, gap * one, deviation * one)
    torch.testing.assert_close(found, length.square() / 2, rtol=1e-6, atol=0)


def test_fisher_rao_is_a_metric_and_close_to_kl():
    loc, scale, other_loc, other_scale = gaussians()
    third = gaussians(seed=1)[:2]

    def metric(*pair):
        return (2 * functional.fisher_rao(*pair)).sqrt()

    direct = metric(loc, scale, other_loc, other_scale)
    torch.testing.assert_close(direct, metric(other_loc, other_scale, loc, scale))
    detour = metric(loc, scale, *third) + metric(*third, other_loc, other_scale)
    assert bool((direct <= detour).all())
    near = loc + 1e-3 * scale * other_loc, scale * (1 + 1e-3 * third[0])
    found = functional.fisher_rao(*near, loc, scale)
    torch.testing.assert_close(found, functional.gaussian_kl(*near, loc, scale), rtol=0.02, atol=0)


@pytest.mark.parametrize("distance", OF_GAUSSIANS)
def test_distances_of_equal_gaussians_are_0_and_have_no_slope(distance):
    loc, scale, *_ = (x.float().requires_grad_() for x in gaussians())
    value = OF_GAUSSIANS[distance](loc, scale, loc.detach(), scale.detach())
    torch.testing.assert_close(value, torch.zeros_like(value), atol=1e-6, rtol=0)
    for slope in torch.autograd.grad(value.sum(), (loc, scale)):
        torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-5, rtol=0)


@pytest.mark.parametrize("distance", ["kl", "fisher_rao"])
def test_kl_and_fisher_rao_do_not_depend_on_the_units(distance):
    loc, scale, other_loc, other_scale = gaussians()
    function, unit = OF_GAUSSIANS[distance], torch.tensor([3.0, 0.1, 7.0], dtype=torch.float64)
    scaled = function(unit * loc + 1, unit * scale, unit * other_loc + 1, unit * other_scale)
    torch.testing.assert_close(scaled, function(loc, scale, other_loc, other_scale))


def test_the_exact_distance_is_that_of_the_best_assignment():
    torch.manual_seed(0)
    x, y = SPEC.rand([2, 5, 4])
    found = sample_distance("exact", x, y, SPEC.low, SPEC.high, blur=0.05, backend="tensorized")
    x, y = x / HALF, y / HALF
    costs = [
        (x - y[:, list(order)]).square().sum(-1).mean(-1) / 2
        for order in itertools.permutations(range(4))
    ]
    torch.testing.assert_close(found, torch.stack(costs).min(0)[0])


# ------------------------------------------------------------------ in a chain

DISPLACEMENT = [0.03, -0.04]  # half its square is 0.00125
SIGMA = 0.2


@pytest.mark.parametrize(
    ("distance", "distribution", "spread", "expected"),
    [
        ("sinkhorn", None, None, 0.00125),
        ("exact", None, None, 0.00125),
        ("l2", None, None, 0.00125),
        ("gaussian_w2", IndependentNormal, SIGMA, 0.00125),
        ("kl", IndependentNormal, SIGMA, 0.00125 / SIGMA**2),
        ("fisher_rao", IndependentNormal, SIGMA, 0.00125 / SIGMA**2),
    ],
)
def test_distances_have_a_common_scale(distance, distribution, spread, expected):
    chain = make_chain(distribution, spread, distance=distance)
    shift(chain, DISPLACEMENT)
    loss, metadata = chain.actor_loss(BATCH)
    assert metadata["w2_1"].item() == pytest.approx(expected, rel=0.01)
    reached = torch.autograd.grad(loss, chain.actor_params(1), allow_unused=True)
    assert reached[0].abs().sum() > 0


def test_all_distances_are_tested():
    marks = test_distances_have_a_common_scale.pytestmark[0]
    assert tuple(row[0] for row in marks.args[1]) == DISTANCES


@pytest.mark.parametrize("distance", ["kl", "fisher_rao"])
def test_a_tanh_does_not_change_kl_and_fisher_rao(distance):
    chain = make_chain(TanhNormal, SIGMA, distance=distance)
    with torch.no_grad():
        loc, scale = chain.actor_params(1)
        loc.add_(0.3)
        scale.mul_(1.5)
    reference = tuple(p.detach() for p in chain._params(0).parameters())
    expected = OF_GAUSSIANS[distance](loc, scale, *reference)
    _, metadata = chain.actor_loss(BATCH)
    torch.testing.assert_close(metadata["w2_1"], expected.detach())


@pytest.mark.parametrize("distance", ["sinkhorn", "gaussian_w2"])
def test_entropy_bonus(distance):
    settings = {"distance": distance, "q_normalization": None, "num_samples": 2}
    chain = make_chain(IndependentNormal, SIGMA, entropy_weight=0.5, **settings)
    plain = make_chain(IndependentNormal, SIGMA, **settings)
    plain.load_state_dict(chain.state_dict())
    assert "entropy_1" in chain.out_keys
    assert "entropy_1" not in plain.out_keys
    results = []
    for each in (chain, plain):
        torch.manual_seed(0)
        results.append(each.actor_loss(BATCH))
    (loss, metadata), (without, _) = results
    entropy = ACTION * (math.log(SIGMA) + 0.5 * math.log(2 * math.pi * math.e))
    assert metadata["entropy_1"].item() == pytest.approx(entropy, rel=1e-5)
    assert (loss - without).item() == pytest.approx(-0.5 * entropy, rel=1e-4)
    scale = [each.actor_params(1)[1] for each in (chain, plain)]
    slopes = [torch.autograd.grad(x[0], s)[0] for x, s in zip(results, scale)]
    torch.testing.assert_close(slopes[0] - slopes[1], -0.5 / scale[0].detach())


def test_a_restarted_actor_is_a_copy_of_its_predecessor():
    chain = make_chain(None, w2_weights=[1.0, 1.0])
    shift(chain, [0.1, 0.1])
    chain.restart(2)
    assert torch.equal(chain.actor_params(2)[0], chain.actor_params(1)[0])
    assert not torch.equal(chain.actor_params(1)[0], next(chain._params(0).parameters()))
    with pytest.raises(IndexError, match="no predecessor"):
        chain.restart(0)


# ------------------------------------------------------------------ actors that fit


def test_torchrls_actor_is_deterministic():
    net = nn.Linear(OBSERVATION, ACTION)
    base = TD3BCLoss(
        Actor(net, spec=SPEC), make_qvalue(OBSERVATION, ACTION, (4,)), action_spec=SPEC
    )
    chain = JKOChain(base, w2_weights=[1.0], distance="l2")
    assert chain.deterministic
    assert chain.actor_loss(BATCH)[0].requires_grad
    net = make_deterministic_net(OBSERVATION, ACTION, (4,))
    assert is_deterministic(TransportActor(net, SPEC))  # it ignores z


def test_actors_that_draw_noise_are_not_deterministic():
    assert not is_deterministic(make_actor(OBSERVATION, SPEC, (4,)))
    assert not is_deterministic(DiffusionActor(ACTION, OBSERVATION, num_steps=2))
    if hasattr(torchrl.modules, "OneStepPolicy"):  # TorchRL 0.15
        net = nn.Linear(OBSERVATION + ACTION, ACTION)
        assert not is_deterministic(torchrl.modules.OneStepPolicy(net, ACTION))


def test_actors_within_a_sequence_are_sampled():
    actor = make_chain(IndependentNormal, SIGMA).actor_network
    encoder = TensorDictModule(nn.Linear(OBSERVATION, OBSERVATION), ["pixels"], ["observation"])
    sequence = TensorDictSequential(encoder, actor)
    qvalue = ValueOperator(Affine(), in_keys=["pixels", "action"])
    base = TD3BCLoss(sequence, qvalue, action_spec=SPEC)
    chain = JKOChain(base, w2_weights=[1.0])
    assert not chain.deterministic
    batch = BATCH.copy().rename_key_("observation", "pixels")
    torch.manual_seed(0)
    _, metadata = chain.actor_loss(batch)
    assert metadata["w2_1"] > 0  # of independent draws of equal actors
    with pytest.raises(ValueError, match="a TanhNormal, not TensorDictSequential"):
        JKOChain(base, w2_weights=[1.0], distance="kl")


@pytest.mark.parametrize(
    ("distribution", "distance", "message"),
    [
        (None, "gaussian_w2", "'gaussian_w2' needs an actor with an IndependentNormal, not Tensor"),
        (None, "kl", "'kl' needs an actor with an IndependentNormal or a TanhNormal, not Tensor"),
        (TanhDelta, "fisher_rao", "an IndependentNormal or a TanhNormal, not TanhDelta: use"),
        (
            TanhNormal,
            "gaussian_w2",
            "an IndependentNormal, not TanhNormal: use distance='sinkhorn'",
        ),
        (TanhNormal, "l2", r"draws its actions \(TanhNormal\): use distance='sinkhorn'"),
        (IndependentNormal, "l2", r"draws its actions \(IndependentNormal\)"),
    ],
)
def test_distances_that_do_not_fit_an_actor_are_refused(distribution, distance, message):
    spread = SIGMA if distribution in (TanhNormal, IndependentNormal) else None
    with pytest.raises(ValueError, match=message):
        make_chain(distribution, spread, distance=distance)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distance": "exact", "num_samples": 11}, "11 is too large for distance='exact'"),
        ({"w2_backend": "exact", "num_samples": 11}, "11 is too large for w2_backend='exact'"),
        ({"entropy_weight": -1.0}, "entropy_weight=-1.0 must be a finite number >= 0"),
        ({"entropy_weight": 0.1}, "entropy_weight=0.1 needs an actor with an IndependentNormal"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make_chain(TanhNormal, SIGMA, **settings)


def test_deterministic_actors_take_one_sample_of_any_distance():
    chain = make_chain(TanhDelta, distance="exact", num_samples=100)
    assert chain.actor_loss(BATCH)[1]["w2_1"].item() == 0
