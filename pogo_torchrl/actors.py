"""Transport-map actors and their networks.

Needs torch and tensordict only, so that trained actors can be deployed without TorchRL.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import (
    InteractionType,
    TensorDictModule,
    TensorDictModuleBase,
    dispatch,
)
from tensordict.nn.probabilistic import interaction_type
from torch import Tensor, nn

from pogo_torchrl.specs import Bounds, bounded_action_spec

if TYPE_CHECKING:
    from torchrl.data import TensorSpec


class TransportActor(TensorDictModule):
    r"""Stochastic policy given by a transport map :math:`a = T(s, z)`, :math:`z \sim N(0, I)`.

    .. math::
        T(s, z) = \tfrac{high + low}{2} + \tfrac{high - low}{2} \tanh f(s, z),
        \qquad \dim z = \dim a

    If the tensordict contains ``noise_key``, its value is used as z. Otherwise z depends on the
    exploration type: z ~ N(0, I) for ``RANDOM``, and z = 0 for ``DETERMINISTIC``, ``MEAN`` and
    ``MODE``. If no exploration type is set, z = 0, as in TorchRL's probabilistic modules.

    Source: *Policy Optimization as a Gradient Flow in Offline Reinforcement Learning* (POGO).

    Args:
        module: the network f, which maps ``(observation, z)`` to a tensor of shape ``[*B, d]``.
            With several ``in_keys``, it receives one argument per key, in their order, then z.
        action_spec: a :class:`~torchrl.data.Bounded` spec of shape ``[d]``, or a ``Composite`` that
            contains it under the action key or as its only entry. Bounds are in the environment's
            units, may differ between dimensions and need not be symmetric. Without TorchRL, the
            :class:`~pogo_torchrl.specs.Bounds` alone.
        in_keys: keys of the observations, each of shape ``[*B, n]``, such as
            ``["observation", "goal"]``; the default network concatenates them. Defaults to
            ``["observation"]``.
        out_keys: key of the action. Defaults to ``["action"]``.
        noise_key: key of an optional z of shape ``[*B, d]``. Defaults to ``"noise"``.

    Raises:
        ValueError: if the action spec is not a ``Bounded`` spec with finite bounds; when called, if
            z does not have the shape of the action.
        KeyError: when called, if an observation is missing.

    Images and other observations that are not vectors are encoded first, by any TorchRL module
    that writes a vector: ``TensorDictSequential(encoder, TransportActor(...))``. The losses,
    ``shared_noise`` and the trainer treat such a sequence as the transport map at its end.

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

        With a goal, and with images:

        >>> from tensordict.nn import TensorDictModule, TensorDictSequential
        >>> from torchrl.modules import ConvNet
        >>> in_keys = ["observation", "goal"]
        >>> actor = TransportActor(make_transport_net(3 + 2, 2), spec, in_keys=in_keys)
        >>> actor(observation=torch.zeros(5, 3), goal=torch.zeros(5, 2)).shape
        torch.Size([5, 2])
        >>> encoder = TensorDictModule(ConvNet(num_cells=[8], kernel_sizes=4), ["pixels"], ["code"])
        >>> head = TransportActor(make_transport_net(8 * 5 * 5, 2), spec, in_keys=["code"])
        >>> actor = TensorDictSequential(encoder, head)
        >>> actor(pixels=torch.zeros(5, 3, 8, 8))[-1].shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        module: nn.Module,
        action_spec: TensorSpec | Bounds,
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
        """Dimension of z, equal to the action dimension."""
        return self.action_spec.shape[-1]

    @property
    def _dispatch_keys(self) -> list[NestedKey]:
        return [*self.in_keys, self.noise_key]

    @dispatch(source="_dispatch_keys", auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase, *args: Any, **kwargs: Any) -> TensorDictBase:
        """Write the action for the observations (and noise) of ``tensordict`` to it.

        Args:
            tensordict: holds the observations, each of shape ``[*B, n]``, and optionally the noise,
                of shape ``[*B, d]``.
            *args: none, as for ``**kwargs``: :func:`torch.export.export` reads from the signature
                that observations can be passed by position or by name.
            **kwargs: none.

        Returns:
            The same tensordict with the action, of shape ``[*B, d]``.

        Raises:
            KeyError: if an observation is missing.
            TypeError: if there is an argument that is neither an observation nor the noise.
            ValueError: if the noise does not have the shape of the action.
        """
        check_no_more(self._dispatch_keys, args, kwargs)
        observations = [tensordict.get(key) for key in self.in_keys]
        noise = tensordict.get(self.noise_key, None)
        for key, observation in zip(self.in_keys, observations):
            if observation is None:
                raise KeyError(
                    f"TransportActor needs the key {key!r}, but the tensordict has "
                    f"{list(tensordict.keys())}: add it, or pass in_keys to TransportActor."
                )
        shape = (*observations[0].shape[:-1], self.noise_dim)
        if noise is None:
            noise = self._draw(shape, observations)
        elif noise.shape != shape:
            raise ValueError(
                f"{self.noise_key!r} has shape {tuple(noise.shape)}, but must be {shape}: one z of "
                "the action's size per observation."
            )
        action = self.squash(self.module(*observations, noise))
        return tensordict.set(self.out_keys[0], self.action_loc + self.action_scale * action)

    def squash(self, output: Tensor) -> Tensor:
        """Map the output of the network to [-1, 1]."""
        return output.tanh()

    def _draw(self, shape: tuple[int, ...], observations: Sequence[Tensor]) -> Tensor:
        floats = [x.dtype for x in observations if x.is_floating_point()]
        dtype, device = (*floats, self.action_loc.dtype)[0], observations[0].device
        if interaction_type() == InteractionType.RANDOM:
            return torch.randn(shape, dtype=dtype, device=device)
        return torch.zeros(shape, dtype=dtype, device=device)


def check_no_more(keys: Sequence[NestedKey], args: tuple, kwargs: dict[str, Any]) -> None:
    """Reject arguments that are none of a module's inputs, such as misspelt ones."""
    if args or kwargs:
        raise TypeError(
            f"unexpected argument(s) {list(kwargs) or len(args)}: the inputs are {list(keys)}, as "
            "tensors or in a tensordict."
        )


def noise_reader(policy: nn.Module) -> TensorDictModuleBase | None:
    """Return the part of a policy that reads its noise z from the tensordict, under ``noise_key``.

    Args:
        policy: a :class:`TransportActor`, or a sequence of modules with one in it (behind an
            encoder, for example).

    Returns:
        The policy itself or the only such module in it; ``None`` if there is none, or several,
        which cannot share one z.
    """
    if hasattr(policy, "noise_key"):
        return policy
    parts = [part for part in policy.modules() if isinstance(part, TensorDictModuleBase)]
    readers = [part for part in parts if hasattr(part, "noise_key")]
    return readers[0] if len(readers) == 1 else None


class TransportNet(nn.Module):
    """MLP on the concatenation ``[s, z]``: the network f of a :class:`TransportActor`.

    Args:
        mlp: network from ``[*B, n + d]`` to ``[*B, d]``.
        observation_dim: n, the size of all observations together, used to validate them. Defaults
            to ``None`` (no validation).
    """

    def __init__(self, mlp: nn.Module, observation_dim: int | None = None) -> None:
        super().__init__()
        self.mlp = mlp
        self.observation_dim = observation_dim

    def forward(self, *inputs: Tensor) -> Tensor:
        """Compute ``f(s, z)``.

        Args:
            *inputs: one or several observations, of shape ``[*B, n_i]``, which make up s in this
                order, then z, of shape ``[*B, d]``.

        Returns:
            A tensor of shape ``[*B, d]``.

        Raises:
            ValueError: if the observations do not have size n in total, are integers, or are
                float64 while the network is not.
        """
        self.check(inputs[:-1])
        return self.mlp(torch.cat(inputs, -1))

    def check(self, observations: Sequence[Tensor]) -> None:
        """Check the sizes and dtypes of observations; :meth:`forward` says what is raised."""
        if self.observation_dim is None:
            return
        size = sum(x.shape[-1] if x.dim() else 0 for x in observations)
        leading = observations[0].shape[:-1]
        if size != self.observation_dim or any(x.shape[:-1] != leading for x in observations[1:]):
            shapes = " and ".join(str(tuple(x.shape)) for x in observations)
            raise ValueError(
                f"observations have shape {shapes}, but this network expects "
                f"[*B, {self.observation_dim}]{' in total' if len(observations) > 1 else ''}: pass "
                "observations of its environment."
            )
        # None while a loss calls the network with its own parameters; losses validate batches.
        parameter = next(self.mlp.parameters(), None)
        if parameter is None:
            return
        for observation in observations:
            wide = observation.dtype == torch.float64 != parameter.dtype
            if wide or not observation.is_floating_point():
                raise ValueError(
                    f"observations are {observation.dtype}, but this network expects "
                    f"{parameter.dtype}: convert them with .to({parameter.dtype})."
                )


class Normalized(nn.Module):
    """A network f(s, z) on raw observations: ``f((s - mean) / std, z)``.

    It stores the observation normalisation of the dataset inside an exported actor.

    Args:
        module: the network f on normalised observations.
        mean: mean of the observations, of shape ``[n]``; several observations are one after the
            other, as in ``in_keys``.
        std: standard deviation of the observations, of shape ``[n]``.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, module: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.module = module
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Compute ``f`` on the normalised observations, which come before z."""
        *observations, noise = inputs
        sizes = [observation.shape[-1] for observation in observations]
        normalised = (torch.cat(observations, -1) - self.mean) / self.std
        return self.module(*normalised.split(sizes, -1), noise)


def make_transport_net(
    observation_dim: int, action_dim: int, hidden_sizes: Sequence[int] = (256, 256)
) -> TransportNet:
    """Create the default network f(s, z): an MLP on ``[s, z]`` with ReLU activations.

    Args:
        observation_dim: n, the size of the observation, or of all observations together.
        action_dim: d, the size of the action and of z.
        hidden_sizes: widths of the hidden layers. Defaults to ``(256, 256)``.

    Raises:
        ValueError: if a size is not an integer >= 1.
    """
    check_sizes(observation_dim, action_dim, hidden_sizes)
    mlp = make_mlp(observation_dim + action_dim, action_dim, hidden_sizes)
    return TransportNet(mlp, observation_dim)


def make_mlp(inputs: int, outputs: int, hidden_sizes: Sequence[int]) -> nn.Sequential:
    """Create an MLP with ReLU activations."""
    widths = [inputs, *hidden_sizes]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], outputs))


def check_sizes(observation_dim: int, action_dim: int, hidden_sizes: Sequence[int]) -> None:
    for name, value in (("observation_dim", observation_dim), ("action_dim", action_dim)):
        if not is_count(value):
            raise ValueError(f"{name}={value!r} must be an integer >= 1.")
    sizes = list(hidden_sizes) if isinstance(hidden_sizes, Sequence) else []
    if not sizes or not all(map(is_count, sizes)):
        raise ValueError(
            f"hidden_sizes={hidden_sizes!r} must be a non-empty sequence of integers >= 1, the "
            "widths of the hidden layers, e.g. (256, 256)."
        )


def is_count(value: object) -> bool:
    """Return whether a value is an integer >= 1."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1
