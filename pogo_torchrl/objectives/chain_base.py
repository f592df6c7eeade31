"""What a chain needs to know of the loss at its base: its actor and critics, and their checks."""

from __future__ import annotations

from functools import partial
from typing import Any

import torchrl.modules
from tensordict import NestedKey, TensorDictParams
from tensordict.nn import ProbabilisticTensorDictModule
from tensordict.nn.distributions import Delta as TensorDictDelta
from torch import nn
from torch.nn.parameter import is_lazy
from torchrl.modules import Delta, GRUModule, LSTMModule, TanhDelta
from torchrl.objectives.common import LossModule

from pogo_torchrl.modules import TransportActor
from pogo_torchrl.objectives.chain_loss import ChainLoss, parameter_sizes
from pogo_torchrl.objectives.settings import CHAIN_CHECKS, Check, check_choice, check_positive
from pogo_torchrl.policy_nets import DeterministicNet

CHECKS_OF_CHAINS: dict[str, Check] = {
    **{key: CHAIN_CHECKS[key] for key in ("alpha", "blur", "num_samples", "w2_backend")},
    "q_normalization": CHAIN_CHECKS["q_normalization"],
    "actor_q": partial(check_choice, allowed=("first", "mean", "min", "advantage")),
    "entropy_weight": partial(check_positive, or_zero=True),
}
"""Checks of the settings of :class:`~pogo_torchrl.JKOChain`, by name."""

# Actors of TorchRL that draw noise without a distribution; the installed version may lack some.
_NOISY = tuple(
    getattr(torchrl.modules, name)
    for name in ("DiffusionActor", "FlowMatchingPolicy", "OneStepPolicy")
    if hasattr(torchrl.modules, name)
)


def distribution_of(actor: nn.Module) -> ProbabilisticTensorDictModule | None:
    """Part of an actor that makes the distribution which its ``get_dist`` returns, or ``None``."""
    if not hasattr(actor, "get_dist"):  # of TorchRL's Actor, it is one of a single action
        return None
    parts = [m for m in actor.modules() if isinstance(m, ProbabilisticTensorDictModule)]
    return parts[-1] if parts else None


def distribution_class(actor: nn.Module) -> type | None:
    """Class of the distribution that an actor draws its actions from, or ``None``."""
    part = distribution_of(actor)
    kind = None if part is None else part.distribution_class
    return kind if isinstance(kind, type) else None


def is_deterministic(actor: nn.Module) -> bool:
    """Whether an actor maps a state to a single action."""
    kind = distribution_class(actor)
    if kind is not None:
        return issubclass(kind, Delta | TanhDelta | TensorDictDelta)
    modules = list(actor.modules())
    maps = [m.module for m in modules if isinstance(m, TransportActor)]
    return all(isinstance(net, DeterministicNet) for net in maps) and not any(
        isinstance(m, (ProbabilisticTensorDictModule, *_NOISY)) for m in modules
    )


def value_key(base: LossModule) -> NestedKey:
    """Key that the critics write; ``FQLLoss`` calls it ``value``."""
    keys = base.tensor_keys
    return getattr(keys, "state_action_value", None) or keys.value


def first_actor_params(base: LossModule) -> TensorDictParams:
    """Parameters of the base's actor, or of the first one of a chain."""
    name = "actor_network_0_params" if isinstance(base, ChainLoss) else "actor_network_params"
    return getattr(base, name)


def check_value_network(actor_q: str, base: LossModule) -> None:
    """Check that a loss has the value network of an advantage, or raise ``ValueError``."""
    if actor_q == "advantage" and not hasattr(base, "value_network_params"):
        raise ValueError(
            f"actor_q='advantage' needs a value network, which {type(base).__name__} does not "
            "have: use 'first', 'mean' or 'min'."
        )


def base_settings(base: LossModule) -> dict[str, Any]:
    """Settings of a base loss by name, which a run must share with a checkpoint.

    Args:
        base: any of TorchRL's actor-critic losses.

    Returns:
        Its public attributes that are numbers or text, its buffers and those of its value estimator
        (such as gamma), and the dtype and the sizes of its networks.
    """
    if isinstance(base, ChainLoss):
        return base.settings()
    estimator = base.value_estimator
    return {
        **{
            name: value
            for name, value in vars(base).items()
            if isinstance(value, bool | int | float | str)
            and name[0] != "_"
            and name not in ("training", "deactivate_vmap")
        },
        **dict(base.named_buffers(recurse=False)),
        "value_estimator": type(estimator).__name__,
        **dict(estimator.named_buffers(recurse=False)),
        "dtype": str(next(base.parameters()).dtype),
        "actor_network": parameter_sizes(base.actor_network_params),
        "qvalue_network": parameter_sizes(base.qvalue_network_params),
    }


def check_base(base: LossModule) -> None:
    """Check that a loss can be the base of a chain.

    Raises:
        TypeError: if it is not a loss module.
        ValueError: if it lacks a network, or its actor or actions are not supported; the message
            names what is missing.
    """
    name = type(base).__name__
    if not isinstance(base, LossModule):
        raise TypeError(f"base_loss must be a TorchRL LossModule, not {name}.")
    missing = [
        attribute
        for attribute in ("actor_network", "qvalue_network")
        if getattr(base, f"{attribute}_params", None) is None
    ]
    if missing:
        raise ValueError(
            f"{name} cannot be the base of a JKOChain: it has no {' and no '.join(missing)}. "
            "Losses with both are TD3BCLoss, IQLLoss, CQLLoss, TD3Loss, SACLoss and REDQLoss."
        )
    if getattr(base, "action_space", None) is not None:
        raise ValueError(
            f"{name} has discrete actions (action_space={base.action_space}); a JKOChain moves "
            "continuous actions."
        )
    actor = base.actor_network
    recurrent = [type(m).__name__ for m in actor.modules() if isinstance(m, LSTMModule | GRUModule)]
    if recurrent:
        raise ValueError(
            f"the actor of {name} is recurrent ({', '.join(recurrent)}); a JKOChain needs an actor "
            "that maps a state to an action."
        )
    values = [*first_actor_params(base).values(True, True)]
    if any(is_lazy(value) for value in values):
        raise ValueError(
            f"the actor of {name} has lazy parameters: run it once on a batch before the loss is "
            "created, so that the chain can copy them."
        )
    storages = {value.data_ptr() for value in base.qvalue_network_params.values(True, True)}
    if any(value.numel() and value.data_ptr() in storages for value in values):
        raise ValueError(
            f"the actor and the critics of {name} share parameters; a JKOChain needs them apart."
        )
