"""The POGO objective as a TorchRL loss module.

The algorithm is in three functions of :class:`POGOLoss`, each under the equation that it computes:
``qvalue_terms`` (the critics), ``first_actor_terms`` (actor 0) and ``jko_terms`` (the others).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor
from torchrl.data import TensorSpec
from torchrl.objectives.utils import distance_loss

from pogo_torchrl import functional
from pogo_torchrl.objectives.chain_loss import ChainLoss, Noise, Params, actor_scalars
from pogo_torchrl.objectives.checks import (
    action_bounds,
    as_networks,
    check_choice,
    check_integer,
    check_positive,
    check_share,
    check_weights,
)
from pogo_torchrl.ot import BACKENDS, MAX_POINTS, sinkhorn_divergence


class POGOLoss(ChainLoss):
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
    stepping :meth:`qvalue_loss` and ``actor_loss(td, 0), ..., actor_loss(td, N - 1)`` in turn, each
    with an optimizer of its own (:meth:`qvalue_params`, :meth:`actor_params`), as
    :class:`~pogo_torchrl.POGOTrainer` does.

    Source: "Policy Optimization as a Gradient Flow in Offline Reinforcement Learning" (POGO);
    target noise and twin critics from TD3 (Fujimoto et al., 2018); :math:`\lambda` from TD3+BC
    (Fujimoto and Gu, 2021).

    Args:
        actor_network (TensorDictModule or list of them): one actor, from which the chain is made
            with newly drawn parameters for actors 1, 2, ..., or a list of ``len(w2_weights)``
            actors of one architecture. Any stochastic TorchRL actor serves; the method's is
            :class:`~pogo_torchrl.TransportActor`. Each actor has its own set of parameters,
            ``actor_network_0_params``, ``actor_network_1_params``, ..., which the modules passed in
            share: a single one is actor 0. The policy to deploy is ``actor(-1)``. Actors and
            critics cannot share layers.
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
        w2_fraction (float): share of the batch's states, in (0, 1], on which :math:`D_i` is
            evaluated for i >= 1, scaled so that its expectation stays that of the whole batch: less
            to compute, more variance. Defaults to ``1.0``, the method's.
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
    ``lmbd_i`` (:math:`\lambda`) and :math:`D_i`, which is ``bc_mse`` for actor 0, a mean squared
    error, and ``w2_i`` for the others; ``pred_value``, ``target_value``, ``next_state_value``.
    (Summing every key that starts with ``loss``, as TorchRL's trainer does,
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
        w2_fraction: float = 1.0,
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
        self.w2_weights = check_weights(w2_weights)
        check_integer("num_qvalue_nets", num_qvalue_nets)
        check_integer("num_samples", num_samples)
        check_positive("blur", blur)
        check_share("w2_fraction", w2_fraction)
        check_positive("alpha", alpha)
        check_positive("policy_noise", policy_noise, or_zero=True)
        check_positive("noise_clip", noise_clip, or_zero=True)
        check_choice("w2_backend", w2_backend, BACKENDS)
        if w2_backend == "exact" and num_samples > MAX_POINTS:
            raise ValueError(
                f"num_samples={num_samples} is too large for w2_backend='exact', which takes "
                f"1..{MAX_POINTS}: lower it, or use w2_backend='fast'."
            )
        check_choice("q_normalization", q_normalization, functional.Q_NORMALIZATIONS)
        check_choice("loss_function", loss_function, ("l2", "l1", "smooth_l1"))
        check_choice("reduction", reduction, ("mean", "sum", "none"))

        self.num_actors = len(self.w2_weights)
        self.num_qvalue_nets = num_qvalue_nets
        self.num_samples = num_samples
        self.blur = blur
        self.w2_backend = w2_backend
        self.w2_fraction = w2_fraction
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

        actors = as_networks(actor_network, self.num_actors, "actor", "one for each of w2_weights")
        qvalues = as_networks(qvalue_network, num_qvalue_nets, "qvalue_network", "num_qvalue_nets")
        if shared_noise and not hasattr(actors[0], "noise_key"):
            raise ValueError(
                "shared_noise=True needs actors that read z from the tensordict, but "
                f"{type(actors[0]).__name__} has no noise_key: use TransportActor or "
                "shared_noise=False."
            )
        low, high = action_bounds(action_spec, bounds, actors[0], self.tensor_keys.action)
        self._register(actors, qvalues)
        self.randomness_changed()
        self.register_buffer("min_action", low)
        self.register_buffer("max_action", high)
        self._set_in_keys()
        self._out_keys: list[NestedKey] = [
            "loss_actor",
            "loss_qvalue",
            *[name for i in range(self.num_actors) for name in actor_scalars(i)],
            "pred_value",
            "target_value",
            "next_state_value",
        ]

    # ------------------------------------------------------------------ the algorithm

    def qvalue_terms(
        self, qvalue: Params, batch: TensorDictBase, noise: Noise, actor: Params, target: Params
    ) -> tuple[Tensor, dict[str, Tensor]]:
        r"""The critics' loss.

        .. math::
            L_Q = \sum_j \mathrm{mean}\, (Q_j(s, a) - y)^2

        Args:
            qvalue: parameters of the critics, stacked ``[C, ...]``.
            batch: transitions.
            noise: ``target`` and ``smoothing`` of :meth:`draw_noise`.
            actor: parameters of the actor in the TD target: actor 0 or its Polyak copy.
            target: parameters of the target critics.

        Returns:
            As :meth:`qvalue_loss`.
        """
        with torch.no_grad():
            target_value, next_value = self._target_value(batch, noise, actor, target)
        pred_value = self._qvalues(qvalue, batch, batch.get(self.tensor_keys.action))
        loss = distance_loss(
            pred_value, target_value.expand_as(pred_value), loss_function=self.loss_function
        )
        return self.reduce(loss.sum(0), batch), {
            "td_error": (pred_value - target_value).detach().square(),
            "pred_value": pred_value.detach().mean(),
            "target_value": target_value.mean(),
            "next_state_value": next_value.mean(),
        }

    def _target_value(
        self, batch: TensorDictBase, noise: Noise, actor: Params, target: Params
    ) -> tuple[Tensor, Tensor]:
        r"""The TD target, and its value of the next state; each ``[*B]``.

        .. math::
            y = r + \gamma (1 - terminated) \min_j \bar Q_j(s', a'), \qquad
            a' = \mathrm{clip}(\pi_0(s', z') + \mathrm{clip}(\sigma n, -c, c))
        """
        next_state = batch.get("next")
        action = functional.smoothed_target_action(
            self._act(actor, next_state, noise.get("target")),
            noise["smoothing"],
            self.min_action,
            self.max_action,
            sigma=self.policy_noise,
            clip=self.noise_clip,
        )
        next_value = self._qvalues(target, next_state, action).min(0)[0]
        batch = batch.clone(False)
        batch.set(("next", self.tensor_keys.state_action_value), next_value.unsqueeze(-1))
        return self.value_estimator.value_estimate(batch).squeeze(-1), next_value

    def first_actor_terms(
        self,
        actor: Params,
        batch: TensorDictBase,
        noise: Noise,
        qvalue: Params,
        weight: float | Tensor,
        alpha: float | Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        r"""The loss of actor 0, which steps from the data.

        .. math::
            L_0 = -\lambda\, \mathrm{mean}\, Q_1(s, \pi_0(s, z))
                  + w_0\, \mathrm{mean}\, (\pi_0(s, z) - a)^2

        Args:
            actor: parameters of actor 0.
            batch: transitions.
            noise: ``actor_0`` of :meth:`draw_noise`.
            qvalue: parameters of the critics, stacked ``[C, ...]``; they are frozen.
            weight: :math:`w_0`.
            alpha: weight of the Q term.

        Returns:
            As :meth:`actor_loss`.
        """
        action = self._act(actor, batch, noise.get("actor_0"))
        distance = functional.l2_distance(
            self._to_unit_box(action), self._to_unit_box(batch.get(self.tensor_keys.action))
        )
        return self._objective(action, distance, batch, qvalue, weight, alpha, index=0)

    def jko_terms(
        self,
        actor: Params,
        batch: TensorDictBase,
        noise: Noise,
        reference: Params,
        qvalue: Params,
        weight: float | Tensor,
        alpha: float | Tensor,
        *,
        index: int,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        r"""The loss of actor i, i >= 1, which steps from the actor before it.

        .. math::
            L_i = -\lambda\, \mathrm{mean}\, Q_1(s, \pi_i(s, z)) + w_i\, \mathrm{mean}_s\,
                  S_\varepsilon(\pi_i(\cdot|s), \pi_{i-1}(\cdot|s))

        The first of the K draws of :math:`\pi_i` in the divergence also serves the Q term: each
        term's distribution is that of draws of its own, and so is the loss's expectation.

        Args:
            actor: parameters of actor i.
            batch: transitions.
            noise: ``actor_i`` and ``reference_i`` of :meth:`draw_noise`.
            reference: parameters of actor i - 1; they are fixed.
            qvalue: parameters of the critics, stacked ``[C, ...]``; they are frozen.
            weight: :math:`w_i`.
            alpha: weight of the Q term.
            index: i.

        Returns:
            As :meth:`actor_loss`.
        """
        z, z_reference = noise.get(f"actor_{index}"), noise.get(f"reference_{index}")
        state = batch.select(*self.actor_network.in_keys, strict=False)
        # With w2_fraction < 1 the first states of the batch stand for all of it in the divergence.
        count = math.ceil(self.w2_fraction * state.shape[0])
        repeated = self._repeat(state[:count])
        samples = self._act(actor, repeated, z if z is None else z[:count])
        with torch.no_grad():
            z_reference = z_reference if z_reference is None else z_reference[:count]
            references = self._act(reference, repeated, z_reference)
        distance = sinkhorn_divergence(
            self._to_unit_box(samples),
            self._to_unit_box(references),
            blur=self.blur,
            backend=self.w2_backend,
            # The diagonal of the unit box; GeomLoss measures the batch's, as published.
            diameter=2 * samples.shape[-1] ** 0.5 if self.w2_backend == "fast" else None,
        )
        action = samples[..., 0, :]
        if count < state.shape[0]:
            others = self._act(actor, state[count:], z if z is None else z[count:, ..., 0, :])
            action = torch.cat([action, others])
            distance = distance * (len(action) / count)
            distance = torch.cat([distance, distance.new_zeros(others.shape[:-1])])
        return self._objective(action, distance, batch, qvalue, weight, alpha, index=index)

    def _objective(
        self,
        action: Tensor,
        distance: Tensor,
        batch: TensorDictBase,
        qvalue: Params,
        weight: float | Tensor,
        alpha: float | Tensor,
        *,
        index: int,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        r""":math:`-\lambda Q_1 + w_i D_i`, reduced over the batch, and what is logged of it."""
        frozen = {name: values[0].detach() for name, values in qvalue.items()}
        q = self._qvalue(frozen, batch, action)
        scale = functional.q_scale(q, alpha, self.q_normalization)
        loss = functional.jko_loss(q, distance, scale=scale, weight=weight)
        loss = self.reduce(loss, batch)
        values = loss.detach().mean(), q.detach().mean(), distance.detach().mean(), scale
        return loss, dict(zip(actor_scalars(index), values))

    def _repeat(self, state: TensorDictBase) -> TensorDictBase:
        """The same states ``num_samples`` times, along a new last batch dimension."""
        return state.unsqueeze(-1).expand(*state.batch_size, self.num_samples)

    def _to_unit_box(self, action: Tensor) -> Tensor:
        return functional.to_unit_box(action, self.min_action, self.max_action)
