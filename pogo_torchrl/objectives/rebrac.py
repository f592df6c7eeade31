"""ReBRAC as a TorchRL loss module."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor
from torchrl.data import TensorSpec

from pogo_torchrl import functional
from pogo_torchrl.objectives.actor_critic import ActorCriticLoss
from pogo_torchrl.objectives.settings import COMMON_CHECKS, check_positive


class ReBRACLoss(ActorCriticLoss):
    r"""ReBRAC loss module: TD3+BC with separate penalties in the actor and in the TD target.

    .. math::
        L_\pi &= \beta_1\, \mathrm{mean}\, |\pi(s) - a|^2
                 - \lambda\, \mathrm{mean} \min_j Q_j(s, \pi(s)), \qquad
        \lambda = 1 / \mathrm{mean}\, |\min_j Q_j(s, \pi(s))|, \\
        L_Q &= \sum_j \mathrm{mean}\, (Q_j(s, a) - y)^2, \qquad
        y = r + \gamma (1 - terminated)
            \big(\min_j \bar Q_j(s', a') - \beta_2\, |a' - a'_{data}|^2\big), \\
        a' &= \mathrm{clip}(\bar\pi(s') + \mathrm{clip}(\sigma n, -c, c)),
              \qquad n \sim N(0, I)

    where :math:`a'_{data}` is the action that the dataset takes in :math:`s'`, and bars are target
    networks. Squared distances are sums over the action dimensions, on actions mapped to [-1, 1].
    The critics of the paper have three layers with LayerNorm,
    ``make_qvalue(n, d, (256, 256, 256), layer_norm=True)``, and its actors are updated at every
    second update of the critics.

    Source: Tarasov et al., *Revisiting the Minimalist Approach to Offline Reinforcement Learning*,
    2023, arXiv:2305.09836; Fujimoto & Gu, *A Minimalist Approach to Offline Reinforcement
    Learning*, 2021, arXiv:2106.06860 (:math:`\lambda`).

    Args:
        actor_network (TensorDictModule): the actor :math:`\pi`, deterministic in the paper.
        qvalue_network (TensorDictModule or list of TensorDictModule): a single critic, copied
            ``num_qvalue_nets`` times with reinitialised parameters, or a list of critics.

    Keyword Args:
        action_spec (TensorSpec, optional): bounded action spec. Exclusive with ``bounds``. If
            neither is given, the ``action_spec`` or ``spec`` of the actor is used.
        bounds (tuple of float or of Tensor, optional): lower and upper action bounds.
        actor_bc_weight (float): :math:`\beta_1`. Defaults to ``0.01``. The paper tunes it for each
            dataset, in 0.001 to 0.1.
        critic_bc_weight (float): :math:`\beta_2`, in the units of the reward. With ``0``, the batch
            needs no next actions. Defaults to ``0.01``. The paper tunes it for each dataset, in 0
            to 0.5.
        q_normalization (str or None): ``"mean_abs"``, or ``None`` for :math:`\lambda = 1`. Defaults
            to ``"mean_abs"``.
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
        ValueError: if a setting is out of range, or a list of critics has the wrong length.

    A batch has the keys of :class:`~torchrl.objectives.TD3BCLoss` and, with
    ``critic_bc_weight`` > 0, the dataset's next action under ``("next", "action")``. The penalty is
    0 where it is NaN, which marks that there is none. ``make_replay_buffer(..., next_action=True)``
    adds it.

    The output contains ``loss_actor`` and ``loss_qvalue``, and the detached scalars ``bc_loss``
    (the mean squared distance to the data, summed over dimensions), ``q_actor``, ``lmbd``,
    ``pred_value``, ``target_value`` and ``next_state_value``. A
    :class:`~pogo_torchrl.JKOChain` adds actors to it as to any loss.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> from torchrl.data import Bounded
        >>> from torchrl.modules import MLP
        >>> from torchrl.objectives import SoftUpdate
        >>> from pogo_torchrl import ReBRACLoss, make_qvalue
        >>> spec = Bounded(low=-torch.ones(2), high=torch.ones(2))
        >>> net = torch.nn.Sequential(MLP(in_features=3, out_features=2, num_cells=[8]),
        ...     torch.nn.Tanh())
        >>> actor = TensorDictModule(net, ["observation"], ["action"])
        >>> qvalue = make_qvalue(3, 2, (8, 8, 8), layer_norm=True)
        >>> loss = ReBRACLoss(actor, qvalue, action_spec=spec, actor_bc_weight=0.01,
        ...     critic_bc_weight=0.001)
        >>> _ = loss.make_value_estimator(gamma=0.99)
        >>> targets = SoftUpdate(loss, tau=0.005)
        >>> batch = TensorDict({"observation": torch.randn(8, 3), "action": spec.rand([8]),
        ...     "next": {"observation": torch.randn(8, 3), "reward": torch.randn(8, 1),
        ...              "done": torch.zeros(8, 1, dtype=torch.bool),
        ...              "terminated": torch.zeros(8, 1, dtype=torch.bool),
        ...              "action": spec.rand([8])}}, [8])
        >>> out = loss(batch)
        >>> (out["loss_qvalue"] + out["loss_actor"]).backward()
    """

    checks = COMMON_CHECKS | {"actor_bc_weight": partial(check_positive, or_zero=True)}

    def __init__(
        self,
        actor_network: TensorDictModule,
        qvalue_network: TensorDictModule | Sequence[TensorDictModule],
        *,
        action_spec: TensorSpec | None = None,
        bounds: tuple | None = None,
        actor_bc_weight: float = 0.01,
        critic_bc_weight: float = 0.01,
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
        super().__init__(
            actor_network,
            qvalue_network,
            action_spec=action_spec,
            bounds=bounds,
            critic_bc_weight=critic_bc_weight,
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
        self.actor_bc_weight = actor_bc_weight
        self._out_keys = [
            "loss_actor",
            "loss_qvalue",
            "bc_loss",
            "q_actor",
            "lmbd",
            "pred_value",
            "target_value",
            "next_state_value",
        ]

    def actor_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        r"""Compute :math:`L_\pi`, which has gradients with respect to the actor only.

        Args:
            tensordict: a batch with the observations and actions.

        Returns:
            The loss and the detached scalars ``bc_loss``, ``q_actor`` and ``lmbd``.

        Raises:
            KeyError: if a key is missing.
            ValueError: if a dtype or shape does not match.
        """
        self.check_batch(tensordict, (*self.actor_network.in_keys, self.tensor_keys.action))
        state = tensordict.select(*self.actor_network.in_keys, strict=False)
        with self.actor_network_params.to_module(self.actor_network):
            action = self.actor_network(state).get(self.tensor_keys.action)
        data_action = self.to_unit_box(tensordict.get(self.tensor_keys.action))
        penalty = functional.squared_distance(self.to_unit_box(action), data_action)
        q = self.qvalues(self.qvalue_network_params.data, tensordict, action).min(0)[0]
        scale = functional.q_scale(q, 1.0, self.q_normalization)
        loss = functional.jko_loss(q, penalty, scale=scale, weight=self.actor_bc_weight)
        return self.reduce(loss, tensordict), {
            "bc_loss": penalty.detach().mean(),
            "q_actor": q.detach().mean(),
            "lmbd": scale,
        }
