"""Base class for losses of a single actor with twin critics, which are trained as in TD3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModule, dispatch
from torch import Tensor
from torchrl.data import TensorSpec
from torchrl.objectives.utils import distance_loss

from pogo_torchrl import functional
from pogo_torchrl.objectives.checks import action_bounds, as_networks
from pogo_torchrl.objectives.critics import critic_values
from pogo_torchrl.objectives.keyed_loss import KeyedLoss


class ActorCriticLoss(KeyedLoss):
    """Base class for losses of a single actor and its critics.

    Subclasses define :meth:`actor_loss`. The arguments are those of
    :class:`~pogo_torchrl.objectives.ReBRACLoss`.
    """

    actor_network: TensorDictModule
    actor_network_params: TensorDictParams
    target_actor_network_params: TensorDictParams
    qvalue_network: TensorDictModule
    qvalue_network_params: TensorDictParams
    target_qvalue_network_params: TensorDictParams
    max_action: Tensor

    fixed = ("num_qvalue_nets", "delay_actor", "delay_qvalue")

    def __init__(
        self,
        actor_network: TensorDictModule,
        qvalue_network: TensorDictModule | Sequence[TensorDictModule],
        *,
        action_spec: TensorSpec | None,
        bounds: tuple | None,
        critic_bc_weight: float,
        q_normalization: Literal["mean_abs"] | None,
        num_qvalue_nets: int,
        policy_noise: float,
        noise_clip: float,
        delay_actor: bool,
        delay_qvalue: bool,
        loss_function: Literal["l2", "l1", "smooth_l1"],
        reduction: Literal["mean", "sum", "none"] | None,
        use_prioritized_weights: bool | Literal["auto"],
    ) -> None:
        super().__init__()
        self.critic_bc_weight = critic_bc_weight
        self.q_normalization = q_normalization
        self.num_qvalue_nets = num_qvalue_nets
        self.policy_noise = policy_noise
        self.noise_clip = noise_clip
        self.delay_actor = delay_actor
        self.delay_qvalue = delay_qvalue
        self.loss_function = loss_function
        self.reduction = "mean" if reduction is None else reduction
        self.use_prioritized_weights = use_prioritized_weights

        owner, num_qvalue_nets = type(self).__name__, self.num_qvalue_nets  # a Python number
        (actor,) = as_networks(actor_network, 1, "actor", "one", owner=owner)
        critics = as_networks(
            qvalue_network, num_qvalue_nets, "qvalue_network", "num_qvalue_nets", owner=owner
        )
        key = self.tensor_keys.action
        low, high = action_bounds(action_spec, bounds, actor, key, owner=owner)
        self.convert_to_functional(actor, "actor_network", create_target_params=delay_actor)
        # TorchRL registers no parameters for a list of one.
        self.convert_to_functional(
            critics if num_qvalue_nets > 1 else critics[0],
            "qvalue_network",
            expand_dim=num_qvalue_nets,
            create_target_params=delay_qvalue,
        )
        self.register_buffer("min_action", low)
        self.register_buffer("max_action", high)
        self._set_in_keys()

    # ------------------------------------------------------------------ the algorithm

    def actor_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of the actor and its detached scalars; defined by subclasses."""
        raise NotImplementedError

    def qvalue_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        r"""Compute the loss of the critics, summed over the critics.

        .. math::
            L_Q = \sum_j \mathrm{mean}\, (Q_j(s, a) - y)^2

        with the target y of the class.

        Args:
            tensordict: a batch with the keys :attr:`in_keys`.

        Returns:
            The loss and a dictionary of detached metrics: ``td_error`` (the squared error, of
            shape ``[C, *B]``) and the batch means ``pred_value``, ``target_value`` and
            ``next_state_value``.

        Raises:
            KeyError: if a key is missing.
            ValueError: if a dtype or shape does not match.
        """
        self.check_batch(tensordict)
        with torch.no_grad():
            target, next_value = self._target_value(tensordict)
        action = tensordict.get(self.tensor_keys.action)
        values = self.qvalues(self.qvalue_network_params, tensordict, action)
        loss = distance_loss(values, target.expand_as(values), loss_function=self.loss_function)
        return self.reduce(loss.sum(0), tensordict), {
            "td_error": (values - target).detach().square(),
            "pred_value": values.detach().mean(),
            "target_value": target.mean(),
            "next_state_value": next_value.mean(),
        }

    def _target_value(self, batch: TensorDictBase) -> tuple[Tensor, Tensor]:
        """TD target and the value of the next state, each of shape ``[*B]``."""
        following = batch.get("next")
        state = following.select(*self.actor_network.in_keys, strict=False)
        with self.target_actor_network_params.to_module(
            self.actor_network,
            preserve_module_state=False,  # it would make them parameters
        ):
            clean = self.actor_network(state).get(self.tensor_keys.action)
        action = functional.smoothed_target_action(
            clean,
            torch.randn_like(clean),
            self.min_action,
            self.max_action,
            sigma=self.policy_noise,
            clip=self.noise_clip,
        )
        value = self.qvalues(self.target_qvalue_network_params, following, action).min(0)[0]
        if self.critic_bc_weight:
            data_action = self.to_unit_box(following.get(self.tensor_keys.action))
            penalty = functional.next_action_penalty(self.to_unit_box(action), data_action)
            value = value - self.critic_bc_weight * penalty
        batch = batch.clone(False)
        batch.set(("next", self.tensor_keys.state_action_value), value.unsqueeze(-1))
        return self.value_estimator.value_estimate(batch).squeeze(-1), value

    def qvalues(self, critics: TensorDictBase, state: TensorDictBase, action: Tensor) -> Tensor:
        """Compute Q values of the critics.

        Args:
            critics: parameters of the critics, stacked ``[C]``.
            state: the states ``[*B]``.
            action: the actions ``[*B, d]``.

        Returns:
            The values ``[C, *B]``.
        """
        return critic_values(
            self.qvalue_network,
            critics,
            state,
            action,
            action_key=self.tensor_keys.action,
            value_key=self.tensor_keys.state_action_value,
        )

    def to_unit_box(self, action: Tensor) -> Tensor:
        """Map actions from their bounds to [-1, 1]."""
        return functional.to_unit_box(action, self.min_action, self.max_action)

    # ------------------------------------------------------------------ TorchRL

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Compute all losses of one batch at the current parameters.

        Also writes the TD error of each sample to the ``priority`` key of ``tensordict``.

        Args:
            tensordict: a batch with the keys :attr:`in_keys`.

        Returns:
            A tensordict with the entries :attr:`out_keys`.
        """
        loss_actor, actor_metadata = self.actor_loss(tensordict)
        loss_qvalue, metadata = self.qvalue_loss(tensordict)
        tensordict.set(self.tensor_keys.priority, metadata.pop("td_error").max(0)[0])
        return TensorDict(
            {
                "loss_actor": loss_actor,
                "loss_qvalue": loss_qvalue,
                **actor_metadata,
                **metadata,
            }
        )

    def randomness_changed(self) -> None:
        """Nothing to do: the losses use no vmap."""
