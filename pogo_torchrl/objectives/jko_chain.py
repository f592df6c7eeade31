"""A JKO chain on top of any of TorchRL's actor-critic losses."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModule, dispatch
from torch import Tensor, nn
from torch.distributions import Distribution
from torchrl.data import TensorSpec
from torchrl.envs.utils import ExplorationType
from torchrl.modules import Delta
from torchrl.objectives.common import LossModule
from torchrl.objectives.utils import ValueEstimators

from pogo_torchrl import functional
from pogo_torchrl.objectives.chain_base import (
    CHECKS_OF_CHAINS,
    check_base,
    check_value_network,
    distribution_of,
    first_actor_params,
    is_deterministic,
    value_key,
)
from pogo_torchrl.objectives.checks import action_bounds, check_rows
from pogo_torchrl.objectives.critics import critic_values
from pogo_torchrl.objectives.distances import (
    OF_GAUSSIANS,
    check_distance,
    check_entropy_weight,
    gaussian_distance,
    moments,
    sample_distance,
)
from pogo_torchrl.objectives.settings import (
    CheckedSettings,
    chain_weights,
    check_change_of_weights,
)
from pogo_torchrl.torchrl_private import ProtectedLossModule, reduce_loss, share_update_marks


class JKOChain(CheckedSettings, ProtectedLossModule):
    r"""A JKO chain on top of a TorchRL actor-critic loss.

    The base loss is untouched: its actor is :math:`\pi_0`, and its critics are trained by it alone.
    Actors :math:`i = 1, \dots, n` start as copies of it, never act in a TD target, and minimise

    .. math::
        L_i = -\lambda\, \mathrm{mean}\, Q(s, a_i) + w_i\, \mathrm{mean}_s\,
              D(\pi_i(\cdot|s), \pi_{i-1}(\cdot|s)), \qquad a_i \sim \pi_i(\cdot|s),

    with :math:`\lambda = \alpha / \mathrm{mean}\,|Q(s, a_i)|`. Neither the critics nor actor i - 1
    receive a gradient of it. Distances are computed on actions mapped to [-1, 1]:

    * ``"sinkhorn"``: the debiased Sinkhorn divergence between K actions of each actor, for any
      actor whose actions are reparametrised samples; about half the squared 2-Wasserstein distance,
      and exactly that for deterministic actors, with one action of each.
    * ``"exact"``: half the squared 2-Wasserstein distance between K actions of each.
    * ``"l2"``: half the squared distance between the actions of deterministic actors.
    * ``"gaussian_w2"``: half the squared 2-Wasserstein distance between diagonal Gaussians,
      :func:`~pogo_torchrl.functional.gaussian_w2`, for actors with an ``IndependentNormal``.
    * ``"kl"``: the Kullback-Leibler divergence :func:`~pogo_torchrl.functional.gaussian_kl`, and
      ``"fisher_rao"``: half the squared Fisher-Rao distance
      :func:`~pogo_torchrl.functional.fisher_rao`, for actors with an ``IndependentNormal`` or a
      ``TanhNormal``. Both are in units of the standard deviation :math:`\sigma`: the same step size
      displaces the mean by :math:`\sigma^2` times as much as with the other distances.

    With ``entropy_weight`` :math:`\eta`, :math:`L_i` has the term
    :math:`-\eta\, \mathrm{mean}_s\, H(\pi_i(\cdot|s))`, the entropy of the Gaussian over mapped
    actions.

    Source: the objective of :class:`~pogo_torchrl.POGOLoss`, with another base than its own.

    Args:
        base_loss: a TorchRL loss with ``actor_network`` and ``qvalue_network``: ``TD3BCLoss``,
            ``IQLLoss``, ``CQLLoss``, ``TD3Loss``, ``SACLoss``, ``REDQLoss``, or a
            :class:`~pogo_torchrl.POGOLoss`, whose actor 0 is then the base's actor.

    Keyword Args:
        w2_weights: :math:`w_i \ge 0`, one per added actor; none: the base alone.
        step_sizes: :math:`h_i = \alpha / (w_i d)` instead of ``w2_weights``, where d is the number
            of action dimensions.
        action_spec: bounds of the actions. Defaults to the bounds of the base loss, if it has any,
            or else to the spec of its actor.
        bounds: ``(low, high)`` instead of ``action_spec``.
        actor_q: Q in the objective: ``"first"``, the first critic; ``"mean"`` or ``"min"`` over
            the critics; ``"advantage"``, the minimum minus the base's V(s). Defaults to
            ``"first"``.
        distance: ``"sinkhorn"``, ``"exact"``, ``"l2"``, ``"gaussian_w2"``, ``"kl"`` or
            ``"fisher_rao"``. Defaults to ``"sinkhorn"``.
        num_samples: K, actions per state and actor. Defaults to ``4``; deterministic actors take
            one.
        blur: regularisation of the Sinkhorn divergence. Defaults to ``0.05``.
        w2_backend: see :func:`~pogo_torchrl.sinkhorn_divergence`. Defaults to ``"tensorized"``.
        q_normalization: ``"mean_abs"``, or ``None`` for :math:`\lambda = \alpha`. Defaults to
            ``"mean_abs"``.
        alpha: weight of the Q term. Defaults to ``1.0``.
        entropy_weight: :math:`\eta \ge 0`, for actors with an ``IndependentNormal``. Defaults to
            ``0.0``.

    The output of :meth:`forward` is that of the base loss and ``loss_chain``, the sum of the
    :math:`L_i`, as well as, without gradient, ``chain_loss_i``, ``q_actor_i``, ``w2_i`` (the
    distance), ``lmbd_i`` and, with ``entropy_weight``, ``entropy_i``. ``set_keys``,
    ``make_value_estimator`` and target updates pass through to the base, and so do all attributes
    that the chain does not have.

    Raises:
        ValueError: if the base loss lacks a network, or its actor or actions are not supported.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> from torchrl.data import Bounded
        >>> from torchrl.modules import MLP
        >>> from torchrl.objectives import SoftUpdate, TD3BCLoss
        >>> from pogo_torchrl import JKOChain, make_qvalue
        >>> spec = Bounded(low=-torch.ones(2), high=torch.ones(2))
        >>> net = MLP(in_features=3, out_features=2, num_cells=[8], activate_last_layer=True)
        >>> actor = TensorDictModule(net, ["observation"], ["action"])
        >>> base = TD3BCLoss(actor, make_qvalue(3, 2), action_spec=spec)
        >>> chain = JKOChain(base, step_sizes=[0.5, 0.5])
        >>> _ = chain.make_value_estimator(gamma=0.99)
        >>> targets = SoftUpdate(chain, tau=0.005)
        >>> batch = TensorDict({"observation": torch.randn(8, 3), "action": spec.rand([8]),
        ...     "next": {"observation": torch.randn(8, 3), "reward": torch.randn(8, 1),
        ...              "done": torch.zeros(8, 1, dtype=torch.bool),
        ...              "terminated": torch.zeros(8, 1, dtype=torch.bool)}}, [8])
        >>> out = chain(batch)
        >>> [key for key in out.keys() if key.startswith("loss")]
        ['loss_actor', 'loss_qvalue', 'loss_chain']
        >>> chain.actor(-1)(batch.select("observation"))["action"].shape
        torch.Size([8, 2])
    """

    deterministic_sampling_mode = ExplorationType.RANDOM

    base_loss: LossModule
    actor_network: TensorDictModule

    checks = CHECKS_OF_CHAINS

    def __init__(
        self,
        base_loss: LossModule,
        *,
        w2_weights: Sequence[float] | None = None,
        step_sizes: Sequence[float] | None = None,
        action_spec: TensorSpec | None = None,
        bounds: tuple | None = None,
        actor_q: Literal["first", "mean", "min", "advantage"] = "first",
        distance: Literal[
            "sinkhorn", "exact", "l2", "gaussian_w2", "kl", "fisher_rao"
        ] = "sinkhorn",
        num_samples: int = 4,
        blur: float = 0.05,
        w2_backend: Literal["tensorized", "online", "auto", "fast", "exact"] = "tensorized",
        q_normalization: Literal["mean_abs"] | None = "mean_abs",
        alpha: float = 1.0,
        entropy_weight: float = 0.0,
    ) -> None:
        check_base(base_loss)
        super().__init__()
        self.base_loss = base_loss
        check_value_network(actor_q, base_loss)
        self.actor_q = actor_q
        self.distance = distance
        self.num_samples = num_samples
        self.blur = blur
        self.w2_backend = w2_backend
        self.q_normalization = q_normalization
        self.alpha = alpha
        self.entropy_weight = entropy_weight
        check_distance(distance, base_loss.actor_network, self.num_samples, w2_backend)
        check_entropy_weight(self.entropy_weight, base_loss.actor_network)

        self.w2_weights: tuple[float, ...] = ()
        self.__dict__["actor_network"] = base_loss.actor_network  # registered by the base
        if action_spec is None and bounds is None and hasattr(base_loss, "min_action"):
            bounds = base_loss.min_action, base_loss.max_action
        key = self.tensor_keys.action
        low, high = action_bounds(action_spec, bounds, self.actor(0), key, owner="JKOChain")
        self.register_buffer("action_low", low)
        self.register_buffer("action_high", high)
        weights = chain_weights(w2_weights, step_sizes, low, self.alpha)
        for i in range(1, len(weights) + 1):
            setattr(self, f"chain_actor_{i}_params", copy.deepcopy(self._params(0)))
        self.w2_weights = weights
        share_update_marks(self, base_loss)

    @property
    def is_created(self) -> bool:
        """Whether the constructor has checked the base and its bounds."""
        return "action_high" in self.__dict__.get("_buffers", ())

    def checked_change(self, name: str, value: Any) -> Any:
        """Return the new value of a setting, checked with the other settings and the actors."""
        if name == "w2_weights":
            added = [key for key, _ in self.named_children() if key.startswith("chain_actor_")]
            return check_change_of_weights(value, len(added))
        if name in ("distance", "num_samples", "w2_backend"):
            now = {key: getattr(self, key) for key in ("distance", "num_samples", "w2_backend")}
            now[name] = value
            distance, num_samples, backend = now.values()
            check_distance(distance, self.actor_network, num_samples, backend)
        if name == "actor_q":
            check_value_network(value, self.base_loss)
        if name == "entropy_weight":
            check_entropy_weight(value, self.actor_network)
        return value

    # ------------------------------------------------------------------ the algorithm

    def actor_loss(
        self, tensordict: TensorDictBase, index: int | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        r"""Compute the loss :math:`L_i` of one added actor, or the sum over all of them.

        Args:
            tensordict: a batch with the observations.
            index: index of the actor, in 1..n. Defaults to ``None``: the sum, at the current
                parameters.

        Returns:
            The loss and the detached scalars ``chain_loss_i``, ``q_actor_i``, ``w2_i``, ``lmbd_i``.

        Raises:
            IndexError: if ``index`` is out of range.
        """
        if index is not None and not 1 <= index < self.num_actors:
            raise IndexError(
                f"actor index {index} is out of range: the chain trains 1..{self.num_actors - 1}."
            )
        check_rows(tensordict)
        losses, metadata = [], {}
        for i in range(1, self.num_actors) if index is None else (index,):
            action, distance, entropy = self._proximal_terms(tensordict, i)
            q = self._q(tensordict, action)
            scale = functional.q_scale(q, self.alpha, self.q_normalization)
            weight = self.w2_weights[i - 1]
            loss = functional.jko_loss(q, distance, scale=scale, weight=weight)
            if entropy is not None:
                loss = loss - self.entropy_weight * entropy
                metadata[f"entropy_{i}"] = entropy.detach().mean()
            losses.append(self.reduce(loss, tensordict))
            metadata[f"chain_loss_{i}"] = loss.detach().mean()
            metadata[f"q_actor_{i}"] = q.detach().mean()
            metadata[f"w2_{i}"] = distance.detach().mean()
            metadata[f"lmbd_{i}"] = scale
        return sum(losses, self.action_low.new_zeros(())), metadata

    def _proximal_terms(
        self, batch: TensorDictBase, index: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Action of actor i for every state ``[*B, d]``, its distance to i - 1, and its entropy.

        The entropy is ``None`` without ``entropy_weight``; the others have shape ``[*B]``.
        """
        of_gaussians = self.distance in OF_GAUSSIANS
        count = 1 if of_gaussians or self.deterministic else self.num_samples
        # Actors that draw their own noise may list it among their keys; the base does not read it.
        keys = [key for key in self.actor_network.in_keys if key in self.in_keys]
        state = batch.select(*keys, strict=False)
        if not of_gaussians:
            state = state.unsqueeze(-1).expand(*state.batch_size, count)
        policy = self._policy(index, state)
        samples = policy.rsample()
        with torch.no_grad():
            reference = self._policy(index - 1, state)
        box = self.action_low, self.action_high
        entropy = None
        if self.entropy_weight:
            entropy = functional.gaussian_entropy(moments(policy, *box)[1])
        if of_gaussians:
            return samples, gaussian_distance(self.distance, policy, reference, *box), entropy
        with torch.no_grad():
            references = reference.rsample()
        distance = sample_distance(
            self.distance, samples, references, *box, blur=self.blur, backend=self.w2_backend
        )
        return samples[..., 0, :], distance, entropy if entropy is None else entropy[..., 0]

    def _policy(self, index: int, state: TensorDictBase) -> Distribution:
        """Distribution of an actor's actions; without one, that of a single action or draw."""
        network = self.actor_network
        with self._params(index).to_module(network):
            if distribution_of(network) is not None:
                return network.get_dist(state)
            return Delta(network(state).get(self.tensor_keys.action))

    def _q(self, batch: TensorDictBase, action: Tensor) -> Tensor:
        """Q of the base's critics ``[*B]``, at parameters without gradient."""
        base = self.base_loss
        critics = base.qvalue_network_params.data
        if self.actor_q == "first" and critics.ndim:
            critics = critics[0]
        q = critic_values(
            base.qvalue_network,
            critics,
            batch,
            action,
            action_key=self.tensor_keys.action,
            value_key=value_key(base),
        )
        if self.actor_q in ("first", "mean"):
            return q.mean(0)
        q = q.min(0)[0]
        if self.actor_q == "min":
            return q
        state = batch.select(*base.value_network.in_keys, strict=False)
        with (
            torch.no_grad(),
            base.value_network_params.data.to_module(
                base.value_network, preserve_module_state=False
            ),
        ):
            return q - base.value_network(state).get(self.tensor_keys.value).squeeze(-1)

    # ------------------------------------------------------------------ actors and parameters

    @property
    def num_actors(self) -> int:
        """Number of actors, the base's included."""
        return len(self.w2_weights) + 1

    @property
    def deterministic(self) -> bool:
        """Whether the base's actor is deterministic; one action per state is then enough."""
        return is_deterministic(self.actor_network)

    def _params(self, index: int) -> TensorDictParams:
        if index == 0:
            return first_actor_params(self.base_loss)
        return getattr(self, f"chain_actor_{index}_params")

    def actor_params(self, index: int) -> list[nn.Parameter]:
        """Return the trainable parameters of an added actor, for its own optimizer.

        Args:
            index: index of the actor, in 1..n, or negative to count from the end.

        Raises:
            IndexError: if ``index`` is out of range, or 0: the base loss trains actor 0.
        """
        index = self._actor_index(index)
        if index == 0:
            raise IndexError("actor 0 belongs to the base loss: optimise actor_network_params.")
        return [p for p in self._params(index).parameters() if p.requires_grad]

    def chain_params(self) -> list[nn.Parameter]:
        """Return the trainable parameters of all added actors."""
        return [p for i in range(1, self.num_actors) for p in self.actor_params(i)]

    def actor(self, index: int) -> TensorDictModule:
        """Return an actor as a policy that shares the parameters being trained.

        Args:
            index: index of the actor: 0 is the base's, ``-1`` the policy to deploy.

        Raises:
            IndexError: if ``index`` is out of range.
        """
        policy = copy.deepcopy(self.actor_network)
        self._params(self._actor_index(index)).to_module(policy, preserve_module_state=False)
        return policy

    def _actor_index(self, index: int) -> int:
        if not -self.num_actors <= index < self.num_actors:
            raise IndexError(
                f"actor index {index} is out of range: the actors are 0..{self.num_actors - 1}."
            )
        return index % self.num_actors

    def restart(self, index: int | None = None) -> None:
        """Reset an added actor to a copy of its predecessor, e.g. when that has been trained.

        Args:
            index: index of the actor, in 1..n. Defaults to ``None``: all, as copies of the base's.

        Raises:
            IndexError: if ``index`` is out of range, or 0.
        """
        if index is not None and not self._actor_index(index):
            raise IndexError("actor 0 belongs to the base loss, and has no predecessor.")
        for i in range(1, self.num_actors) if index is None else (self._actor_index(index),):
            self._params(i).data.update_(self._params(i - 1).data)

    # ------------------------------------------------------------------ TorchRL

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Compute the losses of the base and of the chain at the current parameters.

        Args:
            tensordict: a batch with the base's :attr:`in_keys`.

        Returns:
            The output of the base loss, ``loss_chain`` and the scalars of :meth:`actor_loss`.
        """
        out = self.base_loss(tensordict)  # first: its random draws are those without the chain
        loss, metadata = self.actor_loss(tensordict)
        return TensorDict({**dict(out.items()), "loss_chain": loss, **metadata}, out.batch_size)

    def reduce(self, loss: Tensor, batch: TensorDictBase) -> Tensor:
        """Reduce a loss as the base does, with its reduction, weights and masks of padded steps."""
        return reduce_loss(self.base_loss, loss, batch)

    @property
    def loss_mask_key(self) -> NestedKey | None:
        """Key of the mask of padded steps: that of the base loss."""
        return self.base_loss.loss_mask_key

    @loss_mask_key.setter
    def loss_mask_key(self, value: NestedKey | None) -> None:
        self.base_loss.loss_mask_key = value

    @property
    def tensor_keys(self) -> Any:
        """The keys of the base loss."""
        return self.base_loss.tensor_keys

    def set_keys(self, **kwargs: NestedKey) -> None:
        """Set the tensordict keys of the base loss."""
        self.base_loss.set_keys(**kwargs)

    def make_value_estimator(
        self, value_type: ValueEstimators | None = None, **hyperparams: Any
    ) -> JKOChain:
        """Set the value estimator of the base loss.

        Args:
            value_type: the estimator. Defaults to the base's default.
            **hyperparams: passed to the estimator, e.g. ``gamma=0.99``.

        Returns:
            The chain itself.
        """
        self.base_loss.make_value_estimator(value_type, **hyperparams)
        return self

    @property
    def in_keys(self) -> list[NestedKey]:
        """Keys that a batch must contain: those of the base loss."""
        return self.base_loss.in_keys

    @property
    def out_keys(self) -> list[NestedKey]:
        """Keys of the output of :meth:`forward`."""
        names = ("chain_loss", "q_actor", "w2", "lmbd", *["entropy"] * bool(self.entropy_weight))
        indices = range(1, self.num_actors)
        return [
            *self.base_loss.out_keys,
            "loss_chain",
            *(f"{name}_{i}" for i in indices for name in names),
        ]

    def randomness_changed(self) -> None:
        """Nothing to do: the chain itself uses no vmap."""

    def keys_changed(self) -> None:
        """Nothing to do: the base reads its keys again."""

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Children, and the target parameters of the base, which ``SoftUpdate`` looks for here."""
        yield from super().named_children()
        for name, child in self.base_loss.named_children():
            if name.startswith("target_"):
                yield name, child

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__.get("_modules", {})
        if "base_loss" in own and name.startswith("target_"):
            return getattr(own["base_loss"], name)
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base_loss" not in own:
                raise
            return getattr(own["base_loss"], name)
