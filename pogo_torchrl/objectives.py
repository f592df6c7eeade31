"""The POGO objective as a TorchRL loss module."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModule, dispatch
from torch import Tensor, nn
from torchrl.data import TensorSpec
from torchrl.envs.utils import ExplorationType, step_mdp
from torchrl.objectives.common import LossModule
from torchrl.objectives.utils import (
    ValueEstimators,
    _vmap_func,
    dispatch_value_estimator,
    distance_loss,
)
from torchrl.objectives.value import ValueEstimatorBase

from pogo_torchrl import functional
from pogo_torchrl.modules import bounded_action_spec, fresh_copies, redraw_parameters
from pogo_torchrl.transport import BACKENDS, MAX_POINTS, sinkhorn_divergence


class POGOLoss(LossModule):
    r"""POGO: a chain of JKO steps of a Wasserstein gradient flow of policies, for offline RL.

    Twin critics learn from the first actor of the chain, which acts in the TD target with TD3's
    clipped noise (see :meth:`qvalue_loss`):

    .. math::
        y = r + \gamma (1 - terminated) \min_{j=1,2} \bar Q_j(s', \mathrm{clip}(\pi_0(s', z')
            + \mathrm{clip}(\sigma n, -c, c))), \qquad
        L_Q = \sum_j (Q_j(s, a) - y)^2

    Each actor :math:`\pi_i` improves on the one before it, actor 0 on the data (see
    :meth:`actor_loss`):

    .. math::
        L_i = -\lambda\, \mathbb{E}[Q_1(s, \pi_i(s, z))] + w_i D_i, \qquad
        D_0 = \mathrm{mean}\,(\pi_0(s, z) - a)^2, \qquad
        D_i = \mathbb{E}_s\, S_\varepsilon(\pi_i(\cdot|s), \pi_{i-1}(\cdot|s))

    with :math:`\lambda = \alpha / \mathrm{mean}|Q_1(s, \pi_i(s, z))|` and :math:`S_\varepsilon` the
    debiased Sinkhorn divergence of ``num_samples`` actions per state and policy, about
    :math:`W_2^2/2`, computed on actions mapped to [-1, 1]. Keep these scales as they are (mean
    over dimensions in :math:`D_0`, half the squared distance summed over dimensions in
    :math:`D_i`): the published ``w2_weights`` are tuned to them. References and critics are
    detached: each term trains its own actor only.

    :meth:`forward` evaluates every term on one batch, as any TorchRL loss does. The sequential
    order of the method (actor i sees the just updated actor i - 1 and critic) is obtained by
    stepping :meth:`qvalue_loss` and ``actor_loss(td, 0), ..., actor_loss(td, N - 1)`` in turn, as
    :class:`~pogo_torchrl.POGOTrainer` does.

    Source: "Policy Optimization as a Gradient Flow in Offline Reinforcement Learning" (POGO);
    target noise and twin critics from TD3 (Fujimoto et al., 2018); :math:`\lambda` from TD3+BC
    (Fujimoto and Gu, 2021).

    Args:
        actor_network (TensorDictModule or list of them): one actor, from which the chain is made
            with newly drawn parameters for actors 1, 2, ..., or a list of ``len(w2_weights)``
            actors of one architecture. Any stochastic TorchRL actor serves; the method's is
            :class:`~pogo_torchrl.TransportActor`. The loss holds its own, stacked copy of the
            parameters: take trained policies from :meth:`actor`. Actors and critics cannot share
            layers.
        qvalue_network (TensorDictModule or list of them): one critic, copied ``num_qvalue_nets``
            times with new parameters, or the list.

    Keyword Args:
        w2_weights (sequence of float): :math:`w_i`, one for each actor; its length is the
            chain's. Defaults to ``(0.2, 0.2, 0.2)``.
        action_spec (TensorSpec, optional): bounded action spec. Exclusive with ``bounds``; where
            neither is given, the actor's own ``action_spec`` is used.
        bounds (tuple of float, optional): lower and upper bound of the actions.
        num_qvalue_nets (int): number of critics. Defaults to ``2``.
        num_samples (int): K, actions per state and policy in :math:`D_i`. Defaults to ``4``.
        blur (float): Sinkhorn blur in units of half the action range. Defaults to ``0.05``.
        w2_backend (str): backend of :func:`~pogo_torchrl.sinkhorn_divergence`: GeomLoss's, or
            ``"fast"`` (the same divergence, its annealing started from the action bounds), or
            ``"exact"`` (the optimal assignment, ``num_samples <= 10``). Defaults to
            ``"tensorized"``.
        shared_noise (bool): draw the actions of :math:`\pi_i` and :math:`\pi_{i-1}` in
            :math:`D_i` with the same z, which makes it 0 for equal policies and removes its pull
            on their spread; for actors that read z from the tensordict, as
            :class:`~pogo_torchrl.TransportActor` does. Defaults to ``False``: z is drawn
            independently, as the method has it.
        policy_noise (float): :math:`\sigma` of the target noise in units of half the action
            range. Defaults to ``0.2``.
        noise_clip (float): c, in the same units. Defaults to ``0.5``.
        q_normalization (str or None): ``"mean_abs"`` or ``None``, see
            :func:`pogo_torchrl.functional.q_scale`. Defaults to ``"mean_abs"``.
        alpha (float): weight of the Q term. Defaults to ``1.0``.
        delay_actor (bool): let the Polyak copy of actor 0 act in the TD target instead of the
            online one. Defaults to ``False``.
        delay_qvalue (bool): separate target critics. Defaults to ``True``.
        loss_function (str): distance of the critics to the target: ``"l2"``, ``"l1"`` or
            ``"smooth_l1"``. Defaults to ``"l2"``.
        reduction (str): ``"mean"``, ``"sum"`` or ``"none"``. Defaults to ``"mean"``.
        deactivate_vmap (bool): loop over the critics instead of ``vmap``. Defaults to ``False``.
        use_prioritized_weights (bool or "auto"): weigh samples by ``priority_weight`` where the
            batch holds it. Defaults to ``"auto"``.

    Raises:
        ValueError: for settings out of range, actors of different architecture, or a list whose
            length does not fit; the message says what to do.

    Output: ``loss_qvalue`` and ``loss_actor`` (the sum over the chain) carry gradients; everything
    else is a detached scalar for the log: for each actor i ``loss_actor_i``, ``q_actor_i``,
    ``w2_i`` (:math:`D_i`), ``lmbd_i`` (:math:`\lambda`); ``pred_value``, ``target_value``,
    ``next_state_value``. (Summing every key that starts with ``loss``, as TorchRL's trainer does,
    therefore gives the right gradient.)

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.data import Bounded
        >>> from torchrl.objectives import SoftUpdate
        >>> from pogo_torchrl import POGOLoss, make_actor, make_qvalue
        >>> spec = Bounded(low=-torch.ones(4), high=torch.ones(4))
        >>> loss = POGOLoss(make_actor(3, spec), make_qvalue(3, 4), w2_weights=(0.2, 0.5))
        >>> _ = loss.make_value_estimator(gamma=0.99)
        >>> updater = SoftUpdate(loss, tau=0.005)
        >>> data = TensorDict({
        ...     "observation": torch.randn(8, 3),
        ...     "action": spec.rand([8]),
        ...     ("next", "observation"): torch.randn(8, 3),
        ...     ("next", "reward"): torch.randn(8, 1),
        ...     ("next", "done"): torch.zeros(8, 1, dtype=torch.bool),
        ...     ("next", "terminated"): torch.zeros(8, 1, dtype=torch.bool),
        ... }, [8])
        >>> out = loss(data)
        >>> (out["loss_qvalue"] + out["loss_actor"]).backward()
        >>> sorted(out.keys())[:4]
        ['lmbd_0', 'lmbd_1', 'loss_actor', 'loss_actor_0']
        >>> loss.actor(-1)(data.select("observation"))["action"].shape
        torch.Size([8, 4])

    It takes tensors as keyword arguments too and then returns a tuple in the order of
    :attr:`out_keys`:

        >>> _ = loss.select_out_keys("loss_actor", "loss_qvalue")
        >>> loss_actor, loss_qvalue = loss(
        ...     observation=torch.randn(8, 3), action=spec.rand([8]),
        ...     next_observation=torch.randn(8, 3), next_reward=torch.randn(8, 1),
        ...     next_done=torch.zeros(8, 1, dtype=torch.bool),
        ...     next_terminated=torch.zeros(8, 1, dtype=torch.bool))
        >>> loss_actor.backward()
    """

    @dataclass
    class _AcceptedKeys:
        """Default keys, to be changed by ``set_keys(name=key)``.

        Attributes:
            action (NestedKey): the action. Defaults to ``"action"``.
            state_action_value (NestedKey): what the critic writes. Defaults to
                ``"state_action_value"``.
            priority (NestedKey): where the TD error of each sample is written, for prioritised
                replay. Defaults to ``"td_error"``.
            reward (NestedKey): the reward, under ``"next"``. Defaults to ``"reward"``.
            done (NestedKey): end of the trajectory, under ``"next"``. Defaults to ``"done"``.
            terminated (NestedKey): true end of the episode, under ``"next"``. Defaults to
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
    default_value_estimator = ValueEstimators.TD0

    # A transport map under TorchRL's default, DETERMINISTIC, would act with z = 0 in the losses.
    deterministic_sampling_mode = ExplorationType.RANDOM

    actor_network: TensorDictModule
    qvalue_network: TensorDictModule
    actor_network_params: TensorDictParams
    qvalue_network_params: TensorDictParams
    target_actor_network_params: TensorDictParams
    target_qvalue_network_params: TensorDictParams

    SUPPORTED_VALUE_ESTIMATORS = (
        ValueEstimators.TD0,
        ValueEstimators.TD1,
        ValueEstimators.TDLambda,
    )

    def __init__(
        self,
        actor_network: TensorDictModule | Sequence[TensorDictModule],
        qvalue_network: TensorDictModule | Sequence[TensorDictModule],
        *,
        w2_weights: Sequence[float] = (0.2, 0.2, 0.2),
        action_spec: TensorSpec | None = None,
        bounds: tuple[float, float] | tuple[Tensor, Tensor] | None = None,
        num_qvalue_nets: int = 2,
        num_samples: int = 4,
        blur: float = 0.05,
        w2_backend: str = "tensorized",
        shared_noise: bool = False,
        policy_noise: float = 0.2,
        noise_clip: float = 0.5,
        q_normalization: str | None = "mean_abs",
        alpha: float = 1.0,
        delay_actor: bool = False,
        delay_qvalue: bool = True,
        loss_function: str = "l2",
        reduction: str | None = "mean",
        deactivate_vmap: bool = False,
        use_prioritized_weights: str | bool = "auto",
    ) -> None:
        super().__init__()
        reduction = "mean" if reduction is None else reduction
        self.w2_weights = _check_weights(w2_weights)
        _check_integer("num_qvalue_nets", num_qvalue_nets)
        _check_integer("num_samples", num_samples)
        _check_positive("blur", blur)
        _check_positive("alpha", alpha)
        _check_positive("policy_noise", policy_noise, or_zero=True)
        _check_positive("noise_clip", noise_clip, or_zero=True)
        _check_choice("w2_backend", w2_backend, BACKENDS)
        if w2_backend == "exact" and num_samples > MAX_POINTS:
            raise ValueError(
                f"num_samples={num_samples} is too large for w2_backend='exact', which takes "
                f"1..{MAX_POINTS}: lower it, or use w2_backend='fast'."
            )
        _check_choice("q_normalization", q_normalization, functional.Q_NORMALIZATIONS)
        _check_choice("loss_function", loss_function, ("l2", "l1", "smooth_l1"))
        _check_choice("reduction", reduction, ("mean", "sum", "none"))

        self.num_actors = len(self.w2_weights)
        self.num_qvalue_nets = num_qvalue_nets
        self.num_samples = num_samples
        self.blur = blur
        self.w2_backend = w2_backend
        self.shared_noise = shared_noise
        self.policy_noise = policy_noise
        self.noise_clip = noise_clip
        self.q_normalization = q_normalization
        self.alpha = alpha
        self.delay_actor = delay_actor
        self.delay_qvalue = delay_qvalue
        self.loss_function = loss_function
        self.reduction = reduction
        self.deactivate_vmap = deactivate_vmap
        self.use_prioritized_weights = use_prioritized_weights

        actors = _as_list(actor_network, self.num_actors, "actor", "one for each of w2_weights")
        qvalues = _as_list(qvalue_network, num_qvalue_nets, "qvalue_network", "num_qvalue_nets")
        if shared_noise and not hasattr(actors[0], "noise_key"):
            raise ValueError(
                "shared_noise=True needs actors that read z from the tensordict, but "
                f"{type(actors[0]).__name__} has no noise_key: use TransportActor or "
                "shared_noise=False."
            )
        self._stack(actors, "actor_network", create_target_params=delay_actor)
        self._stack(qvalues, "qvalue_network", create_target_params=delay_qvalue)
        low, high = self._bounds(action_spec, bounds, actors[0])
        self.register_buffer("min_action", low)
        self.register_buffer("max_action", high)
        self._make_vmap()
        self._set_in_keys()
        self._out_keys: list[NestedKey] = [
            "loss_actor",
            "loss_qvalue",
            *[
                f"{name}_{i}"
                for i in range(self.num_actors)
                for name in ("loss_actor", "q_actor", "w2", "lmbd")
            ],
            "pred_value",
            "target_value",
            "next_state_value",
        ]

    def _stack(self, networks: list[nn.Module], name: str, *, create_target_params: bool) -> None:
        """Register the parameters of networks of one architecture, stacked."""
        # Of a list of one, TorchRL registers no parameters; of a module, it draws new ones.
        several = len(networks) > 1
        self.convert_to_functional(
            networks if several else networks[0],
            name,
            expand_dim=len(networks),
            create_target_params=create_target_params,
        )
        if not several:
            values = TensorDict.from_module(networks[0]).data.unsqueeze(0)
            for params in (f"{name}_params", f"target_{name}_params"):
                getattr(self, params).data.update_(values)

    def _bounds(
        self, action_spec: TensorSpec | None, bounds: tuple | None, actor: TensorDictModule
    ) -> tuple[Tensor, Tensor]:
        if action_spec is not None and bounds is not None:
            raise ValueError("Give POGOLoss either action_spec or bounds, not both.")
        parameter = next(self.parameters())
        if bounds is not None:
            low, high = (torch.as_tensor(b, dtype=parameter.dtype) for b in bounds)
            if not bool(((low < high) & torch.isfinite(high - low)).all()):
                raise ValueError(
                    f"bounds=({bounds[0]}, {bounds[1]}) must be finite, the lower below the upper."
                )
        else:
            if action_spec is None:
                action_spec = getattr(actor, "action_spec", None)
            if action_spec is None:
                raise ValueError(
                    "POGOLoss needs the actions' bounds: give action_spec=Bounded(...) or "
                    "bounds=(low, high)."
                )
            space = bounded_action_spec(action_spec, self.tensor_keys.action).space
            low, high = space.low, space.high
        return low.clone().to(parameter), high.clone().to(parameter)

    def _make_vmap(self) -> None:
        self._vmap_qvalue_network = _vmap_func(
            self.qvalue_network,
            randomness=self.vmap_randomness,
            pseudo_vmap=self.deactivate_vmap,
        )

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
            tensordict, each actor's z: ``target`` (:math:`z'`, ``[*B, d]``), ``actor_0``
            (``[*B, 1, d]``), and for :math:`i \ge 1` ``actor_i`` and ``reference_i``
            (``[*B, K, d]``, one and the same with ``shared_noise``).

        Example:
            >>> import torch
            >>> from tensordict import TensorDict
            >>> from torchrl.data import Bounded
            >>> from pogo_torchrl import POGOLoss, make_actor, make_qvalue
            >>> spec = Bounded(low=-torch.ones(2), high=torch.ones(2))
            >>> loss = POGOLoss(make_actor(3, spec), make_qvalue(3, 2), w2_weights=(0.2, 0.5))
            >>> batch = TensorDict({"action": spec.rand([8])}, [8])
            >>> {name: list(z.shape) for name, z in loss.draw_noise(batch, critic=False).items()}
            {'actor_0': [8, 1, 2], 'actor_1': [8, 4, 2], 'reference_1': [8, 4, 2]}
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
                shapes[f"actor_{i}"] = (self.num_samples if i else 1,)
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
        """The critics' loss, summed over the critics.

        Args:
            tensordict: a batch with the keys of :attr:`in_keys`.

        Returns:
            The loss, and a dictionary of detached values: ``td_error`` (squared, ``[C, *B]``),
            and the batch means ``pred_value``, ``target_value`` and ``next_state_value``.
        """
        loss, metadata = self.qvalue_terms(
            tensordict,
            self.draw_noise(tensordict, actors=()),
            self.target_actor_network_params[0],
            self.qvalue_network_params,
            self.target_qvalue_network_params,
        )
        self._clear_weakrefs(tensordict, *self._parameter_names)
        return loss, metadata

    def qvalue_terms(
        self,
        tensordict: TensorDictBase,
        noise: dict[str, Tensor],
        actor: TensorDictBase,
        qvalue: TensorDictBase,
        target_qvalue: TensorDictBase,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """:meth:`qvalue_loss` as a function of the parameters and the noise, for ``torch.vmap``.

        Args:
            tensordict: a batch.
            noise: of :meth:`draw_noise`.
            actor: parameters of the actor in the TD target.
            qvalue: parameters of the critics, stacked ``[C]``.
            target_qvalue: those of the target critics.

        Returns:
            As :meth:`qvalue_loss`.
        """
        self._check_batch(tensordict, self.in_keys)
        weights = self._maybe_get_priority_weight(tensordict)
        tensordict = tensordict.clone(False)
        with torch.no_grad():
            next_value = self._next_value(tensordict, noise, actor, target_qvalue)
        tensordict.set(("next", self.tensor_keys.state_action_value), next_value.unsqueeze(-1))
        target_value = self.value_estimator.value_estimate(tensordict).squeeze(-1)
        pred_value = self._qvalues(tensordict, qvalue)
        td_error = (pred_value - target_value).detach().pow(2)
        loss = distance_loss(
            pred_value, target_value.expand_as(pred_value), loss_function=self.loss_function
        ).sum(0)
        loss = self._reduce_loss(loss, tensordict=tensordict, weights=weights)
        metadata = {
            "td_error": td_error,
            "pred_value": pred_value.detach().mean(),
            "target_value": target_value.detach().mean(),
            "next_state_value": next_value.mean(),
        }
        return loss, metadata

    def _check_batch(self, tensordict: TensorDictBase, keys: Sequence[NestedKey]) -> None:
        """Refuse a batch that would fail deep inside, or pass where broadcasting hides a mistake.

        Keys, shapes and dtypes only: no number is read.
        """
        dtype, found = self.min_action.dtype, {}
        for key in keys:
            values = found[key] = tensordict.get(key)
            if values is None:
                # TorchRL takes either end for the other; the rest has no substitute.
                if key in self._end_keys:
                    continue
                raise KeyError(
                    f"POGOLoss needs the key {key!r}, the batch has "
                    f"{list(tensordict.keys(True, True))}: add it, or name yours with set_keys()."
                )
            if values.dtype == torch.float64 != dtype:
                raise ValueError(
                    f"{key!r} is {values.dtype} where the networks are {dtype}: convert the data "
                    "(batch.float()) or the loss (loss.double())."
                )
            if key in self._end_keys and values.dtype != torch.bool:
                raise ValueError(f"{key!r} is {values.dtype}, it must be torch.bool: use != 0.")
        shape = found[self.tensor_keys.action].shape
        if self.min_action.dim() and shape[-1] != self.min_action.shape[-1]:
            raise ValueError(
                f"{self.tensor_keys.action!r} has shape {tuple(shape)}, the actors act in "
                f"[*B, {self.min_action.shape[-1]}]: give the data of their environment."
            )
        scalar = (*shape[:-1], 1)
        for key in (("next", self.tensor_keys.reward), *self._end_keys):
            values = found.get(key)
            if values is not None and values.shape != scalar:
                raise ValueError(
                    f"{key!r} has shape {tuple(values.shape)}, it must be {scalar}: one number "
                    "for each action."
                )

    def _next_value(
        self,
        tensordict: TensorDictBase,
        noise: dict[str, Tensor],
        actor: TensorDictBase,
        target_qvalue: TensorDictBase,
    ) -> Tensor:
        """``min_j Qbar_j(s', a')`` with the smoothed action of actor 0, shape ``[*B]``."""
        next_td = step_mdp(tensordict)
        action = self._act(
            next_td.select(*self.actor_network.in_keys, strict=False), noise.get("target"), actor
        )
        action = functional.smoothed_target_action(
            action,
            noise["smoothing"],
            self.min_action,
            self.max_action,
            sigma=self.policy_noise,
            clip=self.noise_clip,
        )
        next_td.set(self.tensor_keys.action, action)
        return self._qvalues(next_td, target_qvalue).min(0)[0]

    def _qvalues(self, tensordict: TensorDictBase, params: TensorDictBase) -> Tensor:
        """Values of all critics, shape ``[C, *B]``."""
        tensordict = tensordict.select(*self.qvalue_network.in_keys, strict=False)
        tensordict = tensordict.expand(self.num_qvalue_nets, *tensordict.batch_size)
        out = self._vmap_qvalue_network(tensordict, params)
        return out.get(self.tensor_keys.state_action_value).squeeze(-1)

    def actor_loss(
        self, tensordict: TensorDictBase, index: int | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        r"""The JKO objective :math:`L_i` of one actor, or the sum over the chain.

        Args:
            tensordict: a batch with the observations and, for actor 0, the data's actions.
            index: which actor, ``0 .. N - 1``; ``None`` sums over all, on this batch and with the
                parameters as they are.

        Returns:
            The loss, and a dictionary of detached scalars ``loss_actor_i``, ``q_actor_i``,
            ``w2_i`` and ``lmbd_i``.

        Raises:
            IndexError: when there is no such actor.
        """
        if index is not None and not 0 <= index < self.num_actors:
            raise IndexError(f"actor index {index} is not in 0..{self.num_actors - 1}.")
        indices = range(self.num_actors) if index is None else (index,)
        noise = self.draw_noise(tensordict, critic=False, actors=indices)
        params = self.actor_network_params
        losses, metadata = [], {}
        for i in indices:
            loss, scalars = self.jko_terms(
                tensordict,
                noise,
                params[i],
                params[i - 1] if i else None,
                self.qvalue_network_params,
                self.w2_weights[i],
                self.alpha,
                index=i,
            )
            losses.append(loss)
            metadata.update(scalars)
        self._clear_weakrefs(tensordict, *self._parameter_names)
        return sum(losses[1:], losses[0]), metadata

    def jko_terms(
        self,
        tensordict: TensorDictBase,
        noise: dict[str, Tensor],
        actor: TensorDictBase,
        reference: TensorDictBase | None,
        qvalue: TensorDictBase,
        weight: float | Tensor,
        alpha: float | Tensor,
        *,
        index: int,
        over_runs: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda terms: terms,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """:meth:`actor_loss` as a function of the parameters and the noise.

        Args:
            tensordict: a batch.
            noise: of :meth:`draw_noise`.
            actor: parameters of actor i.
            reference: parameters of the one before it; ``None`` for actor 0.
            qvalue: parameters of the critics, stacked ``[C]``.
            weight: :math:`w_i`.
            alpha: weight of the Q term.
            index: which actor.
            over_runs: vectorises a function over a leading dimension that all arguments share, as
                ``torch.vmap`` does. The distance takes any leading dimensions as it is.

        Returns:
            As :meth:`actor_loss`.
        """
        actions, others, q = over_runs(partial(self._jko_samples, index=index))(
            tensordict, noise, actor, reference, qvalue
        )
        if reference is None:
            distance = functional.l2_distance(actions[..., 0, :], others[..., 0, :])
        else:
            distance = sinkhorn_divergence(
                actions,
                others,
                blur=self.blur,
                backend=self.w2_backend,
                # The diagonal of the unit box; GeomLoss measures the batch's, as published.
                diameter=2 * actions.shape[-1] ** 0.5 if self.w2_backend == "fast" else None,
            )
        return over_runs(partial(self._jko_objective, index=index))(
            tensordict, q, distance, weight, alpha
        )

    def _jko_samples(
        self,
        tensordict: TensorDictBase,
        noise: dict[str, Tensor],
        actor: TensorDictBase,
        reference: TensorDictBase | None,
        qvalue: TensorDictBase,
        *,
        index: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The actor's actions and those of what came before it, in the unit box, and Q."""
        if index == 0:
            keys = (*self.actor_network.in_keys, self.tensor_keys.action)
            self._check_batch(tensordict, keys)
        state = tensordict.select(*self.actor_network.in_keys, strict=False)
        # Beyond actor 0, K draws for the distance, the first of which also serves the Q term: each
        # term's distribution is that of draws of its own, and so is the loss's expectation.
        states = _repeat(state, self.num_samples if index else 1)
        actions = self._act(states, noise.get(f"actor_{index}"), actor)
        if reference is None:
            others = tensordict.get(self.tensor_keys.action).unsqueeze(-2)
        else:
            with torch.no_grad():
                states = _repeat(state, self.num_samples)
                others = self._act(states, noise.get(f"reference_{index}"), reference)
        q = self._critic(tensordict, actions[..., 0, :], qvalue)
        return self._to_unit_box(actions), self._to_unit_box(others), q

    def _jko_objective(
        self,
        tensordict: TensorDictBase,
        q: Tensor,
        distance: Tensor,
        weight: float | Tensor,
        alpha: float | Tensor,
        *,
        index: int,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        weights = self._maybe_get_priority_weight(tensordict)
        scale = functional.q_scale(q, alpha, self.q_normalization)
        loss = functional.jko_loss(q, distance, scale=scale, weight=weight)
        loss = self._reduce_loss(loss, tensordict=tensordict, weights=weights)
        return loss, {
            f"loss_actor_{index}": loss.detach().mean(),
            f"q_actor_{index}": q.detach().mean(),
            f"w2_{index}": distance.detach().mean(),
            f"lmbd_{index}": scale,
        }

    def _act(
        self, tensordict: TensorDictBase, noise: Tensor | None, params: TensorDictBase
    ) -> Tensor:
        """The action of an actor that is given its z, or draws on its own."""
        if noise is not None:
            tensordict = tensordict.set(self.actor_network.noise_key, noise)
        with params.to_module(self.actor_network, preserve_module_state=False):
            return self.actor_network(tensordict).get(self.tensor_keys.action)

    def _critic(self, tensordict: TensorDictBase, action: Tensor, qvalue: TensorDictBase) -> Tensor:
        """``Q1(s, action)`` with the critic frozen, shape ``[*B]``."""
        inputs = tensordict.select(*self.qvalue_network.in_keys, strict=False)
        inputs.set(self.tensor_keys.action, action)
        with qvalue[0].detach().to_module(self.qvalue_network, preserve_module_state=False):
            out = self.qvalue_network(inputs)
        return out.get(self.tensor_keys.state_action_value).squeeze(-1)

    def _to_unit_box(self, action: Tensor) -> Tensor:
        return functional.to_unit_box(action, self.min_action, self.max_action)

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
        self._clear_weakrefs(tensordict, td_out, *self._parameter_names)
        return td_out

    def actor(self, index: int) -> TensorDictModule:
        """Actor ``index`` as a policy that shares the parameters being trained.

        Args:
            index: which actor; negative indices count from the end (``-1``: the last, the
                policy that the chain is for).

        Returns:
            A module of the class that was passed in, for any batch shape. It follows the
            training; take a ``deepcopy`` to keep a snapshot, and a new one after ``loss.to(...)``.

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
        if not -self.num_actors <= index < self.num_actors:
            raise IndexError(f"actor index {index} is not in 0..{self.num_actors - 1}.")
        policy = copy.deepcopy(self.actor_network)
        slices = self.actor_network_params.data[index]
        for name, module in policy.named_modules():
            path = tuple(name.split(".")) if name else ()
            for key, parameter in module.named_parameters(recurse=False):
                shared = nn.Parameter(slices.get((*path, key)), parameter.requires_grad)
                setattr(module, key, shared)
            for key, _ in module.named_buffers(recurse=False):
                setattr(module, key, slices.get((*path, key)))
        return policy

    def reset_parameters_recursive(self) -> None:
        """Draw all parameters anew, each actor and critic on its own; targets start equal."""
        for name in ("actor_network", "qvalue_network"):
            network = getattr(self, name)
            params = self._modules[f"{name}_params"]
            for index in range(params.batch_size[0]):
                fresh = copy.deepcopy(network)
                redraw_parameters(fresh, name)
                params.data[index].update_(TensorDict.from_module(fresh).data)
            target = self._modules.get(f"target_{name}_params")
            if target is not None:
                target.data.update_(params.data)

    def make_value_estimator(
        self, value_type: ValueEstimators | None = None, **hyperparams
    ) -> POGOLoss:
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
            _check_gamma(hyperparams["gamma"])
        if value_type is None:
            value_type = self.default_value_estimator
        if isinstance(value_type, ValueEstimatorBase) or (
            isinstance(value_type, type) and issubclass(value_type, ValueEstimatorBase)
        ):
            if isinstance(value_type, type):
                hyperparams.setdefault("value_network", None)
            LossModule.make_value_estimator(self, value_type, **hyperparams)
            self._forward_value_estimator_keys()
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

    def _forward_value_estimator_keys(self, **kwargs) -> None:
        if self._value_estimator is not None:
            self._value_estimator.set_keys(
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
        return (
            "actor_network_params",
            "qvalue_network_params",
            "target_actor_network_params",
            "target_qvalue_network_params",
        )


def _repeat(tensordict: TensorDictBase, count: int) -> TensorDictBase:
    """The same states ``count`` times, along a new last batch dimension."""
    return tensordict.unsqueeze(-1).expand(*tensordict.batch_size, count)


def _as_list(network, count: int, name: str, meaning: str) -> list[nn.Module]:
    """``count`` distinct networks of one architecture, drawn anew where only one is given."""
    if isinstance(network, nn.Module) and not isinstance(network, nn.ModuleList):
        return fresh_copies(network, count, name)
    networks = list(network)
    if len(networks) != count:
        raise ValueError(
            f"POGOLoss got {len(networks)} {name}s but needs {count} ({meaning}): pass a list of "
            f"{count}, or a single one, of which the others are made."
        )
    for i, module in enumerate(networks):
        if any(module is earlier for earlier in networks[:i]):
            networks[i] = fresh_copies(module, 2, name)[1]
    expected = _architecture(networks[0])
    for i, module in enumerate(networks[1:], start=1):
        for mine, first in zip_longest(_architecture(module), expected, fillvalue="nothing"):
            if mine != first:
                raise ValueError(
                    f"{name}s must share one architecture, but number {i} has {mine} where number "
                    f"0 has {first}: build all of them alike, or pass a single one."
                )
    return networks


def _architecture(module: nn.Module) -> list[str]:
    """All that networks must have in common to be stacked, in words."""
    layers = [f"{name or 'module'}: {type(m).__name__}" for name, m in module.named_modules()]
    shapes = [f"{name} of shape {list(p.shape)}" for name, p in module.named_parameters()]
    buffers = [f"{name} = {b.tolist()}" for name, b in module.named_buffers()]  # e.g. bounds
    return layers + shapes + buffers


def _check_weights(w2_weights: Sequence[float]) -> tuple[float, ...]:
    try:
        weights = () if isinstance(w2_weights, str) else tuple(float(w) for w in w2_weights)
    except (TypeError, ValueError):
        weights = ()
    if not weights or not all(math.isfinite(w) and w >= 0 for w in weights):
        raise ValueError(
            f"w2_weights={w2_weights!r} must be a sequence of finite numbers >= 0, one for each "
            "actor of the chain, e.g. (0.2, 0.2, 0.2)."
        )
    return weights


def _check_integer(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} must be an integer >= 1.")


def _check_positive(name: str, value: float, or_zero: bool = False) -> None:
    ok = isinstance(value, (int, float)) and math.isfinite(value)
    if not ok or value < 0 or (value == 0 and not or_zero):
        raise ValueError(
            f"{name}={value!r} must be a finite number {'>= 0' if or_zero else '> 0'}."
        )


def _check_gamma(gamma: float | Tensor) -> None:
    try:
        fits = 0 <= float(gamma) <= 1
    except (TypeError, ValueError, RuntimeError):
        fits = False
    if not fits:
        raise ValueError(f"gamma={gamma} must be a number in [0, 1], e.g. 0.99.")


def _check_choice(name: str, value, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {list(allowed)}.")
