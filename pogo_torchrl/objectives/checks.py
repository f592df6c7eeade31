"""Checks of what losses are given: settings, networks, bounds and batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor, nn
from torchrl.data import TensorSpec

from pogo_torchrl.modules import bounded_action_spec, fresh_copies


def check_weights(w2_weights: Sequence[float]) -> tuple[float, ...]:
    """The weights of a chain as a tuple of floats.

    Raises:
        ValueError: when they are not a non-empty sequence of finite numbers >= 0.
    """
    try:
        weights = () if isinstance(w2_weights, str) else tuple(float(w) for w in w2_weights)
    except (TypeError, ValueError):
        weights = ()
    if not weights or not all(math.isfinite(w) and w >= 0 for w in weights):
        raise ValueError(
            f"w2_weights={w2_weights!r} must be a sequence of finite numbers >= 0, one for each "
            "actor of the chain, e.g. (0.2, 0.2, 0.2)."
        )
    return weights


def check_integer(name: str, value: int) -> None:
    """Raise a ``ValueError`` unless the value is an integer >= 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} must be an integer >= 1.")


def check_positive(name: str, value: float, or_zero: bool = False) -> None:
    """Raise a ``ValueError`` unless the value is finite and positive (or zero, if allowed)."""
    ok = isinstance(value, (int, float)) and math.isfinite(value)
    if not ok or value < 0 or (value == 0 and not or_zero):
        raise ValueError(
            f"{name}={value!r} must be a finite number {'>= 0' if or_zero else '> 0'}."
        )


def check_share(name: str, value: float) -> None:
    """Raise a ``ValueError`` unless the value is in (0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ValueError(f"{name}={value!r} must be a number in (0, 1], e.g. 0.25.")


def check_gamma(gamma: float | Tensor) -> None:
    """Raise a ``ValueError`` unless the discount factor is in [0, 1]."""
    try:
        fits = 0 <= float(gamma) <= 1
    except (TypeError, ValueError, RuntimeError):
        fits = False
    if not fits:
        raise ValueError(f"gamma={gamma} must be a number in [0, 1], e.g. 0.99.")


def check_choice(name: str, value, allowed: tuple) -> None:
    """Raise a ``ValueError`` unless the value is one of those allowed."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {list(allowed)}.")


def as_networks(network, count: int, name: str, meaning: str) -> list[nn.Module]:
    """``count`` distinct networks of one architecture.

    Of a single network, all but the first are copies with newly drawn parameters.

    Raises:
        ValueError: when a list has another length, or its networks differ in architecture.
    """
    if isinstance(network, nn.Module) and not isinstance(network, nn.ModuleList):
        return fresh_copies(network, count, name)
    networks = list(network)
    if len(networks) != count:
        raise ValueError(
            f"POGOLoss got {len(networks)} {name}s but needs {count} ({meaning}): pass a list of "
            f"{count}, or a single one, of which the others are made."
        )
    for i, module in enumerate(networks):
        if any(module is earlier for earlier in networks[:i]):
            networks[i] = fresh_copies(module, 2, name)[1]
    expected = _architecture(networks[0])
    for i, module in enumerate(networks[1:], start=1):
        for mine, first in zip_longest(_architecture(module), expected, fillvalue="nothing"):
            if mine != first:
                raise ValueError(
                    f"{name}s must share one architecture, but number {i} has {mine} where number "
                    f"0 has {first}: build all of them alike, or pass a single one."
                )
    return networks


def _architecture(module: nn.Module) -> list[str]:
    """All that networks of one list must have in common, in words."""
    layers = [f"{name or 'module'}: {type(m).__name__}" for name, m in module.named_modules()]
    shapes = [f"{name} of shape {list(p.shape)}" for name, p in module.named_parameters()]
    buffers = [f"{name} = {b.tolist()}" for name, b in module.named_buffers()]  # e.g. bounds
    return layers + shapes + buffers


def action_bounds(
    action_spec: TensorSpec | None, bounds: tuple | None, actor: nn.Module, key: NestedKey
) -> tuple[Tensor, Tensor]:
    """The lower and upper action bounds, from the spec, the bounds or the actor's own spec.

    Raises:
        ValueError: when both or none are given, or they bound nothing.
    """
    parameter = next(actor.parameters())
    if action_spec is not None and bounds is not None:
        raise ValueError("Give POGOLoss either action_spec or bounds, not both.")
    if bounds is not None:
        low, high = (torch.as_tensor(b, dtype=parameter.dtype) for b in bounds)
        if not bool(((low < high) & torch.isfinite(high - low)).all()):
            raise ValueError(
                f"bounds=({bounds[0]}, {bounds[1]}) must be finite, the lower below the upper."
            )
    else:
        if action_spec is None:
            action_spec = getattr(actor, "action_spec", None)
        if action_spec is None:
            raise ValueError(
                "POGOLoss needs the actions' bounds: give action_spec=Bounded(...) or "
                "bounds=(low, high)."
            )
        space = bounded_action_spec(action_spec, key).space
        low, high = space.low, space.high
    return low.clone().to(parameter), high.clone().to(parameter)


def check_batch(
    batch: TensorDictBase,
    keys: Sequence[NestedKey],
    *,
    action: NestedKey,
    reward: NestedKey,
    ends: Sequence[NestedKey],
    low: Tensor,
) -> None:
    """Refuse a batch that would fail deep inside, or pass where broadcasting hides a mistake.

    Keys, shapes and dtypes only: no number is read.

    Args:
        batch: transitions.
        keys: what it must hold.
        action: key of the action.
        reward: key of the reward, of shape ``[*B, 1]``.
        ends: keys of ``done`` and ``terminated``; either stands in for the other, as in TorchRL.
        low: the lower bound of the actions, whose shape and dtype the batch must fit.

    Raises:
        KeyError: when a key is missing.
        ValueError: when a dtype or a shape does not fit.
    """
    found = {}
    for key in keys:
        values = found[key] = batch.get(key)
        if values is None:
            if key in ends:
                continue
            raise KeyError(
                f"POGOLoss needs the key {key!r}, the batch has "
                f"{list(batch.keys(True, True))}: add it, or name yours with set_keys()."
            )
        if values.dtype == torch.float64 != low.dtype:
            raise ValueError(
                f"{key!r} is {values.dtype} where the networks are {low.dtype}: convert the data "
                "(batch.float()) or the loss (loss.double())."
            )
        if key in ends and values.dtype != torch.bool:
            raise ValueError(f"{key!r} is {values.dtype}, it must be torch.bool: use != 0.")
    shape = found[action].shape
    if low.dim() and shape[-1] != low.shape[-1]:
        raise ValueError(
            f"{action!r} has shape {tuple(shape)}, the actors act in "
            f"[*B, {low.shape[-1]}]: give the data of their environment."
        )
    scalar = (*shape[:-1], 1)
    for key in (reward, *ends):
        values = found.get(key)
        if values is not None and values.shape != scalar:
            raise ValueError(
                f"{key!r} has shape {tuple(values.shape)}, it must be {scalar}: one number "
                "for each action."
            )
