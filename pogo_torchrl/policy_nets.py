"""Policies of other algorithms as transport maps: deterministic ones and Gaussians.

Needs torch and tensordict only, as :mod:`pogo_torchrl.actors`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from tensordict.nn import AddStateIndependentNormalScale
from torch import Tensor, nn

from pogo_torchrl.actors import TransportActor, TransportNet, make_mlp


class DeterministicNet(TransportNet):
    """A network f(s, z) = f(s) that ignores z.

    Args:
        mlp: network from ``[*B, n]`` to ``[*B, d]``.
        observation_dim: n, used to validate observations.
    """

    def forward(self, *inputs: Tensor) -> Tensor:
        """Compute ``f(s)``; the inputs are those of :class:`~pogo_torchrl.actors.TransportNet`."""
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
        """Compute ``f(s, z)``, see :class:`~pogo_torchrl.actors.TransportNet`."""
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


def make_deterministic_net(
    observation_dim: int, action_dim: int, hidden_sizes: Sequence[int] = (256, 256)
) -> DeterministicNet:
    """Create the network of a deterministic policy, an MLP with ReLU activations.

    Args:
        observation_dim: n, the size of the observation.
        action_dim: d, the size of the action.
        hidden_sizes: widths of the hidden layers. Defaults to ``(256, 256)``.
    """
    return DeterministicNet(make_mlp(observation_dim, action_dim, hidden_sizes), observation_dim)


def make_gaussian_net(
    observation_dim: int, action_dim: int, hidden_sizes: Sequence[int] = (256, 256)
) -> GaussianNet:
    """Create the network of a Gaussian policy, an MLP with ReLU activations for its mean.

    Args:
        observation_dim: n, the size of the observation.
        action_dim: d, the size of the action.
        hidden_sizes: widths of the hidden layers. Defaults to ``(256, 256)``.
    """
    mlp = make_mlp(observation_dim, action_dim, hidden_sizes)
    return GaussianNet(mlp, observation_dim, action_dim)
