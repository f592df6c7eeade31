"""Optimal transport between small clouds of actions: one signature, several backends."""

from __future__ import annotations

import importlib.util
import math

import torch
from geomloss import SamplesLoss
from torch import Tensor

BACKENDS = ("tensorized", "online", "auto")
"""Accepted values of ``backend``, see :func:`sinkhorn_divergence`."""

# Above this number of pairs GeomLoss's "auto" leaves dense matrices for KeOps.
_MAX_DENSE_PAIRS = 5000**2


def sinkhorn_divergence(
    x: Tensor, y: Tensor, *, blur: float = 0.05, backend: str = "tensorized"
) -> Tensor:
    r"""Debiased Sinkhorn divergence between batches of point clouds, uniform weights.

    .. math::
        S_\varepsilon(x, y) = OT_\varepsilon(x, y) - \tfrac12 OT_\varepsilon(x, x)
                              - \tfrac12 OT_\varepsilon(y, y),
        \qquad c(u, v) = \tfrac12 \lVert u - v\rVert^2, \quad \varepsilon = blur^2

    which is about :math:`W_2^2 / 2`. Value and gradient are exactly those of
    ``geomloss.SamplesLoss("sinkhorn", p=2, blur=blur)``: the published ``w2_weights`` are tuned to
    this scale (half the squared distance, summed over the action dimensions). The gradient flows
    to both clouds; detach the one that is a fixed reference.

    Source: Feydy et al., "Interpolating between Optimal Transport and MMD using Sinkhorn
    Divergences" (2019), equation 3; GeomLoss.

    Args:
        x: clouds of shape ``[*B, K, d]``: K points of dimension d for each leading index.
        y: clouds of shape ``[*B, K', d]``, same dtype and device as ``x``.
        blur: the entropic smoothing length in units of the points, positive.
        backend: ``"tensorized"`` (dense, the default), ``"online"`` (KeOps, linear memory; needs
            the extra ``keops``) or ``"auto"`` (GeomLoss chooses by size).

    Returns:
        One divergence per leading index, shape ``[*B]``; float16 and bfloat16 clouds are measured
        in float32, because the gradient of the cost is lost in less.

    Raises:
        ValueError: for an unknown backend, a blur that is not positive, shapes or dtypes that do
            not fit, an empty cloud, or points that are not finite.
        ImportError: when the backend needs KeOps and it is not installed.

    Example:
        >>> import torch
        >>> x = torch.zeros(5, 4, 2)
        >>> y = x + torch.tensor([3.0, 4.0])
        >>> sinkhorn_divergence(x, y)[0].item()  # |3, 4|^2 / 2
        12.5
    """
    x, y = _check(x, y, blur, backend)
    if _needs_keops(backend, x.shape[-2] * y.shape[-2]):
        raise ImportError(
            f"w2_backend={backend!r} needs KeOps, which is not installed: "
            "pip install \"pogo_torchrl[keops]\", or use w2_backend='tensorized'."
        )
    return _geomloss(x, y, blur, backend)


# GeomLoss derives its schedule from the batch's diameter on the host: torch.compile would compile
# anew for every value of it, so it steps over this call instead.
@torch.compiler.disable
def _geomloss(x: Tensor, y: Tensor, blur: float, backend: str) -> Tensor:
    diameter = _diameter(x, y)
    if not math.isfinite(diameter):
        raise ValueError(
            "sinkhorn_divergence got points that are not finite (NaN or infinite): the policy has "
            "diverged. Try larger w2_weights, q_normalization='mean_abs' or a smaller lr."
        )
    if diameter == 0:
        # Every point coincides (GeomLoss raises): value and gradient are exactly 0.
        return 0 * (x.sum((-2, -1)) + y.sum((-2, -1)))
    divergence = SamplesLoss("sinkhorn", p=2, blur=blur, backend=backend)
    # GeomLoss switches gradients on and leaves them on: restore the caller's mode.
    with torch.set_grad_enabled(torch.is_grad_enabled()):
        value = divergence(_as_batch(x), _as_batch(y))
    return value.reshape(x.shape[:-2])


def _check(x: Tensor, y: Tensor, blur: float, backend: str) -> tuple[Tensor, Tensor]:
    if backend not in BACKENDS:
        raise ValueError(f"w2_backend={backend!r} is unknown; choose one of {list(BACKENDS)}.")
    if not blur > 0:
        raise ValueError(f"blur={blur} must be positive (in units of the actions, e.g. 0.05).")
    if x.dim() < 2 or x.shape[:-2] != y.shape[:-2] or x.shape[-1] != y.shape[-1]:
        raise ValueError(
            "sinkhorn_divergence takes clouds of shape [*B, K, d] with equal *B and d, "
            f"got {tuple(x.shape)} and {tuple(y.shape)}."
        )
    if x.dtype != y.dtype or not x.dtype.is_floating_point:
        raise ValueError(
            "sinkhorn_divergence takes two clouds of one floating-point dtype, "
            f"got {x.dtype} and {y.dtype}."
        )
    if 0 in (x.shape[-2], y.shape[-2], x.shape[-1]):
        raise ValueError(
            f"sinkhorn_divergence got an empty cloud: shapes {tuple(x.shape)} and "
            f"{tuple(y.shape)}; num_samples and the action dimension must be at least 1."
        )
    if x.dtype in (torch.float16, torch.bfloat16):
        return x.float(), y.float()
    return x, y


def _needs_keops(backend: str, pairs: int) -> bool:
    dense = backend == "tensorized" or (backend == "auto" and pairs <= _MAX_DENSE_PAIRS)
    return not dense and importlib.util.find_spec("pykeops") is None


def _as_batch(x: Tensor) -> Tensor:
    """``[*B, K, d]`` as ``[B, K, d]``."""
    return x.reshape(-1, *x.shape[-2:]).contiguous()


def _diameter(x: Tensor, y: Tensor) -> float:
    """Diagonal of the box around all points; 0 for an empty batch."""
    if x.numel() == 0:
        return 0.0
    points = torch.cat([x.detach().flatten(0, -2), y.detach().flatten(0, -2)])
    return (points.amax(0) - points.amin(0)).norm().item()
