"""Networks of a chain: their parameters, averages and target copies."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

from tensordict import TensorDict, TensorDictParams
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from pogo_torchrl.modules import noise_reader, redraw_parameters
from pogo_torchrl.objectives.keyed_loss import KeyedLoss

Params = dict[str, Tensor]
"""Parameters and buffers of a network by name, the input of :func:`torch.func.functional_call`."""


class ChainNetworks(KeyedLoss):
    """The actors of a chain and their critics.

    Each actor has its own set of parameters, ``actor_network_0_params``, ...; the parameters of the
    critics are stacked in ``qvalue_network_params``.
    """

    actor_network: TensorDictModule  # shared by all actors; see actor_network_{i}_params
    actor_network_0_params: TensorDictParams
    noise_reader: Any  # the part of actor_network that reads z; None if it draws its own
    qvalue_network_params: TensorDictParams
    target_qvalue_network_params: TensorDictParams

    num_actors: int
    num_qvalue_nets: int
    chain_init: str
    average_actors: float | None
    delay_actor: bool
    delay_qvalue: bool

    def _register(
        self, actors: Sequence[TensorDictModule], qvalues: Sequence[TensorDictModule]
    ) -> None:
        """Register the parameters: one set per actor, those of the critics stacked."""
        with warnings.catch_warnings():
            # TorchRL expects class annotations, but the number of actors is only known here.
            warnings.filterwarnings("ignore", ".*part of the annotations")
            for i, actor in enumerate(actors):
                self.convert_to_functional(
                    actor, f"actor_network_{i}", create_target_params=self.delay_actor and i == 0
                )
        if self.average_actors is not None:
            for i in range(len(actors)):
                params = getattr(self, f"actor_network_{i}_params")
                average = TensorDictParams(params.data.clone(), no_convert=True)  # buffers
                setattr(self, f"average_actor_network_{i}_params", average)
        # Not submodules: the parameters are above.
        self.__dict__.update(actor_network=actors[0], noise_reader=noise_reader(actors[0]))
        # TorchRL registers no parameters for a list of one, and reinitialises a single module.
        several = len(qvalues) > 1
        self.convert_to_functional(
            list(qvalues) if several else qvalues[0],
            "qvalue_network",
            expand_dim=len(qvalues),
            create_target_params=self.delay_qvalue,
        )
        if not several:
            values = TensorDict.from_module(qvalues[0]).data.unsqueeze(0)
            for params in (self.qvalue_network_params, self.target_qvalue_network_params):
                params.data.update_(values)

    def params(self, name: str) -> Params:
        """Return the parameters and buffers of a network by name.

        Args:
            name: ``actor_network_0``, ..., ``qvalue_network``, or one of these prefixed with
                ``target_``; with ``average_actors``, also ``average_actor_network_0``, ...

        Returns:
            The tensors themselves (not copies), for :func:`torch.func.functional_call`; those of
            the critics are stacked ``[C, ...]``.
        """
        tensors = getattr(self, f"{name}_params").items(True, True)
        return {".".join(key) if isinstance(key, tuple) else key: value for key, value in tensors}

    def actor_params(self, index: int) -> list[nn.Parameter]:
        """Return the trainable parameters of one actor, for its own optimizer.

        Args:
            index: index of the actor; negative indices count from the end.

        Raises:
            IndexError: if ``index`` is out of range.

        Example:
            >>> import torch
            >>> from torchrl.data import Bounded
            >>> from pogo_torchrl import POGOLoss, make_actor, make_qvalue
            >>> spec = Bounded(low=-torch.ones(2), high=torch.ones(2))
            >>> loss = POGOLoss(make_actor(3, spec), make_qvalue(3, 2), w2_weights=(0.2, 0.5))
            >>> optimizers = [torch.optim.Adam(loss.actor_params(i), 3e-4) for i in range(2)]
        """
        params = getattr(self, f"actor_network_{self._actor_index(index)}_params")
        return [p for p in params.parameters() if p.requires_grad]

    def qvalue_params(self) -> list[nn.Parameter]:
        """Return the trainable parameters of the critics, stacked ``[C, ...]``."""
        return [p for p in self.qvalue_network_params.parameters() if p.requires_grad]

    @property
    def actor_network_params(self) -> TensorDict:
        """Parameters of all actors, for a single optimizer as in TorchRL's loops for TD3.

        Example:
            >>> import torch
            >>> from torchrl.data import Bounded
            >>> from pogo_torchrl import POGOLoss, make_actor, make_qvalue
            >>> spec = Bounded(low=-torch.ones(2), high=torch.ones(2))
            >>> loss = POGOLoss(make_actor(3, spec), make_qvalue(3, 2), w2_weights=(0.2, 0.5))
            >>> optimizer = torch.optim.Adam(loss.actor_network_params.values(True, True), 3e-4)
        """
        actors = [f"actor_network_{i}_params" for i in range(self.num_actors)]
        return TensorDict({name: getattr(self, name) for name in actors})

    def _actor_index(self, index: int) -> int:
        if not -self.num_actors <= index < self.num_actors:
            raise IndexError(
                f"actor index {index} is out of range: the actors are 0..{self.num_actors - 1}."
            )
        return index % self.num_actors

    def actor(self, index: int, *, averaged: bool = False) -> TensorDictModule:
        """Return one actor as a policy that shares the parameters being trained.

        Args:
            index: index of the actor; negative indices count from the end, and ``-1`` is the
                policy to deploy.
            averaged: return the Polyak average of the actor instead, see ``average_actors``; it
                shares the averaged parameters. Defaults to ``False``.

        Returns:
            A module of the class that was passed in, for any batch shape. It changes as training
            proceeds; use ``copy.deepcopy`` to keep a snapshot.

        Raises:
            IndexError: if ``index`` is out of range.
            ValueError: if ``averaged`` and the loss has no averages.

        Example:
            >>> import torch
            >>> from torchrl.data import Bounded
            >>> from pogo_torchrl import POGOLoss, make_actor, make_qvalue
            >>> spec = Bounded(low=-torch.ones(2), high=torch.ones(2))
            >>> loss = POGOLoss(make_actor(3, spec), make_qvalue(3, 2), w2_weights=(0.2, 0.5))
            >>> loss.actor(1)(observation=torch.zeros(4, 5, 3)).shape
            torch.Size([4, 5, 2])
        """
        if averaged:
            self.check_averages()
        prefix = "average_" if averaged else ""
        params = getattr(self, f"{prefix}actor_network_{self._actor_index(index)}_params")
        policy = copy.deepcopy(self.actor_network)
        params.to_module(policy)
        return policy

    def check_averages(self) -> None:
        """Raise a ``ValueError`` if the loss has no averaged actors."""
        if self.average_actors is None:
            raise ValueError(
                f"this {type(self).__name__} has no averaged actors: create it with "
                "average_actors=0.002, for example."
            )

    def reset_parameters_recursive(self) -> None:
        """Reinitialise all actors and critics, and copy them to their targets and averages."""
        registered: dict[str, Any] = dict(self.named_children())
        for name in (*(f"actor_network_{i}" for i in range(self.num_actors)), "qvalue_network"):
            network, params = getattr(self, name), registered[f"{name}_params"].data
            stacked = name == "qvalue_network"
            for each in params.unbind(0) if stacked else (params,):
                fresh = copy.deepcopy(network)
                redraw_parameters(fresh, name)
                each.update_(TensorDict.from_module(fresh).data)
            if name.startswith("actor") and self.chain_init == "copy":
                params.update_(registered["actor_network_0_params"].data)
            for copies in ("target", "average"):
                if f"{copies}_{name}_params" in registered:
                    registered[f"{copies}_{name}_params"].data.update_(params)

    @property
    def _parameter_names(self) -> tuple[str, ...]:
        actors = [f"actor_network_{i}_params" for i in range(self.num_actors)]
        return (
            *actors,
            "qvalue_network_params",
            "target_actor_network_0_params",
            "target_qvalue_network_params",
        )
