"""The backends "fast" (against GeomLoss) and "exact" (against brute force), and shared noise."""

from __future__ import annotations

import itertools
import math
import shutil

import pytest
import torch
from geomloss import SamplesLoss
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Bounded
from torchrl.modules import NormalParamExtractor, ProbabilisticActor, TanhNormal

from pogo_torchrl import POGOLoss, make_actor, make_qvalue, sinkhorn_divergence
from pogo_torchrl.ot import BACKENDS, MAX_POINTS

quick = settings(max_examples=40, deadline=None, derandomize=True)


def fast(x, y, diameter=None, **kwargs):
    if diameter is None:
        diameter = 2 * x.shape[-1] ** 0.5
    return sinkhorn_divergence(x, y, backend="fast", diameter=diameter, **kwargs)


def exact(x, y):
    return sinkhorn_divergence(x, y, backend="exact")


def geomloss(x, y, blur, diameter):
    loss = SamplesLoss("sinkhorn", p=2, blur=blur, diameter=diameter, backend="tensorized")
    return loss(x, y)


def value_and_gradients(function, x, y):
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    value = function(x, y)
    weights = torch.arange(1, value.numel() + 1, dtype=x.dtype).reshape(value.shape)
    return value.detach(), *torch.autograd.grad((weights * value).sum(), (x, y))


def box(*shape, dtype=torch.float64):
    return torch.rand(*shape, dtype=dtype) * 2 - 1


@st.composite
def problems(draw, ratios=(0.5, 400.0)):
    """Clouds in [-1, 1]^d: spread out, concentrated, at the corners, or with common points."""
    k, m, d = draw(st.integers(1, 6)), draw(st.integers(1, 6)), draw(st.integers(1, 5))
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    spread = draw(st.sampled_from([1e-3, 0.1, 1.0, 3.0, 100.0]))
    x, y = (
        (spread * torch.randn(8, n, d) + draw(st.floats(-1, 1)) * torch.randn(8, 1, d)).clamp(-1, 1)
        for n in (k, m)
    )
    if draw(st.booleans()):
        y[..., : min(k, m), :] = x[..., : min(k, m), :]
    diameter = 2 * math.sqrt(d) * draw(st.floats(1, 1.5))
    # float32 values stored as float64, which both precisions represent exactly
    return x.double(), y.double(), diameter / draw(st.floats(*ratios)), diameter


def errors_in_float32(x, y, blur, diameter):
    """Largest errors of value and gradients of "fast" and of GeomLoss."""

    def ours(x, y):
        return fast(x, y, diameter, blur=blur)

    def theirs(x, y):
        return geomloss(x, y, blur, diameter)

    truth = value_and_gradients(theirs, x, y)
    return [
        [
            (a.double() - b).abs().max().item()
            for a, b in zip(value_and_gradients(function, x.float(), y.float()), truth)
        ]
        for function in (ours, theirs)
    ]


@given(problems())
@quick
def test_value_and_gradients_are_those_of_geomloss(problem):
    x, y, blur, diameter = problem
    ours = value_and_gradients(lambda x, y: fast(x, y, diameter, blur=blur), x, y)
    truth = value_and_gradients(lambda x, y: geomloss(x, y, blur, diameter), x, y)
    # The rounding error of the cost, in units of blur^2, limits the accuracy of any solver.
    slack = max(1.0, (diameter / blur / 100) ** 2)
    for a, b in zip(ours, truth):
        torch.testing.assert_close(a, b, rtol=1e-12 * slack, atol=1e-12 * slack)


@given(st.lists(problems(), min_size=3, max_size=3))
@quick
def test_in_float32_it_is_as_accurate_as_geomloss(several):
    ours, theirs = [], []
    for problem in several:
        mine, peer = errors_in_float32(*problem)
        ours, theirs = [*ours, mine], [*theirs, peer]
    ours, theirs = ([max(column) for column in zip(*rows)] for rows in (ours, theirs))
    for mine, peer in zip(ours, theirs):
        assert mine <= 3 * peer + 1e-5


@pytest.mark.parametrize(("k", "d"), [(4, 3), (4, 6), (4, 17), (16, 6), (64, 6)])
def test_mean_error_in_float32_is_that_of_geomloss(k, d):
    diameter, blur = 2 * d**0.5, 0.05
    for spread in (1, 50):  # inside the box and at its corners
        x, y = ((spread * box(3200 // k**2 + 20, k, d)).clamp(-1, 1).float() for _ in range(2))
        truth = value_and_gradients(
            lambda x, y: geomloss(x, y, blur, diameter), x.double(), y.double()
        )
        # The value is as accurate as GeomLoss up to sampling noise, the gradient twice as accurate.
        for slack, a, b, c in zip(
            (1.5, 1.0, 1.0),
            value_and_gradients(lambda x, y: fast(x, y, diameter), x, y),
            value_and_gradients(lambda x, y: geomloss(x, y, blur, diameter), x, y),
            truth,
        ):
            mine, peer = (a.double() - c).square().mean(), (b.double() - c).square().mean()
            assert mine.sqrt() <= slack * peer.sqrt() + 1e-9


@pytest.mark.parametrize("diameter", [3.2, 6.4, 0.1, 0.05, 0.04])
def test_the_schedule_is_that_of_geomloss_for_power_of_two_ratios(diameter):
    x, y = diameter / 4 * box(5, 4, 3), diameter / 4 * box(5, 4, 3)
    torch.testing.assert_close(
        value_and_gradients(lambda x, y: fast(x, y, diameter), x, y),
        value_and_gradients(lambda x, y: geomloss(x, y, 0.05, diameter), x, y),
        rtol=1e-12,
        atol=1e-13,
    )


@pytest.mark.parametrize("backend", ["fast", "tensorized"])
def test_the_default_diameter_is_that_of_the_batch(backend):
    x, y = box(2, 3, 4, 6), box(2, 3, 7, 6)
    points = torch.cat([x.flatten(0, -2), y.flatten(0, -2)])
    diameter = (points.amax(0) - points.amin(0)).norm().item()
    ours = sinkhorn_divergence(x, y, backend=backend)
    assert ours.shape == (2, 3)
    truth = geomloss(x.flatten(0, 1), y.flatten(0, 1), 0.05, diameter)
    torch.testing.assert_close(ours.flatten(), truth, rtol=1e-12, atol=0)
    given = sinkhorn_divergence(x, y, backend=backend, diameter=2 * diameter)
    truth = geomloss(x.flatten(0, 1), y.flatten(0, 1), 0.05, 2 * diameter)
    torch.testing.assert_close(given.flatten(), truth, rtol=1e-12, atol=0)


@given(problems())
@quick
def test_symmetry_order_translation_and_sign(problem):
    x, y, blur, diameter = problem
    value = fast(x, y, diameter, blur=blur)
    close = {"rtol": 1e-8, "atol": 1e-9 * max(1.0, (diameter / blur / 100) ** 2)}
    torch.testing.assert_close(fast(y, x, diameter, blur=blur), value, **close)
    torch.testing.assert_close(fast(x.flip(1), y.flip(1), diameter, blur=blur), value, **close)
    torch.testing.assert_close(fast(x + 0.5, y + 0.5, diameter, blur=blur), value, **close)
    # It is non-negative at convergence, but GeomLoss's schedule stops slightly earlier.
    assert (value >= -1e-2 * blur**2 - 1e-2 * value.abs().max()).all()


@given(problems((1.0, 1e4)))
@quick
def test_results_are_finite_for_any_ratio_of_diameter_and_blur(problem):
    x, y, blur, diameter = problem
    for out in value_and_gradients(
        lambda x, y: fast(x, y, diameter, blur=blur), x.float(), y.float()
    ):
        assert torch.isfinite(out).all()


@pytest.mark.parametrize("ratio", [50, 98, 150, 250, 1e3, 1e4])
@pytest.mark.parametrize(("k", "m"), [(4, 4), (3, 5), (16, 16), (4, 64)])
def test_at_the_corners_of_the_box_it_agrees_with_geomloss(k, m, ratio):
    # Some rows of exp((f + g - C) / eps) underflow here unless the exponent is shifted.
    d = 6
    diameter = 2 * d**0.5
    x, y = (torch.where(box(1000 // max(k, m), n, d) < 0, -1.0, 1.0).float() for n in (k, m))
    blur = diameter / ratio
    value, *gradients = value_and_gradients(lambda x, y: fast(x, y, blur=blur), x, y)
    assert all(torch.isfinite(g).all() for g in gradients)
    truth, *_ = value_and_gradients(
        lambda x, y: geomloss(x, y, blur, diameter), x.double(), y.double()
    )
    torch.testing.assert_close(value.double(), truth, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e3])
def test_points_beyond_the_diameter_give_finite_values(factor):
    x, y = (factor * box(50, 4, 3, dtype=torch.float32) for _ in range(2))
    for out in value_and_gradients(lambda x, y: fast(x, y, 1.0), x, y):
        assert torch.isfinite(out).all()


@pytest.mark.parametrize("backend", ["fast", "exact"])
class TestFastAndExact:
    def test_diracs_have_half_their_squared_distance(self, backend):
        x, y = box(6, 1, 3), box(6, 1, 3)
        value, grad_x, grad_y = value_and_gradients(
            lambda x, y: sinkhorn_divergence(x, y, backend=backend), x, y
        )
        torch.testing.assert_close(value, (x - y).square().sum((-2, -1)) / 2)
        weights = torch.arange(1.0, 7.0, dtype=torch.float64)[:, None, None]
        torch.testing.assert_close(grad_x, weights * (x - y))
        torch.testing.assert_close(grad_y, weights * (y - x))

    @pytest.mark.parametrize("shape", [(4, 2), (3, 4, 2), (3, 1, 2)])
    def test_equal_clouds_have_zero_divergence_and_gradient(self, backend, shape):
        for x in (box(*shape), torch.full(shape, 0.7, dtype=torch.float64)):
            for out in value_and_gradients(
                lambda x, y: sinkhorn_divergence(x, y, backend=backend), x, x
            ):
                torch.testing.assert_close(out, torch.zeros_like(out), rtol=0, atol=1e-12)

    def test_an_empty_batch_gives_an_empty_result(self, backend):
        x = torch.zeros(0, 4, 2, requires_grad=True)
        value = sinkhorn_divergence(x, torch.zeros(0, 4, 2), backend=backend)
        assert value.shape == (0,)
        value.sum().backward()
        assert x.grad.shape == (0, 4, 2)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_computed_in_float32(self, backend, dtype):
        x, y = box(5, 4, 3).to(dtype), box(5, 4, 3).to(dtype)

        def function(x, y):
            return sinkhorn_divergence(x, y, backend=backend)

        value, grad_x, _ = value_and_gradients(function, x, y)
        truth, truth_grad, _ = value_and_gradients(function, x.double(), y.double())
        assert value.dtype == torch.float32
        assert grad_x.dtype == dtype
        torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad_x, truth_grad.to(dtype), rtol=2e-2, atol=1e-3)

    def test_autocast_is_ignored(self, backend):
        x, y = box(5, 4, 3).float(), box(5, 4, 3).float()

        def function(x, y):
            return sinkhorn_divergence(x, y, backend=backend)

        plain = value_and_gradients(function, x, y)
        with torch.autocast("cpu", torch.bfloat16):
            cast = value_and_gradients(function, x, y)
        assert all(torch.equal(a, b) for a, b in zip(plain, cast))

    def test_gradients_follow_requires_grad(self, backend):
        for asks_x, asks_y in itertools.product([False, True], repeat=2):
            x, y = box(5, 4, 3).requires_grad_(asks_x), box(5, 4, 3).requires_grad_(asks_y)
            value = sinkhorn_divergence(x, y, backend=backend)
            assert value.requires_grad == (asks_x or asks_y)
            if value.requires_grad:
                value.sum().backward()
            assert (x.grad is not None) == asks_x
            assert (y.grad is not None) == asks_y
            with torch.no_grad():
                assert not sinkhorn_divergence(x, y, backend=backend).requires_grad

    def test_a_non_finite_point_affects_its_own_cloud_only(self, backend):
        for bad in (math.nan, math.inf):
            x, y = box(5, 4, 3).float(), box(5, 4, 3).float()
            x[2, 1, 0] = bad
            value = sinkhorn_divergence(x, y, backend=backend, diameter=4.0)
            assert (~torch.isfinite(value)).tolist() == [False, False, True, False, False]

    def test_it_compiles_into_one_graph(self, backend):
        x, y = box(7, 3, 2).float(), box(7, 3, 2).float()

        def function(x, y):
            return sinkhorn_divergence(x, y, backend=backend, diameter=3.0, blur=1.0)

        # Without a C++ compiler, test at least the tracing.
        compiler = "inductor" if shutil.which("g++") else "aot_eager"
        compiled = torch.compile(function, fullgraph=True, backend=compiler)
        torch.testing.assert_close(
            value_and_gradients(compiled, x, y),
            value_and_gradients(function, x, y),
            rtol=1e-5,
            atol=1e-6,
        )


def test_compiled_calls_follow_blur_diameter_and_shape():
    compiled = torch.compile(fast, fullgraph=True, backend="eager")
    for blur, diameter, n, k in [(2.0, 3.0, 4, 2), (2.5, 3.0, 5, 3)]:
        x, y = box(n, k, 2), box(n, k, 2)
        torch.testing.assert_close(
            compiled(x, y, diameter, blur=blur), fast(x, y, diameter, blur=blur)
        )


def test_a_second_derivative_raises():
    x = box(5, 4, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(fast(x, box(5, 4, 3)).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_fast_without_a_diameter_rejects_non_finite_points(bad):
    x = box(5, 4, 3)
    x[2, 1, 0] = bad
    with pytest.raises(ValueError, match="not finite"):
        sinkhorn_divergence(x, box(5, 4, 3), backend="fast")


@pytest.mark.parametrize("diameter", [0.0, -1.0, math.nan, math.inf])
def test_an_invalid_diameter_raises(diameter):
    with pytest.raises(ValueError, match="diameter"):
        fast(box(5, 4, 3), box(5, 4, 3), diameter)


@pytest.mark.parametrize("k", range(1, 6))
def test_exact_is_the_best_of_all_permutations(k):
    x, y = box(40, k, 3), box(40, k, 3)
    costs = torch.stack(
        [
            (x - y[:, list(p)]).square().sum(-1).mean(-1) / 2
            for p in itertools.permutations(range(k))
        ]
    )
    value, grad_x, grad_y = value_and_gradients(exact, x, y)
    torch.testing.assert_close(value, costs.min(0)[0])
    # The gradient of the cost at the best permutation.
    best = [list(itertools.permutations(range(k)))[i] for i in costs.argmin(0)]
    weights = torch.arange(1.0, 41.0, dtype=torch.float64)[:, None, None]
    partners = torch.stack([y[i, list(p)] for i, p in enumerate(best)])
    torch.testing.assert_close(grad_x, weights * (x - partners) / k)
    torch.testing.assert_close(grad_y.sum(1), -grad_x.sum(1))


@pytest.mark.parametrize("k", [7, MAX_POINTS])
def test_exact_sorts_in_one_dimension(k):
    x, y = box(2, 5, k, 1), box(2, 5, k, 1)
    sorted_cost = (x.sort(-2)[0] - y.sort(-2)[0]).square().mean((-2, -1)) / 2
    torch.testing.assert_close(exact(x, y), sorted_cost)


def test_exact_is_a_lower_bound_and_close_to_the_divergence_at_a_small_blur():
    x, y = box(300, 4, 2), box(300, 4, 2)
    assert (exact(x, y) <= (x - y).square().sum(-1).mean(-1) / 2 + 1e-12).all()
    near = fast(x, y, blur=0.01)
    torch.testing.assert_close(near.mean(), exact(x, y).mean(), rtol=3e-2, atol=0)


@pytest.mark.parametrize(("k", "m"), [(MAX_POINTS + 1, MAX_POINTS + 1), (3, 4)])
def test_exact_rejects_large_or_unequal_clouds(k, m):
    with pytest.raises(ValueError, match=r"exact.*fast"):
        exact(box(2, k, 2), box(2, m, 2))


@pytest.fixture
def make_loss(unit_spec):
    def make(equal=False, **kwargs):
        actors = [make_actor(3, unit_spec, (8,)) for _ in range(2)]
        if equal:
            actors[1].load_state_dict(actors[0].state_dict())
        loss = POGOLoss(actors, make_qvalue(3, 2, (8,)), w2_weights=(0.2, 0.5), **kwargs)
        return loss.make_value_estimator(gamma=0.9)

    return make


BACKENDS_WITHOUT_KEOPS = [b for b in BACKENDS if b != "online"]


class TestInTheLoss:
    @pytest.mark.parametrize("shared_noise", [False, True])
    @pytest.mark.parametrize("backend", BACKENDS_WITHOUT_KEOPS)
    def test_gradients_reach_only_the_trained_actor(
        self, make_loss, make_batch, backend, shared_noise
    ):
        loss = make_loss(w2_backend=backend, shared_noise=shared_noise)
        value, metadata = loss.actor_loss(make_batch(32), 1)
        value.backward()
        assert metadata["w2_1"] > 0
        assert all(p.grad is None for p in loss.actor_params(0))
        assert all(p.grad.abs().max() > 0 for p in loss.actor_params(1))
        assert all(p.grad is None for p in loss.qvalue_network_params.parameters())

    def test_fast_uses_the_diameter_of_the_bounds(self, make_loss, make_batch, monkeypatch):
        diameters = []

        def spy(*args, **kwargs):
            diameters.append(kwargs["diameter"])
            return sinkhorn_divergence(*args, **kwargs)

        monkeypatch.setattr("pogo_torchrl.objectives.distances.sinkhorn_divergence", spy)
        for backend in ("fast", "tensorized"):
            make_loss(w2_backend=backend).actor_loss(make_batch(), 1)
        assert diameters == [2 * 2**0.5, None]

    def test_fast_and_tensorized_agree(self, make_loss, make_batch):
        batch, values = make_batch(64), []
        loss = make_loss()
        for loss.w2_backend in ("fast", "tensorized"):
            torch.manual_seed(1)
            values.append(loss.actor_loss(batch, 1)[1]["w2_1"])
        # the same noise; the annealing of GeomLoss starts at another diameter
        torch.testing.assert_close(*values, rtol=5e-3, atol=1e-5)

    @pytest.mark.parametrize("backend", ["fast", "tensorized", "exact"])
    def test_shared_noise_vanishes_for_equal_actors(self, make_loss, make_batch, backend):
        batch = make_batch(64)
        shared = make_loss(True, w2_backend=backend, shared_noise=True, alpha=1e-12)
        value, metadata = shared.actor_loss(batch, 1)
        value.backward()
        assert metadata["w2_1"].abs() < 1e-7
        for p in shared.actor_params(1):
            assert p.grad.abs().max() < 1e-6
        assert make_loss(True, w2_backend=backend).actor_loss(batch, 1)[1]["w2_1"] > 1e-4

    def test_shared_noise_keeps_the_distance_of_deterministic_actors(self, make_loss, make_batch):
        # Without spread, both estimators are half the squared distance of the actions.
        loss, batch = make_loss(w2_backend="exact", shared_noise=True), make_batch(512)
        with torch.no_grad():
            for i in range(loss.num_actors):
                first = next(p for p in loss.actor_params(i) if p.shape[-1] == 5)
                first[..., -2:] = 0  # columns of z in [s, z]: makes the actors deterministic
        shared = loss.actor_loss(batch, 1)[1]["w2_1"]
        loss.shared_noise = False
        torch.testing.assert_close(shared, loss.actor_loss(batch, 1)[1]["w2_1"])

    def test_shared_noise_keeps_the_q_term(self, make_loss, make_batch):
        batch, loss = make_batch(4096), make_loss()
        means = []
        for loss.shared_noise in (False, True):
            means.append(loss.actor_loss(batch, 1)[1]["q_actor_1"])
        torch.testing.assert_close(*means, rtol=0.1, atol=5e-3)

    def test_shared_noise_does_not_modify_the_batch(self, make_loss, make_batch):
        batch = make_batch()
        before = set(batch.keys(True))
        make_loss(shared_noise=True).actor_loss(batch, 1)
        assert set(batch.keys(True)) == before

    def test_shared_noise_requires_actors_that_read_noise(self, unit_spec):
        net = nn.Sequential(nn.Linear(3, 4), NormalParamExtractor())
        actor = ProbabilisticActor(
            TensorDictModule(net, ["observation"], ["loc", "scale"]),
            in_keys=["loc", "scale"],
            spec=Bounded(low=-torch.ones(2), high=torch.ones(2)),
            distribution_class=TanhNormal,
        )
        with pytest.raises(ValueError, match="shared_noise"):
            POGOLoss(actor, make_qvalue(3, 2), action_spec=unit_spec, shared_noise=True)

    def test_exact_limits_num_samples(self, make_loss):
        with pytest.raises(ValueError, match="num_samples"):
            make_loss(w2_backend="exact", num_samples=MAX_POINTS + 1)
