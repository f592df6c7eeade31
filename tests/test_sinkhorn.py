"""The Sinkhorn divergence against GeomLoss, closed forms and exact optimal transport."""

from __future__ import annotations

import importlib.util
import itertools
import math

import pytest
import torch
from geomloss import SamplesLoss

from pogo_torchrl import sinkhorn_divergence
from pogo_torchrl.ot import BACKENDS

needs_no_keops = pytest.mark.skipif(
    importlib.util.find_spec("pykeops") is not None, reason="pykeops is installed"
)


def clouds(*shape, other=None, dtype=torch.float64):
    """Two clouds in the unit box, the second with ``other`` points."""
    *leading, k, d = shape
    x = torch.rand(*leading, k, d, dtype=dtype) * 2 - 1
    y = torch.rand(*leading, other or k, d, dtype=dtype) * 2 - 1
    return x, y


def value_and_gradients(function, x, y):
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    value = function(x, y)
    weights = torch.arange(1, value.numel() + 1, dtype=x.dtype).reshape(value.shape)
    return value.detach(), *torch.autograd.grad((weights * value).sum(), (x, y))


@pytest.mark.parametrize("blur", [0.05, 0.5])
@pytest.mark.parametrize(
    ("shape", "other"),
    [
        ((4, 2), None),
        ((5, 4, 3), None),
        ((2, 3, 4, 6), None),
        ((5, 4, 3), 7),
        ((5, 1, 3), None),
        ((5, 1, 3), 4),
        ((3, 16, 1), None),
    ],
)
def test_value_and_gradient_are_those_of_geomloss(shape, other, blur):
    def direct(x, y):
        loss = SamplesLoss("sinkhorn", p=2, blur=blur, backend="tensorized")
        return loss(x.flatten(0, -3), y.flatten(0, -3)) if x.dim() > 2 else loss(x[None], y[None])

    x, y = clouds(*shape, other=other)
    ours = value_and_gradients(lambda x, y: sinkhorn_divergence(x, y, blur=blur), x, y)
    reference = value_and_gradients(direct, x, y)
    assert ours[0].shape == shape[:-2]
    torch.testing.assert_close(ours[0].flatten(), reference[0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(ours[1:], reference[1:], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("offset", [[0.3, -0.4], [1.0, 2.0]])
@pytest.mark.parametrize("k", [1, 4])
def test_a_translated_cloud_has_half_the_squared_shift(offset, k):
    offset = torch.tensor(offset, dtype=torch.float64)
    x, _ = clouds(3, k, 2)
    value, grad_x, grad_y = value_and_gradients(sinkhorn_divergence, x, x + offset)
    expected = offset.square().sum() / 2
    torch.testing.assert_close(value, expected.expand(3), rtol=1e-2, atol=1e-3)
    # moving the whole cloud x changes |offset|^2 / 2 by -offset
    per_cloud = torch.arange(1.0, 4.0, dtype=torch.float64)[:, None] * offset
    torch.testing.assert_close(grad_x.sum(-2), -per_cloud, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(grad_y.sum(-2), per_cloud, rtol=1e-2, atol=1e-3)


def test_diracs_have_half_their_squared_distance():
    x, y = clouds(6, 1, 3)
    value, grad_x, _ = value_and_gradients(lambda x, y: 1.0 * sinkhorn_divergence(x, y), x, y)
    torch.testing.assert_close(value, (x - y).square().sum((-2, -1)) / 2)
    weights = torch.arange(1.0, 7.0, dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(grad_x, weights * (x - y))


def test_it_is_symmetric():
    x, y = clouds(5, 4, 3)
    torch.testing.assert_close(sinkhorn_divergence(x, y), sinkhorn_divergence(y, x))


def test_it_vanishes_with_its_gradient_between_equal_clouds():
    x, _ = clouds(5, 4, 3)
    value, grad_x, grad_y = value_and_gradients(sinkhorn_divergence, x, x)
    for out in (value, grad_x, grad_y):
        torch.testing.assert_close(out, torch.zeros_like(out), rtol=0, atol=1e-12)


def test_it_is_invariant_to_the_order_of_points():
    x, y = clouds(5, 4, 3)
    shuffled = sinkhorn_divergence(x[:, [2, 0, 3, 1]], y[:, [1, 3, 0, 2]])
    torch.testing.assert_close(shuffled, sinkhorn_divergence(x, y))


def test_with_a_small_blur_it_is_close_to_half_the_exact_optimal_transport_cost():
    x, y = clouds(50, 4, 2)
    costs = torch.stack(
        [(x - y[:, list(p)]).square().sum(-1).mean(-1) for p in itertools.permutations(range(4))]
    )
    exact = costs.min(0)[0] / 2
    value = sinkhorn_divergence(x, y, blur=0.01)
    # GeomLoss stops before convergence: single states deviate by several per cent
    torch.testing.assert_close(value.mean(), exact.mean(), rtol=3e-2, atol=0)
    torch.testing.assert_close(value, exact, rtol=0.2, atol=5e-3)


@pytest.mark.parametrize("shape", [(4, 2), (3, 4, 2), (3, 1, 2)])
def test_identical_points_are_at_distance_zero_with_zero_gradient(shape):
    x = torch.full(shape, 0.7)
    value, grad_x, grad_y = value_and_gradients(sinkhorn_divergence, x, x)
    assert value.shape == shape[:-2]
    for out in (value, grad_x, grad_y):
        assert torch.equal(out, torch.zeros_like(out))


def test_an_empty_batch_gives_an_empty_result():
    x = torch.zeros(0, 4, 2, requires_grad=True)
    value = sinkhorn_divergence(x, torch.zeros(0, 4, 2))
    assert value.shape == (0,)
    value.sum().backward()
    assert x.grad.shape == (0, 4, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    x, y = (c.to(dtype) for c in clouds(5, 4, 3))
    value, grad_x, _ = value_and_gradients(sinkhorn_divergence, x, y)
    exact, exact_grad, _ = value_and_gradients(sinkhorn_divergence, x.double(), y.double())
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)
    assert grad_x.dtype == dtype  # rounded to the input's dtype only at the end
    torch.testing.assert_close(grad_x, exact_grad.to(dtype), rtol=2e-2, atol=1e-3)


def test_no_gradient_flows_to_a_detached_cloud():
    x, y = (c.requires_grad_() for c in clouds(5, 4, 3))
    sinkhorn_divergence(x, y.detach()).sum().backward()
    assert x.grad.abs().sum() > 0
    assert y.grad is None


def test_the_grad_mode_of_the_caller_is_restored():
    x, y = (c.requires_grad_() for c in clouds(5, 4, 3))
    with torch.no_grad():
        assert not sinkhorn_divergence(x, y).requires_grad
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    assert sinkhorn_divergence(x, y).requires_grad


def test_inputs_without_gradient_give_values_without_gradient():
    x, y = clouds(5, 4, 3)
    assert not sinkhorn_divergence(x, y).requires_grad
    assert not x.requires_grad


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_non_finite_points_raise(bad, side):
    pair = clouds(5, 4, 3)
    pair[side][2, 1, 0] = bad
    with pytest.raises(ValueError, match="not finite"):
        sinkhorn_divergence(*pair)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (torch.zeros(3), torch.zeros(3)),
        (torch.zeros(5, 4, 3), torch.zeros(4, 3)),
        (torch.zeros(5, 4, 3), torch.zeros(6, 4, 3)),
        (torch.zeros(5, 4, 3), torch.zeros(5, 4, 2)),
        (torch.zeros(5, 0, 3), torch.zeros(5, 4, 3)),
        (torch.zeros(5, 4, 0), torch.zeros(5, 4, 0)),
        (torch.zeros(5, 4, 3), torch.zeros(5, 4, 3, dtype=torch.float64)),
        (torch.zeros(5, 4, 3).long(), torch.zeros(5, 4, 3).long()),
    ],
    ids=["1d", "rank", "batch", "dim", "no points", "no dims", "mixed dtype", "integer"],
)
def test_mismatched_clouds_raise(x, y):
    with pytest.raises(ValueError, match="cloud"):
        sinkhorn_divergence(x, y)


@pytest.mark.parametrize("blur", [0.0, -1.0, math.nan])
def test_a_non_positive_blur_raises(blur):
    with pytest.raises(ValueError, match="blur"):
        sinkhorn_divergence(*clouds(5, 4, 3), blur=blur)


def test_an_unknown_backend_raises_and_lists_the_choices():
    with pytest.raises(ValueError, match="tensorized"):
        sinkhorn_divergence(*clouds(5, 4, 3), backend="fancy")
    assert {"tensorized", "online", "auto"} <= set(BACKENDS)


def test_auto_is_tensorized_for_small_clouds():
    x, y = clouds(5, 4, 3)
    auto = value_and_gradients(lambda x, y: sinkhorn_divergence(x, y, backend="auto"), x, y)
    torch.testing.assert_close(auto, value_and_gradients(sinkhorn_divergence, x, y))


@needs_no_keops
def test_online_without_keops_names_the_extra():
    with pytest.raises(ImportError, match=r"pogo_torchrl\[keops\]"):
        sinkhorn_divergence(*clouds(5, 4, 3), backend="online")
