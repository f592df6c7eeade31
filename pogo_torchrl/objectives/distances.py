"""Distance between the actions of two actors, as the losses of a chain use it."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from pogo_torchrl import functional
from pogo_torchrl.ot import sinkhorn_divergence


def unit_box_divergence(
    actions: Tensor,
    references: Tensor,
    low: Tensor,
    high: Tensor,
    *,
    blur: float,
    backend: Literal["tensorized", "online", "auto", "fast", "exact"],
) -> Tensor:
    """Debiased Sinkhorn divergence between K actions of two actors, mapped to [-1, 1].

    Args:
        actions: actions of the one actor, of shape ``[*B, K, d]``.
        references: actions of the other.
        low: lower bounds of the actions.
        high: upper bounds of the actions.

    Keyword Args:
        blur: see :func:`~pogo_torchrl.sinkhorn_divergence`.
        backend: see :func:`~pogo_torchrl.sinkhorn_divergence`.

    Returns:
        The divergence per state, of shape ``[*B]``.
    """
    return sinkhorn_divergence(
        functional.to_unit_box(actions, low, high),
        functional.to_unit_box(references, low, high),
        blur=blur,
        backend=backend,
        # The diagonal of [-1, 1]^d. As published, GeomLoss uses the diameter of the batch.
        diameter=2 * actions.shape[-1] ** 0.5 if backend == "fast" else None,
    )
