"""The first step of the paper's POGO, with Gaussian policies, as a TorchRL loss module."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModule, dispatch
from torch import Tensor
from torch.distributions import Distribution
from torchrl.data import TensorSpec
from torchrl.envs.utils import ExplorationType
from torchrl.modules import IndependentNormal

from pogo_torchrl import functional
from pogo_torchrl.objectives.actor_critic import ActorCriticLoss
from pogo_torchrl.objectives.chain_base import distribution_class
from pogo_torchrl.objectives.checks import check_rows
from pogo_torchrl.objectives.distances import OF_GAUSSIANS, gaussian_distance, moments
from pogo_torchrl.objectives.settings import (
    COMMON_CHECKS,
    check_choice,
    check_positive,
    plain_number,
)


class GaussianPOGOLoss(ActorCriticLoss):
    r"""First step of the paper's POGO: critics, a Gaussian actor, and the policy behind the data.

    A behaviour policy :math:`\pi_\beta` learns the actions of the data by maximum likelihood, and
    is the reference of actor 0. All policies are diagonal Gaussians:

    .. math::
        L_\beta &= -\mathrm{mean} \log \pi_\beta(a|s), \\
        L_0 &= -\lambda\, \mathrm{mean}\, Q_1(s, a_0)
               + w_0\, \mathrm{mean}_s\, D(\pi_0(\cdot|s), \pi_\beta(\cdot|s))
               - \eta\, \mathrm{mean}_s\, H(\pi_0(\cdot|s)), \qquad a_0 \sim \pi_0(\cdot|s), \\
        D &= \tfrac12 W_2^2
           = \tfrac12 \big(|\mu_0 - \mu_\beta|^2 + |\sigma_0 - \sigma_\beta|^2\big)

    with :math:`\lambda = \alpha / \mathrm{mean}\,|Q_1(s, a_0)|`. The distance and the entropy H are
    those of Gaussians over actions mapped to [-1, 1]. The critics have the target of TD3, in which
    the Polyak copy of actor 0 acts:

    .. math::
        L_Q = \sum_j \mathrm{mean}\, (Q_j(s, a) - y)^2, \qquad
        y = r + \gamma (1 - terminated) \min_j \bar Q_j(s', \mathrm{clip}(a' +
            \mathrm{clip}(\sigma n, -c, c))), \qquad a' \sim \bar\pi_0(\cdot|s')

    The next steps are the actors of a :class:`~pogo_torchrl.JKOChain` over this loss, with
    ``distance="gaussian_w2"`` and the same ``entropy_weight``. In the paper, they are trained when
    the critics are frozen, after half of the updates: train ``loss`` until then, call
    ``chain.restart()``, and minimise ``chain.actor_loss(batch)`` alone from there on.

    Source: *Policy Optimization as a Gradient Flow in Offline Reinforcement Learning* (POGO).

    Args:
        actor_network (TensorDictModule): actor 0, a ``ProbabilisticActor`` with an
            ``IndependentNormal``, such as that of :func:`~pogo_torchrl.make_gaussian_actor`.
        qvalue_network (TensorDictModule or list of TensorDictModule): a single critic, copied
            ``num_qvalue_nets`` times with reinitialised parameters, or a list of critics.

    Keyword Args:
        behaviour_network (TensorDictModule, optional): the behaviour policy, with the keys and the
            distribution of the actor. Defaults to a copy of the actor, so that the distance is 0 at
            first.
        w2_weight (float, optional): :math:`w_0`. Since D is half of :math:`W_2^2`, it is twice the
            weight of :math:`W_2^2`. Defaults to ``0.2``.
        step_size (float, optional): :math:`h_0 = \alpha / (w_0 d)` instead of ``w2_weight``, where
            d is the number of action dimensions.
        entropy_weight (float): :math:`\eta`. Defaults to ``0.01``.
        distance (str): ``"gaussian_w2"``, or ``"kl"`` or ``"fisher_rao"`` for D; see
            :class:`~pogo_torchrl.JKOChain`. Defaults to ``"gaussian_w2"``.
        alpha (float): weight of the Q term, positive. Defaults to ``1.0``.
        action_spec (TensorSpec, optional): bounded action spec. Exclusive with ``bounds``. If
            neither is given, the ``spec`` of the actor is used.
        bounds (tuple of float or of Tensor, optional): lower and upper action bounds.
        q_normalization (str or None): ``"mean_abs"``, or ``None`` for :math:`\lambda = \alpha`.
            Defaults to ``"mean_abs"``.
        num_qvalue_nets (int): number of critics. Defaults to ``2``.
        policy_noise (float): :math:`\sigma`, the standard deviation of the target noise in units
            of half the action range. Defaults to ``0.2``.
        noise_clip (float): c, the clipping range of the target noise in the same units. Defaults
            to ``0.5``.
        delay_actor (bool): use a target copy of the actor in the TD target. Defaults to ``True``.
        delay_qvalue (bool): use target copies of the critics in the TD target. Defaults to
            ``True``.
        loss_function (str): loss between the critics and the TD target: ``"l2"``, ``"l1"`` or
            ``"smooth_l1"``. Defaults to ``"l2"``.
        reduction (str): ``"mean"``, ``"sum"`` or ``"none"``. Defaults to ``"mean"``.
        use_prioritized_weights (bool or "auto"): weight samples by ``priority_weight`` if the
            batch contains it. Defaults to ``"auto"``.

    Raises:
        ValueError: if a setting is out of range, or the actors are not Gaussian.

    A batch has the keys of :class:`~torchrl.objectives.TD3BCLoss`. The output contains
    ``loss_actor``, ``loss_qvalue`` and ``loss_behaviour``, and the detached scalars ``q_actor``,
    ``w2_behaviour`` (D), ``entropy``, ``lmbd``, ``behaviour_std`` (the mean standard deviation of
    the behaviour policy over mapped actions), ``pred_value``, ``target_value`` and
    ``next_state_value``.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.data import Bounded
        >>> from torchrl.objectives import SoftUpdate
        >>> from pogo_torchrl import GaussianPOGOLoss, JKOChain, make_gaussian_actor, make_qvalue
        >>> spec = Bounded(low=-torch.ones(2), high=torch.ones(2))
        >>> actor = make_gaussian_actor(3, spec)
        >>> loss = GaussianPOGOLoss(actor, make_qvalue(3, 2), step_size=0.1)
        >>> chain = JKOChain(loss, step_sizes=[0.1], distance="gaussian_w2", entropy_weight=0.01)
        >>> _ = chain.make_value_estimator(gamma=0.99)
        >>> targets = SoftUpdate(chain, tau=0.005)
        >>> batch = TensorDict({"observation": torch.randn(8, 3), "action": spec.rand([8]),
        ...     "next": {"observation": torch.randn(8, 3), "reward": torch.randn(8, 1),
        ...              "done": torch.zeros(8, 1, dtype=torch.bool),
        ...              "terminated": torch.zeros(8, 1, dtype=torch.bool)}}, [8])
        >>> out = loss(batch)  # the first half of the updates
        >>> [key for key in out.keys() if key.startswith("loss")]
        ['loss_actor', 'loss_qvalue', 'loss_behaviour']
        >>> chain.restart()
        >>> later, _ = chain.actor_loss(batch)  # the second half
    """

    deterministic_sampling_mode = ExplorationType.RANDOM

    checks = COMMON_CHECKS | {
        "distance": partial(check_choice, allowed=tuple(OF_GAUSSIANS)),
        "entropy_weight": partial(check_positive, or_zero=True),
        "w2_weight": partial(check_positive, or_zero=True),
    }

    behaviour_network: TensorDictModule
    behaviour_network_params: TensorDictParams
    target_behaviour_network_params: TensorDictParams

    def __init__(
        self,
        actor_network: TensorDictModule,
        qvalue_network: TensorDictModule | Sequence[TensorDictModule],
        *,
        behaviour_network: TensorDictModule | None = None,
        w2_weight: float | None = None,
        step_size: float | None = None,
        entropy_weight: float = 0.01,
        distance: Literal["gaussian_w2", "kl", "fisher_rao"] = "gaussian_w2",
        alpha: float = 1.0,
        action_spec: TensorSpec | None = None,
        bounds: tuple | None = None,
        q_normalization: Literal["mean_abs"] | None = "mean_abs",
        num_qvalue_nets: int = 2,
        policy_noise: float = 0.2,
        noise_clip: float = 0.5,
        delay_actor: bool = True,
        delay_qvalue: bool = True,
        loss_function: Literal["l2", "l1", "smooth_l1"] = "l2",
        reduction: Literal["mean", "sum", "none"] | None = "mean",
        use_prioritized_weights: bool | Literal["auto"] = "auto",
    ) -> None:
        if behaviour_network is None:
            behaviour_network = copy.deepcopy(actor_network)
        for name, network in (("actor", actor_network), ("behaviour_network", behaviour_network)):
            _check_gaussian(name, network)
        if behaviour_network.in_keys != actor_network.in_keys:
            raise ValueError(
                f"the behaviour_network reads {behaviour_network.in_keys}, but the actor reads "
                f"{actor_network.in_keys}: both need the same in_keys."
            )
        super().__init__(
            actor_network,
            qvalue_network,
            action_spec=action_spec,
            bounds=bounds,
            critic_bc_weight=0.0,
            q_normalization=q_normalization,
            num_qvalue_nets=num_qvalue_nets,
            policy_noise=policy_noise,
            noise_clip=noise_clip,
            delay_actor=delay_actor,
            delay_qvalue=delay_qvalue,
            loss_function=loss_function,
            reduction=reduction,
            use_prioritized_weights=use_prioritized_weights,
        )
        self.convert_to_functional(behaviour_network, "behaviour_network")
        self.entropy_weight = entropy_weight
        self.distance = distance
        self.alpha = alpha
        self.w2_weight = self._weight(w2_weight, step_size)
        self._out_keys = [
            "loss_actor",
            "loss_qvalue",
            "q_actor",
            "w2_behaviour",
            "entropy",
            "lmbd",
            "pred_value",
            "target_value",
            "next_state_value",
            "loss_behaviour",
            "behaviour_std",
        ]

    def _weight(self, weight: float | None, size: float | None) -> float:
        if weight is not None and size is not None:
            raise ValueError(f"step_size={size} sets w2_weight={weight}; give one of the two.")
        if size is None:
            return 0.2 if weight is None else weight
        size = plain_number(size)
        check_positive("step_size", size)
        if not self.min_action.dim():
            raise ValueError(
                "step_size depends on the number of action dimensions, which bounds=(low, high) of "
                "two numbers do not tell: pass action_spec=Bounded(...)."
            )
        return self.alpha / (size * self.min_action.shape[-1])

    def actor_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        r"""Compute :math:`L_0`, which has gradients with respect to the actor only.

        Args:
            tensordict: a batch with the observations.

        Returns:
            The loss and the detached scalars ``q_actor``, ``w2_behaviour``, ``entropy`` and
            ``lmbd``.
        """
        check_rows(tensordict)
        box = self.min_action, self.max_action
        policy = self._policy("actor", tensordict)
        with torch.no_grad():
            reference = self._policy("behaviour", tensordict)
        distance = gaussian_distance(self.distance, policy, reference, *box)
        entropy = functional.gaussian_entropy(moments(policy, *box)[1])
        first = self.qvalue_network_params.data[:1]
        q = self.qvalues(first, tensordict, policy.rsample())[0]
        scale = functional.q_scale(q, self.alpha, self.q_normalization)
        loss = functional.jko_loss(q, distance, scale=scale, weight=self.w2_weight)
        loss = loss - self.entropy_weight * entropy
        return self.reduce(loss, tensordict), {
            "q_actor": q.detach().mean(),
            "w2_behaviour": distance.detach().mean(),
            "entropy": entropy.detach().mean(),
            "lmbd": scale,
        }

    def behaviour_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        r"""Compute :math:`L_\beta`, the negative log-likelihood of the data's actions.

        Args:
            tensordict: a batch with the observations and actions.

        Returns:
            The loss and the detached scalar ``behaviour_std``.

        Raises:
            KeyError: if a key is missing.
            ValueError: if a dtype or shape does not match.
        """
        self.check_batch(tensordict, (*self.actor_network.in_keys, self.tensor_keys.action))
        policy = self._policy("behaviour", tensordict)
        loss = -policy.log_prob(tensordict.get(self.tensor_keys.action))
        _, std = moments(policy, self.min_action, self.max_action)
        return self.reduce(loss, tensordict), {"behaviour_std": std.detach().mean()}

    def _policy(self, name: str, batch: TensorDictBase) -> Distribution:
        network = getattr(self, f"{name}_network")
        state = batch.select(*network.in_keys, strict=False)
        with getattr(self, f"{name}_network_params").to_module(network):
            return network.get_dist(state)

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Compute all losses of one batch at the current parameters.

        Also writes the TD error of each sample to the ``priority`` key of ``tensordict``.

        Args:
            tensordict: a batch with the keys :attr:`in_keys`.

        Returns:
            A tensordict with the entries :attr:`out_keys`.
        """
        out = super().forward(tensordict)
        loss, metadata = self.behaviour_loss(tensordict)
        return TensorDict({**dict(out.items()), "loss_behaviour": loss, **metadata})


def _check_gaussian(name: str, network: TensorDictModule) -> None:
    kind = distribution_class(network)
    if kind is None or not issubclass(kind, IndependentNormal):
        found = type(network).__name__ if kind is None else kind.__name__
        raise ValueError(
            f"GaussianPOGOLoss needs an IndependentNormal in the {name}, not {found}: pass a "
            "ProbabilisticActor(..., distribution_class=IndependentNormal)."
        )
