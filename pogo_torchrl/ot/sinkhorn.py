"""The Sinkhorn divergence: argument validation and choice of the solver."""

from __future__ import annotations

import importlib.util
import math
from typing import Literal

import torch
from geomloss import SamplesLoss
from torch import Tensor

from pogo_torchrl.ot.exact import MAX_POINTS, assignment_cost
from pogo_torchrl.ot.fast import fast_sinkhorn

BACKENDS = ("tensorized", "online", "auto", "fast", "exact")
"""Accepted values of ``backend``, see :func:`sinkhorn_divergence`."""

# Above this number of pairs, GeomLoss's "auto" switches from dense matrices to KeOps.
_MAX_DENSE_PAIRS = 5000**2


class NotFiniteError(ValueError, FloatingPointError):
    """Raised for non-finite points: an invalid argument, or a diverged training run."""


def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    *,
    blur: float = 0.05,
    backend: Literal["tensorized", "online", "auto", "fast", "exact"] = "tensorized",
    diameter: float | None = None,
) -> Tensor:
    r"""Debiased Sinkhorn divergence between batches of uniformly weighted point clouds.

    .. math::
        S_\varepsilon(x, y) = OT_\varepsilon(x, y) - \tfrac12 OT_\varepsilon(x, x)
                              - \tfrac12 OT_\varepsilon(y, y),
        \qquad c(u, v) = \tfrac12 \lVert u - v\rVert^2, \quad \varepsilon = blur^2

    The divergence approximates :math:`W_2^2 / 2`. Its value and gradient are those of
    ``geomloss.SamplesLoss("sinkhorn", p=2, blur=blur, diameter=diameter)``. The published
    ``w2_weights`` are tuned to this scale: half the squared distance, summed over the action
    dimensions. The gradient flows to both clouds; detach the one that serves as a fixed reference.
    Second derivatives are not supported (those of GeomLoss are wrong).

    References:
        Feydy et al., *Interpolating between Optimal Transport and MMD using Sinkhorn Divergences*,
        2019, arXiv:1810.08278, equation 3.

    Args:
        x: clouds of shape ``[*B, K, d]``: K points of dimension d per leading index.
        y: clouds of shape ``[*B, K', d]``, with the dtype and device of ``x``.
        blur: entropic smoothing length, positive, in the units of the points. Defaults to ``0.05``.
        backend: the solver. Defaults to ``"tensorized"``.

            * ``"tensorized"``: the dense solver of GeomLoss;
            * ``"online"``: GeomLoss with KeOps, linear in memory; needs the extra ``keops``;
            * ``"auto"``: ``"tensorized"`` or ``"online"``, chosen by GeomLoss depending on size;
            * ``"fast"``: the iterates of GeomLoss for many small clouds, faster and without host
              synchronisation if ``diameter`` is given;
            * ``"exact"``: no entropic smoothing. The optimal assignment
              :math:`\min_p \mathrm{mean}_k \tfrac12\lVert x_k - y_{p(k)}\rVert^2`, for
              ``K = K' <= 10``; ignores ``blur`` and ``diameter``.
        diameter: upper bound on the distance between points, at which the annealing of the blur
            starts; ``2 * d**0.5`` for actions in :math:`[-1, 1]^d`. Defaults to ``None``: the
            diagonal of the bounding box of all points of the batch, as in GeomLoss. Computing it
            synchronises with the host, so ``"fast"`` needs an explicit diameter for CUDA graphs
            and ``torch.compile(fullgraph=True)``.

    Returns:
        One divergence per leading index, of shape ``[*B]``. Float16 and bfloat16 clouds are
        converted to float32, since the gradient of the cost needs the precision. Autocast is
        ignored.

    Raises:
        ValueError: if the backend is unknown, the blur or diameter is not positive, shapes or
            dtypes do not match, a cloud is empty, or points are not finite. (``"exact"``, and
            ``"fast"`` with a diameter, return NaN for clouds with non-finite points instead.)
        ImportError: if the backend needs KeOps, which is not installed.

    Example:
        >>> import torch
        >>> x = torch.zeros(5, 4, 2)
        >>> y = x + torch.tensor([3.0, 4.0])
        >>> sinkhorn_divergence(x, y)[0].item()  # |3, 4|^2 / 2
        12.5
        >>> sinkhorn_divergence(x, y, backend="fast", diameter=5.0).shape
        torch.Size([5])
    """
    x, y = _check(x, y, blur, backend, diameter)
    if backend == "exact":
        return assignment_cost(x, y)
    if backend == "fast":
        # If all points coincide, any diameter is valid.
        bound = diameter if diameter is not None else _diameter(x, y) or blur
        return fast_sinkhorn(x, y, blur=blur, diameter=bound)
    if _needs_keops(backend, x.shape[-2] * y.shape[-2]):
        raise ImportError(
            f"w2_backend={backend!r} needs KeOps, which is not installed: run "
            "pip install \"pogo_torchrl[keops]\", or use w2_backend='fast' or 'tensorized'."
        )
    return _geomloss(x, y, blur, backend, diameter)


# GeomLoss derives its schedule from the batch's diameter on the host. torch.compile would recompile
# for every value, so this call stays uncompiled.
@torch.compiler.disable(
    reason="GeomLoss reads values on the host: use w2_backend='fast', which is the same "
    "divergence, or compile without fullgraph=True"
)
def _geomloss(x: Tensor, y: Tensor, blur: float, backend: str, diameter: float | None) -> Tensor:
    if _diameter(x, y) == 0:
        # All points coincide, for which GeomLoss raises: value and gradient are exactly 0.
        return 0 * (x.sum((-2, -1)) + y.sum((-2, -1)))
    divergence = SamplesLoss("sinkhorn", p=2, blur=blur, backend=backend, diameter=diameter)
    # GeomLoss enables gradients and leaves them enabled: restore the caller's mode.
    with torch.set_grad_enabled(torch.is_grad_enabled()):
        value = divergence(_as_batch(x), _as_batch(y))
    return value.reshape(x.shape[:-2])


def _check(
    x: Tensor, y: Tensor, blur: float, backend: str, diameter: float | None
) -> tuple[Tensor, Tensor]:
    if backend not in BACKENDS:
        raise ValueError(f"w2_backend={backend!r} is unknown; choose one of {list(BACKENDS)}.")
    if not 0 < blur < math.inf:
        raise ValueError(f"blur={blur} must be positive (in units of the actions, e.g. 0.05).")
    if diameter is not None and not 0 < diameter < math.inf:
        raise ValueError(
            f"diameter={diameter} must be a positive upper bound on the distance between points, "
            "or None to compute it from the points."
        )
    if min(x.dim(), y.dim()) < 2 or x.shape[:-2] != y.shape[:-2] or x.shape[-1] != y.shape[-1]:
        raise ValueError(
            "sinkhorn_divergence expects clouds of shape [*B, K, d] with equal *B and d, "
            f"got {tuple(x.shape)} and {tuple(y.shape)}."
        )
    if x.dtype != y.dtype or not x.dtype.is_floating_point:
        raise ValueError(
            "sinkhorn_divergence expects two clouds of the same floating-point dtype, "
            f"got {x.dtype} and {y.dtype}."
        )
    if 0 in (x.shape[-2], y.shape[-2], x.shape[-1]):
        raise ValueError(
            f"sinkhorn_divergence got an empty cloud: shapes {tuple(x.shape)} and "
            f"{tuple(y.shape)}; num_samples and the action dimension must be at least 1."
        )
    if backend == "exact" and not x.shape[-2] == y.shape[-2] <= MAX_POINTS:
        raise ValueError(
            f"w2_backend='exact' expects clouds of equal size K <= {MAX_POINTS}, got {x.shape[-2]} "
            f"and {y.shape[-2]} points: lower num_samples, or use w2_backend='fast'."
        )
    if x.dtype in (torch.float16, torch.bfloat16):
        return x.float(), y.float()
    return x, y


def _needs_keops(backend: str, pairs: int) -> bool:
    dense = backend == "tensorized" or (backend == "auto" and pairs <= _MAX_DENSE_PAIRS)
    return not dense and importlib.util.find_spec("pykeops") is None


def _as_batch(x: Tensor) -> Tensor:
    """Reshape ``[*B, K, d]`` to ``[B, K, d]``."""
    return x.reshape(-1, *x.shape[-2:]).contiguous()


@torch.compiler.disable
def _diameter(x: Tensor, y: Tensor) -> float:
    """Diagonal of the bounding box of all points, read on the host; 0 for an empty batch."""
    if x.numel() == 0:
        return 0.0
    points = torch.cat([x.detach().flatten(0, -2), y.detach().flatten(0, -2)])
    diameter = (points.amax(0) - points.amin(0)).norm().item()
    if not math.isfinite(diameter):
        raise NotFiniteError(
            "sinkhorn_divergence got points that are not finite (NaN or infinity): the policy has "
            "diverged. Try larger w2_weights, q_normalization='mean_abs' or a smaller lr."
        )
    return diameter
