"""Networks: the transport map that acts, the critic, and copies of either."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from numbers import Integral

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import InteractionType, TensorDictModule, dispatch
from torch import Tensor, nn
from torchrl.data import Bounded, Composite, TensorSpec
from torchrl.envs.utils import exploration_type
from torchrl.modules import MLP, ValueOperator


class TransportActor(TensorDictModule):
    r"""A stochastic policy as a transport map: :math:`a = T(s, z)`, :math:`z \sim N(0, I)`.

    .. math::
        T(s, z) = \tfrac{high + low}{2} + \tfrac{high - low}{2} \tanh f(s, z),
        \qquad \dim z = \dim a

    The noise z is read from the tensordict where it stands there under ``noise_key``. Otherwise it
    is drawn according to the exploration type: z = 0 under ``DETERMINISTIC``, ``MEAN`` and
    ``MODE`` (and where none is set, as in TorchRL's probabilistic modules), z ~ N(0, I) under
    ``RANDOM``.

    Source: POGO, section on transport-map policies.

    Args:
        module: the network f, called as ``module(observation, z)``, with ``[*B, d]`` out.
        action_spec: a :class:`~torchrl.data.Bounded` spec of shape ``[d]`` (or a ``Composite``
            that holds it under the action's key); bounds may differ in each dimension and need not
            be symmetric.
        in_keys: the observation's key. Defaults to ``["observation"]``.
        out_keys: the action's key. Defaults to ``["action"]``.
        noise_key: where an explicit z is looked for. Defaults to ``"noise"``.

    Raises:
        ValueError: when the action spec is not bounded, or its bounds are not finite or empty; on a
            call, when z is not of the action's size.
        KeyError: on a call without the observation.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.data import Bounded
        >>> from torchrl.envs.utils import ExplorationType, set_exploration_type
        >>> spec = Bounded(low=-torch.ones(2), high=torch.tensor([1.0, 3.0]))
        >>> actor = TransportActor(make_transport_net(3, 2), spec)
        >>> td = TensorDict({"observation": torch.zeros(5, 3)}, [5])
        >>> with set_exploration_type(ExplorationType.RANDOM):
        ...     actor(td)["action"].shape
        torch.Size([5, 2])
        >>> bool(spec.is_in(td["action"][0]))
        True
        >>> z = torch.randn(5, 2)
        >>> torch.equal(actor(td.set("noise", z))["action"], actor(td.set("noise", z))["action"])
        True
    """

    def __init__(
        self,
        module: nn.Module,
        action_spec: TensorSpec,
        *,
        in_keys: Sequence[NestedKey] = ("observation",),
        out_keys: Sequence[NestedKey] = ("action",),
        noise_key: NestedKey = "noise",
    ) -> None:
        super().__init__(module, in_keys=list(in_keys), out_keys=list(out_keys))
        self.noise_key = noise_key
        self.action_spec = bounded_action_spec(action_spec, self.out_keys[0])
        low, high = self.action_spec.space.low, self.action_spec.space.high
        self.register_buffer("action_loc", (high + low) / 2)
        self.register_buffer("action_scale", (high - low) / 2)

    @property
    def noise_dim(self) -> int:
        """Dimension of z: that of the action."""
        return self.action_spec.shape[-1]

    @property
    def _dispatch_keys(self) -> list[NestedKey]:
        return [*self.in_keys, self.noise_key]

    @dispatch(source="_dispatch_keys", auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the action for the observation (and noise) in ``tensordict``."""
        observation = tensordict.get(self.in_keys[0])
        noise = tensordict.get(self.noise_key, None)
        if observation is None:
            raise KeyError(
                f"TransportActor needs the key {self.in_keys[0]!r}, the tensordict has "
                f"{list(tensordict.keys())}: set it, or give in_keys."
            )
        if noise is None:
            noise = self._draw(observation)
        elif noise.shape != (*observation.shape[:-1], self.noise_dim):
            raise ValueError(
                f"{self.noise_key!r} has shape {tuple(noise.shape)}, it must be "
                f"{(*observation.shape[:-1], self.noise_dim)}: one z of the action's size for each "
                "observation."
            )
        action = self.action_loc + self.action_scale * self.module(observation, noise).tanh()
        return tensordict.set(self.out_keys[0], action)

    def _draw(self, observation: Tensor) -> Tensor:
        shape = (*observation.shape[:-1], self.noise_dim)
        dtype = observation.dtype if observation.is_floating_point() else self.action_loc.dtype
        if exploration_type() == InteractionType.RANDOM:
            return torch.randn(shape, dtype=dtype, device=observation.device)
        return torch.zeros(shape, dtype=dtype, device=observation.device)


class QValueOperator(ValueOperator):
    """A TorchRL ``ValueOperator`` that writes what its network gives as it is.

    ``ValueOperator`` itself asks at each call whether the value could be a pandas table, and for
    that whether pandas is installed (tensordict 0.14): a tenth of the time of an eager update.
    """

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the value of the state and action in ``tensordict``."""
        inputs = [tensordict.get(key) for key in self.in_keys]
        return tensordict.set(self.out_keys[0], self.module(*inputs))


class TransportNet(nn.Module):
    """An MLP on the concatenation ``[s, z]``: the network f inside a :class:`TransportActor`.

    Args:
        mlp: from ``[*B, n + d]`` to ``[*B, d]``.
        observation_dim: n, to check observations by. Defaults to ``None``: they are not checked.
    """

    def __init__(self, mlp: nn.Module, observation_dim: int | None = None) -> None:
        super().__init__()
        self.mlp = mlp
        self.observation_dim = observation_dim

    def forward(self, observation: Tensor, noise: Tensor) -> Tensor:
        """``f(s, z)`` of shape ``[*B, d]`` for ``s`` of ``[*B, n]`` and ``z`` of ``[*B, d]``.

        Raises:
            ValueError: when the observations are not of size n, or integers, or doubles where the
                network is not.
        """
        if self.observation_dim is not None:
            self._check(observation)
        return self.mlp(torch.cat([observation, noise], -1))

    def _check(self, observation: Tensor) -> None:
        if observation.shape[-1:] != (self.observation_dim,):
            raise ValueError(
                f"observations have shape {tuple(observation.shape)}, this network takes "
                f"[*B, {self.observation_dim}]: give observations of the environment it is for."
            )
        # There is none while a loss has put its own parameters in place; it checks its batches.
        parameter = next(self.mlp.parameters(), None)
        if parameter is None:
            return
        wide = observation.dtype == torch.float64 != parameter.dtype
        if wide or not observation.is_floating_point():
            raise ValueError(
                f"observations are {observation.dtype}, this network takes {parameter.dtype}: "
                f"convert them with .to({parameter.dtype})."
            )


class Normalized(nn.Module):
    """A network f(s, z) that takes raw observations: ``f((s - mean) / std, z)``.

    It carries the dataset's normalisation inside an actor that leaves training.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, module: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.module = module
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, observation: Tensor, noise: Tensor) -> Tensor:
        """``f`` of the normalised observation."""
        return self.module((observation - self.mean) / self.std, noise)


def make_transport_net(
    observation_dim: int, action_dim: int, hidden_sizes: Sequence[int] = (256, 256)
) -> TransportNet:
    """The default f(s, z): an MLP on ``[s, z]`` with ReLU, and z of the action's dimension."""
    _check_sizes(observation_dim, action_dim, hidden_sizes)
    return TransportNet(
        MLP(
            in_features=observation_dim + action_dim,
            out_features=action_dim,
            num_cells=list(hidden_sizes),
            activation_class=nn.ReLU,
        ),
        observation_dim,
    )


def make_actor(
    observation_dim: int, action_spec: TensorSpec, hidden_sizes: Sequence[int] = (256, 256)
) -> TransportActor:
    """A transport-map actor with the default network, freshly initialised.

    Args:
        observation_dim: size of ``observation``.
        action_spec: bounded spec of shape ``[d]``, see :class:`TransportActor`.
        hidden_sizes: widths of the hidden layers. Defaults to ``(256, 256)``.

    Returns:
        A :class:`TransportActor` from ``observation`` (and ``noise``) to ``action``.

    Raises:
        ValueError: when the action spec is not bounded, or a size is no integer >= 1.

    Example:
        >>> import torch
        >>> from torchrl.data import Bounded
        >>> actor = make_actor(11, Bounded(low=-torch.ones(3), high=torch.ones(3)))
        >>> actor(observation=torch.zeros(7, 11)).shape
        torch.Size([7, 3])
    """
    spec = bounded_action_spec(action_spec, "action")
    return TransportActor(make_transport_net(observation_dim, spec.shape[-1], hidden_sizes), spec)


def make_qvalue(
    observation_dim: int,
    action_dim: int,
    hidden_sizes: Sequence[int] = (256, 256),
    layer_norm: bool = False,
) -> ValueOperator:
    """A critic Q(s, a): an MLP on ``[s, a]`` with ReLU.

    Args:
        observation_dim: size of ``observation``.
        action_dim: size of ``action``.
        hidden_sizes: widths of the hidden layers. Defaults to ``(256, 256)``.
        layer_norm: put a LayerNorm after each hidden layer, which keeps Q from running away on
            actions that the data do not hold (Ball et al., 2023). Defaults to ``False``.

    Returns:
        A :class:`QValueOperator`, which is a TorchRL ``ValueOperator``, from ``observation``,
        ``action`` to ``state_action_value`` of shape ``[*B, 1]``.

    Example:
        >>> import torch
        >>> qvalue = make_qvalue(11, 3)
        >>> qvalue(observation=torch.zeros(7, 11), action=torch.zeros(7, 3)).shape
        torch.Size([7, 1])
    """
    _check_sizes(observation_dim, action_dim, hidden_sizes)
    mlp = MLP(
        in_features=observation_dim + action_dim,
        out_features=1,
        num_cells=list(hidden_sizes),
        activation_class=nn.ReLU,
        norm_class=nn.LayerNorm if layer_norm else None,
        norm_kwargs=[{"normalized_shape": width} for width in hidden_sizes] if layer_norm else None,
    )
    return QValueOperator(mlp, in_keys=["observation", "action"])


def _check_sizes(observation_dim: int, action_dim: int, hidden_sizes: Sequence[int]) -> None:
    for name, value in (("observation_dim", observation_dim), ("action_dim", action_dim)):
        if not is_count(value):
            raise ValueError(f"{name}={value!r} must be an integer >= 1.")
    sizes = list(hidden_sizes) if isinstance(hidden_sizes, Sequence) else []
    if not sizes or not all(map(is_count, sizes)):
        raise ValueError(
            f"hidden_sizes={hidden_sizes!r} must hold one integer >= 1 or more, the widths of the "
            "hidden layers, e.g. (256, 256)."
        )


def is_count(value: object) -> bool:
    """Whether a value is an integer of at least 1."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def bounded_action_spec(action_spec: TensorSpec, action_key: NestedKey) -> Bounded:
    """The ``Bounded`` spec of shape ``[d]`` of one action, taken out of whatever holds it.

    Raises:
        ValueError: when there is none, or its bounds are not finite or empty.
    """
    if isinstance(action_spec, Composite):
        leading = action_spec.ndim
        action_spec = action_spec[action_key]
        # an environment's batch dimensions are no part of one action
        action_spec = action_spec[(0,) * leading] if leading else action_spec
    if not isinstance(action_spec, Bounded):
        raise ValueError(
            f"action_spec must be a Bounded spec, got {type(action_spec).__name__}: POGO moves "
            "continuous actions inside finite bounds. Pass Bounded(low=..., high=...)."
        )
    low, high = action_spec.space.low, action_spec.space.high
    if low.dim() == 0 or not bool(torch.isfinite(low).all() & torch.isfinite(high).all()):
        raise ValueError(
            f"action_spec must have shape [action_dim] and finite bounds, got low={low.tolist()} "
            f"and high={high.tolist()}."
        )
    if not bool((low < high).all()):
        raise ValueError(
            "action_spec has a lower bound that is not below the upper bound: "
            f"low={low.tolist()}, high={high.tolist()}."
        )
    return action_spec


def fresh_copies(module: nn.Module, count: int, name: str) -> list[nn.Module]:
    """The module itself and ``count - 1`` copies with newly drawn parameters.

    Raises:
        ValueError: when a submodule owns parameters and cannot redraw them.
    """
    copies = [module]
    for _ in range(count - 1):
        twin = copy.deepcopy(module)
        redraw_parameters(twin, name)
        copies.append(twin)
    return copies


def redraw_parameters(module: nn.Module, name: str) -> None:
    """Call ``reset_parameters`` of every submodule that owns parameters.

    Raises:
        ValueError: when a submodule owns parameters and has no such method.
    """
    for submodule in module.modules():
        if next(submodule.parameters(recurse=False), None) is None:
            continue
        reset = getattr(submodule, "reset_parameters", None)
        if reset is None:
            raise ValueError(
                f"{name} cannot be copied with new parameters: {type(submodule).__name__} owns "
                f"parameters but has no reset_parameters(). Pass a list of {name}s instead."
            )
        reset()
