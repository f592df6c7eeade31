"""Keys, value estimator and batches of an actor-critic loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor
from torchrl.objectives.common import LossModule
from torchrl.objectives.utils import ValueEstimators, dispatch_value_estimator
from torchrl.objectives.value import GAE, ValueEstimatorBase, VTrace

from pogo_torchrl.objectives.checks import check_batch, check_padding
from pogo_torchrl.objectives.settings import CheckedSettings, check_gamma
from pogo_torchrl.torchrl_private import ProtectedLossModule


class KeyedLoss(CheckedSettings, ProtectedLossModule):
    """Loss with an actor and critics that reads transitions and bootstraps from a TD target."""

    @dataclass
    class _AcceptedKeys:
        """Default tensordict keys, which ``set_keys(name=key)`` replaces.

        Attributes:
            action (NestedKey): the action; under ``"next"``, with ``critic_bc_weight`` > 0, the
                dataset's next action. Defaults to ``"action"``.
            state_action_value (NestedKey): the output of the critics. Defaults to
                ``"state_action_value"``.
            priority (NestedKey): key to which the TD error of each sample is written, for
                prioritised replay. Defaults to ``"td_error"``.
            reward (NestedKey): the reward, under ``"next"``. Defaults to ``"reward"``.
            done (NestedKey): end of the trajectory, under ``"next"``. Defaults to ``"done"``.
            terminated (NestedKey): terminal state, under ``"next"``. Defaults to
                ``"terminated"``.
            priority_weight (NestedKey): importance weight of each sample. Defaults to
                ``"priority_weight"``.
        """

        action: NestedKey = "action"
        state_action_value: NestedKey = "state_action_value"
        priority: NestedKey = "td_error"
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"
        priority_weight: NestedKey = "priority_weight"

    tensor_keys: _AcceptedKeys
    default_keys = _AcceptedKeys

    # Settings that decide which keys a batch must contain.
    key_settings: ClassVar[tuple[str, ...]] = ("critic_bc_weight",)

    default_value_estimator = ValueEstimators.TD0

    SUPPORTED_VALUE_ESTIMATORS = (
        ValueEstimators.TD0,
        ValueEstimators.TD1,
        ValueEstimators.TDLambda,
    )

    actor_network: TensorDictModule
    qvalue_network: TensorDictModule
    min_action: Tensor
    critic_bc_weight: float
    _out_keys: list[NestedKey]

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; settings are checked, see :class:`CheckedSettings`."""
        super().__setattr__(name, value)
        if name in self.key_settings and self.is_created:
            self._set_in_keys()

    def make_value_estimator(
        self, value_type: ValueEstimators | None = None, **hyperparams
    ) -> KeyedLoss:
        """Set the value estimator that computes the TD target.

        Args:
            value_type: ``TD0``, ``TD1`` or ``TDLambda``, or a ``ValueEstimatorBase`` class or
                instance. Defaults to ``TD0``, as in the method.
            **hyperparams: passed to the estimator, e.g. ``gamma=0.99``.

        Returns:
            The loss itself.

        Raises:
            NotImplementedError: if the estimator needs a network of state values.
            ValueError: if ``gamma`` is not in [0, 1].
        """
        if "gamma" in hyperparams:
            check_gamma(hyperparams["gamma"])
        if value_type is None:
            value_type = self.default_value_estimator
        kind = value_type if isinstance(value_type, type) else type(value_type)
        if issubclass(kind, GAE | VTrace):
            raise NotImplementedError(
                f"{kind.__name__} needs a network of state values, which {type(self).__name__} "
                "does not have: use TD0Estimator, TD1Estimator or TDLambdaEstimator."
            )
        if issubclass(kind, ValueEstimatorBase):
            if isinstance(value_type, type):
                hyperparams.setdefault("value_network", None)
            LossModule.make_value_estimator(self, value_type, **hyperparams)
            self.keys_changed()
            return self
        # The default device is the host, from which every compiled update would copy gamma.
        hyperparams.setdefault("device", self.min_action.device)
        dispatch_value_estimator(
            self,
            value_type,
            supported=self.SUPPORTED_VALUE_ESTIMATORS,
            tensor_keys={
                "value": self.tensor_keys.state_action_value,
                "reward": self.tensor_keys.reward,
                "done": self.tensor_keys.done,
                "terminated": self.tensor_keys.terminated,
            },
            value_network=None,
            **hyperparams,
        )
        return self

    def keys_changed(self) -> None:
        """Forward the keys to the value estimator and update :attr:`in_keys`."""
        if self.has_value_estimator:
            self.value_estimator.set_keys(
                value=self.tensor_keys.state_action_value,
                reward=self.tensor_keys.reward,
                done=self.tensor_keys.done,
                terminated=self.tensor_keys.terminated,
            )
        self._set_in_keys()

    def _set_in_keys(self) -> None:
        keys = [
            self.tensor_keys.action,
            ("next", self.tensor_keys.reward),
            ("next", self.tensor_keys.done),
            ("next", self.tensor_keys.terminated),
            *self.actor_network.in_keys,
            *self.qvalue_network.in_keys,
        ]
        states = {*self.actor_network.in_keys, *self.qvalue_network.in_keys}
        keys += [("next", key) for key in keys if key in states - {self.tensor_keys.action}]
        if self.critic_bc_weight:
            keys.append(("next", self.tensor_keys.action))
        self._in_keys: list[NestedKey] = list(dict.fromkeys(keys))
        self._end_keys = [("next", self.tensor_keys.done), ("next", self.tensor_keys.terminated)]

    def check_batch(
        self, tensordict: TensorDictBase, keys: Sequence[NestedKey] | None = None
    ) -> None:
        """Validate the keys, shapes and dtypes of a batch, and the values of padded rows.

        Args:
            tensordict: a batch.
            keys: keys that it must contain. Defaults to :attr:`in_keys`.

        Raises:
            KeyError: if a key is missing.
            ValueError: if the batch has no rows, if a dtype or shape does not match, or if padded
                rows are not finite.
        """
        keys = self.in_keys if keys is None else keys
        if not torch.compiler.is_compiling():
            self._check_written()
        check_batch(
            tensordict,
            keys,
            action=self.tensor_keys.action,
            reward=("next", self.tensor_keys.reward),
            ends=self._end_keys,
            low=self.min_action,
            owner=type(self).__name__,
        )
        valid = self.valid_rows(tensordict)
        if valid is not None and not torch.compiler.is_compiling():
            # Next actions are NaN where there is none.
            missing_allowed = ("next", self.tensor_keys.action)
            check_padding(tensordict, [k for k in keys if k != missing_allowed], valid)

    def _check_written(self) -> None:
        """Check that the networks write the keys that the loss reads from them."""
        for name, network in (
            ("action", self.actor_network),
            ("state_action_value", self.qvalue_network),
        ):
            key = getattr(self.tensor_keys, name)
            if key not in network.out_keys:
                raise ValueError(
                    f"{type(self).__name__} reads {key!r} from the {type(network).__name__}, which "
                    f"writes {list(network.out_keys)}: use loss.set_keys({name}=...), or other "
                    "out_keys."
                )

    @property
    def in_keys(self) -> list[NestedKey]:
        """Keys that a batch must contain."""
        return self._in_keys

    @in_keys.setter
    def in_keys(self, values: list[NestedKey]) -> None:
        self._in_keys = values

    @property
    def out_keys(self) -> list[NestedKey]:
        """Keys of the output of :meth:`forward`."""
        return self._out_keys

    @out_keys.setter
    def out_keys(self, values: list[NestedKey]) -> None:
        self._out_keys = values
