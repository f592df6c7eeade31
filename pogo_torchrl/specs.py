"""Action specs: the bounds of a single action, from the spec of any environment."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tensordict import NestedKey, unravel_key

if TYPE_CHECKING:  # trained actors are also deployed without TorchRL
    from torchrl.data import Bounded, Composite, TensorSpec


class Bounds(NamedTuple):
    """Bounds of an action where TorchRL is not installed: what actors read of a ``Bounded`` spec.

    Example:
        >>> Bounds(low=-torch.ones(2), high=torch.ones(2)).shape
        torch.Size([2])
    """

    low: torch.Tensor
    """Smallest actions, of shape ``[d]``."""
    high: torch.Tensor
    """Largest actions, of shape ``[d]``."""

    @property
    def space(self) -> Bounds:
        """The bounds themselves."""
        return self

    @property
    def shape(self) -> torch.Size:
        """Shape of an action, ``[d]``."""
        return self.low.shape


def make_bounds(low: torch.Tensor, high: torch.Tensor) -> Bounded | Bounds:
    """Return a ``Bounded`` spec or, without TorchRL, the :class:`Bounds` alone.

    Args:
        low: smallest actions, of shape ``[d]``.
        high: largest actions, of shape ``[d]``.
    """
    try:
        from torchrl.data import Bounded
    except ImportError:
        return Bounds(low, high)
    return Bounded(low=low, high=high)


def bounded_action_spec(action_spec: TensorSpec | Bounds, action_key: NestedKey) -> Bounded:
    """Return the ``Bounded`` spec of a single action, of shape ``[d]``.

    Args:
        action_spec: the spec itself, or a ``Composite`` that contains it. Dimensions of batched
            environments and of agents may come before ``d``. :class:`Bounds` are returned as they
            are, once checked.
        action_key: key of the action in a ``Composite``, see :func:`action_entry`.

    Raises:
        ValueError: if the spec is not ``Bounded``, its bounds are not finite and increasing, or
            they differ between environments or agents.
    """
    spec: Any = action_spec
    if not isinstance(spec, Bounds):
        spec = _bounded(spec, action_key)
    low, high = spec.space.low, spec.space.high
    if low.dim() == 0 or not bool(torch.isfinite(low).all() & torch.isfinite(high).all()):
        raise ValueError(
            f"action_spec must have shape [action_dim] and finite bounds, got low={low.tolist()} "
            f"and high={high.tolist()}."
        )
    if not bool((low < high).all()):
        raise ValueError(
            "action_spec has a lower bound that is not below its upper bound: "
            f"low={low.tolist()}, high={high.tolist()}."
        )
    first = spec[(0,) * (low.dim() - 1)] if low.dim() > 1 else spec
    if not bool((low == first.space.low).all() & (high == first.space.high).all()):
        raise ValueError(
            f"action_spec has shape {list(low.shape)}, and its bounds differ between the batched "
            f"environments or agents: low={low.tolist()}, high={high.tolist()}. Pass bounds that "
            "hold for all of them, of shape [action_dim]."
        )
    return first


def _bounded(action_spec: TensorSpec, action_key: NestedKey) -> Bounded:
    from torchrl.data import Bounded, Composite

    if isinstance(action_spec, Composite):
        action_spec = action_spec[action_entry(action_spec, action_key)]
    if not isinstance(action_spec, Bounded):
        raise ValueError(
            f"action_spec must be a Bounded spec, got {type(action_spec).__name__}: POGO supports "
            "continuous actions with finite bounds. Pass Bounded(low=..., high=...)."
        )
    return action_spec


def action_entry(action_spec: Composite, action_key: NestedKey) -> NestedKey:
    """Return the key of the action in a ``Composite``.

    Args:
        action_spec: the spec.
        action_key: its usual key.

    Returns:
        ``action_key`` if the spec has it, otherwise the only key that it has.

    Raises:
        ValueError: if it has none, or several others.
    """
    keys = [key for key in action_spec.keys(True, True) if action_spec[key] is not None]
    if unravel_key(action_key) in keys:
        return action_key
    if len(keys) != 1:
        raise ValueError(
            f"action_spec has no entry {action_key!r}, but {keys}: pass the spec of the action "
            "alone, or the key to which TransportActor writes it (out_keys)."
        )
    return keys[0]
