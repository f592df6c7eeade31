r"""GeomLoss's Sinkhorn divergence for many small clouds, batched and without host synchronisation.

The iterates are those of ``geomloss.SamplesLoss("sinkhorn", p=2, blur=blur, diameter=diameter)``:
symmetrised updates, annealing of the blur by a factor of 2, and a final extrapolation. Only the
arithmetic differs. Let :math:`t_{ij} = (f_i + g_j - c_{ij})/\varepsilon`. A single matrix
``exp(t)`` is used for both half-updates

.. math::
    f_i \mathrel{-}= \tfrac\varepsilon2 \log \mathrm{mean}_j e^{t_{ij}}, \qquad
    g_j \mathrel{-}= \tfrac\varepsilon2 \log \mathrm{mean}_i e^{t_{ij}},

and by the envelope theorem the gradient depends on the last step only. The batch is the last,
contiguous dimension, so that every operation is vectorised over it for any K.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import torch
from torch import Tensor

# Bound on -max(t) over the rows of t, for clouds of diameter D at temperature eps, in units of
# D / sqrt(eps): a row that lags behind falls back by a factor of 2 in each annealing step. The
# worst clouds found by benchmarks/transport.py --search reach 0.97 for K = K' and 1.18 otherwise;
# a longer search reached 1.02 and 1.23. The bound is empirical: if it fails, the floor and the
# ceiling in _log_mean_exp keep the result finite.
_DEPTH = 1.35


def fast_sinkhorn(x: Tensor, y: Tensor, *, blur: float, diameter: float) -> Tensor:
    """Return the Sinkhorn divergence of batches of clouds; see :func:`sinkhorn_divergence`.

    The result is differentiable once. Non-finite points give NaN for their own pair of clouds
    only.

    Args:
        x: clouds of shape ``[*B, K, d]``.
        y: clouds of shape ``[*B, K', d]``.
        blur: entropic smoothing length, in the units of the points.
        diameter: upper bound on the distance between points, which sets the annealing schedule.

    Returns:
        The divergences, of shape ``[*B]``.
    """
    # torch.compile may treat K as symbolic, so that the schedule depends on a bound on K instead.
    max_points = 64 if x.shape[-2] <= 64 and y.shape[-2] <= 64 else 2**20
    steps = _schedule(_as_constant(diameter), _as_constant(blur), max_points, str(x.dtype))
    grad_enabled = torch.is_grad_enabled()
    # Autocast would compute the products in half precision.
    with torch.autocast(x.device.type, enabled=False):
        clouds = _batch_last(x), _batch_last(y)
        with torch.no_grad():
            value, *gradients = _solve(
                *clouds, steps, (grad_enabled and x.requires_grad, grad_enabled and y.requires_grad)
            )
        # Attach the gradients of the envelope theorem by a term that is linear in the points and
        # has the value 0.
        for cloud, gradient in zip(clouds, gradients):
            if gradient is not None:
                value = value + ((cloud - cloud.detach()) * gradient).sum((0, 1))
    if value.requires_grad and not torch.compiler.is_compiling():
        value.register_hook(partial(_forbid_double_backward, x, y))
    return value.reshape(x.shape[:-2])


def _forbid_double_backward(x: Tensor, y: Tensor, gradient: Tensor) -> Tensor:
    """Make a second differentiation raise; the linear term would silently give zero."""
    if not torch.is_grad_enabled():
        return gradient
    for points in (x, y):
        if points.requires_grad:
            zero = (points - points.detach()).sum()
            zero.register_hook(_raise_double_backward)
            gradient = gradient + zero
    return gradient


def _raise_double_backward(gradient: Tensor) -> None:
    raise RuntimeError(
        "sinkhorn_divergence(backend='fast') has no second derivative, because its gradient comes "
        "from the envelope theorem. Remove create_graph=True, or use backend='exact'."
    )


def _solve(
    x: Tensor, y: Tensor, steps: tuple[tuple[float, float | None], ...], grads: tuple[bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the divergence of clouds ``[K, d, N]`` and ``[K', d, N]`` and its gradients.

    Args:
        x: clouds of shape ``[K, d, N]``.
        y: clouds of shape ``[K', d, N]``.
        steps: temperatures and shifts of :func:`_schedule`.
        grads: whether to compute the gradients with respect to x and y.
    """
    # There are four potentials: f (x to y), g (y to x), p (x to x) and q (y to y). If K = K', they
    # are concatenated along the batch and solved as a single problem.
    n = x.shape[-1]
    points, targets = [x, y, x, y], [y, x, x, y]
    if x.shape[0] == y.shape[0]:
        points, targets = [torch.cat(points, -1)], [torch.cat(targets, -1)]
    costs = [_cost(a, b) for a, b in zip(points, targets)]
    start = steps[0][0]
    potentials = [-start * _log_mean_exp(c * (-1 / start), 0.0) for c in costs]
    for eps, shift in steps:
        pairs = zip(potentials, _dual_potentials(potentials, n), costs)
        potentials = [
            u - eps / 2 * _log_mean_exp(_exponent(u, v, c, eps), shift) for u, v, c in pairs
        ]

    # The final extrapolation is a full step; its softmax weights give the gradient.
    potentials, costs, targets = (_split(parts, n) for parts in (potentials, costs, targets))
    duals = _dual_potentials(potentials, n)
    exponents = [_exponent(u, v, c, eps) for u, v, c in zip(potentials, duals, costs)]
    log_means = [_log_mean_exp(t, None) for t in exponents]
    f, g, p, q = (u - eps * r for u, r in zip(potentials, log_means))
    value = (f - p).mean(0) + (g - q).mean(0)
    grad_x = grad_y = None
    if grads[0]:
        mean_y, mean_x = (_barycentres(exponents[i], log_means[i], targets[i]) for i in (0, 2))
        grad_x = (mean_x - mean_y) / x.shape[0]
    if grads[1]:
        mean_x, mean_y = (_barycentres(exponents[i], log_means[i], targets[i]) for i in (1, 3))
        grad_y = (mean_y - mean_x) / y.shape[0]
    return value, grad_x, grad_y


def _dual_potentials(potentials: list[Tensor], n: int) -> list[Tensor]:
    """Dual of each potential: g for f, f for g, and p and q for themselves."""
    if len(potentials) == 4:
        f, g, p, q = potentials
        return [g, f, p, q]
    joint = potentials[0]
    return [torch.cat([joint[:, n : 2 * n], joint[:, :n], joint[:, 2 * n :]], -1)]


def _split(parts: list[Tensor], n: int) -> list[Tensor]:
    """Split tensors that are concatenated along the batch into the four problems."""
    return parts if len(parts) == 4 else [parts[0][..., i * n : (i + 1) * n] for i in range(4)]


def _exponent(u: Tensor, v: Tensor, cost: Tensor, eps: float) -> Tensor:
    return (u[:, None] + v[None]).sub_(cost).mul_(1 / eps)


def _log_mean_exp(t: Tensor, shift: float | None) -> Tensor:
    """``log mean exp(t)`` over dimension 1, stabilised by ``shift`` or, if None, by the maximum.

    With a shift, ``t`` is modified in place.

    A constant shift avoids the search for the maximum and is chosen to keep exp in range. If it
    does not, the floor and the ceiling keep the result finite (NaN stays NaN). The floor also
    avoids denormal numbers, for which exp is tens of times slower.
    """
    floor = _min_exponent(t.dtype)
    if shift is None:
        maximum = t.amax(1, keepdim=True)
        return maximum.squeeze(1) + (t - maximum).clamp_min_(floor).exp_().mean(1).log()
    t = t.add_(shift) if shift else t
    mean = t.clamp_min_(floor).exp_().mean(1)
    return mean.clamp_max(torch.finfo(t.dtype).max).log() - shift


def _barycentres(t: Tensor, log_means: Tensor, points: Tensor) -> Tensor:
    """Softmax-weighted mean of ``points`` ``[K', d, N]`` for each row of ``t``; ``[K, d, N]``."""
    # Products of weights below half the floor would be denormal; such weights are negligible.
    weights = (t - log_means[:, None]).clamp_min_(_min_exponent(t.dtype) / 2).exp_()
    if torch.compiler.is_compiling():
        return (weights[:, :, None] * points[None]).mean(1)  # fused, not materialised
    return torch.stack([(weights * points[:, c]).mean(1) for c in range(points.shape[1])], 1)


def _cost(x: Tensor, y: Tensor) -> Tensor:
    """``|x_i - y_j|^2 / 2``, shape ``[K, K', N]``; differences avoid cancellation."""
    total = (x[:, None, 0] - y[None, :, 0]).square()
    for c in range(1, x.shape[1]):
        total = total + (x[:, None, c] - y[None, :, c]).square()
    return total / 2


def _batch_last(x: Tensor) -> Tensor:
    """Reshape ``[*B, K, d]`` to ``[K, d, N]``."""
    return x.reshape(-1, *x.shape[-2:]).permute(1, 2, 0).contiguous()


def _min_exponent(dtype: torch.dtype) -> float:
    """Floor of the exponent: one above the log of the smallest normal number, where exp is slow."""
    return math.log(torch.finfo(dtype).tiny) + 1


def _as_constant(value: float) -> float:
    """Return the value; under torch.compile, which may treat it as symbolic, specialise it."""
    numerator, denominator = float(value).as_integer_ratio()
    return numerator / denominator


@torch.compiler.assume_constant_result
def _schedule(
    diameter: float, blur: float, max_points: int, dtype: str
) -> tuple[tuple[float, float | None], ...]:
    """Annealing temperatures, each with the shift of its exponent (None: subtract the maximum).

    In exact arithmetic no exponent exceeds 4 log K after a step that divides eps by 4, and no row
    has been found whose maximum is below ``-_DEPTH * diameter / sqrt(eps)``. The shift moves this
    range into the range of exp.
    """
    float_dtype = getattr(torch, dtype.removeprefix("torch."))
    # Bitwise as in GeomLoss; otherwise rounding could make the schedule one step longer.
    epsilons = np.exp(np.arange(2 * np.log(diameter), 2 * np.log(blur), 2 * np.log(0.5)))
    steps: list[tuple[float, float | None]] = []
    for eps in (diameter**2, *epsilons.tolist(), blur**2):
        # The margin of 16 keeps a row at this depth e^16 above the floor.
        shift = max(0.0, _DEPTH * diameter / math.sqrt(eps) + _min_exponent(float_dtype) + 16)
        max_shift = math.log(torch.finfo(float_dtype).max) - 5 * math.log(max_points)
        steps.append((eps, shift if shift <= max_shift else None))
    return tuple(steps)
