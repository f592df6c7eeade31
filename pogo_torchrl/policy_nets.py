"""Policies of other algorithms as transport maps: deterministic ones and Gaussians."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from tensordict.nn import AddStateIndependentNormalScale, TensorDictModule
from torch import Tensor, nn
from torchrl.data import Bounded
from torchrl.modules import MLP, IndependentNormal, ProbabilisticActor

from pogo_torchrl.modules import TransportActor, TransportNet


class DeterministicNet(TransportNet):
    """A network f(s, z) = f(s) that ignores z.

    Args:
        mlp: network from ``[*B, n]`` to ``[*B, d]``.
        observation_dim: n, used to validate observations.
    """

    def forward(self, *inputs: Tensor) -> Tensor:
        """Compute ``f(s)``; the inputs are those of :class:`~pogo_torchrl.modules.TransportNet`."""
        self.check(inputs[:-1])
        return self.mlp(torch.cat(inputs[:-1], -1))


class GaussianNet(TransportNet):
    r"""The map :math:`f(s, z) = \tanh m(s) + \sigma z` of a Gaussian with a constant deviation.

    Args:
        mlp: network m from ``[*B, n]`` to ``[*B, d]``.
        observation_dim: n, used to validate observations.
        action_dim: d.
    """

    def __init__(self, mlp: nn.Module, observation_dim: int, action_dim: int) -> None:
        super().__init__(mlp, observation_dim)
        self.spread = AddStateIndependentNormalScale(action_dim, scale_lb=math.exp(-5))

    def moments(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation, for actions in [-1, 1]."""
        return self.spread(self.mlp(observation).tanh())

    def forward(self, *inputs: Tensor) -> Tensor:
        """Compute ``f(s, z)``; the inputs are those of :class:`~pogo_torchrl.TransportActor`."""
        self.check(inputs[:-1])
        loc, scale = self.moments(torch.cat(inputs[:-1], -1))
        return loc + scale * inputs[-1]


class ClippedActor(TransportActor):
    r"""A :class:`~pogo_torchrl.TransportActor` that clips f to [-1, 1] in place of the tanh.

    It is the policy of a Gaussian (:class:`GaussianNet`) whose samples are clipped to the bounds.
    """

    def squash(self, output: Tensor) -> Tensor:
        """Clip the output of the network to [-1, 1]."""
        return output.clamp(-1, 1)


class _Moments(nn.Module):
    """Mean and standard deviation of a Gaussian in the environment's units."""

    def __init__(self, net: GaussianNet, spec: Bounded) -> None:
        super().__init__()
        self.net, self.spec = net, spec
        low, high = spec.space.low, spec.space.high
        self.register_buffer("action_loc", (high + low) / 2)
        self.register_buffer("action_scale", (high - low) / 2)

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        loc, scale = self.net.moments(observation)
        return self.action_loc + self.action_scale * loc, self.action_scale * scale


def make_deterministic_net(
    observation_dim: int, action_dim: int, hidden_sizes: Sequence[int] = (256, 256)
) -> DeterministicNet:
    """Create the network of a deterministic policy, an MLP with ReLU activations.

    Args:
        observation_dim: n, the size of the observation.
        action_dim: d, the size of the action.
        hidden_sizes: widths of the hidden layers. Defaults to ``(256, 256)``.
    """
    return DeterministicNet(_mlp(observation_dim, action_dim, hidden_sizes), observation_dim)


def make_gaussian_net(
    observation_dim: int, action_dim: int, hidden_sizes: Sequence[int] = (256, 256)
) -> GaussianNet:
    """Create the network of a Gaussian policy, an MLP with ReLU activations for its mean.

    Args:
        observation_dim: n, the size of the observation.
        action_dim: d, the size of the action.
        hidden_sizes: widths of the hidden layers. Defaults to ``(256, 256)``.
    """
    mlp = _mlp(observation_dim, action_dim, hidden_sizes)
    return GaussianNet(mlp, observation_dim, action_dim)


def _mlp(inputs: int, outputs: int, hidden_sizes: Sequence[int]) -> MLP:
    return MLP(
        in_features=inputs,
        out_features=outputs,
        num_cells=list(hidden_sizes),
        activation_class=nn.ReLU,
    )


def gaussian_actor(net: GaussianNet, spec: Bounded) -> ProbabilisticActor:
    """Return a TorchRL actor with a Gaussian's network, for losses that need its likelihood.

    Args:
        net: the network.
        spec: bounds of the actions, of shape ``[d]``.

    Example:
        >>> import torch
        >>> spec = Bounded(low=-torch.ones(2), high=torch.ones(2))
        >>> actor = gaussian_actor(make_gaussian_net(3, 2, [8]), spec)
        >>> same = as_transport_actor(actor)
        >>> state = torch.randn(5, 3)
        >>> torch.equal(same(observation=state), actor[0](observation=state)[0])
        True
    """
    return ProbabilisticActor(
        TensorDictModule(_Moments(net, spec), in_keys=["observation"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        spec=spec,
        distribution_class=IndependentNormal,
        distribution_kwargs={"tanh_loc": False},
    )


def as_transport_actor(actor: nn.Module) -> TransportActor:
    """Return an actor as a transport map that shares its parameters.

    Args:
        actor: a :class:`~pogo_torchrl.TransportActor` or the result of :func:`gaussian_actor`.
    """
    if isinstance(actor, TransportActor):
        return actor
    moments = actor[0].module
    return ClippedActor(moments.net, moments.spec).to(moments.action_loc.device)
