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

import numpy as np
import torch
from torch import Tensor

# Deepest row of t that clouds of diameter D can reach at temperature eps, in units of
# D / sqrt(eps): a row that is late falls behind twofold at each annealing step. The worst clouds
# that benchmarks/transport.py --search finds reach 1.02 where K = K', 1.23 elsewhere.
_DEPTH = 1.5


def fast_sinkhorn(x: Tensor, y: Tensor, *, blur: float, diameter: float) -> Tensor:
    """The divergence of clouds ``[*B, K, d]`` and ``[*B, K', d]``; shape ``[*B]``.

    ``diameter`` bounds the distance between points and sets the schedule. A point that is not
    finite makes its own cloud's value NaN, no other's. Differentiable once.
    """
    grads = (x.requires_grad, y.requires_grad) if torch.is_grad_enabled() else (False, False)
    # A bound instead of K itself: torch.compile may hold K as a symbol.
    points = 64 if x.shape[-2] <= 64 and y.shape[-2] <= 64 else 2**20
    steps = _steps(_number(diameter), _number(blur), points, str(x.dtype))
    # Autocast would run the products in half precision.
    with torch.autocast(x.device.type, enabled=False):
        value = _Sinkhorn.apply(_batch_last(x), _batch_last(y), steps, grads)
    return value.reshape(x.shape[:-2])


class _Sinkhorn(torch.autograd.Function):
    """Value ``[N]`` and analytic gradient for clouds ``[K, d, N]``."""

    @staticmethod
    def forward(ctx, x, y, steps, grads):
        value, grad_x, grad_y = _solve(x, y, steps, grads)
        ctx.save_for_backward(x, y, grad_x, grad_y)
        return value

    @staticmethod
    def backward(ctx, grad):
        x, y, grad_x, grad_y = ctx.saved_tensors
        out_x = None if grad_x is None else grad_x * grad
        out_y = None if grad_y is None else grad_y * grad
        # once_differentiable would let a second derivative pass as 0 where grad is a constant.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            out_x, out_y = _Once.apply(out_x, out_y, x, y)
        return out_x, out_y, None, None


class _Once(torch.autograd.Function):
    """Gradients of x and y as they are, which refuse to be differentiated."""

    @staticmethod
    def forward(ctx, grad_x, grad_y, x, y):
        return grad_x, grad_y

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "sinkhorn_divergence(backend='fast') has no second derivative: its gradient comes from "
            "the envelope theorem. Drop create_graph=True, or use backend='exact'."
        )


def _solve(
    x: Tensor, y: Tensor, steps: tuple[tuple[float, float | None], ...], grads: tuple[bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    k, m = x.shape[0], y.shape[0]
    cost = _cost(x, y)
    # The clouds' transport to themselves: one problem of twice the batch where K = K'.
    selves = [torch.cat([x, y], -1)] if k == m else [x, y]
    self_costs = [_cost(z, z) for z in selves]

    start = steps[0][0]
    f, g = _log_means(cost * (-1 / start), 0.0, (1, 0))
    f, g = -start * f, -start * g
    potentials = [-start * _log_means(c * (-1 / start), 0.0, (1,))[0] for c in self_costs]
    for eps, shift in steps:
        rows, columns = _log_means(_exponent(f, g, cost, eps), shift, (1, 0))
        f, g = f - eps / 2 * rows, g - eps / 2 * columns
        potentials = [
            p - eps / 2 * _log_means(_exponent(p, p, c, eps), shift, (1,))[0]
            for p, c in zip(potentials, self_costs)
        ]

    # The last extrapolation, a full step. Max-subtracted: its softmax weights make the gradient.
    t = _exponent(f, g, cost, eps)
    rows, columns = _log_means(t, None, (1, 0))
    self_t = [_exponent(p, p, c, eps) for p, c in zip(potentials, self_costs)]
    self_rows = [_log_means(s, None, (1,))[0] for s in self_t]
    p, q = _split([h - eps * r for h, r in zip(potentials, self_rows)], x.shape[-1])
    value = (f - eps * rows - p).mean(0) + (g - eps * columns - q).mean(0)

    grad_x = grad_y = None
    if any(grads):
        pulls = [_weigh(s, r, z) for s, r, z in zip(self_t, self_rows, selves)]
        pull_x, pull_y = _split(pulls, x.shape[-1])
        if grads[0]:
            grad_x = (pull_x - _weigh(t, rows, y)) / k
        if grads[1]:
            grad_y = (pull_y - _weigh(t.transpose(0, 1), columns, x)) / m
    return value, grad_x, grad_y


def _exponent(f: Tensor, g: Tensor, cost: Tensor, eps: float) -> Tensor:
    return (f[:, None] + g[None] - cost) * (1 / eps)


def _log_means(t: Tensor, shift: float | None, dims: tuple[int, ...]) -> list[Tensor]:
    """``log mean exp(t)`` over each of ``dims``; the maximum subtracted where shift is None.

    With a shift all means share one exp. It stays in range where the shift has been chosen so;
    where it does not, the clamp keeps the result finite (and NaN NaN).
    """
    if shift is None:
        return [torch.logsumexp(t, dim) - math.log(t.shape[dim]) for dim in dims]
    info = torch.finfo(t.dtype)
    exp = torch.exp(t + shift if shift else t)
    return [exp.mean(dim).clamp(info.tiny, info.max).log() - shift for dim in dims]


def _weigh(t: Tensor, rows: Tensor, points: Tensor) -> Tensor:
    """The mean of ``points`` ``[K', d, N]`` seen from each row: its softmax weights; [K, d, N]."""
    weights = torch.exp(t - rows[:, None])
    return (weights[:, :, None] * points[None]).mean(1)


def _cost(x: Tensor, y: Tensor) -> Tensor:
    """``|x_i - y_j|^2 / 2`` from differences (exact zeros, no cancellation); [K, K', N]."""
    return (x[:, None] - y[None]).square().sum(2) / 2


def _split(parts: list[Tensor], batch: int) -> tuple[Tensor, Tensor]:
    """The part of x and that of y, from one joint or two separate problems."""
    if len(parts) == 2:
        return parts[0], parts[1]
    return parts[0][..., :batch], parts[0][..., batch:]


def _batch_last(x: Tensor) -> Tensor:
    """``[*B, K, d]`` as ``[K, d, N]``."""
    return x.reshape(-1, *x.shape[-2:]).permute(1, 2, 0).contiguous()


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
    info = torch.finfo(getattr(torch, dtype.removeprefix("torch.")))
    # As GeomLoss computes it, to the last bit: else a schedule may be one step longer.
    ladder = np.exp(np.arange(2 * np.log(diameter), 2 * np.log(blur), 2 * np.log(0.5)))
    steps: list[tuple[float, float | None]] = []
    for eps in (diameter**2, *ladder.tolist(), blur**2):
        shift = max(0.0, _DEPTH * diameter / math.sqrt(eps) + math.log(info.tiny))
        room = math.log(info.max) - 5 * math.log(points)
        steps.append((eps, shift if shift <= room else None))
    return tuple(steps)
