"""Fitted Q evaluation of several policies at once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModule, dispatch
from torch import Tensor
from torch.func import functional_call
from torchrl.objectives.utils import distance_loss

from pogo_torchrl.modules import fresh_copies
from pogo_torchrl.objectives.keyed_loss import KeyedLoss


class FQELoss(KeyedLoss):
    r"""Fitted Q evaluation: critics of given policies, learned from offline data.

    Each policy :math:`\pi_p` has ``num_qvalue_nets`` critics, which regress on the value of the
    policy itself, not of a better one:

    .. math::
        L = \sum_{p, j} \mathrm{mean}\, (Q_{pj}(s, a) - y_{pj})^2, \qquad
        y_{pj} = r + \gamma (1 - terminated) \bar Q_{pj}(s', \pi_p(s'))

    All critics are evaluated in one batched computation. Critic j of every policy starts from the
    same weights and sees the same batches, so that the critics of two policies differ by their
    policies alone. The policies receive no gradient and are not parameters of the loss.

    Source: Le, Voloshin & Yue, *Batch Policy Learning under Constraints*, 2019, arXiv:1903.08738,
    algorithm 3; with target networks in place of complete regressions.

    Args:
        policies: the policies to evaluate, with the same keys. They act without exploration noise
            (``set_exploration_type`` is ``DETERMINISTIC``); set ``deterministic_sampling_mode`` to
            ``ExplorationType.RANDOM`` to evaluate stochastic policies.
        qvalue_network: a critic, which is copied with reinitialised parameters.

    Keyword Args:
        num_qvalue_nets: C, the number of critics per policy. Defaults to ``1``.
        loss_function: ``"l2"``, ``"l1"`` or ``"smooth_l1"``. Defaults to ``"l2"``.

    Raises:
        ValueError: if there is no policy, or a setting is out of range.

    A batch may contain ``bootstrap_weight`` of shape ``[*B, C]``, the weights of its rows in the
    losses of the critics. Weights of resampled episodes give an ensemble whose spread shows how
    much the values depend on the data (Kostrikov & Nachum, *Statistical Bootstrapping for
    Uncertainty Estimation in Off-Policy Evaluation*, 2020, arXiv:2007.13609).

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.data import Bounded
        >>> from torchrl.objectives import SoftUpdate
        >>> from pogo_torchrl import make_actor, make_qvalue
        >>> from pogo_torchrl.objectives import FQELoss
        >>> spec = Bounded(low=-torch.ones(2), high=torch.ones(2))
        >>> policies = [make_actor(3, spec), make_actor(3, spec)]
        >>> loss = FQELoss(policies, make_qvalue(3, 2), num_qvalue_nets=4)
        >>> _ = loss.make_value_estimator(gamma=0.99)
        >>> targets = SoftUpdate(loss, tau=0.05)
        >>> batch = TensorDict({"observation": torch.randn(8, 3), "action": spec.rand([8]),
        ...     "next": {"observation": torch.randn(8, 3), "reward": torch.randn(8, 1),
        ...              "done": torch.zeros(8, 1, dtype=torch.bool),
        ...              "terminated": torch.zeros(8, 1, dtype=torch.bool)}}, [8])
        >>> loss(batch)["loss_qvalue"].backward()
        >>> targets.step()
        >>> loss.values(batch).shape  # policy, critic, state
        torch.Size([2, 4, 8])
    """

    @dataclass
    class _AcceptedKeys(KeyedLoss._AcceptedKeys):
        """Default tensordict keys: those of the other losses, and ``bootstrap_weight``.

        Attributes:
            bootstrap_weight (NestedKey): optional weights of a sample for the critics of a policy,
                ``[*B, C]``. Defaults to ``"bootstrap_weight"``.
        """

        bootstrap_weight: NestedKey = "bootstrap_weight"

    tensor_keys: _AcceptedKeys
    default_keys = _AcceptedKeys

    qvalue_network_params: TensorDictParams
    target_qvalue_network_params: TensorDictParams

    critic_bc_weight = 0.0
    fixed = ("num_qvalue_nets",)

    def __init__(
        self,
        policies: Sequence[TensorDictModule],
        qvalue_network: TensorDictModule,
        *,
        num_qvalue_nets: int = 1,
        loss_function: Literal["l2", "l1", "smooth_l1"] = "l2",
    ) -> None:
        super().__init__()
        policies = list(policies)
        if not policies:
            raise ValueError("policies is empty: pass the policies to evaluate, e.g. [actor].")
        self.num_qvalue_nets = num_qvalue_nets
        num_qvalue_nets = self.num_qvalue_nets  # a Python number by now
        self.loss_function = loss_function
        self.reduction, self.use_prioritized_weights = "mean", "auto"
        self.__dict__.update(policies=policies, actor_network=policies[0])  # not submodules
        critics = fresh_copies(qvalue_network, num_qvalue_nets, "qvalue_network")
        stacked = [copy.deepcopy(critic) for _ in policies for critic in critics]
        # A list of one would register no parameters, a single network would be reinitialised.
        several = len(stacked) > 1
        self.convert_to_functional(
            stacked if several else stacked[0],
            "qvalue_network",
            expand_dim=len(stacked),
            create_target_params=True,
        )
        if not several:
            values = TensorDict.from_module(stacked[0]).data.unsqueeze(0)
            for params in (self.qvalue_network_params, self.target_qvalue_network_params):
                params.data.update_(values)
        # Unknown bounds; the dtype and device of the critics.
        like = next(self.qvalue_network_params.parameters())
        self.register_buffer("min_action", like.new_tensor(-torch.inf), persistent=False)
        self._set_in_keys()
        self._out_keys = ["loss_qvalue", "td_error", "pred_value", "target_value"]

    def randomness_changed(self) -> None:
        """Nothing to do: the randomness is read in each call."""

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Compute the loss of all critics on a batch.

        Args:
            tensordict: a batch with the keys :attr:`in_keys`.

        Returns:
            ``loss_qvalue``, the sum over critics and policies, and, without gradient, the mean
            squared TD error, the mean value and the mean target of each policy, ``[P]``.
        """
        self.check_batch(tensordict)
        with torch.no_grad():
            target = self._target(tensordict)
        action = tensordict.get(self.tensor_keys.action)
        actions = action.expand(len(self.policies), *action.shape)
        pred = self._q(self.qvalue_network_params, tensordict, actions)
        losses = distance_loss(pred, target, loss_function=self.loss_function)
        weight = tensordict.get(self.tensor_keys.bootstrap_weight, None)
        if weight is not None:
            losses = losses * weight.movedim(-1, 0)
        pooled = [losses.detach(), pred.detach(), target]
        td_error, pred_value, target_value = (x.flatten(1).mean(-1) for x in pooled)
        return TensorDict(
            {
                "loss_qvalue": self.reduce(losses.sum((0, 1)), tensordict),
                "td_error": td_error,
                "pred_value": pred_value,
                "target_value": target_value,
            }
        )

    @torch.no_grad()
    def values(self, tensordict: TensorDictBase) -> Tensor:
        r"""Compute :math:`Q_{pj}(s, \pi_p(s))`, the values of the policies in given states.

        Args:
            tensordict: the observations, with batch size ``[*B]``.

        Returns:
            The values, of shape ``[P, C, *B]``.
        """
        return self._q(self.qvalue_network_params, tensordict, self._actions(tensordict))

    def _target(self, batch: TensorDictBase) -> Tensor:
        """TD targets of all critics, ``[P, C, *B]``."""
        state = batch.get("next")
        following = self._q(self.target_qvalue_network_params, state, self._actions(state))
        expanded = batch.select(*self.in_keys).expand(*following.shape[:2], *batch.batch_size)
        expanded = expanded.clone(False)
        expanded.set(("next", self.tensor_keys.state_action_value), following.unsqueeze(-1))
        return self.value_estimator.value_estimate(expanded).squeeze(-1)

    def _actions(self, state: TensorDictBase) -> Tensor:
        """Actions of all policies, ``[P, *B, d]``."""
        state = state.select(*self.actor_network.in_keys, strict=False)
        key = self.tensor_keys.action
        return torch.stack([policy(state.clone(False)).get(key) for policy in self.policies])

    def _q(self, params: TensorDictParams, state: TensorDictBase, actions: Tensor) -> Tensor:
        """Values of all critics at the actions of their policies, ``[P, C, *B]``."""
        state = state.select(*self.qvalue_network.in_keys, strict=False)

        def one(params: dict[str, Tensor], action: Tensor) -> Tensor:
            inputs = state.clone(False).set(self.tensor_keys.action, action)
            out = functional_call(self.qvalue_network, params, (inputs,), tie_weights=False)
            return out.get(self.tensor_keys.state_action_value).squeeze(-1)

        named = {
            ".".join(key) if isinstance(key, tuple) else key: value
            for key, value in params.items(True, True)
        }
        repeated = actions.repeat_interleave(self.num_qvalue_nets, 0)
        values = torch.vmap(one, randomness=self.vmap_randomness)(named, repeated)
        return values.unflatten(0, (len(self.policies), self.num_qvalue_nets))
