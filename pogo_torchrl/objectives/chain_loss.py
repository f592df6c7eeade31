"""What a loss of a chain of actors holds: networks, their noise, keys and value estimator."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModule, dispatch
from torch import Tensor, nn
from torch.func import functional_call
from torchrl.envs.utils import ExplorationType
from torchrl.objectives.common import LossModule
from torchrl.objectives.utils import ValueEstimators, dispatch_value_estimator
from torchrl.objectives.value import ValueEstimatorBase

from pogo_torchrl.modules import redraw_parameters
from pogo_torchrl.objectives.checks import check_batch, check_gamma
from pogo_torchrl.torchrl_private import ProtectedLossModule

Params = dict[str, Tensor]
"""Parameters and buffers of a network by name, as :func:`torch.func.functional_call` takes them."""

Noise = dict[str, Tensor]
"""Standard normal draws by name, see :meth:`ChainLoss.draw_noise`."""


Terms = Callable[..., tuple[Tensor, dict[str, Tensor]]]
"""A function of parameters, batch and noise that returns a loss and what is logged of it."""


def actor_scalars(index: int) -> tuple[str, str, str, str]:
    r"""What is logged of an actor: its loss, its Q, :math:`D_i` and :math:`\lambda`."""
    distance = f"w2_{index}" if index else "bc_mse"
    return f"loss_actor_{index}", f"q_actor_{index}", distance, f"lmbd_{index}"


class ChainLoss(ProtectedLossModule):
    """The networks of a chain of actors and their critics, as TorchRL's losses hold theirs.

    Each actor has its own set of parameters, ``actor_network_0_params``, ...; the critics' are
    stacked in ``qvalue_network_params``. A subclass has the objectives.
    """

    # A transport map under TorchRL's default, DETERMINISTIC, would act with z = 0 in the losses.
    deterministic_sampling_mode = ExplorationType.RANDOM
    default_value_estimator = ValueEstimators.TD0

    SUPPORTED_VALUE_ESTIMATORS = (
        ValueEstimators.TD0,
        ValueEstimators.TD1,
        ValueEstimators.TDLambda,
    )

    tensor_keys: Any
    actor_network: TensorDictModule  # the function of all actors; see actor_network_{i}_params
    qvalue_network: TensorDictModule
    qvalue_network_params: TensorDictParams
    target_qvalue_network_params: TensorDictParams

    num_actors: int
    num_qvalue_nets: int
    num_samples: int
    w2_weights: Any
    alpha: Any
    shared_noise: bool
    delay_actor: bool
    delay_qvalue: bool
    deactivate_vmap: bool
    min_action: Tensor
    max_action: Tensor
    _out_keys: list[NestedKey]

    # The objectives of a subclass, see POGOLoss.
    qvalue_terms: Terms
    first_actor_terms: Terms
    jko_terms: Terms

    def _register(
        self, actors: Sequence[TensorDictModule], qvalues: Sequence[TensorDictModule]
    ) -> None:
        """Register the parameters: each actor's by itself, the critics' stacked ``[C, ...]``."""
        with warnings.catch_warnings():
            # TorchRL asks for an annotation of every name, and their number is not known here.
            warnings.filterwarnings("ignore", ".*part of the annotations")
            for i, actor in enumerate(actors):
                # Only actor 0 acts in the TD target.
                self.convert_to_functional(
                    actor, f"actor_network_{i}", create_target_params=self.delay_actor and i == 0
                )
        self.__dict__["actor_network"] = actors[0]  # the function of all; no parameters of its own
        # Of a list of one, TorchRL registers no parameters; of a module, it draws new ones.
        several = len(qvalues) > 1
        self.convert_to_functional(
            list(qvalues) if several else qvalues[0],
            "qvalue_network",
            expand_dim=len(qvalues),
            create_target_params=self.delay_qvalue,
        )
        if not several:
            values = TensorDict.from_module(qvalues[0]).data.unsqueeze(0)
            for params in (self.qvalue_network_params, self.target_qvalue_network_params):
                params.data.update_(values)

    def _act(self, actor: Params, state: TensorDictBase, noise: Tensor | None) -> Tensor:
        """Actions of an actor that is given its z, or draws on its own (``noise=None``)."""
        inputs = state.select(*self.actor_network.in_keys, strict=False)
        if noise is not None:
            inputs.set(self.actor_network.noise_key, noise)
        out = functional_call(self.actor_network, actor, (inputs,), tie_weights=False)
        return out.get(self.tensor_keys.action)

    def _qvalue(self, qvalue: Params, state: TensorDictBase, action: Tensor) -> Tensor:
        """``Q(s, a)`` of one critic, shape ``[*B]``."""
        inputs = state.select(*self.qvalue_network.in_keys, strict=False)
        inputs.set(self.tensor_keys.action, action)
        out = functional_call(self.qvalue_network, qvalue, (inputs,), tie_weights=False)
        return out.get(self.tensor_keys.state_action_value).squeeze(-1)

    def _qvalues(self, qvalue: Params, state: TensorDictBase, action: Tensor) -> Tensor:
        """``Q_j(s, a)`` of all critics, shape ``[C, *B]``."""

        def one(params: Params) -> Tensor:
            return self._qvalue(params, state, action)

        if not self.deactivate_vmap:
            return torch.vmap(one, randomness=self._critics_randomness)(qvalue)
        critics = range(self.num_qvalue_nets)
        return torch.stack([one({name: v[j] for name, v in qvalue.items()}) for j in critics])

    def params(self, name: str) -> Params:
        """The parameters and buffers of a network by name.

        Args:
            name: ``actor_network_0``, ..., ``qvalue_network``, or one of them after ``target_``.

        Returns:
            The tensors themselves, as :func:`torch.func.functional_call` takes them; the critics'
            are stacked ``[C, ...]``.
        """
        tensors = getattr(self, f"{name}_params").items(True, True)
        return {".".join(key) if isinstance(key, tuple) else key: value for key, value in tensors}

    def actor_params(self, index: int) -> list[nn.Parameter]:
        """The trainable parameters of actor ``index``, for an optimizer of its own.

        Args:
            index: which actor; negative indices count from the end.

        Raises:
            IndexError: when there is no such actor.

        Example:
            >>> import torch
            >>> from torchrl.data import Bounded
            >>> from pogo_torchrl import POGOLoss, make_actor, make_qvalue
            >>> spec = Bounded(low=-torch.ones(2), high=torch.ones(2))
            >>> loss = POGOLoss(make_actor(3, spec), make_qvalue(3, 2), w2_weights=(0.2, 0.5))
            >>> optimizers = [torch.optim.Adam(loss.actor_params(i), 3e-4) for i in range(2)]
        """
        params = getattr(self, f"actor_network_{self._actor_index(index)}_params")
        return [p for p in params.parameters() if p.requires_grad]

    def qvalue_params(self) -> list[nn.Parameter]:
        """The trainable parameters of the critics, stacked ``[C, ...]``, for their optimizer."""
        return [p for p in self.qvalue_network_params.parameters() if p.requires_grad]

    def _actor_index(self, index: int) -> int:
        if not -self.num_actors <= index < self.num_actors:
            raise IndexError(f"actor index {index} is not in 0..{self.num_actors - 1}.")
        return index % self.num_actors

    def randomness_changed(self) -> None:
        """Keep the randomness of vmap."""
        # What TorchRL works out at each call, torch.compile (2.11) cannot trace.
        self._critics_randomness = self.vmap_randomness

    def draw_noise(
        self,
        tensordict: TensorDictBase,
        *,
        critic: bool = True,
        actors: Sequence[int] | None = None,
    ) -> dict[str, Tensor]:
        r"""All standard normal draws that an update on a batch takes, from a single call.

        Args:
            tensordict: the batch, of which only shapes matter.
            critic: draw those of the TD target. Defaults to ``True``.
            actors: draw those of these actors. Defaults to all.

        Returns:
            ``smoothing`` (n of the TD target, ``[*B, d]``) and, for actors that read z from the
            tensordict, each actor's z: ``target`` (:math:`z'`) and ``actor_0``, ``[*B, d]``, and
            for :math:`i \ge 1` ``actor_i`` and ``reference_i``, ``[*B, K, d]``, one and the same
            with ``shared_noise``.

        Example:
            >>> import torch
            >>> from tensordict import TensorDict
            >>> from torchrl.data import Bounded
            >>> from pogo_torchrl import POGOLoss, make_actor, make_qvalue
            >>> spec = Bounded(low=-torch.ones(2), high=torch.ones(2))
            >>> loss = POGOLoss(make_actor(3, spec), make_qvalue(3, 2), w2_weights=(0.2, 0.5))
            >>> batch = TensorDict({"action": spec.rand([8])}, [8])
            >>> {name: list(z.shape) for name, z in loss.draw_noise(batch, critic=False).items()}
            {'actor_0': [8, 2], 'actor_1': [8, 4, 2], 'reference_1': [8, 4, 2]}
        """
        action = tensordict.get(self.tensor_keys.action)
        actor = self.actor_network
        reads_noise = hasattr(actor, "noise_key")
        if action is None:  # only actor 0 and the critics need the data's
            batch_size, dim = tensordict.batch_size, actor.noise_dim if reads_noise else 0
        else:
            *batch_size, dim = action.shape
        shapes: dict[str, tuple[int, ...]] = {"smoothing": ()} if critic else {}
        if reads_noise:
            if critic:
                shapes["target"] = ()
            for i in range(self.num_actors) if actors is None else actors:
                shapes[f"actor_{i}"] = (self.num_samples,) if i else ()
                if i and not self.shared_noise:
                    shapes[f"reference_{i}"] = (self.num_samples,)
        sizes = [math.prod((*batch_size, *shape, dim)) for shape in shapes.values()]
        flat = torch.randn(sum(sizes), dtype=self.min_action.dtype, device=self.min_action.device)
        noise = {
            name: part.view(*batch_size, *shape, dim)
            for (name, shape), part in zip(shapes.items(), flat.split(sizes))
        }
        if self.shared_noise:
            for i in range(1, self.num_actors):
                if f"actor_{i}" in noise:
                    noise[f"reference_{i}"] = noise[f"actor_{i}"]
        return noise

    def actor(self, index: int) -> TensorDictModule:
        """Actor ``index`` as a policy that shares the parameters being trained.

        Args:
            index: which actor; negative indices count from the end (``-1``: the last, the
                policy that the chain is for).

        Returns:
            A module of the class that was passed in, for any batch shape. It follows the
            training; take a ``deepcopy`` to keep a snapshot.

        Raises:
            IndexError: when there is no such actor.

        Example:
            >>> import torch
            >>> from torchrl.data import Bounded
            >>> from pogo_torchrl import POGOLoss, make_actor, make_qvalue
            >>> spec = Bounded(low=-torch.ones(2), high=torch.ones(2))
            >>> loss = POGOLoss(make_actor(3, spec), make_qvalue(3, 2), w2_weights=(0.2, 0.5))
            >>> loss.actor(1)(observation=torch.zeros(4, 5, 3)).shape
            torch.Size([4, 5, 2])
        """
        params = getattr(self, f"actor_network_{self._actor_index(index)}_params")
        policy = copy.deepcopy(self.actor_network)
        params.to_module(policy)
        return policy

    def qvalue_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """The critics' loss, summed over the critics; see :meth:`qvalue_terms`.

        Args:
            tensordict: a batch with the keys of :attr:`in_keys`.

        Returns:
            The loss, and a dictionary of detached values: ``td_error`` (squared, ``[C, *B]``),
            and the batch means ``pred_value``, ``target_value`` and ``next_state_value``.
        """
        self.check_batch(tensordict)
        loss, metadata = self.qvalue_terms(
            self.params("qvalue_network"),
            tensordict,
            self.draw_noise(tensordict, actors=()),
            self.params("target_actor_network_0"),
            self.params("target_qvalue_network"),
        )
        self.release(tensordict, *self._parameter_names)
        return loss, metadata

    def actor_loss(
        self, tensordict: TensorDictBase, index: int | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        r"""The objective :math:`L_i` of one actor, or the sum over the chain.

        See :meth:`first_actor_terms` and :meth:`jko_terms`.

        Args:
            tensordict: a batch with the observations and, for actor 0, the data's actions.
            index: which actor, ``0 .. N - 1``; ``None`` sums over all, on this batch and with the
                parameters as they are.

        Returns:
            The loss, and a dictionary of detached scalars ``loss_actor_i``, ``q_actor_i``,
            ``w2_i`` (``bc_mse`` for actor 0) and ``lmbd_i``.

        Raises:
            IndexError: when there is no such actor.
        """
        if index is not None and not 0 <= index < self.num_actors:
            raise IndexError(f"actor index {index} is not in 0..{self.num_actors - 1}.")
        indices = range(self.num_actors) if index is None else (index,)
        if 0 in indices:
            self.check_batch(tensordict, (*self.actor_network.in_keys, self.tensor_keys.action))
        noise = self.draw_noise(tensordict, critic=False, actors=indices)
        qvalue = self.params("qvalue_network")
        losses, metadata = [], {}
        for i in indices:
            actor, rest = self.params(f"actor_network_{i}"), (self.w2_weights[i], self.alpha)
            if i == 0:
                loss, found = self.first_actor_terms(actor, tensordict, noise, qvalue, *rest)
            else:
                before = self.params(f"actor_network_{i - 1}")
                loss, found = self.jko_terms(
                    actor, tensordict, noise, before, qvalue, *rest, index=i
                )
            losses.append(loss)
            metadata.update(found)
        self.release(tensordict, *self._parameter_names)
        return sum(losses[1:], losses[0]), metadata

    def check_batch(
        self, tensordict: TensorDictBase, keys: Sequence[NestedKey] | None = None
    ) -> None:
        """Refuse a batch that lacks keys or has shapes or dtypes that do not fit.

        Args:
            tensordict: a batch.
            keys: what it must hold. Defaults to :attr:`in_keys`.

        Raises:
            KeyError: when a key is missing.
            ValueError: when a dtype or a shape does not fit.
        """
        check_batch(
            tensordict,
            self.in_keys if keys is None else keys,
            action=self.tensor_keys.action,
            reward=("next", self.tensor_keys.reward),
            ends=self._end_keys,
            low=self.min_action,
        )

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """All losses of one batch, without any update in between.

        Also writes each sample's TD error under the ``priority`` key of ``tensordict``.
        """
        loss_actor, actor_metadata = self.actor_loss(tensordict)
        loss_qvalue, qvalue_metadata = self.qvalue_loss(tensordict)
        tensordict.set(self.tensor_keys.priority, qvalue_metadata.pop("td_error").max(0)[0])
        td_out = TensorDict(
            {
                "loss_actor": loss_actor,
                "loss_qvalue": loss_qvalue,
                **actor_metadata,
                **qvalue_metadata,
            }
        )
        self.release(tensordict, td_out, *self._parameter_names)
        return td_out

    def reset_parameters_recursive(self) -> None:
        """Draw all parameters anew, each actor and critic on its own; targets start equal."""
        registered: dict[str, Any] = dict(self.named_children())
        for name in (*(f"actor_network_{i}" for i in range(self.num_actors)), "qvalue_network"):
            network, params = getattr(self, name), registered[f"{name}_params"].data
            stacked = name == "qvalue_network"
            for each in params.unbind(0) if stacked else (params,):
                fresh = copy.deepcopy(network)
                redraw_parameters(fresh, name)
                each.update_(TensorDict.from_module(fresh).data)
            target = registered.get(f"target_{name}_params")
            if target is not None:
                target.data.update_(params)

    def make_value_estimator(
        self, value_type: ValueEstimators | None = None, **hyperparams
    ) -> ChainLoss:
        """Choose the estimator of the TD target; ``gamma`` is the most common hyperparameter.

        Args:
            value_type: TD(0), the default and the method's, TD(1) or TD(lambda), or a
                ``ValueEstimatorBase`` class or instance.
            **hyperparams: passed to the estimator, e.g. ``gamma=0.99``.

        Returns:
            The loss, for chaining.

        Raises:
            ValueError: when gamma is not in [0, 1].
        """
        if "gamma" in hyperparams:
            check_gamma(hyperparams["gamma"])
        if value_type is None:
            value_type = self.default_value_estimator
        if isinstance(value_type, ValueEstimatorBase) or (
            isinstance(value_type, type) and issubclass(value_type, ValueEstimatorBase)
        ):
            if isinstance(value_type, type):
                hyperparams.setdefault("value_network", None)
            LossModule.make_value_estimator(self, value_type, **hyperparams)
            self.keys_changed()
            return self
        # On the host by default: each compiled update would copy gamma from there.
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
        """Pass the keys on to the value estimator, and list those that a batch must hold."""
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
        self._in_keys: list[NestedKey] = list(dict.fromkeys(keys))
        self._end_keys = [("next", self.tensor_keys.done), ("next", self.tensor_keys.terminated)]

    @property
    def in_keys(self) -> list[NestedKey]:
        """Keys that a batch must hold."""
        return self._in_keys

    @in_keys.setter
    def in_keys(self, values: list[NestedKey]) -> None:
        self._in_keys = values

    @property
    def out_keys(self) -> list[NestedKey]:
        """Keys of the output, see the class."""
        return self._out_keys

    @out_keys.setter
    def out_keys(self, values: list[NestedKey]) -> None:
        self._out_keys = values

    @property
    def _parameter_names(self) -> tuple[str, ...]:
        actors = [f"actor_network_{i}_params" for i in range(self.num_actors)]
        return (
            *actors,
            "qvalue_network_params",
            "target_actor_network_0_params",
            "target_qvalue_network_params",
        )
