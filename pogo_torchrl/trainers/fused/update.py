"""One update of POGO, of one run or of a stack of runs; eager, compiled or in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.func import vjp
from torch.optim import Optimizer
from torchrl.envs.utils import ExplorationType, set_exploration_type

from pogo_torchrl.objectives import POGOLoss
from pogo_torchrl.objectives.chain_loss import Noise, Params, Terms, actor_scalars
from pogo_torchrl.trainers.fused.adam import FusedAdam
from pogo_torchrl.trainers.fused.compilation import check_backend, compiled_update, matmul_precision

Optimizers = Mapping[str, Optimizer]
"""By name: ``qvalue``, ``actor_0``, ``actor_1``, ..."""


class Results(NamedTuple):
    """What an update gives, each with a leading ``[R]`` if stacked."""

    qvalue: Tensor
    """Scalars of the critics, in the order of :attr:`Update.qvalue_names`."""
    actors: Tensor | None
    """Scalars of the actors, in the order of :attr:`Update.actor_names`; ``None`` without them."""
    td_error: Tensor
    """The larger squared TD error of each sample, ``[*B]``."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Results:
        """The results with a function applied to each."""
        actors = None if self.actors is None else function(self.actors)
        return Results(function(self.qvalue), actors, function(self.td_error))


class Network(NamedTuple):
    """The tensors of a network, sharing the loss's memory; ``[R, ...]`` for a stack."""

    params: Params
    """What is trained."""
    buffers: Params
    """What is not."""

    @property
    def all(self) -> Params:
        """Both."""
        return {**self.buffers, **self.params}


class Update:
    r"""The critics, then the actors 0, 1, ..., each after the one before, then the targets.

    Actor i is trained against the just updated actor i - 1 and the just updated critics, each
    network by its own optimizer.

    The parameters are those of the loss, and the moments those of the optimizers: the update works
    on their memory as it is when the update is made, and :meth:`is_current` tells whether it still
    is. Losses of one architecture and of the same settings, up to ``w2_weights`` and ``alpha``, are
    updated together, vectorised over the R runs: their parameters and moments are moved side by
    side in memory, ``[R, ...]``, where each loss and optimizer goes on to see its own.

    Args:
        losses: one, or a stack.
        optimizers: of each loss.

    Keyword Args:
        tau: Polyak step of the targets; ``None``: they are moved elsewhere.
        clip_grad_norm: the largest norm of a network's gradient; ``None``: any.
        stacked: take batches, and give results, of a stack. Defaults to ``False``: of the only one.
        compile: run the update as one graph of ``torch.compile``: the numbers are the same up to
            rounding. Settings of the losses beside ``w2_weights`` and ``alpha`` are read when it is
            traced, at the first call. Takes Adam and AdamW, as a stack does.
        bf16: run the networks in bfloat16 (autocast); parameters, moments and the divergence stay
            in float32.

    Raises:
        ValueError: for an optimizer or a divergence that cannot be compiled or stacked.
    """

    def __init__(
        self,
        losses: Sequence[POGOLoss],
        optimizers: Sequence[Optimizers],
        *,
        tau: float | None,
        clip_grad_norm: float | None = None,
        stacked: bool = False,
        compile: bool = False,
        bf16: bool = False,
    ) -> None:
        self.losses, self.loss = list(losses), losses[0]
        if stacked or compile:
            check_backend(self.loss)
        self.runs = list(optimizers)
        self.tau, self.clip_grad_norm, self.bf16 = tau, clip_grad_norm, bf16
        # Compiled, a single run is a stack of one: products over a stack are traced into batched
        # ones, whose biases join the activations (a linear layer's are written beforehand).
        self.stacked = stacked or compile
        self.qvalue_names, self.actor_names = scalar_names(self.loss)
        self._bind()
        if len(losses) > 1:
            for one in losses:
                _clone_in_state_dict(one)
        self._coefficients_of: tuple[Any, ...] | None = None
        self._single = compile and not stacked
        self._run = self._update_one if self._single else self._update
        if compile:
            self._run = compiled_update(self._run, self.loss.min_action.device.type)

    def _bind(self) -> None:
        """Find the parameters, targets and moments in the memory where they lie now."""
        loss = self.loss
        self.networks = {"qvalue": self._network("qvalue_network")}
        for i in range(loss.num_actors):
            self.networks[f"actor_{i}"] = self._network(f"actor_network_{i}")
        # Without copies of their own the targets are the networks themselves.
        self.target_qvalue, self.target_actor = self.networks["qvalue"], self.networks["actor_0"]
        self._targets: list[tuple[Network, Network]] = []
        if loss.delay_qvalue:
            self.target_qvalue = self._network("target_qvalue_network", trained="qvalue")
            self._targets.append((self.target_qvalue, self.networks["qvalue"]))
        if loss.delay_actor:
            self.target_actor = self._network("target_actor_network_0", trained="actor_0")
            self._targets.append((self.target_actor, self.networks["actor_0"]))
        self.optimizers = {
            name: self._optimizer(name, list(network.params.values()))
            for name, network in self.networks.items()
        }
        self._addresses, self._kinds = self._find_addresses(), self._find_kinds()

    # ------------------------------------------------------------------ the algorithm

    @torch.no_grad()
    def _update(
        self,
        batch: TensorDictBase,
        noise: Noise,
        weights: Sequence[Any],
        alpha: Any,
        lr: Tensor,
        with_actors: bool,
    ) -> Results:
        loss, networks = self.loss, self.networks
        rates = dict(zip(networks, lr))

        def minimise(name: str, terms: Terms, *inputs: Any) -> dict[str, Tensor]:
            """One step of a network along the gradient of its loss."""
            gradients, value, found = self._gradients(terms, networks[name], batch, noise, *inputs)
            self.optimizers[name].step(gradients, rates[name])
            return {f"loss_{name}": value, **found}

        found = minimise("qvalue", loss.qvalue_terms, self.target_actor.all, self.target_qvalue.all)
        qvalue = torch.stack([found[name] for name in self.qvalue_names], -1)
        td_error = found["td_error"].amax(1 if self.stacked else 0)
        actors = None
        if with_actors:
            critics = networks["qvalue"].all
            found = minimise("actor_0", loss.first_actor_terms, critics, weights[0], alpha)
            for i in range(1, loss.num_actors):
                terms, reference = partial(loss.jko_terms, index=i), networks[f"actor_{i - 1}"].all
                found |= minimise(f"actor_{i}", terms, reference, critics, weights[i], alpha)
            actors = torch.stack([found[name] for name in self.actor_names], -1)
        if self.tau is not None:
            for target, online in self._targets:
                for name, values in target.params.items():
                    values.lerp_(online.params[name], self.tau)
        return Results(qvalue, actors, td_error)

    def _gradients(
        self, terms: Terms, network: Network, *inputs: Any
    ) -> tuple[list[Tensor], Tensor, dict[str, Tensor]]:
        """The gradient of a loss, clipped, its value, and what it reports; over all runs."""

        def of_one(params: Params, buffers: Params, *inputs: Any) -> Any:
            def objective(params: Params) -> tuple[Tensor, dict[str, Tensor]]:
                device = self.loss.min_action.device.type
                with torch.autocast(device, torch.bfloat16, enabled=self.bf16):
                    value, found = terms({**buffers, **params}, *inputs)
                return value.sum(), found

            gradients, value, found = value_and_gradients(objective, params, traced=self.stacked)
            if self.clip_grad_norm is not None:
                gradients = clipped(gradients, self.clip_grad_norm)
            return gradients, value, found

        if self.stacked:
            # Noise that an actor draws by itself differs from run to run.
            of_one = torch.vmap(of_one, randomness="different")
        return of_one(network.params, network.buffers, *inputs)

    # ------------------------------------------------------------------ calling it

    def __call__(
        self, batch: TensorDictBase, noise: Noise, lr: Tensor, with_actors: bool = True
    ) -> Results:
        """Update on one batch.

        Args:
            batch: transitions, with a leading ``[R]`` if ``stacked``; they are not checked.
            noise: of :meth:`POGOLoss.draw_noise`, likewise.
            lr: learning rates of the critics and of each actor, a float64 vector.
            with_actors: update the actors, too.
        """
        weights, alpha = self._coefficients()
        # TorchRL's default, DETERMINISTIC, would have actors that draw their own z act with 0.
        with (
            matmul_precision(self.loss.min_action),
            set_exploration_type(ExplorationType.RANDOM),
        ):
            return self._run(batch, noise, weights, alpha, lr, with_actors)

    def is_current(self) -> bool:
        """Whether the losses' parameters and the optimizers' moments lie where they lay.

        Raises:
            ValueError: when settings of an optimizer have changed that the update cannot follow.
        """
        for optimizer in self.optimizers.values():
            optimizer.check()
        return self._find_addresses() == self._addresses

    def refresh(self) -> bool:
        """Find the memory where it lies now; false where dtypes or the device have changed.

        Then make a new update.
        """
        if self._find_kinds() != self._kinds:
            return False
        self.write_steps()
        self._bind()
        return True

    def memory(self) -> list[Tensor]:
        """All that an update changes."""
        networks = [*self.networks.values(), *(target for target, _ in self._targets)]
        parameters = [values for network in networks for values in network.params.values()]
        moments = [m for optimizer in self.optimizers.values() for m in optimizer.memory()]
        return parameters + moments

    def write_steps(self) -> None:
        """Tell the optimizers how many steps were made for them."""
        for optimizer in self.optimizers.values():
            optimizer.write_steps()

    def _update_one(self, batch: TensorDictBase, noise: Noise, weights, alpha, lr, with_actors):
        """A single run as a stack of one."""
        noise = {name: z.unsqueeze(0) for name, z in noise.items()}
        weights, alpha = [w.unsqueeze(0) for w in weights], alpha.unsqueeze(0)
        results = self._update(batch.unsqueeze(0), noise, weights, alpha, lr, with_actors)
        return results.map(lambda part: part.squeeze(0))

    def _coefficients(self) -> tuple[Sequence[Any], Any]:
        """``w2_weights`` and ``alpha`` of all runs as they are now."""
        if not self.stacked:
            return self.loss.w2_weights, self.loss.alpha
        found = tuple((*one.w2_weights, one.alpha) for one in self.losses)
        if found != self._coefficients_of:
            like = self.loss.min_action
            values = like.new_tensor(found[0] if self._single else list(zip(*found)))
            if self._coefficients_of is None:
                self._values = values
            else:  # in place, where a CUDA graph reads them
                self._values.copy_(values)
            self._coefficients_of = found
        *weights, alpha = self._values.unbind()
        return weights, alpha

    # ------------------------------------------------------------------ memory

    def _network(self, name: str, trained: str | None = None) -> Network:
        """A network of all losses; of a target what its online network has trained is moved."""
        each = [loss.params(name) for loss in self.losses]
        names = {key for key, value in each[0].items() if value.requires_grad}
        if trained is not None:
            names = set(self.networks[trained].params)
        tensors = {}
        for key in each[0]:
            values = [params[key] for params in each]
            if len(values) == 1:
                own = values[0].detach()
                tensors[key] = own.unsqueeze(0) if self.stacked else own
                continue
            tensors[key] = torch.stack([value.detach() for value in values])
            for value, own in zip(values, tensors[key]):
                value.data = own
        return Network(
            {key: value for key, value in tensors.items() if key in names},
            {key: value for key, value in tensors.items() if key not in names},
        )

    def _optimizer(self, name: str, params: list[Tensor]) -> FusedAdam | TorchOptimizer:
        optimizers = [run[name] for run in self.runs]
        parameters = [trained_parameters(loss, name) for loss in self.losses]
        for optimizer, mine in zip(optimizers, parameters):
            held = [id(p) for group in optimizer.param_groups for p in group["params"]]
            if sorted(held) != sorted(map(id, mine)):
                raise ValueError(
                    f"the optimizer of {name} does not hold the parameters of the loss: make it "
                    "from loss.qvalue_params() or loss.actor_params(i), after they were replaced "
                    "or frozen."
                )
        if self.stacked:
            return FusedAdam(optimizers, parameters, params)
        return TorchOptimizer(optimizers[0], parameters[0])

    def _find_addresses(self) -> list[int]:
        """Where all that the losses and optimizers hold lies now."""
        return [tensor.data_ptr() for tensor in self._held()]

    def _find_kinds(self) -> list[Any]:
        """Shape, dtype and device of all of it now."""
        return [(tensor.shape, tensor.dtype, tensor.device) for tensor in self._held()]

    def _held(self) -> Iterator[Tensor]:
        for loss, optimizers in zip(self.losses, self.runs):
            yield from (*loss.parameters(), *loss.buffers(), *self._moments(optimizers))

    def _moments(self, optimizers: Optimizers) -> Iterator[Tensor]:
        """Those that the update works on; other optimizers see to their own."""
        for optimizer in optimizers.values() if self.stacked else ():
            for state in optimizer.state.values():
                yield from (state["exp_avg"], state["exp_avg_sq"])


class TorchOptimizer:
    """Any optimizer of torch, making its own steps."""

    def __init__(self, optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> None:
        self.optimizer, self.parameters = optimizer, list(parameters)

    def step(self, gradients: Sequence[Tensor], lr: float) -> None:
        """Move the parameters by their gradients; the optimizer has its learning rate."""
        for parameter, gradient in zip(self.parameters, gradients):
            if gradient.stride() != parameter.stride():
                # As backward() lays them out: the kernels of fused=True rely on it.
                gradient = torch.empty_like(parameter).copy_(gradient)
            parameter.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad()

    def check(self) -> None:
        """It follows all of its settings."""

    def write_steps(self) -> None:
        """It counts its own."""

    def memory(self) -> list[Tensor]:
        """None that an update has to restore."""
        return []


def value_and_gradients(
    objective: Callable[[Params], tuple[Tensor, Any]], params: Params, *, traced: bool
) -> tuple[list[Tensor], Tensor, Any]:
    """The gradients of a function, its value, and what else it returns.

    Args:
        objective: from parameters to a scalar and other tensors.
        params: to differentiate by.
        traced: differentiate by ``torch.func``, for ``torch.vmap`` and ``torch.compile``. Its
            ``vjp`` records no graph of the backward pass as ``grad_and_value`` does; plain autograd
            takes a fifth less time than either in eager mode (docs/speed.md).
    """
    if traced:
        value, pullback, found = vjp(objective, params, has_aux=True)  # type: ignore[misc]
        (gradients,) = pullback(torch.ones_like(value))
        return list(gradients.values()), value, found
    with torch.enable_grad():
        leaves = {name: values.detach().requires_grad_() for name, values in params.items()}
        value, found = objective(leaves)
    return list(torch.autograd.grad(value, list(leaves.values()))), value.detach(), found


def clipped(gradients: Sequence[Tensor], max_norm: float) -> list[Tensor]:
    r"""Gradients scaled to a joint norm of at most ``max_norm``, as ``clip_grad_norm_`` does.

    Example:
        >>> clipped([torch.tensor([3.0]), torch.tensor([4.0])], max_norm=1.0)
        [tensor([0.6000]), tensor([0.8000])]
    """
    norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp_max(1.0)
    return [gradient * scale for gradient in gradients]


def scalar_names(loss: POGOLoss) -> tuple[list[str], list[str]]:
    """What an update's scalars are called: those of the critics and those of the actors."""
    critics = ["loss_qvalue", "pred_value", "target_value", "next_state_value"]
    return critics, [name for i in range(loss.num_actors) for name in actor_scalars(i)]


def trained_parameters(loss: POGOLoss, name: str) -> list[nn.Parameter]:
    """What the optimizer called ``name`` steps: ``qvalue``, ``actor_0``, ``actor_1``, ..."""
    if name == "qvalue":
        return loss.qvalue_params()
    return loss.actor_params(int(name.removeprefix("actor_")))


def _clone_in_state_dict(loss: POGOLoss) -> None:
    """Have a loss's state be a copy: a file would take the whole stack with a part of it."""

    def copied(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for key, values in state.items():
            if isinstance(values, Tensor):
                state[key] = values.clone()

    loss.register_state_dict_post_hook(copied)
