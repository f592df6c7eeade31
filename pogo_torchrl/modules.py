"""Networks: actors, critics, and reinitialised copies of both."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModule, dispatch
from torch import Tensor, nn
from torchrl.data import Bounded, Composite, TensorSpec
from torchrl.modules import MLP, IndependentNormal, ProbabilisticActor, ValueOperator

from pogo_torchrl.actors import (
    Normalized,
    TransportActor,
    TransportNet,
    check_no_more,
    check_sizes,
    is_count,
    make_transport_net,
    noise_reader,
)
from pogo_torchrl.policy_nets import ClippedActor, GaussianNet, make_gaussian_net
from pogo_torchrl.specs import action_entry, bounded_action_spec

__all__ = [
    "Normalized",
    "QValueOperator",
    "TransportActor",
    "TransportNet",
    "as_transport_actor",
    "fresh_copies",
    "gaussian_actor",
    "is_count",
    "make_actor",
    "make_gaussian_actor",
    "make_qvalue",
    "make_transport_net",
    "noise_reader",
    "redraw_parameters",
]


class QValueOperator(ValueOperator):
    """A TorchRL ``ValueOperator`` that writes the network's output without conversion.

    In every call, ``ValueOperator`` itself checks whether pandas is installed and the value is one
    of its tables (tensordict 0.14), which takes a tenth of the time of an eager update.
    """

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase, *args: Any, **kwargs: Any) -> TensorDictBase:
        """Write the value, of shape ``[*B, 1]``, of the state and action to ``tensordict``."""
        check_no_more(self.in_keys, args, kwargs)
        inputs = [tensordict.get(key) for key in self.in_keys]
        return tensordict.set(self.out_keys[0], self.module(*inputs))


def make_actor(
    observation_dim: int, action_spec: TensorSpec, hidden_sizes: Sequence[int] = (256, 256)
) -> TransportActor:
    r"""Create a transport-map actor :math:`T(s, z)` with the default network.

    The network is an MLP on the concatenation ``[s, z]`` with ReLU activations; see
    :class:`TransportActor` for the map and for how z is drawn.

    Args:
        observation_dim: n, the size of ``observation``.
        action_spec: bounded spec of shape ``[d]``, or a ``Composite`` that contains it under
            ``"action"`` or as its only entry, in the environment's units. The spec of a batched
            environment, or of several agents with the same bounds, is that of each of them.
        hidden_sizes: widths of the hidden layers. Defaults to ``(256, 256)``.

    Returns:
        A :class:`TransportActor` that reads ``observation`` of shape ``[*B, n]`` (and optionally
        ``noise`` of shape ``[*B, d]``) and writes ``action`` of shape ``[*B, d]``, or the only
        entry of the ``Composite``.

    Raises:
        ValueError: if the action spec is not a ``Bounded`` spec with finite bounds, or a size is
            not an integer >= 1.

    Example:
        >>> import torch
        >>> from torchrl.data import Bounded
        >>> actor = make_actor(11, Bounded(low=-torch.ones(3), high=torch.ones(3)))
        >>> actor(observation=torch.zeros(7, 11)).shape
        torch.Size([7, 3])
    """
    key: NestedKey = "action"
    if isinstance(action_spec, Composite):
        key = action_entry(action_spec, key)
    spec = bounded_action_spec(action_spec, key)
    net = make_transport_net(observation_dim, spec.shape[-1], hidden_sizes)
    return TransportActor(net, spec, out_keys=[key])


def make_qvalue(
    observation_dim: int,
    action_dim: int,
    hidden_sizes: Sequence[int] = (256, 256),
    layer_norm: bool = False,
) -> ValueOperator:
    """Create a critic Q(s, a): an MLP on the concatenation ``[s, a]`` with ReLU activations.

    Args:
        observation_dim: n, the size of ``observation``.
        action_dim: d, the size of ``action``.
        hidden_sizes: widths of the hidden layers. Defaults to ``(256, 256)``.
        layer_norm: apply LayerNorm after each hidden layer, which limits the extrapolation of Q to
            actions outside the dataset (Ball et al., *Efficient Online Reinforcement Learning with
            Offline Data*, 2023, arXiv:2302.02948). Defaults to ``False``.

    Returns:
        A :class:`QValueOperator` (a TorchRL ``ValueOperator``) that reads ``observation`` of shape
        ``[*B, n]`` and ``action`` of shape ``[*B, d]`` and writes ``state_action_value`` of shape
        ``[*B, 1]``.

    Raises:
        ValueError: if a size is not an integer >= 1.

    Example:
        >>> import torch
        >>> qvalue = make_qvalue(11, 3)
        >>> qvalue(observation=torch.zeros(7, 11), action=torch.zeros(7, 3)).shape
        torch.Size([7, 1])
    """
    check_sizes(observation_dim, action_dim, hidden_sizes)
    mlp = MLP(
        in_features=observation_dim + action_dim,
        out_features=1,
        num_cells=list(hidden_sizes),
        activation_class=nn.ReLU,
        norm_class=nn.LayerNorm if layer_norm else None,
        norm_kwargs=[{"normalized_shape": width} for width in hidden_sizes] if layer_norm else None,
    )
    return QValueOperator(mlp, in_keys=["observation", "action"])


def fresh_copies(
    module: nn.Module, count: int, name: str, *, reinitialise: bool = True
) -> list[nn.Module]:
    """Return the module itself and ``count - 1`` copies.

    Args:
        module: the module to copy.
        count: number of modules returned.
        name: name of the module, for messages.
        reinitialise: draw new parameters for the copies. Defaults to ``True``.

    Raises:
        ValueError: if a submodule owns parameters but has no ``reset_parameters`` method.
    """
    copies = [module]
    for _ in range(count - 1):
        twin = copy.deepcopy(module)
        if reinitialise:
            redraw_parameters(twin, name)
        copies.append(twin)
    return copies


def redraw_parameters(module: nn.Module, name: str) -> None:
    """Call ``reset_parameters`` of every submodule that owns parameters.

    Raises:
        ValueError: if a submodule owns parameters but has no such method.
    """
    for submodule in module.modules():
        if next(submodule.parameters(recurse=False), None) is None:
            continue
        reset = getattr(submodule, "reset_parameters", None)
        if reset is None:
            raise ValueError(
                f"{name} cannot be copied with reinitialised parameters: its submodule "
                f"{type(submodule).__name__} has no reset_parameters(). Pass a list of {name}s."
            )
        reset()


class _Moments(nn.Module):
    """Mean and standard deviation of a Gaussian in the environment's units."""

    action_loc: Tensor
    action_scale: Tensor

    def __init__(self, net: GaussianNet, spec: Bounded) -> None:
        super().__init__()
        self.net, self.spec = net, spec
        low, high = spec.space.low, spec.space.high
        self.register_buffer("action_loc", (high + low) / 2)
        self.register_buffer("action_scale", (high - low) / 2)

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        loc, scale = self.net.moments(observation)
        return self.action_loc + self.action_scale * loc, self.action_scale * scale


def gaussian_actor(net: GaussianNet, spec: Bounded) -> ProbabilisticActor:
    """Return a TorchRL actor with a Gaussian's network, for losses that need its likelihood.

    Args:
        net: the network.
        spec: bounds of the actions, of shape ``[d]``.

    Example:
        >>> import torch
        >>> from pogo_torchrl.policy_nets import make_gaussian_net
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


def make_gaussian_actor(
    observation_dim: int, action_spec: TensorSpec, hidden_sizes: Sequence[int] = (256, 256)
) -> ProbabilisticActor:
    """Create an actor with a diagonal Gaussian, as in the paper, with the default network.

    Its mean is within the bounds, and its standard deviation does not depend on the state. Actions
    that it draws may be outside the bounds.

    Args:
        observation_dim: n, the size of ``observation``.
        action_spec: bounded spec of shape ``[d]``, as for :func:`make_actor`.
        hidden_sizes: widths of the hidden layers of the mean. Defaults to ``(256, 256)``.

    Returns:
        A TorchRL ``ProbabilisticActor`` with an ``IndependentNormal``, which reads ``observation``
        of shape ``[*B, n]`` and writes ``loc``, ``scale`` and ``action`` of shape ``[*B, d]``.
        Without an exploration type, the action is the mean.

    Raises:
        ValueError: if the action spec is not a ``Bounded`` spec with finite bounds, or a size is
            not an integer >= 1.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.data import Bounded
        >>> actor = make_gaussian_actor(11, Bounded(low=-torch.ones(3), high=torch.ones(3)))
        >>> state = TensorDict({"observation": torch.zeros(7, 11)}, [7])
        >>> actor.get_dist(state).rsample().shape
        torch.Size([7, 3])
    """
    spec = bounded_action_spec(action_spec, "action")
    check_sizes(observation_dim, spec.shape[-1], hidden_sizes)
    return gaussian_actor(make_gaussian_net(observation_dim, spec.shape[-1], hidden_sizes), spec)


def as_transport_actor(actor: nn.Module) -> TransportActor:
    """Return an actor as a transport map that shares its parameters.

    Args:
        actor: a :class:`~pogo_torchrl.TransportActor` or the result of :func:`gaussian_actor`.
    """
    if isinstance(actor, TransportActor):
        return actor
    moments = next(module for module in actor.modules() if isinstance(module, _Moments))
    return ClippedActor(moments.net, moments.spec).to(moments.action_loc.device)
