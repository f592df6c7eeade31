"""The POGO objective as a TorchRL loss module.

Three methods of :class:`POGOLoss` implement the algorithm, each documented with its equation:
``qvalue_terms`` (the critics), ``first_actor_terms`` (actor 0) and ``jko_terms`` (later actors).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor
from torchrl.data import TensorSpec
from torchrl.objectives.utils import distance_loss

from pogo_torchrl import functional
from pogo_torchrl.objectives.chain_loss import ChainLoss, Noise, Params, actor_scalars
from pogo_torchrl.objectives.checks import action_bounds, as_networks, check_reads_noise
from pogo_torchrl.objectives.distances import unit_box_divergence
from pogo_torchrl.objectives.settings import check_combined, check_step_sizes, check_weights


class POGOLoss(ChainLoss):
    r"""POGO loss module: twin critics and a JKO chain of actors for offline RL.

    POGO discretises a Wasserstein gradient flow of policies into JKO steps, one per actor of the
    chain. The critics regress on a TD target in which actor 0 selects the next action, with the
    clipped noise and the minimum over critics of TD3 (see :meth:`qvalue_loss`):

    .. math::
        y = r + \gamma (1 - terminated) \min_{j=1,2} \bar Q_j(s', \mathrm{clip}(\pi_0(s', z')
            + \mathrm{clip}(\sigma n, -c, c))), \qquad
        L_Q = \sum_j (Q_j(s, a) - y)^2

    Actor 0 is regularised towards the actions of the dataset, every later actor :math:`\pi_i`
    towards the previous actor (see :meth:`actor_loss`):

    .. math::
        L_i = -\lambda\, \mathbb{E}[Q_1(s, \pi_i(s, z))] + w_i D_i, \qquad
        D_0 = \mathrm{mean}\,(\pi_0(s, z) - a)^2, \qquad
        D_i = \mathbb{E}_s\, S_\varepsilon(\pi_i(\cdot|s), \pi_{i-1}(\cdot|s))

    Here :math:`\lambda = \alpha / \mathrm{mean}|Q_1(s, \pi_i(s, z))|`, and :math:`S_\varepsilon`
    is the debiased Sinkhorn divergence between ``num_samples`` actions per state and policy,
    approximately :math:`W_2^2/2`. Both :math:`D_0` and :math:`D_i` are computed on actions mapped
    to [-1, 1]; :math:`D_0` averages over the action dimensions, whereas :math:`D_i` sums half the
    squared distance over them. The published ``w2_weights`` are tuned to these scales. Critics and
    previous actors are detached: each term trains its own actor only.

    :meth:`forward` evaluates all terms on one batch, like other TorchRL losses. The method itself
    is sequential: actor i is trained against the critics and actor i - 1 after their own update.
    To reproduce it, step :meth:`qvalue_loss` and then ``actor_loss(td, 0)``, ...,
    ``actor_loss(td, N - 1)``, each with its own optimizer (:meth:`qvalue_params`,
    :meth:`actor_params`); :class:`~pogo_torchrl.POGOTrainer` does so.

    References: *Policy Optimization as a Gradient Flow in Offline Reinforcement Learning* (POGO);
    Fujimoto et al., *Addressing Function Approximation Error in Actor-Critic Methods*, 2018,
    arXiv:1802.09477 (TD3: twin critics, target noise); Fujimoto & Gu, *A Minimalist Approach to
    Offline Reinforcement Learning*, 2021, arXiv:2106.06860 (TD3+BC: :math:`\lambda`); Feydy et al.,
    *Interpolating between Optimal Transport and MMD using Sinkhorn Divergences*, 2019,
    arXiv:1810.08278 (:math:`S_\varepsilon`).

    Args:
        actor_network (TensorDictModule or list of TensorDictModule): a single actor, which becomes
            actor 0 and is copied for actors 1, 2, ... (see ``chain_init``), or a list of
            ``len(w2_weights)`` actors with the same architecture. Any stochastic TorchRL actor is
            supported; the method uses :class:`~pogo_torchrl.TransportActor`. The modules passed in
            share the trained parameters ``actor_network_0_params``, ``actor_network_1_params``,
            ... Actors and critics cannot share layers. The policy to deploy is ``actor(-1)``.
        qvalue_network (TensorDictModule or list of TensorDictModule): a single critic, copied
            ``num_qvalue_nets`` times with reinitialised parameters, or a list of critics.

    Keyword Args:
        w2_weights (sequence of float): weights :math:`w_i \ge 0`, one per actor; their number sets
            the length of the chain. Defaults to ``(0.2, 0.2, 0.2)``.
        step_sizes (sequence of float or float, optional): proximal step sizes :math:`h_i > 0`, from
            which ``w2_weights`` follow by :func:`pogo_torchrl.functional.step_sizes_to_weights`;
            a single number applies to as many actors as ``w2_weights`` has. Defaults to ``None``:
            ``w2_weights`` as given.
        action_spec (TensorSpec, optional): bounded action spec. Exclusive with ``bounds``. If
            neither is given, the ``action_spec`` or ``spec`` of the actor is used.
        bounds (tuple of float or of Tensor, optional): lower and upper action bounds.
        num_qvalue_nets (int): number of critics. Defaults to ``2``.
        num_samples (int): K, the number of actions per state and policy in :math:`D_i`. Defaults
            to ``4``.
        blur (float): Sinkhorn blur, in units of half the action range. Defaults to ``0.05``.
        w2_backend (str): backend of :func:`~pogo_torchrl.sinkhorn_divergence`: ``"tensorized"``,
            ``"online"`` or ``"auto"`` (GeomLoss), ``"fast"`` (the same divergence, annealed from
            the diameter of the action bounds) or ``"exact"`` (optimal assignment, for
            ``num_samples <= 10``). Defaults to ``"tensorized"``.
        w2_fraction (float): fraction of the batch's states, in (0, 1], on which :math:`D_i` is
            evaluated for :math:`i \ge 1`. It is rescaled to keep its expectation: smaller values
            are cheaper and noisier. Defaults to ``1.0``.
        shared_noise (bool): use the same z for the actions of :math:`\pi_i` and
            :math:`\pi_{i-1}` in :math:`D_i`, so that it vanishes for equal policies and does not
            shrink their spread. Requires actors that read z from the tensordict, such as
            :class:`~pogo_torchrl.TransportActor`. Defaults to ``False`` (independent draws, as in
            the method).
        policy_noise (float): :math:`\sigma`, the standard deviation of the target noise in units
            of half the action range. Defaults to ``0.2``.
        noise_clip (float): c, the clipping range of the target noise in the same units. Defaults
            to ``0.5``.
        q_normalization (str or None): ``"mean_abs"``, or ``None`` for :math:`\lambda = \alpha`; see
            :func:`pogo_torchrl.functional.q_scale`. Defaults to ``"mean_abs"``.
        alpha (float): weight of the Q term, positive. Defaults to ``1.0``.
        delay_actor (bool): use a target copy of actor 0 in the TD target instead of the online
            actor. Defaults to ``False``.
        delay_qvalue (bool): use target copies of the critics in the TD target. Defaults to
            ``True``.
        loss_function (str): loss between the critics and the TD target: ``"l2"``, ``"l1"`` or
            ``"smooth_l1"``. Defaults to ``"l2"``.
        reduction (str): ``"mean"``, ``"sum"`` or ``"none"``. Defaults to ``"mean"``.
        data_weight (float): weight :math:`\beta` in [0, 1] of the distance to the data in later
            actors, whose :math:`D_i` becomes :math:`(1 - \beta) D_i + \beta\, \mathrm{mean}\,
            (\pi_i(s, z) - a)^2`; 1 anchors every actor to the data instead of the previous actor.
            Defaults to ``0.0``.
        trajectory_weights (bool): multiply that distance to the data by the batch's
            ``trajectory_weight``, see :func:`~pogo_torchrl.data.trajectories.trajectory_weights`.
            Defaults to ``False``.
        critic_bc_weight (float): weight of ReBRAC's penalty on the next action in the TD target,
            :math:`\min_j \bar Q_j(s', a') - \beta \sum_k (a' - a'_{data})_k^2`, on actions mapped
            to [-1, 1]. Requires the dataset's next action :math:`a'_{data}` in the batch, NaN where
            there is none. Defaults to ``0.0``.
        target_action (str): ``"noisy"``, or ``"min_clean_noisy"``: the TD target takes the minimum
            over critics at the action without noise as well, as an earlier version of the original
            code did. Defaults to ``"noisy"``.
        actor_q (str): Q in the losses of the actors (and in :math:`\lambda`): ``"first"``, or
            ``"mean"`` over the critics. Defaults to ``"first"``.
        advantage_temperature (float, optional): temperature :math:`\beta > 0` of an
            advantage-weighted :math:`D_0`, whose value in a state is multiplied by
            :func:`pogo_torchrl.functional.advantage_weights`, with the minimum over critics as Q.
            Defaults to ``None``: unweighted.
        chain_init (str): initial parameters of actors 1, 2, ... when a single actor is passed:
            ``"independent"`` (reinitialised, as in the method) or ``"copy"`` (those of actor 0, so
            that every :math:`D_i` starts without having to imitate the previous actor first).
            Defaults to ``"independent"``.
        average_actors (float, optional): rate in (0, 1] of Polyak averages of all actors, which are
            evaluated and deployed but do not act in any loss
            (:class:`~pogo_torchrl.objectives.ActorAverages`). An average moves at each update of
            its actor. Defaults to ``None``: no averages.
        deactivate_vmap (bool): replace ``vmap`` over the critics by a loop. Defaults to ``False``.
        use_prioritized_weights (bool or "auto"): weight samples by ``priority_weight`` if the
            batch contains it. Defaults to ``"auto"``.

    Settings may be set later, as in ``loss.alpha = 0.5``: they are checked in the same way, and the
    next update uses them. Those from which networks are created cannot be changed.

    Raises:
        ValueError: if a setting is out of range, if a list of networks has the wrong length, or
            if its networks differ in architecture.

    A batch of shape ``[*B]`` contains ``observation`` (``[*B, n]``), ``action`` (``[*B, d]``) and,
    under ``"next"``, ``observation``, ``reward``, ``done`` and ``terminated`` (the last three of
    shape ``[*B, 1]``), and ``action`` if ``critic_bc_weight`` > 0. The observation keys are those
    of the networks; ``set_keys`` changes the others. Padded steps (``loss_mask_key``) do not count
    in the losses, but in :math:`\lambda` and the logged means; their values must be finite.

    The output contains ``loss_qvalue`` and ``loss_actor`` (the sum over the chain), which carry
    gradients and follow ``reduction``. They alone have keys that start with ``loss``, so that
    summing those entries, as TorchRL's trainer does, counts each term once. All other entries are
    detached scalars for logging: for each actor i its loss (``actor_loss_i``), ``q_actor_i``,
    ``lmbd_i`` (:math:`\lambda`) and :math:`D_i` (``bc_mse`` for actor 0, ``w2_i`` for later
    actors), and ``pred_value``, ``target_value`` and ``next_state_value``.

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
        >>> loss.out_keys[:6]
        ['loss_actor', 'loss_qvalue', 'actor_loss_0', 'q_actor_0', 'bc_mse', 'lmbd_0']
        >>> loss.actor(-1)(data.select("observation"))["action"].shape
        torch.Size([8, 4])

    The loss also accepts tensors as keyword arguments. It then returns a tuple in the order of
    :attr:`out_keys`:

        >>> _ = loss.select_out_keys("loss_actor", "loss_qvalue")
        >>> loss_actor, loss_qvalue = loss(
        ...     observation=torch.randn(8, 3), action=spec.rand([8]),
        ...     next_observation=torch.randn(8, 3), next_reward=torch.randn(8, 1),
        ...     next_done=torch.zeros(8, 1, dtype=torch.bool),
        ...     next_terminated=torch.zeros(8, 1, dtype=torch.bool))
        >>> loss_actor.backward()
    """

    def __init__(
        self,
        actor_network: TensorDictModule | Sequence[TensorDictModule],
        qvalue_network: TensorDictModule | Sequence[TensorDictModule],
        *,
        w2_weights: Sequence[float] = (0.2, 0.2, 0.2),
        step_sizes: Sequence[float] | float | None = None,
        action_spec: TensorSpec | None = None,
        bounds: tuple[float, float] | tuple[Tensor, Tensor] | None = None,
        num_qvalue_nets: int = 2,
        num_samples: int = 4,
        blur: float = 0.05,
        w2_backend: Literal["tensorized", "online", "auto", "fast", "exact"] = "tensorized",
        w2_fraction: float = 1.0,
        shared_noise: bool = False,
        policy_noise: float = 0.2,
        noise_clip: float = 0.5,
        q_normalization: Literal["mean_abs"] | None = "mean_abs",
        alpha: float = 1.0,
        delay_actor: bool = False,
        delay_qvalue: bool = True,
        loss_function: Literal["l2", "l1", "smooth_l1"] = "l2",
        reduction: Literal["mean", "sum", "none"] | None = "mean",
        data_weight: float = 0.0,
        trajectory_weights: bool = False,
        critic_bc_weight: float = 0.0,
        target_action: Literal["noisy", "min_clean_noisy"] = "noisy",
        actor_q: Literal["first", "mean"] = "first",
        advantage_temperature: float | None = None,
        chain_init: Literal["independent", "copy"] = "independent",
        average_actors: float | None = None,
        deactivate_vmap: bool = False,
        use_prioritized_weights: bool | Literal["auto"] = "auto",
    ) -> None:
        super().__init__()
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
        self.reduction = "mean" if reduction is None else reduction
        self.data_weight = data_weight
        self.trajectory_weights = trajectory_weights
        self.critic_bc_weight = critic_bc_weight
        self.target_action = target_action
        self.actor_q = actor_q
        self.advantage_temperature = advantage_temperature
        self.chain_init = chain_init
        self.average_actors = average_actors
        self.deactivate_vmap = deactivate_vmap
        self.use_prioritized_weights = use_prioritized_weights
        self.w2_weights = check_weights(w2_weights)
        check_combined(self)
        sizes = None
        if step_sizes is not None:
            sizes = check_step_sizes(step_sizes, len(self.w2_weights))
        self.num_actors = len(self.w2_weights if sizes is None else sizes)

        actors = as_networks(
            actor_network,
            self.num_actors,
            "actor",
            "one per entry of w2_weights",
            reinitialise=chain_init == "independent",
        )
        num_qvalue_nets = self.num_qvalue_nets  # a Python number by now
        qvalues = as_networks(qvalue_network, num_qvalue_nets, "qvalue_network", "num_qvalue_nets")
        if shared_noise:
            check_reads_noise(actors[0])
        low, high = action_bounds(action_spec, bounds, actors[0], self.tensor_keys.action)
        if sizes is not None:
            if not low.dim():
                raise ValueError(
                    "step_sizes depend on the number of action dimensions, which bounds=(low, "
                    "high) of two numbers do not tell: pass action_spec=Bounded(...)."
                )
            self.w2_weights = functional.step_sizes_to_weights(sizes, low.shape[-1], self.alpha)
        self._register(actors, qvalues)
        self.randomness_changed()
        self.register_buffer("min_action", low)
        self.register_buffer("max_action", high)
        self._set_in_keys()
        self._set_out_keys()

    # ------------------------------------------------------------------ the algorithm

    def qvalue_terms(
        self, qvalue: Params, batch: TensorDictBase, noise: Noise, actor: Params, target: Params
    ) -> tuple[Tensor, dict[str, Tensor]]:
        r"""Compute the loss of the critics from explicit parameters and noise.

        .. math::
            L_Q = \sum_j \mathrm{mean}\, (Q_j(s, a) - y)^2

        Args:
            qvalue: parameters of the critics, stacked ``[C, ...]``.
            batch: transitions.
            noise: the entries ``target`` and ``smoothing`` of :meth:`draw_noise`.
            actor: parameters of the actor in the TD target: actor 0 or its target copy.
            target: parameters of the target critics, stacked ``[C, ...]``.

        Returns:
            The loss and the metadata of :meth:`qvalue_loss`.
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
        r"""TD target and the value of the next state, each of shape ``[*B]``.

        .. math::
            y = r + \gamma (1 - terminated) \min_j \bar Q_j(s', a'), \qquad
            a' = \mathrm{clip}(\pi_0(s', z') + \mathrm{clip}(\sigma n, -c, c))

        With ``target_action="min_clean_noisy"``, the minimum is also over :math:`\pi_0(s', z')`;
        ``critic_bc_weight`` :math:`\beta` subtracts :math:`\beta \sum_k (a' - a'_{data})_k^2`.
        """
        next_state = batch.get("next")
        clean_action = self._act(actor, next_state, noise.get("target"))
        action = functional.smoothed_target_action(
            clean_action,
            noise["smoothing"],
            self.min_action,
            self.max_action,
            sigma=self.policy_noise,
            clip=self.noise_clip,
        )
        next_value = self._qvalues(target, next_state, action).min(0)[0]
        if self.target_action == "min_clean_noisy":
            clean_action = clean_action.clamp(self.min_action, self.max_action)
            clean_value = self._qvalues(target, next_state, clean_action).min(0)[0]
            next_value = torch.minimum(next_value, clean_value)
        if self.critic_bc_weight:
            data_action = self._to_unit_box(next_state.get(self.tensor_keys.action))
            penalty = functional.next_action_penalty(self._to_unit_box(action), data_action)
            next_value = next_value - self.critic_bc_weight * penalty
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
        r"""Compute the loss of actor 0, which is regularised towards the dataset's actions.

        .. math::
            L_0 = -\lambda\, \mathrm{mean}\, Q_1(s, \pi_0(s, z))
                  + w_0\, \mathrm{mean}\, (\pi_0(s, z) - a)^2

        With ``advantage_temperature``, the states of the second mean are weighted by the advantage
        of the dataset's action.

        Args:
            actor: parameters of actor 0.
            batch: transitions.
            noise: the entry ``actor_0`` of :meth:`draw_noise`.
            qvalue: parameters of the critics, stacked ``[C, ...]``; they receive no gradient.
            weight: :math:`w_0`.
            alpha: weight of the Q term.

        Returns:
            The loss and the metadata of :meth:`actor_loss`.
        """
        action = self._act(actor, batch, noise.get("actor_0"))
        data_action = batch.get(self.tensor_keys.action)
        distance = functional.l2_distance(self._to_unit_box(action), self._to_unit_box(data_action))
        if self.advantage_temperature is not None:
            with torch.no_grad():
                q_data = self._qvalues(qvalue, batch, data_action).min(0)[0]
                q_policy = self._qvalues(qvalue, batch, action).min(0)[0]
            distance = distance * functional.advantage_weights(
                q_data, q_policy, self.advantage_temperature
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
        r"""Compute the loss of actor i >= 1, a JKO step from actor i - 1.

        .. math::
            L_i = -\lambda\, \mathrm{mean}\, Q_1(s, \pi_i(s, z)) + w_i\, \mathrm{mean}_s\,
                  S_\varepsilon(\pi_i(\cdot|s), \pi_{i-1}(\cdot|s))

        The Q term reuses the first of the K actions that :math:`\pi_i` draws for the divergence.
        Each term keeps its distribution, and the loss keeps its expectation.

        Args:
            actor: parameters of actor i.
            batch: transitions.
            noise: the entries ``actor_i`` and ``reference_i`` of :meth:`draw_noise`.
            reference: parameters of actor i - 1; they receive no gradient.
            qvalue: parameters of the critics, stacked ``[C, ...]``; they receive no gradient.
            weight: :math:`w_i`.
            alpha: weight of the Q term.
            index: i.

        Returns:
            The loss and the metadata of :meth:`actor_loss`.
        """
        z, z_reference = noise.get(f"actor_{index}"), noise.get(f"reference_{index}")
        state = self._states(batch)
        # With w2_fraction < 1 the divergence is evaluated on the first states of the batch only.
        count = math.ceil(self.w2_fraction * state.shape[0])
        repeated = self._repeat(state[:count])
        samples = self._act(actor, repeated, z if z is None else z[:count])
        with torch.no_grad():
            z_reference = z_reference if z_reference is None else z_reference[:count]
            references = self._act(reference, repeated, z_reference)
        distance = unit_box_divergence(
            samples,
            references,
            self.min_action,
            self.max_action,
            blur=self.blur,
            backend=self.w2_backend,
        )
        action = samples[..., 0, :]
        if count < state.shape[0]:
            others = self._act(actor, state[count:], z if z is None else z[count:, ..., 0, :])
            action = torch.cat([action, others])
            distance = distance * (len(action) / count)
            distance = torch.cat([distance, distance.new_zeros(others.shape[:-1])])
        if self.data_weight:
            data_action = self._to_unit_box(batch.get(self.tensor_keys.action))
            to_data = functional.l2_distance(self._to_unit_box(action), data_action)
            if self.trajectory_weights:
                to_data = to_data * batch.get(self.tensor_keys.trajectory_weight).view_as(to_data)
            distance = (1 - self.data_weight) * distance + self.data_weight * to_data
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
        r""":math:`-\lambda Q_1 + w_i D_i` reduced over the batch, and its logged metrics.

        With ``actor_q="mean"``, the mean over critics replaces :math:`Q_1`.
        """
        frozen = {name: values.detach() for name, values in qvalue.items()}
        if self.actor_q == "mean":
            q = self._qvalues(frozen, batch, action).mean(0)
        else:
            first = {name: values[0] for name, values in frozen.items()}
            q = self._qvalue(first, batch, action)
        scale = functional.q_scale(q, alpha, self.q_normalization)
        loss = functional.jko_loss(q, distance, scale=scale, weight=weight)
        loss = self.reduce(loss, batch)
        values = loss.detach().mean(), q.detach().mean(), distance.detach().mean(), scale
        return loss, dict(zip(actor_scalars(index), values))
