"""A JKO chain on top of any of TorchRL's actor-critic losses."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModule, dispatch
from torch import Tensor, nn
from torch.distributions import Independent, Normal
from torch.nn.parameter import is_lazy
from torchrl.data import TensorSpec
from torchrl.envs.utils import ExplorationType
from torchrl.modules import Delta, GRUModule, LSTMModule, TanhDelta
from torchrl.objectives.common import LossModule
from torchrl.objectives.utils import ValueEstimators

from pogo_torchrl import functional
from pogo_torchrl.modules import TransportActor
from pogo_torchrl.objectives.chain_loss import ChainLoss
from pogo_torchrl.objectives.checks import (
    action_bounds,
    check_choice,
    check_integer,
    check_positive,
    check_step_sizes,
    check_weights,
)
from pogo_torchrl.objectives.distances import unit_box_divergence
from pogo_torchrl.ot import BACKENDS
from pogo_torchrl.torchrl_private import ProtectedLossModule, share_update_marks

ACTOR_Q = ("first", "mean", "min", "advantage")
DISTANCES = ("sinkhorn", "gaussian_w2")


class JKOChain(ProtectedLossModule):
    r"""A JKO chain on top of a TorchRL actor-critic loss.

    The base loss is untouched: its actor is :math:`\pi_0`, and its critics are trained by it alone.
    Actors :math:`i = 1, \dots, n` start as copies of it, never act in a TD target, and minimise

    .. math::
        L_i = -\lambda\, \mathrm{mean}\, Q(s, a_i) + w_i\, \mathrm{mean}_s\,
              D(\pi_i(\cdot|s), \pi_{i-1}(\cdot|s)), \qquad a_i \sim \pi_i(\cdot|s),

    with :math:`\lambda = \alpha / \mathrm{mean}\,|Q(s, a_i)|`. Neither the critics nor actor i - 1
    receive a gradient of it. Distances are computed on actions mapped to [-1, 1], and all of them
    are about half the squared 2-Wasserstein distance:

    * ``"sinkhorn"``: the debiased Sinkhorn divergence between K actions of each actor, for any
      actor whose actions are reparametrised samples. For deterministic actors, with one action of
      each, it is half the squared distance.
    * ``"gaussian_w2"``: the closed form for diagonal Gaussians,
      :func:`~pogo_torchrl.functional.gaussian_w2`, for actors with an ``IndependentNormal``.

    Source: the objective of :class:`~pogo_torchrl.POGOLoss`, with another base than its own.

    Args:
        base_loss: a TorchRL loss with ``actor_network`` and ``qvalue_network``: ``TD3BCLoss``,
            ``IQLLoss``, ``CQLLoss``, ``TD3Loss``, ``SACLoss``, ``REDQLoss``, or a
            :class:`~pogo_torchrl.POGOLoss`, whose actor 0 is then the base's actor.

    Keyword Args:
        w2_weights: :math:`w_i \ge 0`, one per added actor.
        step_sizes: :math:`h_i = \alpha / (w_i d)` instead of ``w2_weights``, where d is the number
            of action dimensions.
        action_spec: bounds of the actions. Defaults to the bounds of the base loss, if it has any,
            or else to the spec of its actor.
        bounds: ``(low, high)`` instead of ``action_spec``.
        actor_q: Q in the objective: ``"first"``, the first critic; ``"mean"`` or ``"min"`` over
            the critics; ``"advantage"``, the minimum minus the base's V(s). Defaults to
            ``"first"``.
        distance: ``"sinkhorn"`` or ``"gaussian_w2"``. Defaults to ``"sinkhorn"``.
        num_samples: K, actions per state and actor. Defaults to ``4``; deterministic actors take
            one.
        blur: regularisation of the Sinkhorn divergence. Defaults to ``0.05``.
        w2_backend: see :func:`~pogo_torchrl.sinkhorn_divergence`. Defaults to ``"tensorized"``.
        q_normalization: ``"mean_abs"``, or ``None`` for :math:`\lambda = \alpha`. Defaults to
            ``"mean_abs"``.
        alpha: weight of the Q term. Defaults to ``1.0``.

    The output of :meth:`forward` is that of the base loss and ``loss_chain``, the sum of the
    :math:`L_i`, as well as, without gradient, ``chain_loss_i``, ``q_actor_i``, ``w2_i`` and
    ``lmbd_i``. ``set_keys``, ``make_value_estimator`` and target updates pass through to the base,
    and so do all attributes that the chain does not have.

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

    def __init__(
        self,
        base_loss: LossModule,
        *,
        w2_weights: Sequence[float] | None = None,
        step_sizes: Sequence[float] | None = None,
        action_spec: TensorSpec | None = None,
        bounds: tuple | None = None,
        actor_q: Literal["first", "mean", "min", "advantage"] = "first",
        distance: Literal["sinkhorn", "gaussian_w2"] = "sinkhorn",
        num_samples: int = 4,
        blur: float = 0.05,
        w2_backend: Literal["tensorized", "online", "auto", "fast", "exact"] = "tensorized",
        q_normalization: Literal["mean_abs"] | None = "mean_abs",
        alpha: float = 1.0,
    ) -> None:
        check_base(base_loss)
        super().__init__()
        self.base_loss = base_loss
        check_choice("actor_q", actor_q, ACTOR_Q)
        check_choice("distance", distance, DISTANCES)
        check_choice("w2_backend", w2_backend, BACKENDS)
        check_choice("q_normalization", q_normalization, ("mean_abs", None))
        check_integer("num_samples", num_samples)
        check_positive("blur", blur)
        check_positive("alpha", alpha)
        if actor_q == "advantage" and not hasattr(base_loss, "value_network_params"):
            raise ValueError(
                f"actor_q='advantage' needs a value network, which {type(base_loss).__name__} does "
                "not have: use 'first', 'mean' or 'min'."
            )
        self.actor_q = actor_q
        self.distance = distance
        self.num_samples = num_samples
        self.blur = blur
        self.w2_backend = w2_backend
        self.q_normalization = q_normalization
        self.alpha = alpha
        self.reduction = getattr(base_loss, "reduction", "mean")
        self.use_prioritized_weights = getattr(base_loss, "use_prioritized_weights", "auto")

        self.w2_weights: tuple[float, ...] = ()
        self.__dict__["actor_network"] = base_loss.actor_network  # registered by the base
        if action_spec is None and bounds is None and hasattr(base_loss, "min_action"):
            bounds = base_loss.min_action, base_loss.max_action
        key = self.tensor_keys.action
        low, high = action_bounds(action_spec, bounds, self.actor(0), key, owner="JKOChain")
        self.register_buffer("action_low", low)
        self.register_buffer("action_high", high)
        self.w2_weights = self._weights(w2_weights, step_sizes)
        for i in range(1, len(self.w2_weights) + 1):
            setattr(self, f"chain_actor_{i}_params", copy.deepcopy(self._params(0)))
        share_update_marks(self, base_loss)

    def _weights(
        self, weights: Sequence[float] | None, sizes: Sequence[float] | None
    ) -> tuple[float, ...]:
        if weights is not None and sizes is None:
            return check_weights(weights)
        if sizes is None or weights is not None:
            raise ValueError("JKOChain needs either w2_weights or step_sizes, one per added actor.")
        if not self.action_low.dim():
            raise ValueError(
                "step_sizes depend on the number of action dimensions, which bounds=(low, high) of "
                "two numbers do not tell: pass action_spec=Bounded(...)."
            )
        dim = self.action_low.shape[-1]
        return tuple(self.alpha / (h * dim) for h in check_step_sizes(sizes, 1))

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
        losses, metadata = [], {}
        for i in range(1, self.num_actors) if index is None else (index,):
            action, distance = self._proximal_term(tensordict, i)
            q = self._q(tensordict, action)
            scale = functional.q_scale(q, self.alpha, self.q_normalization)
            weight = self.w2_weights[i - 1]
            loss = functional.jko_loss(q, distance, scale=scale, weight=weight)
            losses.append(self.reduce(loss, tensordict))
            metadata[f"chain_loss_{i}"] = loss.detach().mean()
            metadata[f"q_actor_{i}"] = q.detach().mean()
            metadata[f"w2_{i}"] = distance.detach().mean()
            metadata[f"lmbd_{i}"] = scale
        return sum(losses[1:], losses[0]), metadata

    def _proximal_term(self, batch: TensorDictBase, index: int) -> tuple[Tensor, Tensor]:
        """An action of actor i for every state ``[*B, d]``, and its distance to i - 1 ``[*B]``."""
        if self.distance == "gaussian_w2":
            gaussian = self._gaussian(index, batch)
            with torch.no_grad():
                reference = self._gaussian(index - 1, batch)
            low, high = self.action_low, self.action_high
            loc, loc_0 = (functional.to_unit_box(g.mean, low, high) for g in (gaussian, reference))
            scale, scale_0 = (2 * g.stddev / (high - low) for g in (gaussian, reference))
            return gaussian.rsample(), functional.gaussian_w2(loc, scale, loc_0, scale_0)
        samples = self._samples(index, batch)
        with torch.no_grad():
            references = self._samples(index - 1, batch)
        distance = unit_box_divergence(
            samples,
            references,
            self.action_low,
            self.action_high,
            blur=self.blur,
            backend=self.w2_backend,
        )
        return samples[..., 0, :], distance

    def _samples(self, index: int, batch: TensorDictBase) -> Tensor:
        """Reparametrised actions ``[*B, K, d]`` of an actor, on the graph of its parameters."""
        state = batch.select(*self.actor_network.in_keys, strict=False)
        count = 1 if self.deterministic else self.num_samples
        state = state.unsqueeze(-1).expand(*state.batch_size, count)
        network = self.actor_network
        with self._params(index).to_module(network):
            if hasattr(network, "get_dist"):
                return network.get_dist(state).rsample()
            return network(state).get(self.tensor_keys.action)

    def _gaussian(self, index: int, batch: TensorDictBase) -> Independent:
        state = batch.select(*self.actor_network.in_keys, strict=False)
        found = None
        if hasattr(self.actor_network, "get_dist"):
            with self._params(index).to_module(self.actor_network):
                found = self.actor_network.get_dist(state)
        if isinstance(found, Independent) and isinstance(found.base_dist, Normal):
            return found
        raise ValueError(
            f"distance='gaussian_w2' needs an actor with an IndependentNormal, not "
            f"{type(found if found is not None else self.actor_network).__name__}: use "
            "distance='sinkhorn'."
        )

    def _q(self, batch: TensorDictBase, action: Tensor) -> Tensor:
        """Q of the base's critics ``[*B]``, at parameters without gradient."""
        base = self.base_loss
        critics = base.qvalue_network_params.data
        critics = critics.unbind(0) if critics.ndim else (critics,)
        values = []
        for critic in critics[:1] if self.actor_q == "first" else critics:
            state = batch.select(*base.qvalue_network.in_keys, strict=False)
            state.set(self.tensor_keys.action, action)
            with critic.to_module(base.qvalue_network):
                out = base.qvalue_network(state)
            values.append(out.get(self.tensor_keys.state_action_value).squeeze(-1))
        q = torch.stack(values)
        if self.actor_q in ("first", "mean"):
            return q.mean(0)
        q = q.min(0)[0]
        if self.actor_q == "min":
            return q
        state = batch.select(*base.value_network.in_keys, strict=False)
        with torch.no_grad(), base.value_network_params.data.to_module(base.value_network):
            return q - base.value_network(state).get(self.tensor_keys.value).squeeze(-1)

    # ------------------------------------------------------------------ actors and parameters

    @property
    def num_actors(self) -> int:
        """Number of actors, the base's included."""
        return len(self.w2_weights) + 1

    @property
    def deterministic(self) -> bool:
        """Whether the base's actor is deterministic; one action per state is then enough."""
        if not hasattr(self.actor_network, "get_dist"):
            return not any(isinstance(m, TransportActor) for m in self.actor_network.modules())
        kind = getattr(self.actor_network[-1], "distribution_class", None)
        return isinstance(kind, type) and issubclass(kind, Delta | TanhDelta)

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

    def restart(self) -> None:
        """Reset every added actor to a copy of the base's actor, e.g. after its training."""
        for i in range(1, self.num_actors):
            self._params(i).data.update_(self._params(0).data)

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
        names = ("chain_loss", "q_actor", "w2", "lmbd")
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


def first_actor_params(base: LossModule) -> TensorDictParams:
    """Parameters of the base's actor, or of the first one of a chain."""
    name = "actor_network_0_params" if isinstance(base, ChainLoss) else "actor_network_params"
    return getattr(base, name)


def check_base(base: LossModule) -> None:
    """Check that a loss can be the base of a chain.

    Raises:
        TypeError: if it is not a loss module.
        ValueError: if it lacks a network, or its actor or actions are not supported; the message
            names what is missing.
    """
    name = type(base).__name__
    if not isinstance(base, LossModule):
        raise TypeError(f"base_loss must be a TorchRL LossModule, not {name}.")
    missing = [
        attribute
        for attribute in ("actor_network", "qvalue_network")
        if getattr(base, f"{attribute}_params", None) is None
    ]
    if missing:
        raise ValueError(
            f"{name} cannot be the base of a JKOChain: it has no {' and no '.join(missing)}. "
            "Losses with both are TD3BCLoss, IQLLoss, CQLLoss, TD3Loss, SACLoss and REDQLoss."
        )
    if getattr(base, "action_space", None) is not None:
        raise ValueError(
            f"{name} has discrete actions (action_space={base.action_space}); a JKOChain moves "
            "continuous actions."
        )
    actor = base.actor_network
    recurrent = [type(m).__name__ for m in actor.modules() if isinstance(m, LSTMModule | GRUModule)]
    if recurrent:
        raise ValueError(
            f"the actor of {name} is recurrent ({', '.join(recurrent)}); a JKOChain needs an actor "
            "that maps a state to an action."
        )
    values = [*first_actor_params(base).values(True, True)]
    if any(is_lazy(value) for value in values):
        raise ValueError(
            f"the actor of {name} has lazy parameters: run it once on a batch before the loss is "
            "created, so that the chain can copy them."
        )
    storages = {value.data_ptr() for value in base.qvalue_network_params.values(True, True)}
    if any(value.numel() and value.data_ptr() in storages for value in values):
        raise ValueError(
            f"the actor and the critics of {name} share parameters; a JKOChain needs them apart."
        )
