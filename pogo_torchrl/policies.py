"""Trained chains on disk: small files that act without the training's config."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torchrl.data import Bounded

from pogo_torchrl.files import atomic_write
from pogo_torchrl.modules import Normalized, TransportActor, make_transport_net

_FORMAT = "pogo_torchrl.actors"
_VERSION = 1


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
    path: str | Path, actors: Sequence[TransportActor], *, hidden_sizes: Sequence[int] = (256, 256)
) -> None:
    """Write actors on raw observations, built by :func:`~pogo_torchrl.make_actor`, to one file.

    Args:
        path: the file; it appears whole or not at all.
        actors: the chain, from :func:`on_raw_observations`.
        hidden_sizes: widths of their hidden layers.
    """
    path = Path(path)
    space = actors[0].action_spec.space
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "hidden_sizes": list(hidden_sizes),
        "low": space.low.cpu(),
        "high": space.high.cpu(),
        "actors": [{k: v.cpu() for k, v in actor.module.state_dict().items()} for actor in actors],
    }
    with atomic_write(path) as file:
        torch.save(content, file)


def load_actors(path: str | Path, *, device: torch.device | str = "cpu") -> list[TransportActor]:
    """Load a trained chain for inference; nothing else of the run is needed.

    Args:
        path: a ``policy.pt`` that a run has written to its ``checkpoints`` folder.
        device: where the actors shall live. Defaults to ``"cpu"``.

    Returns:
        The chain, actor 0 first. Each takes raw observations: the dataset's normalisation is part
        of it. ``chain[-1]`` is the policy that POGO trains for.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when the file is none of ours, is damaged or of a newer version.

    Example:
        >>> chain = load_actors("policy.pt")  # doctest: +SKIP
        >>> action = chain[-1](observation=torch.zeros(11))  # doctest: +SKIP
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; a run writes checkpoints/policy.pt.")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is damaged or no policy file: {error}") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"{path} is no policy file of pogo_torchrl (checkpoints/policy.pt).")
    missing = {"version", "hidden_sizes", "low", "high", "actors"} - content.keys()
    if missing:
        raise ValueError(f"{path} is damaged: it lacks {', '.join(sorted(missing))}.")
    if content["version"] > _VERSION:
        raise ValueError(
            f"{path} has format version {content['version']}, this release reads {_VERSION}: "
            "update pogo_torchrl."
        )
    spec = Bounded(low=content["low"], high=content["high"])
    actors = []
    for state in content["actors"]:
        net = make_transport_net(len(state["mean"]), spec.shape[-1], content["hidden_sizes"])
        module = Normalized(net, torch.zeros_like(state["mean"]), torch.ones_like(state["std"]))
        module.load_state_dict(state)
        actors.append(TransportActor(module, spec).to(device).requires_grad_(False))
    return actors
