r"""GeomLoss's Sinkhorn divergence for many small clouds: batched, no host sync, one graph.

The iterates are those of ``geomloss.SamplesLoss("sinkhorn", p=2, blur=blur, diameter=diameter)``
(symmetrised updates, annealing by a factor of 2 in blur, one last extrapolation), in other
arithmetic. Let :math:`t_{ij} = (f_i + g_j - c_{ij})/\varepsilon`. One matrix ``exp(t)`` serves both
half-updates

.. math::
    f_i \mathrel{-}= \tfrac\varepsilon2 \log \mathrm{mean}_j e^{t_{ij}}, \qquad
    g_j \mathrel{-}= \tfrac\varepsilon2 \log \mathrm{mean}_i e^{t_{ij}},

and by the envelope theorem the gradient needs the last step only. The batch is the last,
contiguous dimension, so that every operation is a long vector one whatever K is.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import torch
from torch import Tensor

# Deepest row of t that clouds of diameter D can reach at temperature eps, in units of
# D / sqrt(eps): a row that is late falls behind twofold at each annealing step. The worst clouds
# that benchmarks/transport.py --search finds reach 0.97 where K = K', 1.18 elsewhere; one longer
# search reached 1.02 and 1.23. No proof: the floor and the ceiling below hold where it fails.
_DEPTH = 1.35


def fast_sinkhorn(x: Tensor, y: Tensor, *, blur: float, diameter: float) -> Tensor:
    """The divergence of clouds ``[*B, K, d]`` and ``[*B, K', d]``; shape ``[*B]``.

    ``diameter`` bounds the distance between points and sets the schedule. A point that is not
    finite makes its own cloud's value NaN, no other's. Differentiable once.
    """
    # A bound instead of K itself: torch.compile may hold K as a symbol.
    points = 64 if x.shape[-2] <= 64 and y.shape[-2] <= 64 else 2**20
    steps = _steps(_number(diameter), _number(blur), points, str(x.dtype))
    wanted = torch.is_grad_enabled()
    # Autocast would run the products in half precision.
    with torch.autocast(x.device.type, enabled=False):
        clouds = _batch_last(x), _batch_last(y)
        with torch.no_grad():
            value, *gradients = _solve(
                *clouds, steps, (wanted and x.requires_grad, wanted and y.requires_grad)
            )
        # By the envelope theorem the gradients are those of the last step: a linear function has
        # the value, since x - x is 0, and these gradients.
        for points_of, gradient in zip(clouds, gradients):
            if gradient is not None:
                value = value + ((points_of - points_of.detach()) * gradient).sum((0, 1))
    if value.requires_grad and not torch.compiler.is_compiling():
        value.register_hook(partial(_refuse_twice, x, y))
    return value.reshape(x.shape[:-2])


def _refuse_twice(x: Tensor, y: Tensor, gradient: Tensor) -> Tensor:
    """The incoming gradient, which refuses to be differentiated: a linear function's would be 0."""
    if not torch.is_grad_enabled():
        return gradient
    for points in (x, y):
        if points.requires_grad:
            zero = (points - points.detach()).sum()
            zero.register_hook(_refuse)
            gradient = gradient + zero
    return gradient


def _refuse(gradient: Tensor) -> None:
    raise RuntimeError(
        "sinkhorn_divergence(backend='fast') has no second derivative: its gradient comes from "
        "the envelope theorem. Drop create_graph=True, or use backend='exact'."
    )


def _solve(
    x: Tensor, y: Tensor, steps: tuple[tuple[float, float | None], ...], grads: tuple[bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    # Four potentials: f on x towards y, g on y towards x, and p, q of each cloud towards itself.
    # Where K = K' they lie side by side along the batch, as a single problem.
    n = x.shape[-1]
    points, targets = [x, y, x, y], [y, x, x, y]
    if x.shape[0] == y.shape[0]:
        points, targets = [torch.cat(points, -1)], [torch.cat(targets, -1)]
    costs = [_cost(a, b) for a, b in zip(points, targets)]
    start = steps[0][0]
    potentials = [-start * _log_mean_exp(c * (-1 / start), 0.0) for c in costs]
    for eps, shift in steps:
        pairs = zip(potentials, _partners(potentials, n), costs)
        potentials = [
            u - eps / 2 * _log_mean_exp(_exponent(u, v, c, eps), shift) for u, v, c in pairs
        ]

    # The last extrapolation, a full step; its softmax weights make the gradient.
    potentials, costs, targets = (_apart(parts, n) for parts in (potentials, costs, targets))
    partners = _partners(potentials, n)
    exponents = [_exponent(u, v, c, eps) for u, v, c in zip(potentials, partners, costs)]
    rows = [_log_mean_exp(t, None) for t in exponents]
    f, g, p, q = (u - eps * r for u, r in zip(potentials, rows))
    value = (f - p).mean(0) + (g - q).mean(0)
    grad_x = grad_y = None
    if grads[0]:
        pull, pull_self = (_weigh(exponents[i], rows[i], targets[i]) for i in (0, 2))
        grad_x = (pull_self - pull) / x.shape[0]
    if grads[1]:
        pull, pull_self = (_weigh(exponents[i], rows[i], targets[i]) for i in (1, 3))
        grad_y = (pull_self - pull) / y.shape[0]
    return value, grad_x, grad_y


def _partners(potentials: list[Tensor], n: int) -> list[Tensor]:
    """The potential that each one meets: f and g each other, p and q themselves."""
    if len(potentials) == 4:
        f, g, p, q = potentials
        return [g, f, p, q]
    joint = potentials[0]
    return [torch.cat([joint[:, n : 2 * n], joint[:, :n], joint[:, 2 * n :]], -1)]


def _apart(parts: list[Tensor], n: int) -> list[Tensor]:
    """The four problems one by one."""
    return parts if len(parts) == 4 else [parts[0][..., i * n : (i + 1) * n] for i in range(4)]


def _exponent(u: Tensor, v: Tensor, cost: Tensor, eps: float) -> Tensor:
    return (u[:, None] + v[None]).sub_(cost).mul_(1 / eps)


def _log_mean_exp(t: Tensor, shift: float | None) -> Tensor:
    """``log mean exp(t)`` over dimension 1, the maximum subtracted where shift is None.

    With a shift t is overwritten.

    A constant shift saves the search for the maximum and is chosen so that exp stays in range.
    Where it does not, the floor and the ceiling keep the result finite (and NaN NaN). The floor
    also keeps exp out of denormal numbers, which are tens of times slower.
    """
    floor = _floor(t.dtype)
    if shift is None:
        top = t.amax(1, keepdim=True)
        return top.squeeze(1) + (t - top).clamp_min_(floor).exp_().mean(1).log()
    t = t.add_(shift) if shift else t
    mean = t.clamp_min_(floor).exp_().mean(1)
    return mean.clamp_max(torch.finfo(t.dtype).max).log() - shift


def _weigh(t: Tensor, rows: Tensor, points: Tensor) -> Tensor:
    """The mean of ``points`` ``[K', d, N]`` seen from each row: its softmax weights; [K, d, N]."""
    # Half the floor, far below rounding: products of smaller weights would be denormal.
    weights = (t - rows[:, None]).clamp_min_(_floor(t.dtype) / 2).exp_()
    if torch.compiler.is_compiling():
        return (weights[:, :, None] * points[None]).mean(1)  # fused: never in memory
    return torch.stack([(weights * points[:, c]).mean(1) for c in range(points.shape[1])], 1)


def _cost(x: Tensor, y: Tensor) -> Tensor:
    """``|x_i - y_j|^2 / 2`` from differences (exact zeros, no cancellation); [K, K', N]."""
    total = (x[:, None, 0] - y[None, :, 0]).square()
    for c in range(1, x.shape[1]):
        total = total + (x[:, None, c] - y[None, :, c]).square()
    return total / 2


def _batch_last(x: Tensor) -> Tensor:
    """``[*B, K, d]`` as ``[K, d, N]``."""
    return x.reshape(-1, *x.shape[-2:]).permute(1, 2, 0).contiguous()


def _floor(dtype: torch.dtype) -> float:
    """The least exponent; one above the edge of normal numbers, where exp is already slow."""
    return math.log(torch.finfo(dtype).tiny) + 1


def _number(value: float) -> float:
    """The value itself; torch.compile, which may hold it as a symbol, makes it a constant."""
    numerator, denominator = float(value).as_integer_ratio()
    return numerator / denominator


@torch.compiler.assume_constant_result
def _steps(
    diameter: float, blur: float, points: int, dtype: str
) -> tuple[tuple[float, float | None], ...]:
    """Temperatures of the annealing, each with its shift of the exponent (None: subtract the max).

    In exact arithmetic no exponent is above 4 log K after a step that divides eps by 4, and none
    deeper than ``_DEPTH * diameter / sqrt(eps)`` has been found: the shift centres that range in
    the numbers that exp can represent.
    """
    number = getattr(torch, dtype.removeprefix("torch."))
    # As GeomLoss computes it, to the last bit: else a schedule may be one step longer.
    ladder = np.exp(np.arange(2 * np.log(diameter), 2 * np.log(blur), 2 * np.log(0.5)))
    steps: list[tuple[float, float | None]] = []
    for eps in (diameter**2, *ladder.tolist(), blur**2):
        # 16: a row at that depth still stands e^16 above the floor.
        shift = max(0.0, _DEPTH * diameter / math.sqrt(eps) + _floor(number) + 16)
        room = math.log(torch.finfo(number).max) - 5 * math.log(points)
        steps.append((eps, shift if shift <= room else None))
    return tuple(steps)
