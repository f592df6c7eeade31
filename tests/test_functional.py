"""The equations against values computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from pogo_torchrl import functional as F


def tensor(*values, **kwargs):
    return torch.tensor(values, dtype=torch.float64, **kwargs)


LOW, HIGH = tensor(-1.0, 0.0), tensor(3.0, 1.0)  # half ranges 2 and 0.5


@pytest.mark.parametrize(
    ("action", "noise", "expected"),
    [
        ([1.0, 0.5], [1.0, -1.0], [1.4, 0.4]),  # 0.2 * n in units of 2 and of 0.5
        ([1.0, 0.5], [4.0, -4.0], [2.0, 0.25]),  # |0.2 * n| = 0.8 is clipped to 0.5
        ([2.9, 0.05], [4.0, -4.0], [3.0, 0.0]),  # the sum is clipped to the bounds
        ([-0.9, 0.95], [-4.0, 4.0], [-1.0, 1.0]),
        ([0.3, 0.7], [0.0, 0.0], [0.3, 0.7]),
    ],
)
def test_smoothing_noise_is_in_units_of_half_the_action_range(action, noise, expected):
    out = F.smoothed_target_action(tensor(*action), tensor(*noise), LOW, HIGH, sigma=0.2, clip=0.5)
    torch.testing.assert_close(out, tensor(*expected))


@pytest.mark.parametrize(("sigma", "clip"), [(0.0, 0.5), (0.2, 0.0)])
def test_no_smoothing_without_sigma_or_clip(sigma, clip):
    action = tensor([1.0, 0.5])
    out = F.smoothed_target_action(
        action, torch.randn_like(action), LOW, HIGH, sigma=sigma, clip=clip
    )
    assert torch.equal(out, action)


@pytest.mark.parametrize("shape", [(2,), (5, 2), (2, 3, 2)])
def test_smoothed_actions_keep_their_shape_and_stay_inside_the_bounds(shape):
    action = LOW + (HIGH - LOW) * torch.rand(shape, dtype=torch.float64)
    out = F.smoothed_target_action(
        action, 10 * torch.randn_like(action), LOW, HIGH, sigma=5.0, clip=9.0
    )
    assert out.shape == shape
    assert ((out >= LOW) & (out <= HIGH)).all()


def test_td_target_bootstraps_unless_terminated():
    reward, next_value = tensor(1.0, -2.0), tensor(10.0, 10.0).requires_grad_()
    target = F.td_target(reward, torch.tensor([False, True]), next_value, gamma=0.9)
    torch.testing.assert_close(target, tensor(10.0, -2.0))
    target.sum().backward()
    torch.testing.assert_close(next_value.grad, tensor(0.9, 0.0))


def test_to_unit_box_maps_the_bounds_to_minus_one_and_one():
    action = torch.stack([LOW, (LOW + HIGH) / 2, HIGH]).requires_grad_()
    out = F.to_unit_box(action, LOW, HIGH)
    torch.testing.assert_close(out, tensor([-1.0, -1.0], [0.0, 0.0], [1.0, 1.0]))
    out.sum().backward()
    torch.testing.assert_close(action.grad, tensor(0.5, 2.0).expand(3, 2))


def test_to_unit_box_is_the_identity_for_unit_bounds():
    action = torch.rand(7, 2) * 2 - 1
    assert torch.equal(F.to_unit_box(action, -torch.ones(2), torch.ones(2)), action)


def test_l2_distance_is_the_mean_over_dimensions():
    action = tensor([1.0, 0.0], [2.0, -1.0]).requires_grad_()
    distance = F.l2_distance(action, tensor([0.0, 0.0], [0.0, 1.0]))
    torch.testing.assert_close(distance, tensor(0.5, 4.0))
    distance.sum().backward()
    torch.testing.assert_close(action.grad, tensor([1.0, 0.0], [2.0, -2.0]))


@pytest.mark.parametrize(
    ("alpha", "q_normalization", "expected"),
    [(1.0, "mean_abs", 0.25), (2.0, "mean_abs", 0.5), (1.0, None, 1.0), (2.5, None, 2.5)],
)
def test_q_scale_is_alpha_over_the_mean_magnitude(alpha, q_normalization, expected):
    scale = F.q_scale(tensor(-2.0, 6.0), alpha, q_normalization)
    assert scale.shape == ()
    assert scale.dtype == torch.float64
    assert scale.item() == pytest.approx(expected)


@pytest.mark.parametrize("q_normalization", F.Q_NORMALIZATIONS)
def test_q_scale_carries_no_gradient(q_normalization):
    scale = F.q_scale(tensor(-2.0, 6.0).requires_grad_(), 1.0, q_normalization)
    assert not scale.requires_grad


def test_q_scale_is_finite_if_all_values_are_zero():
    assert torch.isfinite(F.q_scale(torch.zeros(3), 1.0))


def test_jko_loss_and_its_gradients():
    q, distance = tensor(4.0, -2.0).requires_grad_(), tensor(2.0, 1.0).requires_grad_()
    loss = F.jko_loss(q, distance, scale=tensor(0.25)[0], weight=0.5)
    torch.testing.assert_close(loss, tensor(0.0, 1.0))
    loss.sum().backward()
    torch.testing.assert_close(q.grad, tensor(-0.25, -0.25))
    torch.testing.assert_close(distance.grad, tensor(0.5, 0.5))


def test_the_normalised_objective_does_not_depend_on_the_scale_of_q():
    q = tensor(4.0, -2.0, 1.0)
    values = [
        F.jko_loss(c * q, tensor(2.0), scale=F.q_scale(c * q, 1.0), weight=0.5) for c in (1, 1e4)
    ]
    torch.testing.assert_close(*values)


@pytest.mark.parametrize("alpha", [1.0, 0.3])
@pytest.mark.parametrize("dim", [1, 3])
def test_step_sizes_are_the_displacements_along_a_linear_q(alpha, dim):
    """The minimiser of L_i is displaced by h_i d (lambda / alpha) grad Q, for every actor."""
    sizes = (0.7, 0.2)
    weights = F.step_sizes_to_weights(sizes, dim, alpha)
    gradient, reference = torch.randn(dim, dtype=torch.float64), torch.zeros(dim)
    scale = torch.tensor(alpha / 2.5)  # lambda for mean |Q| = 2.5
    for i, (h, weight) in enumerate(zip(sizes, weights)):
        action = torch.zeros(dim, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([action], tolerance_grad=1e-12, line_search_fn="strong_wolfe")

        def objective(i=i, weight=weight, action=action, optimizer=optimizer):
            optimizer.zero_grad()
            distance = (action - reference).square()
            distance = distance.sum() / 2 if i else distance.mean()
            loss = F.jko_loss(gradient @ action, distance, scale=scale, weight=weight)
            loss.backward()
            return loss

        optimizer.step(objective)
        expected = h * dim * scale / alpha * gradient
        torch.testing.assert_close(action.detach(), expected, rtol=1e-6, atol=1e-9)


def test_step_sizes_and_weights_are_inverse():
    weights = (0.1, 0.5, 0.25)
    sizes = F.weights_to_step_sizes(weights, 6, 0.5)
    assert F.step_sizes_to_weights(sizes, 6, 0.5) == pytest.approx(weights)
    equal = F.step_sizes_to_weights([0.7] * 3, 6)
    assert equal[1:] == pytest.approx((2 * equal[0] / 6,) * 2)
    assert F.weights_to_step_sizes([0.0, 1.0], 2) == (float("inf"), 0.5)


def test_advantage_weights_are_clipped_exponentials_over_their_mean():
    q_policy = tensor(2.0, -4.0, 3.0, 3.0)  # mean magnitude 3
    advantage = tensor(-1.0, 0.0, 0.5, 4.0)
    q_data = q_policy + 3 * advantage
    weights = F.advantage_weights(q_data, q_policy, temperature=0.5, clip=5.0)
    expected = tensor(math.exp(-2), 1.0, math.exp(1), 5.0)  # exp(8) is clipped
    torch.testing.assert_close(weights, expected / expected.mean())
    # neither the scale of Q nor the shape of the batch matters
    scaled = F.advantage_weights(7 * q_data, 7 * q_policy, temperature=0.5, clip=5.0)
    torch.testing.assert_close(scaled, weights)
    folded = F.advantage_weights(q_data.view(2, 2), q_policy.view(2, 2), 0.5, 5.0)
    torch.testing.assert_close(folded, weights.view(2, 2))


def test_advantage_weights_are_finite_for_extreme_values():
    """All exponentials overflow, or all underflow, or every Q value is 0."""
    for advantage in (1e4, -1e4):
        weights = F.advantage_weights(tensor(1 + advantage, 1 + advantage), tensor(1, 1), 1)
        torch.testing.assert_close(weights, tensor(1.0, 1.0))
    torch.testing.assert_close(F.advantage_weights(tensor(0, 0), tensor(0, 0), 1), tensor(1.0, 1.0))


def test_advantage_weights_carry_no_gradient():
    q = tensor(1.0, 2.0, requires_grad=True)
    assert not F.advantage_weights(q, q + 1, temperature=1.0).requires_grad


def test_the_next_action_penalty_is_a_sum_over_dimensions_and_0_where_unknown():
    action = tensor([1.0, -1.0], [0.5, 0.0], [0.5, 0.0])
    data_action = tensor([0.0, 1.0], [0.5, 0.5], [math.nan, math.nan])
    penalty = F.next_action_penalty(action, data_action)
    torch.testing.assert_close(penalty, tensor(5.0, 0.25, 0.0))
