"""Base class for losses of a chain of actors: networks, noise, and the losses of a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import dispatch
from torch import Tensor
from torch.func import functional_call
from torchrl.envs.utils import ExplorationType

from pogo_torchrl import functional
from pogo_torchrl.objectives.checks import check_reads_noise, check_rows
from pogo_torchrl.objectives.keyed_loss import KeyedLoss
from pogo_torchrl.objectives.networks import ChainNetworks, Params
from pogo_torchrl.objectives.settings import (
    CHAIN_CHECKS,
    check_change_of_weights,
    check_exact,
    check_trajectory_weights,
)

Noise = dict[str, Tensor]
"""Standard normal draws by name, see :meth:`ChainLoss.draw_noise`."""

Terms = Callable[..., tuple[Tensor, dict[str, Tensor]]]
"""A function of parameters, batch and noise that returns a loss and its logged metrics."""


# Settings that affect training. Not among them: the initial parameters of a chain (chain_init) and
# deactivate_vmap, which changes nothing but the speed.
_SETTINGS = (
    "w2_weights", "alpha", "num_qvalue_nets", "num_samples", "blur", "w2_backend", "w2_fraction",
    "shared_noise", "policy_noise", "noise_clip", "q_normalization", "delay_actor", "delay_qvalue",
    "loss_function", "reduction", "data_weight", "critic_bc_weight", "target_action", "actor_q",
    "advantage_temperature", "average_actors", "use_prioritized_weights",
)  # fmt: skip


def actor_scalars(index: int) -> tuple[str, str, str, str]:
    r"""Keys of an actor's metrics: its loss, Q value, :math:`D_i` and :math:`\lambda`."""
    distance = f"w2_{index}" if index else "bc_mse"
    return f"actor_loss_{index}", f"q_actor_{index}", distance, f"lmbd_{index}"


def parameter_sizes(params: TensorDictParams) -> str:
    """Shapes of the parameters of a network, such as ``"16, 16x5, 2, 2x16"``."""
    return ", ".join("x".join(map(str, values.shape)) for values in params.parameters())


class ChainLoss(ChainNetworks):
    """Base class for losses of a chain of actors and their critics.

    Subclasses define the objectives.
    """

    @dataclass
    class _AcceptedKeys(KeyedLoss._AcceptedKeys):
        """Default tensordict keys: those of :class:`KeyedLoss`, and one more.

        Attributes:
            trajectory_weight (NestedKey): with ``trajectory_weights``, the weight of each sample
                in the data term of later actors. Defaults to ``"trajectory_weight"``.
        """

        trajectory_weight: NestedKey = "trajectory_weight"

    tensor_keys: _AcceptedKeys
    default_keys = _AcceptedKeys
    key_settings = ("critic_bc_weight", "trajectory_weights")

    # With TorchRL's default, DETERMINISTIC, a transport map would act with z = 0 in the losses.
    deterministic_sampling_mode = ExplorationType.RANDOM

    checks = CHAIN_CHECKS
    fixed = ("num_actors", "num_qvalue_nets", "delay_actor", "delay_qvalue")

    num_samples: int
    w2_weights: Any
    alpha: Any
    w2_backend: Any
    data_weight: float
    trajectory_weights: bool
    shared_noise: bool
    deactivate_vmap: bool
    max_action: Tensor

    # Objectives, defined by subclasses; see POGOLoss.
    qvalue_terms: Terms
    first_actor_terms: Terms
    jko_terms: Terms

    def checked_change(self, name: str, value: Any) -> Any:
        """Return the new value of a setting, checked with the other settings and the networks."""
        if name == "w2_weights":
            return check_change_of_weights(value, self.num_actors)
        if name in ("w2_backend", "num_samples"):
            both = {"w2_backend": self.w2_backend, "num_samples": self.num_samples, name: value}
            check_exact(**both)
        if name in ("data_weight", "trajectory_weights"):
            both = {"data_weight": self.data_weight, "trajectory_weights": self.trajectory_weights}
            check_trajectory_weights(**{**both, name: value})
        if name == "shared_noise" and value:
            check_reads_noise(self.actor_network)
        if name == "average_actors" and (value is None) != (self.average_actors is None):
            raise ValueError(self.too_late(name, value))
        return value

    def _set_in_keys(self) -> None:
        super()._set_in_keys()
        if self.trajectory_weights:
            self._in_keys.append(self.tensor_keys.trajectory_weight)

    def traced_settings(self) -> list[Any]:
        """Return what a compiled update reads when it is traced, to notice when it changes."""
        values = [getattr(self, name) for name in _SETTINGS if name not in ("w2_weights", "alpha")]
        values += [self.trajectory_weights, self.value_estimator]
        return [*values, *vars(self.tensor_keys).values()]

    def settings(self) -> dict[str, Any]:
        """Return the settings that a run must share with a checkpoint that it continues from.

        Returns:
            The settings by name, including the dtype, the bounds and those of the value estimator.
            Subclasses add their own.
        """
        estimator = self.value_estimator
        return {
            **{name: getattr(self, name) for name in _SETTINGS},
            # Absent if off, as in checkpoints of earlier versions.
            **({"trajectory_weights": True} if self.trajectory_weights else {}),
            "num_actors": self.num_actors,
            "min_action": self.min_action,
            "max_action": self.max_action,
            "dtype": str(self.min_action.dtype),
            "actor_network": parameter_sizes(self.actor_network_0_params),
            "qvalue_network": parameter_sizes(self.qvalue_network_params),
            "value_estimator": type(estimator).__name__,
            **dict(estimator.named_buffers(recurse=False)),  # gamma, lmbda
        }

    def _set_out_keys(self) -> None:
        self._out_keys = [
            "loss_actor",
            "loss_qvalue",
            *[name for i in range(self.num_actors) for name in actor_scalars(i)],
            "pred_value",
            "target_value",
            "next_state_value",
        ]

    def _act(self, actor: Params, state: TensorDictBase, noise: Tensor | None) -> Tensor:
        """Actions of an actor for the given z; if ``noise`` is ``None``, the actor draws it."""
        inputs = state.select(*self.actor_network.in_keys, strict=False)
        if noise is not None:
            inputs.set(self.noise_reader.noise_key, noise)
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

    def _states(self, batch: TensorDictBase) -> TensorDictBase:
        """Observations of the actors, with the batch dimensions of the actions.

        In a batch of several agents, those of the tensordict are fewer.
        """
        state = batch.select(*self.actor_network.in_keys, strict=False)
        action = batch.get(self.tensor_keys.action)
        if action is None or action.shape[:-1] == state.batch_size:
            return state
        leading = action.shape[:-1]
        for key, values in state.items(True, True):
            if values.shape[: len(leading)] != leading:
                raise ValueError(
                    f"{key!r} has shape {tuple(values.shape)}, but {self.tensor_keys.action!r} has "
                    f"{tuple(action.shape)}: the observations of actors need the batch dimensions "
                    f"of their actions, {tuple(leading)}. Expand it."
                )
        state.batch_size = leading
        return state

    def _repeat(self, state: TensorDictBase) -> TensorDictBase:
        """Repeat the states ``num_samples`` times along a new last batch dimension."""
        return state.unsqueeze(-1).expand(*state.batch_size, self.num_samples)

    def _to_unit_box(self, action: Tensor) -> Tensor:
        return functional.to_unit_box(action, self.min_action, self.max_action)

    def randomness_changed(self) -> None:
        """Cache the vmap randomness."""
        # TorchRL determines it in every call, which torch.compile (2.11) cannot trace.
        self._critics_randomness = self.vmap_randomness

    def draw_noise(
        self,
        tensordict: TensorDictBase,
        *,
        critic: bool = True,
        actors: Sequence[int] | None = None,
    ) -> dict[str, Tensor]:
        r"""Draw all standard normal noise for an update on a batch, in a single call.

        Args:
            tensordict: the batch; only its shapes are used.
            critic: draw the noise of the TD target. Defaults to ``True``.
            actors: indices of the actors to draw noise for. Defaults to all actors.

        Returns:
            The draws by name: ``smoothing`` (n in the TD target), of shape ``[*B, d]``, and, for
            actors that read z from the tensordict, ``target`` (:math:`z'`) and ``actor_0``, of
            shape ``[*B, d]``, and for :math:`i \ge 1` ``actor_i`` and ``reference_i``, of shape
            ``[*B, K, d]``, which are the same tensor with ``shared_noise=True``.

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
        reader = self.noise_reader
        if action is None:  # only actor 0 and the critics need the actions of the dataset
            batch_size, dim = tensordict.batch_size, 0 if reader is None else reader.noise_dim
        else:
            *batch_size, dim = action.shape
        shapes: dict[str, tuple[int, ...]] = {"smoothing": ()} if critic else {}
        if reader is not None:
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

    def qvalue_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of the critics, summed over the critics; see :meth:`qvalue_terms`.

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
        loss, metadata = self.qvalue_terms(
            self.params("qvalue_network"),
            tensordict,
            self.draw_noise(tensordict, actors=()),
            self.params("target_actor_network_0"),
            self.params("target_qvalue_network"),
        )
        self.release(tensordict, *self._parameter_names)
        return loss, metadata

    def value_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute :meth:`qvalue_loss`, under the name that TorchRL's ``TD3Trainer`` calls."""
        return self.qvalue_loss(tensordict)

    def actor_loss(
        self, tensordict: TensorDictBase, index: int | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        r"""Compute the loss :math:`L_i` of one actor, or the sum over the chain.

        See :meth:`first_actor_terms` and :meth:`jko_terms`.

        Args:
            tensordict: a batch with the observations and, for actor 0, the actions.
            index: index of the actor, in 0..N - 1. Defaults to ``None``: the sum over all actors,
                at the current parameters.

        Returns:
            The loss and a dictionary of the detached scalars ``actor_loss_i``, ``q_actor_i``,
            ``w2_i`` (``bc_mse`` for actor 0) and ``lmbd_i``.

        Raises:
            IndexError: if ``index`` is out of range.
            KeyError, ValueError: if a key, dtype or shape does not match (actor 0).
        """
        if index is not None and not 0 <= index < self.num_actors:
            raise IndexError(
                f"actor index {index} is out of range: the actors are 0..{self.num_actors - 1}."
            )
        indices = range(self.num_actors) if index is None else (index,)
        check_rows(tensordict)
        if 0 in indices or self.data_weight:
            weight = [self.tensor_keys.trajectory_weight] if self.trajectory_weights else []
            keys = (*self.actor_network.in_keys, self.tensor_keys.action, *weight)
            self.check_batch(tensordict, keys)
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
