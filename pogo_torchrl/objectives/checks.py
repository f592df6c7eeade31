"""Validation of the inputs of losses: settings, networks, bounds and batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torchrl.data import Composite, TensorSpec

from pogo_torchrl.functional import Q_NORMALIZATIONS
from pogo_torchrl.modules import fresh_copies, noise_reader
from pogo_torchrl.ot import BACKENDS, MAX_POINTS
from pogo_torchrl.specs import bounded_action_spec


def plain_number(value: Any) -> Any:
    """Return a NumPy scalar or a tensor with no dimensions as a number of Python.

    All other values are returned as they are.
    """
    scalar = isinstance(value, np.generic | np.ndarray | Tensor) and value.ndim == 0
    return value.item() if scalar else value


def check_weights(w2_weights: Sequence[float]) -> tuple[float, ...]:
    """Return the weights of a chain as a tuple of floats.

    Raises:
        ValueError: if they are not a non-empty sequence of finite numbers >= 0.
    """
    try:
        weights = () if isinstance(w2_weights, str) else tuple(float(w) for w in w2_weights)
    except (TypeError, ValueError):
        weights = ()
    if not weights or not all(math.isfinite(w) and w >= 0 for w in weights):
        raise ValueError(
            f"w2_weights={w2_weights!r} must be a sequence of finite numbers >= 0, one per actor "
            "of the chain, e.g. (0.2, 0.2, 0.2)."
        )
    return weights


def check_step_sizes(step_sizes: Sequence[float] | float, num_actors: int) -> tuple[float, ...]:
    """Return the step sizes of a chain as a tuple of floats.

    Args:
        step_sizes: one per actor, or a single number for all ``num_actors``.
        num_actors: number of actors, for a single number.

    Raises:
        ValueError: if they are not positive finite numbers.
    """
    try:
        step_sizes = plain_number(step_sizes)
        if isinstance(step_sizes, int | float):
            sizes: tuple[float, ...] = (float(step_sizes),) * num_actors
        else:
            sizes = () if isinstance(step_sizes, str) else tuple(float(h) for h in step_sizes)
    except (TypeError, ValueError):
        sizes = ()
    if not sizes or not all(0 < h < math.inf for h in sizes):
        raise ValueError(
            f"step_sizes={step_sizes!r} must be a positive number, or a sequence of positive "
            "numbers, one per actor of the chain, e.g. (0.5, 0.5, 0.5)."
        )
    return sizes


def chain_weights(
    w2_weights: Sequence[float] | None,
    step_sizes: Sequence[float] | None,
    low: Tensor,
    alpha: float,
) -> tuple[float, ...]:
    """Return the weights of the actors that a chain adds to a base.

    Args:
        w2_weights: the weights, or ``None``. They may be empty: the base alone.
        step_sizes: the sizes of their steps, or ``None``.
        low: lower action bound, which gives the number of action dimensions.
        alpha: weight of the Q term.

    Raises:
        ValueError: if not exactly one of both is given, or if it is invalid.
    """
    if w2_weights is not None and step_sizes is None:
        return check_weights(w2_weights) if len(w2_weights) else ()
    if step_sizes is None or w2_weights is not None:
        raise ValueError("JKOChain needs either w2_weights or step_sizes, one per added actor.")
    if not low.dim():
        raise ValueError(
            "step_sizes depend on the number of action dimensions, which bounds=(low, high) of "
            "two numbers do not tell: pass action_spec=Bounded(...)."
        )
    return tuple(alpha / (h * low.shape[-1]) for h in check_step_sizes(step_sizes, 1))


def check_integer(name: str, value: int) -> None:
    """Check that a setting is an integer >= 1, raising ``ValueError`` otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} must be an integer >= 1.")


def check_positive(name: str, value: float, or_zero: bool = False) -> None:
    """Check that a setting is finite and > 0 (or >= 0), raising ``ValueError`` otherwise."""
    ok = isinstance(value, (int, float)) and math.isfinite(value)
    if not ok or value < 0 or (value == 0 and not or_zero):
        raise ValueError(
            f"{name}={value!r} must be a finite number {'>= 0' if or_zero else '> 0'}."
        )


def check_share(name: str, value: float, or_zero: bool = False) -> None:
    """Check that a setting is in (0, 1] (or [0, 1]), raising ``ValueError`` otherwise."""
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1
    if not ok or (value == 0 and not or_zero):
        interval = "[0, 1]" if or_zero else "(0, 1]"
        raise ValueError(f"{name}={value!r} must be a number in {interval}, e.g. 0.25.")


def check_gamma(gamma: float | Tensor) -> None:
    """Check that the discount factor is in [0, 1], raising ``ValueError`` otherwise."""
    try:
        fits = 0 <= float(gamma) <= 1
    except (TypeError, ValueError, RuntimeError):
        fits = False
    if not fits:
        raise ValueError(f"gamma={gamma} must be a number in [0, 1], e.g. 0.99.")


def check_choice(name: str, value, allowed: tuple) -> None:
    """Check that a setting is one of the allowed values, raising ``ValueError`` otherwise."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {list(allowed)}.")


_CHECKS: dict[str, Callable[[str, Any], None]] = {
    "num_qvalue_nets": check_integer,
    "num_samples": check_integer,
    "blur": check_positive,
    "w2_fraction": check_share,
    "alpha": check_positive,
    "data_weight": partial(check_share, or_zero=True),
    "critic_bc_weight": partial(check_positive, or_zero=True),
    "policy_noise": partial(check_positive, or_zero=True),
    "noise_clip": partial(check_positive, or_zero=True),
    "w2_backend": partial(check_choice, allowed=BACKENDS),
    "q_normalization": partial(check_choice, allowed=Q_NORMALIZATIONS),
    "loss_function": partial(check_choice, allowed=("l2", "l1", "smooth_l1")),
    "reduction": partial(check_choice, allowed=("mean", "sum", "none")),
    "target_action": partial(check_choice, allowed=("noisy", "min_clean_noisy")),
    "actor_q": partial(check_choice, allowed=("first", "mean")),
    "chain_init": partial(check_choice, allowed=("independent", "copy")),
}


def check_settings(loss: Any) -> None:
    """Check the settings of a :class:`~pogo_torchrl.POGOLoss`, given as its attributes.

    Scalars of NumPy and tensors without dimensions become numbers of Python.

    Raises:
        ValueError: if a setting is out of range.
    """
    for name in (*_CHECKS, "average_actors", "advantage_temperature"):
        setattr(loss, name, plain_number(getattr(loss, name)))
    for name, check in _CHECKS.items():
        check(name, getattr(loss, name))
    if loss.average_actors is not None:
        check_share("average_actors", loss.average_actors)
    if loss.advantage_temperature is not None:
        check_positive("advantage_temperature", loss.advantage_temperature)
    if loss.w2_backend == "exact" and loss.num_samples > MAX_POINTS:
        raise ValueError(
            f"num_samples={loss.num_samples} is too large for w2_backend='exact', which supports "
            f"at most {MAX_POINTS}: lower it, or use w2_backend='fast'."
        )


def check_reads_noise(actor: nn.Module) -> None:
    """Check that an actor can share its noise, raising ``ValueError`` otherwise."""
    if noise_reader(actor) is None:
        raise ValueError(
            "shared_noise=True requires actors that read their noise z from the tensordict, "
            f"but {type(actor).__name__} has no noise_key: use TransportActor, or set "
            "shared_noise=False."
        )


def as_networks(
    network,
    count: int,
    name: str,
    meaning: str,
    *,
    reinitialise: bool = True,
    owner: str = "POGOLoss",
) -> list[nn.Module]:
    """Return ``count`` distinct networks with the same architecture.

    Args:
        network: a single network, which is followed by reinitialised copies, or a list.
        count: number of networks.
        name: name of the networks, for messages.
        meaning: where ``count`` comes from, for messages.
        reinitialise: draw new parameters for copies of a single network. Defaults to ``True``.
        owner: name of the loss, for messages. Defaults to ``"POGOLoss"``.

    Raises:
        ValueError: if a list has another length, its networks differ in architecture, or have
            lazy layers that have not been called yet.
    """
    _check_initialised(network, name, owner)
    if isinstance(network, nn.Module) and not isinstance(network, nn.ModuleList):
        return fresh_copies(network, count, name, reinitialise=reinitialise)
    networks = list(network)
    if len(networks) != count:
        raise ValueError(
            f"{owner} got {len(networks)} {name}s but needs {count} ({meaning}): pass a list of "
            f"{count}, or a single one, which is then copied."
        )
    for i, module in enumerate(networks):
        if any(module is earlier for earlier in networks[:i]):
            networks[i] = fresh_copies(module, 2, name)[1]
    expected = _architecture(networks[0])
    for i, module in enumerate(networks[1:], start=1):
        for mine, first in zip_longest(_architecture(module), expected, fillvalue="nothing"):
            if mine != first:
                raise ValueError(
                    f"all {name}s must have the same architecture, but number {i} has {mine} where "
                    f"number 0 has {first}: build them identically, or pass a single one."
                )
    return networks


def _check_initialised(network: nn.Module | Sequence[nn.Module], name: str, owner: str) -> None:
    """Check that the sizes of lazy layers are known."""
    for module in [network] if isinstance(network, nn.Module) else network:
        lazy = [key for key, parameter in module.named_parameters() if is_lazy(parameter)]
        if lazy:
            raise ValueError(
                f"the {name} has lazy layers, whose sizes are not known yet ({lazy[0]}): call it "
                f"once on a batch, {name}(batch), before it is passed to {owner}, or give its "
                "network in_features."
            )


def _architecture(module: nn.Module) -> list[str]:
    """Describe everything that the networks of a list must have in common."""
    layers = [f"{name or 'module'}: {type(m).__name__}" for name, m in module.named_modules()]
    shapes = [f"{name} of shape {list(p.shape)}" for name, p in module.named_parameters()]
    buffers = [f"{name} = {b.tolist()}" for name, b in module.named_buffers()]  # e.g. bounds
    return layers + shapes + buffers


def action_bounds(
    action_spec: TensorSpec | None,
    bounds: tuple | None,
    actor: nn.Module,
    key: NestedKey,
    *,
    owner: str = "POGOLoss",
) -> tuple[Tensor, Tensor]:
    """Return the lower and upper action bounds from a spec, explicit bounds or the actor's spec.

    Raises:
        ValueError: if both ``action_spec`` and ``bounds`` are given, if there are no bounds, or
            if the bounds are not finite and increasing.
    """
    parameter = next(actor.parameters())
    if action_spec is not None and bounds is not None:
        raise ValueError(f"{owner} accepts either action_spec or bounds, not both.")
    if bounds is not None:
        low, high = (torch.as_tensor(b, dtype=parameter.dtype) for b in bounds)
        if not bool(((low < high) & torch.isfinite(high - low)).all()):
            raise ValueError(
                f"bounds=({bounds[0]}, {bounds[1]}) must be finite, with the lower bound below the "
                "upper bound."
            )
    else:
        if action_spec is None:
            action_spec = _actor_spec(actor)
        if action_spec is None:
            raise ValueError(
                f"{owner} needs action bounds: pass action_spec=Bounded(...) or bounds=(low, high)."
            )
        space = bounded_action_spec(action_spec, key).space
        low, high = space.low, space.high
    return low.clone().to(parameter), high.clone().to(parameter)


def _actor_spec(actor: nn.Module) -> TensorSpec | None:
    """Return the action spec of a transport map, or the ``spec`` of one of TorchRL's actors."""
    spec = getattr(noise_reader(actor) or actor, "action_spec", None)
    if spec is None:
        spec = getattr(actor, "spec", None)
    if isinstance(spec, Composite) and all(spec[key] is None for key in spec.keys(True, True)):
        return None  # TorchRL's actors without a spec have an entry per out_key
    return spec if isinstance(spec, TensorSpec) else None


def check_batch(
    batch: TensorDictBase,
    keys: Sequence[NestedKey],
    *,
    action: NestedKey,
    reward: NestedKey,
    ends: Sequence[NestedKey],
    low: Tensor,
    owner: str = "POGOLoss",
) -> None:
    """Validate a batch, so that broadcasting cannot hide a wrong shape.

    Only keys, shapes and dtypes are checked. No values are read, so there is no host
    synchronisation.

    Args:
        batch: transitions.
        keys: keys that it must contain.
        action: key of the action.
        reward: key of the reward, of shape ``[*B, 1]``.
        ends: keys of ``done`` and ``terminated``; one of them is enough, as in TorchRL.
        low: lower action bound, which gives the expected action dimension and dtype.
        owner: name of the loss, for messages. Defaults to ``"POGOLoss"``.

    Raises:
        KeyError: if a key is missing.
        ValueError: if the batch has no rows, or if a dtype or shape does not match.
    """
    found = {}
    for key in keys:
        values = found[key] = batch.get(key)
        if values is None:
            if key in ends:
                continue
            if key == ("next", action):
                raise KeyError(
                    f"critic_bc_weight > 0 needs the dataset's next actions under the key {key!r}, "
                    f"but the batch has {list(batch.keys(True, True))}: add them, with NaN where "
                    "there is none (make_replay_buffer(..., next_action=True) does)."
                )
            raise KeyError(
                f"{owner} needs the key {key!r}, but the batch has "
                f"{list(batch.keys(True, True))}: add it, or set your own key with set_keys()."
            )
        if values.dtype == torch.float64 != low.dtype:
            raise ValueError(
                f"{key!r} is {values.dtype}, but the networks are {low.dtype}: convert the data "
                "(torchrl.envs.transforms.DoubleToFloat()(batch), or once and for all "
                "replay_buffer.append_transform(DoubleToFloat())) or the loss (loss.double())."
            )
        if key in ends and values.dtype != torch.bool:
            raise ValueError(
                f"{key!r} is {values.dtype}, but must be torch.bool: convert it with != 0."
            )
    if set(ends) <= found.keys() and all(found[key] is None for key in ends):
        first, second = ends
        raise KeyError(
            f"{owner} needs the key {first!r} or {second!r}, but the batch has "
            f"{list(batch.keys(True, True))}: add at least one of them, of dtype torch.bool, or "
            "set your own keys with set_keys()."
        )
    shape = found[action].shape
    if 0 in shape[:-1]:
        raise ValueError(
            f"the batch has no rows ({action!r} has shape {tuple(shape)}), and a mean over none "
            "does not exist: sample at least one transition."
        )
    if low.dim() and shape[-1] != low.shape[-1]:
        raise ValueError(
            f"{action!r} has shape {tuple(shape)}, but the actors have actions of shape "
            f"[*B, {low.shape[-1]}]: use data of the same environment."
        )
    following = found.get(("next", action))
    if following is not None and following.shape != shape:
        raise ValueError(
            f"{('next', action)!r} has shape {tuple(following.shape)}, but {action!r} has "
            f"{tuple(shape)}: both hold one action per transition."
        )
    scalar = (*shape[:-1], 1)
    for key in (reward, *ends):
        values = found.get(key)
        if values is not None and values.shape != scalar:
            raise ValueError(
                f"{key!r} has shape {tuple(values.shape)}, but must be {scalar}: one value per "
                "action."
            )


def check_padding(batch: TensorDictBase, keys: Sequence[NestedKey], valid: Tensor) -> None:
    """Check that padded rows, which the losses leave out, hold finite values.

    Args:
        batch: transitions ``[*B]``.
        keys: keys that the loss reads.
        valid: mask of the rows that are no padding, ``[*B]`` or ``[*B, 1]``.

    Raises:
        ValueError: if a padded row is not finite.
    """
    padded = ~valid.reshape(batch.batch_size)
    for key in keys:
        values = batch.get(key)
        if values is not None and not bool(values[padded].isfinite().all()):
            raise ValueError(
                f"{key!r} is not finite in padded rows, and gradients of all rows would become "
                "NaN: fill them with finite values, such as zeros or copies of other rows "
                "(SliceSampler(pad_output=True) does)."
            )
