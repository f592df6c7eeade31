"""Trained chains on disk: small safetensors files that act without the training's config.

The header is JSON and tells how the chain is built; the rest are the numbers. Nothing in such a
file can run, and no more memory is taken than the file is long.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torchrl.data import Bounded

from pogo_torchrl.files import atomic_write
from pogo_torchrl.modules import Normalized, TransportActor, make_transport_net

_FORMAT = "pogo_torchrl.actors"
_VERSION = 2  # 1 was written by torch.save


def on_raw_observations(
    actor: TransportActor, mean: torch.Tensor, std: torch.Tensor
) -> TransportActor:
    """The same policy, sharing its parameters, for observations that are not normalised.

    Args:
        actor: an actor trained on ``(observation - mean) / std``.
        mean: the dataset's normalisation, shape ``[obs]``.
        std: the dataset's normalisation, shape ``[obs]``.

    Example:
        >>> import torch
        >>> from torchrl.data import Bounded
        >>> from pogo_torchrl import make_actor
        >>> actor = make_actor(3, Bounded(low=-torch.ones(2), high=torch.ones(2)))
        >>> raw = on_raw_observations(actor, mean=torch.ones(3), std=torch.full((3,), 2.0))
        >>> torch.equal(raw(observation=torch.full((3,), 3.0)), actor(observation=torch.ones(3)))
        True
    """
    raw = TransportActor(
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
) -> None:
    """Write actors on raw observations, built by :func:`~pogo_torchrl.make_actor`, to one file.

    Args:
        path: the file; it appears whole or not at all.
        actors: the chain, from :func:`on_raw_observations`.
        hidden_sizes: widths of their hidden layers. Defaults to ``(256, 256)``.
        environment: where they were evaluated, for :func:`policy_environment`; anything that JSON
            can hold. Defaults to ``None``.

    Raises:
        ValueError: when the actors are not such, or have other hidden layers.
        OSError: when the file cannot be written.
    """
    path = Path(path)
    if not actors or not all(isinstance(actor.module, Normalized) for actor in actors):
        raise ValueError("actors must hold one actor or more, each from on_raw_observations(...).")
    space = actors[0].action_spec.space
    bounds = {"low": space.low, "high": space.high}
    states = {f"actor_{i}": actor.module.state_dict() for i, actor in enumerate(actors)}
    try:
        for state in states.values():
            _make_actor(state, bounds, hidden_sizes)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"hidden_sizes={list(hidden_sizes)} are not those of the actors ({_one_line(error)}): "
            "give the widths that make_actor got."
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
        "environment": json.dumps(environment or {}, sort_keys=True),
    }
    content = safetensors.torch.save(tensors, header)
    with atomic_write(path) as file:
        file.write(content)


def load_actors(path: str | Path, *, device: torch.device | str = "cpu") -> list[TransportActor]:
    """Load a trained chain for inference; nothing else of the run is needed.

    The file is safetensors with a JSON header: reading it runs no code of its author's.

    Args:
        path: a ``policy.safetensors`` that a run has written to its ``checkpoints`` folder.
        device: where the actors shall live. Defaults to ``"cpu"``.

    Returns:
        The chain, actor 0 first. Each takes raw observations: the dataset's normalisation is part
        of it. ``chain[-1]`` is the policy that POGO trains for.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when the file is none of ours, is damaged or of a newer version.

    Example:
        >>> chain = load_actors("policy.safetensors")  # doctest: +SKIP
        >>> action = chain[-1](observation=torch.zeros(11))  # doctest: +SKIP
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not a file; a run writes checkpoints/policy.safetensors."
        )
    header, tensors = _read(path)
    if header.get("format") != _FORMAT:
        raise ValueError(f"{path} is no policy of pogo_torchrl (checkpoints/policy.safetensors).")
    if header.get("version") != str(_VERSION):
        raise ValueError(
            f"{path} has format version {header.get('version')}, this release reads {_VERSION}: "
            "update pogo_torchrl, or load it with the release that wrote it."
        )
    try:
        bounds, *states = _by_owner(tensors, int(header["num_actors"]))
        sizes = json.loads(header["hidden_sizes"])
        actors = [_make_actor(state, bounds, sizes) for state in states]
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged ({_one_line(error)}): export the policy again."
        ) from error
    return [actor.to(device).requires_grad_(False) for actor in actors]


def policy_environment(path: str | Path) -> dict[str, Any]:
    """The environment that :func:`save_actors` was given; empty where it was given none.

    Args:
        path: a file of :func:`save_actors`, which :func:`load_actors` can load.
    """
    header, _ = _read(Path(path))
    try:
        found = json.loads(header.get("environment", "{}"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The header and the tensors of a safetensors file."""
    with path.open("rb") as file:
        start = file.read(2)
    if start in (b"PK", b"\x80\x02"):  # how torch.save's files begin: they are pickles
        raise ValueError(
            f"{path} was written by torch.save and is not opened, because such files can run code: "
            "give a safetensors file (checkpoints/policy.safetensors)."
        )
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            # Clones: the file may change while the policy acts.
            return header, {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, RuntimeError) as error:
        raise ValueError(
            f"{path} is damaged or no safetensors file ({_one_line(error)}): export the policy "
            "again."
        ) from error


def _by_owner(tensors: dict[str, Tensor], num_actors: int) -> list[dict[str, Tensor]]:
    """The tensors named ``bounds.*``, ``actor_0.*``, ``actor_1.*``, ..., checked."""
    owners: dict[str, dict[str, Tensor]] = {}
    for key, values in sorted(tensors.items()):
        owner, _, name = key.partition(".")
        owners.setdefault(owner, {})[name] = values
        if values.dtype != next(iter(tensors.values())).dtype or not values.isfinite().all():
            raise ValueError(f"{key} is not finite or of another dtype than the others")
    if num_actors < 1 or len(owners) != 1 + num_actors:
        raise ValueError(f"it should hold num_actors={num_actors} and bounds, not {list(owners)}")
    return [owners["bounds"], *(owners[f"actor_{i}"] for i in range(num_actors))]


def _make_actor(
    state: dict[str, Tensor], bounds: dict[str, Tensor], hidden_sizes: Sequence[int]
) -> TransportActor:
    """An actor of these tensors; sizes are compared before any memory is taken."""
    spec = Bounded(low=bounds["low"], high=bounds["high"])
    size = len(state["mean"])
    if len(state) != 2 * len(hidden_sizes) + 4:
        raise ValueError(f"{len(state)} tensors do not make {len(hidden_sizes)} hidden layers")
    with torch.device("meta"):
        net = make_transport_net(size, spec.shape[-1], hidden_sizes)
        module = Normalized(net, torch.empty(size), torch.empty(size))
    module.load_state_dict(state, assign=True)
    return TransportActor(module, spec)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
