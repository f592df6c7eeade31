"""The algorithms of ``pogo train``: POGO, and a JKO chain on top of other algorithms."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDictBase
from torch import nn
from torchrl.data import Bounded
from torchrl.envs import RewardScaling
from torchrl.modules import MLP, ValueOperator
from torchrl.objectives import IQLLoss, LossModule, TD3BCLoss

from pogo_torchrl.data import OfflineReplayBuffer
from pogo_torchrl.evaluation import Evaluator
from pogo_torchrl.experiments import build
from pogo_torchrl.experiments.config import RunConfig, to_text
from pogo_torchrl.experiments.simulator import DataSpaces
from pogo_torchrl.modules import (
    QValueOperator,
    TransportActor,
    as_transport_actor,
    gaussian_actor,
    make_qvalue,
)
from pogo_torchrl.objectives import GaussianPOGOLoss, JKOChain, POGOLoss, ReBRACLoss
from pogo_torchrl.objectives.settings import check_positive, check_step_sizes, check_weights
from pogo_torchrl.policy_nets import make_deterministic_net, make_gaussian_net
from pogo_torchrl.trainers import ChainTrainer, POGOTrainer
from pogo_torchrl.trainers.chain_trainer import CRITICS_FIRST, TOGETHER

POGO = "pogo"

STEP_SIZE = 0.1
"""Step size of each added actor if neither ``step_sizes`` nor ``w2_weights`` are given."""


PAPER_ENTROPY_WEIGHT = 0.01
"""Weight of the entropy for ``algorithm=paper``, see :class:`~pogo_torchrl.GaussianPOGOLoss`."""


class Base(NamedTuple):
    """An algorithm that trains the first actor and the critics of a chain."""

    make_loss: Callable[[DictConfig, int, Bounded], LossModule]
    """Makes the loss from options, the size of observations and the bounds of actions."""
    order: Sequence[Sequence[str]]
    """Order in which its networks are updated, see :class:`~pogo_torchrl.trainers.ChainTrainer`."""
    options: frozenset[str]
    """Those of :data:`_SPECIFIC` that it uses."""
    distance: Literal["exact", "gaussian_w2"]
    """Distance between the actors of a chain on it."""
    weighs_base: bool = False
    """Whether its own actor has a weight, too: the first of ``w2_weights``."""
    entropy_weight: float = 0.0
    """Weight of the entropy of each actor."""
    chain: int = 0
    """Number of added actors if nothing is given."""


# Options that some algorithms use and others do not.
_SPECIFIC = {
    "alpha", "displacement", "alpha_growth", "q_normalization", "delay_actor", "w2_fraction",
    "shared_noise", "target_action", "actor_bc_weight", "critic_bc_weight",
    "advantage_temperature", "data_weight", "return_temperature", "chain_init", "average_actors",
    "bf16", "num_samples", "blur", "w2_backend", "policy_noise", "noise_clip", "policy_freq",
    "actor_q", "freeze_critics_at",
}  # fmt: skip
_OF_POGO = _SPECIFIC - {"actor_bc_weight"}
_OF_A_CHAIN = {"actor_q", "freeze_critics_at"}
_OF_TD3 = frozenset({"policy_noise", "noise_clip", "policy_freq"})


def td3_bc(cfg: DictConfig, observation_dim: int, spec: Bounded) -> LossModule:
    """TD3+BC (Fujimoto & Gu, 2021, arXiv:2106.06860).

    Args:
        cfg: options of a run.
        observation_dim: size of the observations.
        spec: bounds of the actions.
    """
    return TD3BCLoss(
        _deterministic_actor(cfg, observation_dim, spec),
        _qvalue(cfg, observation_dim, spec),
        action_spec=spec,
        num_qvalue_nets=cfg.num_critics,
        alpha=2.5,
        policy_noise=cfg.policy_noise,
        noise_clip=cfg.noise_clip,
        loss_function="l2",  # the paper's; TorchRL's default is smooth_l1
    )


def rebrac(cfg: DictConfig, observation_dim: int, spec: Bounded) -> LossModule:
    """ReBRAC (Tarasov et al., 2023, arXiv:2305.09836); the arguments are those of td3_bc."""
    return ReBRACLoss(
        _deterministic_actor(cfg, observation_dim, spec),
        _qvalue(cfg, observation_dim, spec),
        action_spec=spec,
        num_qvalue_nets=cfg.num_critics,
        actor_bc_weight=cfg.actor_bc_weight,
        critic_bc_weight=cfg.critic_bc_weight,
        policy_noise=cfg.policy_noise,
        noise_clip=cfg.noise_clip,
    )


def iql(cfg: DictConfig, observation_dim: int, spec: Bounded) -> LossModule:
    """IQL (Kostrikov et al., 2021, arXiv:2110.06169); the arguments are those of td3_bc.

    The actor is the paper's: a Gaussian with a tanh mean and a state-independent deviation.
    """
    net = make_gaussian_net(observation_dim, spec.shape[-1], cfg.hidden_sizes)
    value = MLP(
        in_features=observation_dim,
        out_features=1,
        num_cells=build.critic_sizes(cfg),
        activation_class=nn.ReLU,
    )
    loss = IQLLoss(
        gaussian_actor(net, spec),
        _qvalue(cfg, observation_dim, spec),
        QValueOperator(value, in_keys=["observation"]),  # V(s)
        num_qvalue_nets=cfg.num_critics,
        temperature=3.0,
        expectile=0.7,
        loss_function="l2",  # the paper's; TorchRL's default is smooth_l1
    )
    # As in TorchRL's losses with bounds.
    loss.register_buffer("min_action", spec.space.low)
    loss.register_buffer("max_action", spec.space.high)
    return loss


def paper(cfg: DictConfig, observation_dim: int, spec: Bounded) -> LossModule:
    """First step of POGO with Gaussian policies; the arguments are those of td3_bc.

    Source: *Policy Optimization as a Gradient Flow in Offline Reinforcement Learning* (POGO).
    """
    net = make_gaussian_net(observation_dim, spec.shape[-1], cfg.hidden_sizes)
    return GaussianPOGOLoss(
        gaussian_actor(net, spec),
        _qvalue(cfg, observation_dim, spec),
        action_spec=spec,
        w2_weight=cfg.w2_weights[0],
        entropy_weight=PAPER_ENTROPY_WEIGHT,
        num_qvalue_nets=cfg.num_critics,
        policy_noise=cfg.policy_noise,
        noise_clip=cfg.noise_clip,
    )


def _deterministic_actor(cfg: DictConfig, observation_dim: int, spec: Bounded) -> TransportActor:
    net = make_deterministic_net(observation_dim, spec.shape[-1], cfg.hidden_sizes)
    return TransportActor(net, spec)


def _qvalue(cfg: DictConfig, observation_dim: int, spec: Bounded) -> ValueOperator:
    sizes = build.critic_sizes(cfg)
    return make_qvalue(observation_dim, spec.shape[-1], sizes, cfg.critic_layer_norm)


BASES: Mapping[str, Base] = {
    "td3_bc": Base(td3_bc, CRITICS_FIRST, _OF_TD3, "exact"),
    "iql": Base(iql, TOGETHER, frozenset(), "gaussian_w2"),
    "rebrac": Base(
        rebrac,
        CRITICS_FIRST,
        _OF_TD3 | {"actor_bc_weight", "critic_bc_weight"},
        "exact",
    ),
    "paper": Base(
        paper,
        (("behaviour",), *CRITICS_FIRST),
        _OF_TD3 | {"freeze_critics_at"},
        "gaussian_w2",
        weighs_base=True,
        entropy_weight=PAPER_ENTROPY_WEIGHT,
        chain=1,
    ),
}
"""The algorithms besides POGO, by the value of ``algorithm``."""


def resolve(cfg: DictConfig) -> DictConfig:
    """Check the options of the algorithm, and return those of a run with its chain in numbers.

    Args:
        cfg: a :class:`~pogo_torchrl.experiments.config.RunConfig`.

    Returns:
        The options with ``w2_weights`` in place of ``step_sizes``; ``chain`` is the number of
        added actors, and ``None`` for POGO. ``return_temperature``, which concerns later actors, is
        ``None`` for POGO with a single actor.

    Raises:
        ValueError: for an unknown algorithm, an option that it does not use, or a chain that is not
            valid; the message names it.
    """
    if cfg.algorithm == POGO:
        _check_used(cfg, _OF_POGO)
        cfg = build.resolve_step_sizes(cfg)
        _check_return_temperature(cfg)
        if cfg.chain not in (None, len(cfg.w2_weights) - 1):
            raise ValueError(
                f"chain={cfg.chain} differs from the {len(cfg.w2_weights)} w2_weights of "
                f"algorithm=pogo, one for actor 0 and one for each actor after it: give "
                f"{cfg.chain + 1} w2_weights or step_sizes, and leave chain out."
            )
        resolved = copy.deepcopy(cfg)
        resolved.chain = None
        if len(cfg.w2_weights) == 1:  # it concerns later actors; presets of tasks set it
            resolved.return_temperature = None
        return resolved
    if cfg.algorithm not in BASES:
        raise ValueError(
            f"algorithm={cfg.algorithm} is unknown; choose one of {', '.join((POGO, *BASES))}."
        )
    base, weights = BASES[cfg.algorithm], _chain_weights(cfg)
    chain = len(weights) - base.weighs_base
    used = base.options | (_OF_A_CHAIN if chain else set())
    _check_used(cfg, used, "" if chain else " and chain=0")
    if str(cfg.compile).lower() == "true":
        raise ValueError(
            f"compile=true is for algorithm=pogo; algorithm={cfg.algorithm} is trained in eager "
            "mode: use compile=auto or compile=false."
        )
    resolved = copy.deepcopy(cfg)
    resolved.w2_weights, resolved.step_sizes, resolved.chain = weights, None, chain
    return resolved


def _check_return_temperature(cfg: DictConfig) -> None:
    if cfg.return_temperature is None:
        return
    check_positive("return_temperature", cfg.return_temperature)
    if not cfg.data_weight:
        raise ValueError(
            f"return_temperature={cfg.return_temperature} weighs the data term of actors 1, 2, "
            f"..., but there is none with data_weight={cfg.data_weight:g}: set data_weight in "
            "(0, 1], or return_temperature=null."
        )


def _check_used(cfg: DictConfig, used: frozenset[str] | set[str], where: str = "") -> None:
    """Check that options without a meaning for the algorithm have their defaults."""
    defaults = OmegaConf.structured(RunConfig)
    for key in sorted(_SPECIFIC - used):
        if cfg[key] != defaults[key]:
            raise ValueError(
                f"{key}={to_text(cfg[key])} has no meaning for algorithm={cfg.algorithm}{where}: "
                "leave it out."
            )


def _chain_weights(cfg: DictConfig) -> list[float]:
    """Weight of each added actor of a chain on another algorithm, after that of its own, if any."""
    base, weights, sizes = BASES[cfg.algorithm], list(cfg.w2_weights), cfg.step_sizes
    if sizes is not None and weights:
        raise ValueError(f"step_sizes={sizes} set w2_weights; give one of the two.")
    given = "w2_weights" if sizes is None else "step_sizes"
    if sizes is None and not weights:
        chain = base.chain if cfg.chain is None else cfg.chain
        sizes = [STEP_SIZE] * (chain + base.weighs_base)
    if sizes:
        dim = build.action_dim(cfg)
        weights = [1 / (h * dim) for h in check_step_sizes(list(sizes), len(sizes))]
    if cfg.chain not in (None, len(weights) - base.weighs_base):
        one = "one for its own actor and " if base.weighs_base else ""
        raise ValueError(
            f"chain={cfg.chain} differs from the {len(weights)} {given}={list(cfg[given])}, {one}"
            f"one for each actor on top of algorithm={cfg.algorithm}: give "
            f"{cfg.chain + base.weighs_base}, or leave chain out."
        )
    return list(check_weights(weights)) if weights else []


def make_loss(
    cfg: DictConfig, evaluator: Evaluator | DataSpaces, device: torch.device
) -> POGOLoss | JKOChain:
    """Initialise the loss with its actors and critics.

    Args:
        cfg: a :class:`~pogo_torchrl.experiments.config.RunConfig` from :func:`resolve`.
        evaluator: provides the sizes of observations and actions, and the action spec.
        device: device of the networks.
    """
    if cfg.algorithm == POGO:
        return build.make_loss(cfg, evaluator, device)
    base, spec = BASES[cfg.algorithm], evaluator.action_spec
    chain = JKOChain(
        base.make_loss(cfg, evaluator.observation_dim, spec),
        w2_weights=list(cfg.w2_weights)[base.weighs_base :],
        action_spec=spec,
        actor_q=cfg.actor_q,
        distance=base.distance,
        entropy_weight=base.entropy_weight,
        num_samples=1,  # the actors are deterministic, or the distance needs no samples
    ).to(device)
    chain.make_value_estimator(gamma=cfg.gamma)
    return chain


def make_trainer(cfg: DictConfig) -> Callable[..., POGOTrainer]:
    """Return the trainer of the algorithm, to be called as :class:`~pogo_torchrl.POGOTrainer`.

    Args:
        cfg: a :class:`~pogo_torchrl.experiments.config.RunConfig`.
    """
    if cfg.algorithm == POGO:
        return POGOTrainer
    return partial(ChainTrainer, order=BASES[cfg.algorithm].order)


def policy(loss: POGOLoss | JKOChain, index: int, *, averaged: bool = False) -> TransportActor:
    """Return an actor as a transport map that shares the parameters being trained.

    Args:
        loss: the loss of :func:`make_loss`.
        index: index of the actor.
        averaged: return the average of POGO's actor. Defaults to ``False``.
    """
    if isinstance(loss, JKOChain):
        return as_transport_actor(loss.actor(index))
    return loss.actor(index, averaged=averaged)


def scale_rewards(cfg: DictConfig, replay_buffer: OfflineReplayBuffer) -> float:
    """Scale the rewards as IQL does for locomotion: so that the returns in the data span 1000.

    Args:
        cfg: a :class:`~pogo_torchrl.experiments.config.RunConfig`.
        replay_buffer: the data.

    Returns:
        The factor; 1 for other algorithms and tasks.
    """
    returns = replay_buffer.episode_returns
    span = float(returns.max() - returns.min()) if len(returns) else 0.0
    if cfg.algorithm != "iql" or cfg.task.startswith("antmaze") or span <= 0:
        return 1.0
    replay_buffer.append_transform(
        RewardScaling(loc=0.0, scale=1000 / span, in_keys=[("next", "reward")])
    )
    return 1000 / span


@torch.no_grad()
def mean_q(chain: JKOChain, batch: TensorDictBase) -> float:
    """Mean value of the data's actions in a batch under the first critic."""
    base: Any = chain.base_loss
    critics = base.qvalue_network_params
    with (critics[0] if critics.ndim else critics).to_module(base.qvalue_network):
        value = base.qvalue_network(batch.select(*base.qvalue_network.in_keys))
    return float(value.get(chain.tensor_keys.state_action_value).mean())
