"""Functions that POGO's entries of TorchRL's Hydra groups call to build their objects.

Hydra builds what a config contains before the config itself. A config with ``_partial_: true``
becomes a ``functools.partial`` instead, which is called here, once the sizes are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torchrl.data import Bounded, ReplayBuffer, TensorSpec
from torchrl.envs import EnvBase

from pogo_torchrl.experiments.build import seed_everything
from pogo_torchrl.modules import TransportActor, make_transport_net
from pogo_torchrl.objectives import POGOLoss
from pogo_torchrl.trainers import POGOTrainer


def make_transport_actor(
    network: Any = None,
    *,
    observation_dim: int | None = None,
    action_dim: int | None = None,
    low: float | Sequence[float] | None = None,
    high: float | Sequence[float] | None = None,
    action_spec: TensorSpec | None = None,
    in_keys: Sequence[Any] | None = None,
    out_keys: Sequence[Any] | None = None,
    noise_key: Any = "noise",
    shared: bool = False,
) -> TransportActor:
    """Create the actor of ``model: transport_actor``.

    Args:
        network: the network f(s, z), or a partial, which is called with the sizes it leaves open.
            Defaults to that of :func:`~pogo_torchrl.make_actor`.

    Keyword Args:
        observation_dim: size of all observations together. Defaults to ``None``: set in
            ``network``.
        action_dim: size of the action, if ``low`` and ``high`` are single numbers. Defaults to
            their length.
        low: lower bound of the action, a number or one per dimension. Defaults to the bound of
            ``action_spec``.
        high: upper bound, in the same form.
        action_spec: bounded spec of the action. Defaults to ``None``: ``low`` and ``high``.
        in_keys: keys of the observations. Defaults to ``["observation"]``.
        out_keys: key of the action. Defaults to ``["action"]``.
        noise_key: key of an optional z. Defaults to ``"noise"``.
        shared: move the parameters to shared memory. Defaults to ``False``.

    Raises:
        ValueError: if the bounds of the action are unknown.

    Example:
        >>> make_transport_actor(observation_dim=3, low=[-1, 0], high=1).action_spec.shape
        torch.Size([2])
    """
    if low is not None or high is not None:
        action_spec = _spec(low, high, action_dim)
    if action_spec is None:
        raise ValueError(
            "model: transport_actor does not know the bounds of the action: set low and high, or "
            "trainer.create_env_fn to an environment with these bounds."
        )
    sizes: dict[str, Any] = {
        "observation_dim": observation_dim,
        "action_dim": action_spec.shape[-1],
    }
    actor = TransportActor(
        make_transport_net(**sizes) if network is None else _built(network, **sizes),
        action_spec,
        in_keys=_keys(in_keys),
        out_keys=_keys(out_keys, "action"),
        noise_key=_key(noise_key),
    )
    return actor.share_memory() if shared else actor


def _spec(low: Any, high: Any, action_dim: int | None) -> Bounded:
    if low is None or high is None:
        raise ValueError(f"low={low} and high={high}: set both bounds of the action, or neither.")
    low, high = torch.broadcast_tensors(
        torch.as_tensor(low, dtype=torch.float32), torch.as_tensor(high, dtype=torch.float32)
    )
    if not low.dim():
        if action_dim is None:
            raise ValueError(
                f"low={low:g} and high={high:g} do not tell the size of the action: set "
                "action_dim, or lists of bounds."
            )
        low, high = low.expand(action_dim), high.expand(action_dim)
    return Bounded(low=low, high=high)


def _key(key: Any) -> Any:
    """A tensordict key from YAML, where nested keys are lists."""
    return key if isinstance(key, str) else tuple(key)


def _keys(keys: Sequence[Any] | None, default: str = "observation") -> list[Any]:
    return [default] if keys is None else [_key(key) for key in keys]


def _built(network: Any, **sizes: Any) -> Any:
    """Call a partial with those sizes that its config leaves open; return other objects as given.

    Args:
        network: a partial, a network or a list of networks.
        **sizes: values for the arguments that the partial binds to ``None``.
    """
    if not isinstance(network, partial):
        return network
    bound = network.keywords
    return network(**{k: v for k, v in sizes.items() if k in bound and bound[k] is None})


def make_pogo_loss(
    actor_network: Any = None,
    qvalue_network: Any = None,
    *,
    gamma: float | None = None,
    **settings: Any,
) -> POGOLoss:
    """Create the loss of ``loss: pogo``.

    Args:
        actor_network: see :class:`~pogo_torchrl.POGOLoss`; or a partial that needs no arguments.
        qvalue_network: the same for the critics.

    Keyword Args:
        gamma: discount factor. Defaults to ``None``: that of the default value estimator.
        **settings: keyword arguments of :class:`~pogo_torchrl.POGOLoss`.

    Raises:
        ValueError: if a network is missing.
    """
    for name, network in (("actor_network", actor_network), ("qvalue_network", qvalue_network)):
        if network is None:
            raise ValueError(
                f"loss: pogo has no {name}: set loss.{name}, or set loss._partial_=true and "
                f"trainer.{name}, so that the trainer builds the loss."
            )
    loss = POGOLoss(_built(actor_network), _built(qvalue_network), **settings)
    if gamma is not None:
        loss.make_value_estimator(gamma=gamma)
    return loss


def make_pogo_trainer(
    loss_module: Any,
    replay_buffer: ReplayBuffer,
    total_steps: int,
    *,
    actor_network: Any = None,
    qvalue_network: Any = None,
    create_env_fn: Any = None,
    optimizer: Any = None,
    qvalue_optimizer: Any = None,
    actor_optimizer: Any = None,
    target_net_updater: Any = None,
    clip_grad_norm: bool | float | None = None,
    clip_norm: float | None = None,
    seed: int | None = None,
    **settings: Any,
) -> POGOTrainer:
    """Create the trainer of ``trainer: pogo``.

    Args:
        loss_module: the loss, or a partial of :func:`make_pogo_loss`.
        replay_buffer: the data, which also determine sizes and device of networks built here.
        total_steps: total number of updates.

    Keyword Args:
        actor_network: actor, or partial of a function that makes one, for a partial loss. Defaults
            to that of the loss.
        qvalue_network: the same for the critics.
        create_env_fn: environment, or function that makes one, whose action spec bounds the actors.
            Defaults to ``None``: bounds set in the actor or the loss.
        optimizer: function from parameters to an optimizer, for critics and actors. Defaults to
            ``None``: Adam.
        qvalue_optimizer: optimizer of the critics. Defaults to ``optimizer``.
        actor_optimizer: optimizer of the actors. Defaults to ``optimizer``.
        target_net_updater: target updater, or function from the loss to one. Defaults to a
            ``SoftUpdate`` with ``tau``.
        clip_grad_norm: maximum gradient norm; or ``True``, as in TorchRL: ``clip_norm``. Defaults
            to ``None``: no clipping.
        clip_norm: maximum gradient norm; ``None``: no clipping. Defaults to ``None``.
        seed: seed, set before networks are built here. Defaults to ``None``: not set.
        **settings: keyword arguments of :class:`~pogo_torchrl.POGOTrainer`.

    Raises:
        ValueError: if a setting is out of range or something needed is missing.
    """
    if seed is not None:
        seed_everything(seed)
    if isinstance(loss_module, partial):
        networks = {"actor_network": actor_network, "qvalue_network": qvalue_network}
        given = {name: network for name, network in networks.items() if network is not None}
        loss_module = _built_loss(loss_module, given, replay_buffer, _action_spec(create_env_fn))
    if isinstance(target_net_updater, partial):
        target_net_updater = target_net_updater(loss_module)
    return POGOTrainer(
        loss_module,
        replay_buffer,
        total_steps,
        qvalue_optimizer=qvalue_optimizer or optimizer,
        actor_optimizer=actor_optimizer or optimizer,
        target_net_updater=target_net_updater,
        clip_grad_norm=_max_norm(clip_grad_norm, clip_norm),
        **settings,
    )


def _built_loss(
    make_loss: partial, given: dict[str, Any], replay_buffer: ReplayBuffer, spec: TensorSpec | None
) -> POGOLoss:
    """Build the networks of a loss for the data, and the loss on the device of the data."""
    if len(replay_buffer) == 0:
        raise ValueError(
            "The replay buffer is empty, and POGO learns from data only: use replay_buffer: "
            "pogo_data, or one of TorchRL's datasets."
        )
    row, settings = replay_buffer[0], make_loss.keywords | given
    actor, bounds = settings.get("actor_network"), settings.get("bounds")
    keys = _keys(actor.keywords.get("in_keys") if isinstance(actor, partial) else None)
    action_dim = row["action"].shape[-1]
    sizes = {
        "observation_dim": sum(row[key].shape[-1] for key in keys),
        "action_dim": action_dim,
    }
    if bounds is not None:
        low, high = bounds
        spec = _spec(low, high, action_dim)
    given["actor_network"] = actor = _built(actor, **sizes, action_spec=spec)
    given["qvalue_network"] = _built(settings.get("qvalue_network"), **sizes)
    if bounds is None and getattr(actor, "action_spec", None) is None:
        given["action_spec"] = spec
    return make_loss(**given).to(row["action"].device)


def _action_spec(create_env_fn: Any) -> TensorSpec | None:
    """Spec of a single action of an environment, or of the environments that a function makes."""
    if create_env_fn is None:
        return None
    if isinstance(create_env_fn, EnvBase):
        return create_env_fn.action_spec_unbatched
    env = create_env_fn()
    try:
        return env.action_spec_unbatched
    finally:
        env.close()


def _max_norm(clip_grad_norm: bool | float | None, clip_norm: float | None) -> float | None:
    """Maximum gradient norm from TorchRL's pair of settings, or from a number."""
    if clip_norm is None:
        return None if isinstance(clip_grad_norm, bool) else clip_grad_norm
    if clip_grad_norm not in (None, True):
        raise ValueError(
            f"clip_grad_norm={clip_grad_norm} and clip_norm={clip_norm}: trainer: pogo clips "
            "gradients by their norm; set clip_grad_norm=true with clip_norm, or clip_norm=null."
        )
    return clip_norm
