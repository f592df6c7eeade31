"""One update of POGO, for one run or a stack of runs; eager, compiled or in a CUDA graph."""

from __future__ import annotations

import logging
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
from pogo_torchrl.trainers.fused.adam import FusedAdam, TorchOptimizer
from pogo_torchrl.trainers.fused.compilation import (
    CompilationFailed,
    check_backend,
    compiled_update,
    matmul_precision,
)

_LOGGER = logging.getLogger(__name__)

Optimizers = Mapping[str, Optimizer]
"""Optimizers by name: ``qvalue``, ``actor_0``, ``actor_1``, ..."""


class Results(NamedTuple):
    """Results of an update, each with a leading ``[R]`` if stacked."""

    qvalue: Tensor | None
    """Scalars of the critics, in the order of :attr:`Update.qvalue_names`; ``None`` without
    them."""
    actors: Tensor | None
    """Scalars of the trained actors, in the order of :attr:`Update.actor_names`; ``None`` without
    them."""
    td_error: Tensor | None
    """Squared TD error of each sample, the maximum over the critics, ``[*B]``; ``None`` without
    the critics."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Results:
        """Return the results with ``function`` applied to each tensor."""
        return Results(*[None if part is None else function(part) for part in self])


class Network(NamedTuple):
    """Tensors of a network, sharing the memory of the loss; ``[R, ...]`` for a stack."""

    params: Params
    """Tensors that are trained."""
    buffers: Params
    """Tensors that are not trained."""

    @property
    def all(self) -> Params:
        """Trained and untrained tensors."""
        return {**self.buffers, **self.params}


def polyak_step(average: Network, online: Network, rate: Any) -> None:
    """Move the trained tensors of a network towards those of another one, in place.

    Args:
        average: a target network or an average.
        online: the network that is trained.
        rate: step size in (0, 1].
    """
    for name, values in average.params.items():
        values.lerp_(online.params[name], rate)


class Update:
    r"""One update: first the critics, then actors 0, 1, ... in sequence, finally the targets.

    Each network has its own optimizer. Actor i is trained with the updated actor i - 1 and the
    updated critics. Averages of the actors (``average_actors``) move along with the targets.

    The update works in place on the parameters of the loss and the moments of the optimizers. It
    binds to their memory when it is created; :meth:`is_current` checks whether the binding is still
    valid. Losses that share one architecture and all settings except ``w2_weights`` and ``alpha``
    can be updated together, vectorised over R runs. Their parameters and moments are then moved to
    contiguous tensors ``[R, ...]``, of which each loss and optimizer keeps its own view.

    Args:
        losses: the loss, or R losses to be stacked.
        optimizers: the optimizers of each loss.

    Keyword Args:
        tau: Polyak step of the targets; ``None``: the targets are not updated.
        clip_grad_norm: maximum gradient norm of each network. Defaults to ``None``: no clipping.
        stacked: batches and results have a leading dimension ``[R]``. Defaults to ``False``.
        compile: run the update as one graph of ``torch.compile``, which gives the same values
            except for rounding. If a setting other than ``w2_weights`` and ``alpha`` changes, a
            new update has to be created. Supports Adam and AdamW only, as does
            a stack. If compiling fails, there is one warning, and the update runs uncompiled.
            Defaults to ``False``.
        bf16: run the networks in bfloat16 (autocast); parameters, moments and the divergence stay
            in float32. Defaults to ``False``.

    Raises:
        ValueError: if an optimizer does not hold the parameters of its loss, or if an optimizer or
            the divergence cannot be compiled or stacked.
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
        self._compiled = compile
        # A compiled single run is a stack of one: its products are traced as batched products,
        # whose biases are fused with the activations (those of a linear layer are written before).
        self.stacked = stacked or compile
        self.qvalue_names, self.actor_names = scalar_names(self.loss)
        self._bind()
        if len(losses) > 1:
            for one in losses:
                _clone_in_state_dict(one)
        self._last_coefficients: tuple[Any, ...] | None = None
        self._single = compile and not stacked
        self._run = self._update_single if self._single else self._update
        if self.stacked:
            # TorchRL creates a default estimator at its first use: not within a transform.
            _ = self.loss.value_estimator
        if compile:
            self._run = compiled_update(self._run, self.loss.min_action.device.type)

    def _bind(self) -> None:
        """Bind to the current memory of the parameters, targets and moments."""
        loss = self.loss
        self.networks = {"qvalue": self._network("qvalue_network")}
        for i in range(loss.num_actors):
            self.networks[f"actor_{i}"] = self._network(f"actor_network_{i}")
        # Without delayed copies, the targets are the online networks themselves.
        self.target_qvalue, self.target_actor = self.networks["qvalue"], self.networks["actor_0"]
        self._targets: list[tuple[Network, Network]] = []
        if loss.delay_qvalue:
            self.target_qvalue = self._network("target_qvalue_network", trained="qvalue")
            self._targets.append((self.target_qvalue, self.networks["qvalue"]))
        if loss.delay_actor:
            self.target_actor = self._network("target_actor_network_0", trained="actor_0")
            self._targets.append((self.target_actor, self.networks["actor_0"]))
        self._averages: dict[str, tuple[Network, Network]] = {}
        if loss.average_actors is not None:
            for i in range(loss.num_actors):
                average = self._network(f"average_actor_network_{i}", trained=f"actor_{i}")
                self._averages[f"actor_{i}"] = average, self.networks[f"actor_{i}"]
        self.optimizers = {
            name: self._optimizer(name, list(network.params.values()))
            for name, network in self.networks.items()
        }
        self._addresses, self._layout = self._get_addresses(), self._get_layout()
        self._settings = self._traced_settings()

    # ------------------------------------------------------------------ the algorithm

    @torch.no_grad()
    def _update(
        self,
        batch: TensorDictBase,
        noise: Noise,
        weights: Sequence[Any],
        alpha: Any,
        lr: Tensor,
        trained: Sequence[str],
    ) -> Results:
        loss, networks = self.loss, self.networks
        rates = dict(zip(networks, lr))

        def minimise(name: str, terms: Terms, *inputs: Any) -> dict[str, Tensor]:
            """Step one network along the gradient of its loss."""
            gradients, value, found = self._gradients(terms, networks[name], batch, noise, *inputs)
            self.optimizers[name].step(gradients, rates[name])
            return {f"loss_{name}": value, **found}

        qvalue = actors = td_error = None
        if "qvalue" in trained:
            targets = self.target_actor.all, self.target_qvalue.all
            found = minimise("qvalue", loss.qvalue_terms, *targets)
            qvalue = torch.stack([found[name] for name in self.qvalue_names], -1)
            td_error = found["td_error"].amax(1 if self.stacked else 0)
        critics, found = networks["qvalue"].all, {}
        if "actor_0" in trained:
            found |= minimise("actor_0", loss.first_actor_terms, critics, weights[0], alpha)
        for i in range(1, loss.num_actors):
            if f"actor_{i}" in trained:
                terms, reference = partial(loss.jko_terms, index=i), networks[f"actor_{i - 1}"].all
                found |= minimise(f"actor_{i}", terms, reference, critics, weights[i], alpha)
        if found:
            names = [name for name in self.actor_names if name in found]
            actors = torch.stack([found[name] for name in names], -1)
        if self.tau is not None and "qvalue" in trained:
            for target, online in self._targets:
                polyak_step(target, online, self.tau)
        for name, (average, online) in self._averages.items():
            if name in trained:
                polyak_step(average, online, loss.average_actors)
        return Results(qvalue, actors, td_error)

    def _gradients(
        self, terms: Terms, network: Network, *inputs: Any
    ) -> tuple[list[Tensor], Tensor, dict[str, Tensor]]:
        """Compute the clipped gradients of a loss, its value and its metrics, for all runs."""

        def single_run(params: Params, buffers: Params, *inputs: Any) -> Any:
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
            # Noise that an actor draws internally differs between runs.
            single_run = torch.vmap(single_run, randomness="different")
        return single_run(network.params, network.buffers, *inputs)

    # ------------------------------------------------------------------ calls

    def __call__(
        self,
        batch: TensorDictBase,
        noise: Noise,
        lr: Tensor,
        trained: Sequence[str] | None = None,
    ) -> Results:
        """Run one update on a batch.

        Args:
            batch: transitions ``[*B]``, or ``[R, *B]`` if ``stacked``; they are not checked.
            noise: noise drawn by :meth:`POGOLoss.draw_noise`, with a leading ``[R]`` if
                ``stacked``.
            lr: learning rates of the critics and of each actor, a float64 vector.
            trained: names of the networks to be trained (``qvalue``, ``actor_0``, ...); the others
                are held fixed. Without ``qvalue`` the targets are, too. Defaults to all networks.

        Returns:
            The scalars of all losses and the TD errors.
        """
        # With TorchRL's default, DETERMINISTIC, actors that draw z internally would use z = 0.
        with (
            matmul_precision(self.loss.min_action),
            set_exploration_type(ExplorationType.RANDOM),
        ):
            trained = trained or tuple(self.networks)
            try:
                return self._run(batch, noise, *self._coefficients(), lr, trained)
            except CompilationFailed as error:
                _LOGGER.warning(
                    "The update runs uncompiled and slower: compiling it failed (%s). "
                    "compile=false does not try.",
                    error,
                )
                self._run_uncompiled()
                return self._run(batch, noise, *self._coefficients(), lr, trained)

    def _run_uncompiled(self) -> None:
        """Become an update that is not compiled."""
        self._run = self._update
        if self._single:  # no longer a stack of one, which is slower
            self.write_steps()
            self.stacked = self._single = False
            self._last_coefficients = None
            self._bind()

    def is_current(self) -> bool:
        """Check whether parameters and moments still use the memory that the update is bound to.

        Returns:
            ``False`` if any of them has been moved, or if a setting has changed that a compiled
            update has read; then call :meth:`refresh`.

        Raises:
            ValueError: if a setting of an optimizer has changed that the update cannot follow.
        """
        for optimizer in self.optimizers.values():
            optimizer.check()
        unchanged = self._traced_settings() == self._settings
        return unchanged and self._get_addresses() == self._addresses

    def refresh(self) -> bool:
        """Bind to the current memory of the parameters and moments.

        Returns:
            ``False`` if shapes, dtypes, devices or settings have changed; then create a new update.
        """
        if self._get_layout() != self._layout or self._traced_settings() != self._settings:
            return False
        self.write_steps()
        self._bind()
        return True

    def memory(self) -> list[Tensor]:
        """Return all tensors that an update changes."""
        copies = [copy for copy, _ in (*self._targets, *self._averages.values())]
        networks = [*self.networks.values(), *copies]
        parameters = [values for network in networks for values in network.params.values()]
        moments = [m for optimizer in self.optimizers.values() for m in optimizer.memory()]
        return parameters + moments

    def write_steps(self) -> None:
        """Write the step counts to the optimizers."""
        for optimizer in self.optimizers.values():
            optimizer.write_steps()

    def _update_single(self, batch: TensorDictBase, noise: Noise, weights, alpha, lr, trained):
        """Update a single run as a stack of one."""
        noise = {name: z.unsqueeze(0) for name, z in noise.items()}
        weights, alpha = [w.unsqueeze(0) for w in weights], alpha.unsqueeze(0)
        results = self._update(batch.unsqueeze(0), noise, weights, alpha, lr, trained)
        return results.map(lambda part: part.squeeze(0))

    def _coefficients(self) -> tuple[Sequence[Any], Any]:
        """Return the current ``w2_weights`` and ``alpha`` of all runs."""
        if not self.stacked:
            return self.loss.w2_weights, self.loss.alpha
        self.write_coefficients()
        *weights, alpha = self._coefficient_values.unbind()
        return weights, alpha

    def write_coefficients(self) -> None:
        """Write the current ``w2_weights`` and ``alpha`` to the memory that CUDA graphs read."""
        found = tuple((*one.w2_weights, one.alpha) for one in self.losses)
        if found != self._last_coefficients:
            like = self.loss.min_action
            values = like.new_tensor(found[0] if self._single else list(zip(*found)))
            if self._last_coefficients is None:
                self._coefficient_values = values
            else:  # in place, because CUDA graphs read this memory
                self._coefficient_values.copy_(values)
            self._last_coefficients = found

    # ------------------------------------------------------------------ memory

    def _network(self, name: str, trained: str | None = None) -> Network:
        """Collect a network of all losses.

        For a target network or an average, ``trained`` names its online network: the tensors that
        correspond to trained parameters are those that the Polyak step moves.
        """
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
                    f"the optimizer of {name} does not hold the parameters of the loss: create "
                    "it from loss.qvalue_params() or loss.actor_params(i), after replacing or "
                    "freezing parameters."
                )
        if self.stacked:
            return FusedAdam(optimizers, parameters, params)
        return TorchOptimizer(optimizers[0], parameters[0])

    def _traced_settings(self) -> list[Any]:
        """Settings of the losses that a compiled update reads once, when it is traced."""
        return [one.traced_settings() for one in self.losses] if self._compiled else []

    def _get_addresses(self) -> list[int]:
        """Return the memory addresses of all tensors that the update is bound to."""
        return [tensor.data_ptr() for tensor in self._bound_tensors()]

    def _get_layout(self) -> list[Any]:
        """Return shape, dtype and device of all tensors that the update is bound to."""
        return [(tensor.shape, tensor.dtype, tensor.device) for tensor in self._bound_tensors()]

    def _bound_tensors(self) -> Iterator[Tensor]:
        for loss, optimizers in zip(self.losses, self.runs):
            yield from (*loss.parameters(), *loss.buffers(), *self._moments(optimizers))

    def _moments(self, optimizers: Optimizers) -> Iterator[Tensor]:
        """Yield the moments that the update works on; :class:`TorchOptimizer` manages its own."""
        for optimizer in optimizers.values() if self.stacked else ():
            for state in optimizer.state.values():
                yield from (state["exp_avg"], state["exp_avg_sq"])


def value_and_gradients(
    objective: Callable[[Params], tuple[Tensor, Any]], params: Params, *, traced: bool
) -> tuple[list[Tensor], Tensor, Any]:
    """Compute the gradients of a function, its value, and its auxiliary outputs.

    Args:
        objective: function from parameters to a scalar and auxiliary outputs.
        params: parameters with respect to which the gradients are taken.

    Keyword Args:
        traced: use ``torch.func.vjp``, which works under ``torch.vmap`` and ``torch.compile``.
            Unlike ``grad_and_value``, it records no graph of the backward pass. Otherwise, use
            plain autograd, which takes a fifth less time than either in eager mode (docs/speed.md).

    Returns:
        The gradients in the order of ``params``, the value, and the auxiliary outputs.
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
    r"""Scale gradients to a joint norm of at most ``max_norm``, as ``clip_grad_norm_`` does.

    Args:
        gradients: gradients of one network.
        max_norm: maximum norm.

    Returns:
        The scaled gradients.

    Example:
        >>> clipped([torch.tensor([3.0]), torch.tensor([4.0])], max_norm=1.0)
        [tensor([0.6000]), tensor([0.8000])]
    """
    norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp_max(1.0)
    return [gradient * scale for gradient in gradients]


def scalar_names(loss: POGOLoss) -> tuple[list[str], list[str]]:
    """Return the names of an update's scalars.

    Args:
        loss: the objective.

    Returns:
        The names of the critics' scalars and of the actors' scalars.
    """
    critics = ["loss_qvalue", "pred_value", "target_value", "next_state_value"]
    return critics, [name for i in range(loss.num_actors) for name in actor_scalars(i)]


def trained_parameters(loss: POGOLoss, name: str) -> list[nn.Parameter]:
    """Return the trained parameters of one network.

    Args:
        loss: the objective.
        name: ``"qvalue"``, ``"actor_0"``, ``"actor_1"``, ...
    """
    if name == "qvalue":
        return loss.qvalue_params()
    return loss.actor_params(int(name.removeprefix("actor_")))


def _clone_in_state_dict(loss: POGOLoss) -> None:
    """Make ``state_dict()`` clone tensors: saving a view would write the whole stack."""

    def clone_tensors(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for key, values in state.items():
            if isinstance(values, Tensor):
                state[key] = values.clone()

    loss.register_state_dict_post_hook(clone_tensors)
