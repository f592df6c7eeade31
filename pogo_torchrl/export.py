"""Export of trained chains to safetensors files, which need no training config to be loaded.

The JSON header describes the architecture of the chain; the tensors are its weights. Reading such
a file executes no code and allocates no more memory than the size of the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from pogo_torchrl.actors import Normalized, TransportActor, make_transport_net
from pogo_torchrl.files import atomic_write
from pogo_torchrl.policy_nets import (
    ClippedActor,
    DeterministicNet,
    GaussianNet,
    make_deterministic_net,
    make_gaussian_net,
)
from pogo_torchrl.specs import make_bounds

_FORMAT = "pogo_torchrl.actors"
_VERSION = 2  # version 1 used torch.save
_VERSION_OF_KINDS = 3  # files with another kind of actor, which earlier releases cannot read


class _Kind(NamedTuple):
    """How to build the actors of one kind."""

    make_net: Callable[[int, int, Sequence[int]], nn.Module]
    policy: type[TransportActor] = TransportActor


_KINDS = {
    "transport": _Kind(make_transport_net),
    "deterministic": _Kind(make_deterministic_net),
    "gaussian": _Kind(make_gaussian_net, ClippedActor),
}
_KIND_OF_NET: dict[type, str] = {DeterministicNet: "deterministic", GaussianNet: "gaussian"}


def on_raw_observations(
    actor: TransportActor, mean: torch.Tensor, std: torch.Tensor
) -> TransportActor:
    """Return a policy on raw observations that shares the parameters of an actor.

    Args:
        actor: an actor trained on ``(observation - mean) / std``.
        mean: mean of the observations in the dataset, of shape ``[n]``; if the actor has several
            ``in_keys``, of all observations one after the other.
        std: standard deviation of the observations in the dataset, of shape ``[n]``.

    Returns:
        The policy, on the device of ``mean``.

    Example:
        >>> import torch
        >>> from torchrl.data import Bounded
        >>> from pogo_torchrl import make_actor
        >>> actor = make_actor(3, Bounded(low=-torch.ones(2), high=torch.ones(2)))
        >>> raw = on_raw_observations(actor, mean=torch.ones(3), std=torch.full((3,), 2.0))
        >>> torch.equal(raw(observation=torch.full((3,), 3.0)), actor(observation=torch.ones(3)))
        True
    """
    raw = type(actor)(
        Normalized(actor.module, mean, std),
        actor.action_spec,
        in_keys=actor.in_keys,
        out_keys=actor.out_keys,
        noise_key=actor.noise_key,
    )
    return raw.to(mean.device)


def save_actors(
    path: str | Path,
    actors: Sequence[TransportActor],
    *,
    hidden_sizes: Sequence[int] = (256, 256),
    environment: Mapping[str, Any] | None = None,
    averaged: bool = False,
) -> None:
    """Save a trained chain to one file, which :func:`load_actors` loads.

    Args:
        path: the file, which is written atomically.
        actors: the chain, actor 0 first: actors of :func:`~pogo_torchrl.make_actor`, passed
            through :func:`on_raw_observations`. Loaded actors have the default keys.
        hidden_sizes: widths of the hidden layers of the actors. Defaults to ``(256, 256)``.
        environment: a JSON-serialisable description of the environment, which
            :func:`policy_environment` returns. Defaults to ``None``.
        averaged: whether the actors are Polyak averages (``average_actors``), which
            :func:`policy_weights` tells. Defaults to ``False``.

    Raises:
        ValueError: if ``actors`` is empty, reads several observations, or does not match the
            description above.
        OSError: if the file cannot be written.
    """
    path = Path(path)
    if not actors or not all(isinstance(actor.module, Normalized) for actor in actors):
        raise ValueError(
            "actors must be a non-empty list of actors, each from on_raw_observations(...)."
        )
    for i, actor in enumerate(actors):
        if len(actor.in_keys) != 1:
            raise ValueError(
                f"actor {i} reads in_keys={list(actor.in_keys)}, but loaded actors read "
                "'observation' only: save the actor.state_dict() instead, or export the actor with "
                "torch.export."
            )
    space = actors[0].action_spec.space
    bounds = {"low": space.low, "high": space.high}
    states = {f"actor_{i}": actor.module.state_dict() for i, actor in enumerate(actors)}
    kind = _KIND_OF_NET.get(type(actors[0].module.module), "transport")
    try:
        for state in states.values():
            _make_actor(state, bounds, hidden_sizes, kind)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"hidden_sizes={list(hidden_sizes)} does not match the actors ({_one_line(error)}): "
            "pass the hidden_sizes given to make_actor."
        ) from error
    tensors = {
        f"{owner}.{name}": values.detach().cpu().contiguous().clone()
        for owner, state in {"bounds": bounds, **states}.items()
        for name, values in state.items()
    }
    header = {
        "format": _FORMAT,
        "version": str(_VERSION),
        "hidden_sizes": json.dumps(list(hidden_sizes)),
        "num_actors": str(len(actors)),
        "weights": "averaged" if averaged else "raw",
    }
    if kind != "transport":
        header |= {"version": str(_VERSION_OF_KINDS), "kind": kind}
    if environment is not None:
        header["environment"] = json.dumps(dict(environment), sort_keys=True)
    content = safetensors.torch.save(tensors, header)
    with atomic_write(path) as file:
        file.write(content)


def load_actors(path: str | Path, *, device: torch.device | str = "cpu") -> list[TransportActor]:
    """Load a trained chain for inference, without the config or data of its training run.

    The file is in the safetensors format with a JSON header; reading it executes no code.

    Args:
        path: the ``checkpoints/policy.safetensors`` of a run, or a file of
            :func:`~pogo_torchrl.export.save_actors`.
        device: device of the actors. Defaults to ``"cpu"``.

    Returns:
        The actors of the chain, actor 0 first, without gradients. Each maps raw observations of
        shape ``[*B, n]`` to actions of shape ``[*B, d]`` in the environment's units; the
        observation normalisation is built in. ``chain[-1]`` is the policy to deploy. Actions are
        deterministic (z = 0) unless the exploration type is ``RANDOM``; see
        :class:`~pogo_torchrl.TransportActor`.

        Actions have the dtype of the weights, float32 for the runs of the command line, and so must
        a z that is passed. Observations in integers or half precision are converted to it; float64
        is rejected, unless the actor is cast with ``double()``.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file was not written by pogo_torchrl, is damaged, or has another format
            version.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from torchrl.data import Bounded
        >>> from pogo_torchrl import load_actors, make_actor
        >>> from pogo_torchrl.export import on_raw_observations, save_actors
        >>> spec = Bounded(low=-torch.ones(3), high=torch.ones(3))
        >>> actor = on_raw_observations(make_actor(11, spec), torch.zeros(11), torch.ones(11))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_actors(f"{folder}/policy.safetensors", [actor])
        ...     chain = load_actors(f"{folder}/policy.safetensors")
        >>> chain[-1](observation=torch.zeros(5, 11)).shape
        torch.Size([5, 3])
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not a file: pass the checkpoints/policy.safetensors of a run."
        )
    header, tensors = _read(path)
    if header.get("format") != _FORMAT:
        raise ValueError(
            f"{path} is not a policy written by pogo_torchrl: pass the "
            "checkpoints/policy.safetensors of a run."
        )
    if header.get("version") not in (str(_VERSION), str(_VERSION_OF_KINDS)):
        raise ValueError(
            f"{path} has format version {header.get('version')}, but this release reads versions "
            f"{_VERSION} and {_VERSION_OF_KINDS}: update pogo_torchrl, or load it with the release "
            "that wrote it."
        )
    try:
        bounds, *states = _by_owner(tensors, int(header["num_actors"]))
        sizes = json.loads(header["hidden_sizes"])
        kind = header.get("kind", "transport")
        actors = [_make_actor(state, bounds, sizes, kind) for state in states]
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged ({_one_line(error)}): export the policy again."
        ) from error
    return [actor.to(device).requires_grad_(False) for actor in actors]


def policy_environment(path: str | Path) -> dict[str, Any]:
    """Return the ``environment`` passed to :func:`save_actors`, or an empty dictionary.

    Args:
        path: a file of :func:`save_actors`.

    Raises:
        ValueError: if the file is damaged or is not a safetensors file.
    """
    header, _ = _read(Path(path))
    try:
        found = json.loads(header.get("environment", "{}"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def policy_weights(path: str | Path) -> str:
    """Return which weights a policy file contains: ``"averaged"`` or ``"raw"``.

    Args:
        path: a file of :func:`save_actors`.

    Raises:
        ValueError: if the file is damaged or is not a safetensors file.
    """
    header, _ = _read(Path(path))
    return header.get("weights", "raw")


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read the header and the tensors of a safetensors file."""
    with path.open("rb") as file:
        start = file.read(2)
    if start in (b"PK", b"\x80\x02"):  # zip archives and pickles, as written by torch.save
        raise ValueError(
            f"{path} was written by torch.save and is not opened, because such files can execute "
            "code: pass a safetensors file (checkpoints/policy.safetensors)."
        )
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            # Cloned, because the file may change while the policy is in use.
            return header, {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, RuntimeError) as error:
        raise ValueError(
            f"{path} is damaged or not a safetensors file ({_one_line(error)}): export the policy "
            "again."
        ) from error


def _by_owner(tensors: dict[str, Tensor], num_actors: int) -> list[dict[str, Tensor]]:
    """Validate the tensors and group them into ``bounds.*``, ``actor_0.*``, ``actor_1.*``, ..."""
    owners: dict[str, dict[str, Tensor]] = {}
    for key, values in sorted(tensors.items()):
        owner, _, name = key.partition(".")
        owners.setdefault(owner, {})[name] = values
        if values.dtype != next(iter(tensors.values())).dtype or not values.isfinite().all():
            raise ValueError(f"{key} is not finite or differs in dtype from the other tensors")
    if num_actors < 1 or len(owners) != 1 + num_actors:
        raise ValueError(f"expected num_actors={num_actors} and bounds, found {list(owners)}")
    return [owners["bounds"], *(owners[f"actor_{i}"] for i in range(num_actors))]


def _make_actor(
    state: dict[str, Tensor], bounds: dict[str, Tensor], hidden_sizes: Sequence[int], kind: str
) -> TransportActor:
    """Build an actor from its tensors, whose sizes are checked before memory is allocated."""
    make_net, policy = _KINDS[kind]
    spec = make_bounds(low=bounds["low"], high=bounds["high"])
    size = len(state["mean"])
    if abs(len(state) - 2 * len(hidden_sizes) - 4) > 1:  # a Gaussian also has its deviation
        raise ValueError(f"{len(state)} tensors do not match {len(hidden_sizes)} hidden layers")
    with torch.device("meta"):
        net = make_net(size, spec.shape[-1], hidden_sizes)
        module = Normalized(net, torch.empty(size), torch.empty(size))
    module.load_state_dict(state, assign=True)
    return policy(module, spec)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
