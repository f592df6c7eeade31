"""Validation of the inputs of losses: settings, networks, bounds and batches."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torchrl.data import Composite, TensorSpec

from pogo_torchrl.modules import fresh_copies, noise_reader
from pogo_torchrl.specs import bounded_action_spec


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


_NO_ROWS = (
    "the batch has no rows ({}), and a mean over none does not exist: sample at least one "
    "transition."
)


def check_rows(batch: TensorDictBase) -> None:
    """Check that a batch has rows, raising ``ValueError`` otherwise."""
    if 0 in batch.batch_size:
        raise ValueError(_NO_ROWS.format(f"its shape is {tuple(batch.batch_size)}"))


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
        raise ValueError(_NO_ROWS.format(f"{action!r} has shape {tuple(shape)}"))
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
