"""Action specs: the bounds of a single action, from the spec of any environment."""

from __future__ import annotations

import torch
from tensordict import NestedKey, unravel_key
from torchrl.data import Bounded, Composite, TensorSpec


def bounded_action_spec(action_spec: TensorSpec, action_key: NestedKey) -> Bounded:
    """Return the ``Bounded`` spec of a single action, of shape ``[d]``.

    Args:
        action_spec: the spec itself, or a ``Composite`` that contains it. Dimensions of batched
            environments and of agents may come before ``d``.
        action_key: key of the action in a ``Composite``, see :func:`action_entry`.

    Raises:
        ValueError: if the spec is not ``Bounded``, its bounds are not finite and increasing, or
            they differ between environments or agents.
    """
    if isinstance(action_spec, Composite):
        action_spec = action_spec[action_entry(action_spec, action_key)]
    if not isinstance(action_spec, Bounded):
        raise ValueError(
            f"action_spec must be a Bounded spec, got {type(action_spec).__name__}: POGO supports "
            "continuous actions with finite bounds. Pass Bounded(low=..., high=...)."
        )
    low, high = action_spec.space.low, action_spec.space.high
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
    first = action_spec[(0,) * (low.dim() - 1)] if low.dim() > 1 else action_spec
    if not bool((low == first.space.low).all() & (high == first.space.high).all()):
        raise ValueError(
            f"action_spec has shape {list(low.shape)}, and its bounds differ between the batched "
            f"environments or agents: low={low.tolist()}, high={high.tolist()}. Pass bounds that "
            "hold for all of them, of shape [action_dim]."
        )
    return first


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
