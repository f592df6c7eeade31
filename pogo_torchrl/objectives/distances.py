r"""Distances between the actions of two actors, as the losses of chains use them.

All are computed on actions mapped to [-1, 1] and are about half the squared displacement of an
action, summed over its dimensions, so that weights and step sizes keep their meaning:

=============== ================================ ===========================================
distance        actors                           value for a displacement :math:`\delta`
=============== ================================ ===========================================
``sinkhorn``    any, K actions of each           :math:`|\delta|^2 / 2`
``exact``       any, K actions of each           :math:`|\delta|^2 / 2`
``l2``          deterministic                    :math:`|\delta|^2 / 2`
``gaussian_w2`` Gaussian                         :math:`|\delta|^2 / 2`
``kl``          Gaussian, also before a tanh     :math:`|\delta / \sigma|^2 / 2`
``fisher_rao``  Gaussian, also before a tanh     :math:`|\delta / \sigma|^2 / 2`, if it is small
=============== ================================ ===========================================

The last two measure displacements in units of the standard deviation :math:`\sigma`, and know no
other scale (point masses are infinitely far apart): a step of size h displaces the mean by
:math:`\sigma^2` times that of the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn
from torch.distributions import Distribution
from torchrl.modules import IndependentNormal, TanhNormal

from pogo_torchrl import functional
from pogo_torchrl.objectives.chain_base import distribution_class, is_deterministic
from pogo_torchrl.objectives.settings import check_choice, check_positive
from pogo_torchrl.ot import MAX_POINTS, sinkhorn_divergence

OF_SAMPLES = ("sinkhorn", "exact", "l2")
"""Distances between samples, see :func:`sample_distance`."""

OF_GAUSSIANS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "gaussian_w2": functional.gaussian_w2,
    "kl": functional.gaussian_kl,
    "fisher_rao": functional.fisher_rao,
}
"""Distances between Gaussians, see :func:`gaussian_distance`."""

DISTANCES = (*OF_SAMPLES, *OF_GAUSSIANS)

_UNCHANGED_BY_TANH = ("kl", "fisher_rao")


def check_distance(distance: str, actor: nn.Module, num_samples: int, backend: str) -> None:
    """Check that a distance fits an actor.

    Args:
        distance: one of :data:`DISTANCES`.
        actor: the actor.
        num_samples: K.
        backend: solver of the Sinkhorn divergence.

    Raises:
        ValueError: if it does not.
    """
    check_choice("distance", distance, DISTANCES)
    kind = distribution_class(actor)
    name = type(actor).__name__ if kind is None else kind.__name__
    if distance == "l2" and not is_deterministic(actor):
        raise ValueError(
            f"distance='l2' compares the actions of deterministic actors, but the actor draws "
            f"its actions ({name}): use distance='sinkhorn'."
        )
    if distance in OF_GAUSSIANS:
        fitting = [IndependentNormal]
        fitting += [TanhNormal] if distance in _UNCHANGED_BY_TANH else []
        if kind is None or not issubclass(kind, tuple(fitting)):
            raise ValueError(
                f"distance={distance!r} needs an actor with an "
                f"{' or a '.join(one.__name__ for one in fitting)}, not {name}: use "
                "distance='sinkhorn'."
            )
    if num_samples > MAX_POINTS and not is_deterministic(actor):
        if distance == "exact":
            what, instead = "distance='exact'", "distance='sinkhorn'"
        elif distance == "sinkhorn" and backend == "exact":
            what, instead = "w2_backend='exact'", "w2_backend='fast'"
        else:
            return
        raise ValueError(
            f"num_samples={num_samples} is too large for {what}, which supports at most "
            f"{MAX_POINTS}: lower it, or use {instead}."
        )


def check_entropy_weight(entropy_weight: float, actor: nn.Module) -> None:
    """Check a weight of the entropy, and that the entropy of the actor has a closed form.

    Raises:
        ValueError: if the weight is not a finite number >= 0, or does not fit the actor.
    """
    check_positive("entropy_weight", entropy_weight, or_zero=True)
    kind = distribution_class(actor)
    if entropy_weight and (kind is None or not issubclass(kind, IndependentNormal)):
        raise ValueError(
            f"entropy_weight={entropy_weight} needs an actor with an IndependentNormal, whose "
            "entropy has a closed form: set it to 0."
        )


def sample_distance(
    distance: str,
    actions: Tensor,
    references: Tensor,
    low: Tensor,
    high: Tensor,
    *,
    blur: float,
    backend: Literal["tensorized", "online", "auto", "fast", "exact"],
) -> Tensor:
    """Distance between K actions of two actors, mapped to [-1, 1].

    Args:
        distance: one of :data:`OF_SAMPLES`.
        actions: actions of the one actor, of shape ``[*B, K, d]``.
        references: actions of the other.
        low: lower bounds of the actions.
        high: upper bounds of the actions.

    Keyword Args:
        blur: see :func:`~pogo_torchrl.sinkhorn_divergence`, for ``"sinkhorn"``.
        backend: see :func:`~pogo_torchrl.sinkhorn_divergence`, for ``"sinkhorn"``.

    Returns:
        The distance per state, of shape ``[*B]``.
    """
    if distance == "l2":
        pair = (functional.to_unit_box(x[..., 0, :], low, high) for x in (actions, references))
        return functional.squared_distance(*pair) / 2
    backend = "exact" if distance == "exact" else backend
    return unit_box_divergence(actions, references, low, high, blur=blur, backend=backend)


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


def gaussian_distance(
    distance: str, policy: Distribution, reference: Distribution, low: Tensor, high: Tensor
) -> Tensor:
    """Distance between Gaussians over actions, mapped to [-1, 1].

    Args:
        distance: one of :data:`OF_GAUSSIANS`.
        policy: an ``IndependentNormal``, or a ``TanhNormal``, which is compared before its tanh.
        reference: another one.
        low: lower bounds of the actions.
        high: upper bounds of the actions.

    Returns:
        The distance per state, of shape ``[*B]``.
    """
    pair = (moments(policy, low, high), moments(reference, low, high))
    return OF_GAUSSIANS[distance](*pair[0], *pair[1])


def moments(policy: Distribution, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a Gaussian over actions, mapped to [-1, 1].

    Those of a ``TanhNormal`` are the ones before its tanh.
    """
    if isinstance(policy, TanhNormal):
        return policy.loc, policy.scale
    return functional.to_unit_box(policy.mean, low, high), 2 * policy.stddev / (high - low)
