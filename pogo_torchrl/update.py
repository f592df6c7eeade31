"""One update of POGO over the parameters of one run, or of a stack of runs at once."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor, nn

from pogo_torchrl.objectives import POGOLoss
from pogo_torchrl.optim import Adam

Noise = dict[str, Tensor]


class Update:
    r"""The critics, then the actors 0, 1, ..., each after the one before.

    Actor i is trained against the just updated actor i - 1 and the just updated critic. There is
    one Adam for the critics and one for each actor.

    Losses of one architecture and of the same settings, up to ``w2_weights`` and ``alpha``, are
    updated together: their parameters are laid side by side in memory, ``[R, ...]``, and the
    update is vectorised over the R runs. Each loss goes on to see its own.

    Args:
        losses: one, or a stack.
        lr: learning rate of every Adam.
        tau: also move the targets, by this Polyak step: what TorchRL's ``SoftUpdate`` does, as a
            part of the update. Defaults to ``None``: they are moved elsewhere.
        stacked: take batches, and give scalars, of a stack of runs. Defaults to ``False``: of the
            only one.
        compile: run the update as one graph of ``torch.compile``: the numbers are the same up to
            rounding. Settings of the losses are read when it is traced, at the first call.
        bf16: run the networks in bfloat16 (autocast); parameters, moments and the divergence stay
            in float32.
    """

    def __init__(
        self,
        losses: Sequence[POGOLoss],
        *,
        lr: float,
        tau: float | None = None,
        stacked: bool = False,
        compile: bool = False,
        bf16: bool = False,
    ) -> None:
        self.losses = list(losses)
        self.loss = first = losses[0]
        self.tau, self.bf16 = tau, bf16
        # Compiled, a single run is a stack of one: products over a stack are traced into batched
        # ones, whose biases join the activations (a linear layer's are written beforehand).
        self.stacked = stacked or compile
        # Actor i of all runs is one contiguous block, since it is what a step reads and writes.
        actors = self._side_by_side("actor_network_params", 1)
        self.actors = list(actors.unbind(0))
        self.qvalue = self._side_by_side("qvalue_network_params")
        # Without copies of their own the targets are the networks themselves.
        self.target_actor, self.target_qvalue = self.actors[0], self.qvalue
        self._targets: list[tuple[TensorDictBase, TensorDictBase]] = []
        if first.delay_qvalue:
            self.target_qvalue = self._side_by_side("target_qvalue_network_params")
            self._targets.append((self.target_qvalue, self.qvalue))
        if first.delay_actor:
            target_actors = self._side_by_side("target_actor_network_params", 1)
            self.target_actor = target_actors[0]
            self._targets.append((target_actors, actors))
        self.weights: list[Any] = list(first.w2_weights)
        self.alpha: Any = first.alpha
        if len(losses) > 1:
            for one in losses:
                self._keep_own_part(one)
            like = first.min_action
            self.weights = [like.new_tensor(w) for w in zip(*(one.w2_weights for one in losses))]
            self.alpha = like.new_tensor([one.alpha for one in losses])
        self._actor_names = _trainable(first.actor_network_params)
        self._qvalue_names = _trainable(first.qvalue_network_params)
        self.optimizers = {
            "qvalue": Adam([self.qvalue[name] for name in self._qvalue_names], lr),
            **{
                f"actor_{i}": Adam([actor[name] for name in self._actor_names], lr)
                for i, actor in enumerate(self.actors)
            },
        }
        if compile:
            device = first.min_action.device.type
            self._run = _compiled(self._update if stacked else self._update_one, device)
        else:
            self._run = self._update

    def state_dict(self, run: int = 0) -> dict[str, Any]:
        """The optimizers' states of one run: the same, stacked or not."""
        part = run if self.stacked else None
        return {name: adam.state_dict(part) for name, adam in self.optimizers.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], run: int = 0) -> None:
        """Have one run go on from a checkpoint."""
        part = run if self.stacked else None
        for name, adam in self.optimizers.items():
            adam.load_state_dict(state_dict[name], part)

    @property
    def names(self) -> tuple[list[str], list[str]]:
        """What the two vectors of a call hold."""
        critics = ["loss_qvalue", "pred_value", "target_value", "next_state_value"]
        scalars = ("loss_actor", "q_actor", "w2", "lmbd")
        return critics, [f"{name}_{i}" for i in range(len(self.actors)) for name in scalars]

    def __call__(
        self, batch: TensorDictBase, noise: Noise, with_actors: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Update on one batch and its noise, each with a leading ``[R]`` if ``stacked``.

        Returns:
            The scalars of the critics and of the actors (``None`` without), in the order of
            :attr:`names`, ``[M]`` or ``[R, M]``.
        """
        with _matmul_precision(self.loss.min_action):
            return self._run(batch, noise, with_actors)

    def _update_one(
        self, batch: TensorDictBase, noise: Noise, with_actors: bool
    ) -> tuple[Tensor, Tensor | None]:
        noise = {name: z.unsqueeze(0) for name, z in noise.items()}
        critics, actors = self._update(batch.unsqueeze(0), noise, with_actors)
        return critics.squeeze(0), None if actors is None else actors.squeeze(0)

    def _update(
        self, batch: TensorDictBase, noise: Noise, with_actors: bool
    ) -> tuple[Tensor, Tensor | None]:
        loss = self.loss
        autocast = torch.autocast(loss.min_action.device.type, torch.bfloat16, enabled=self.bf16)
        qvalue, leaves = _leaves(self.qvalue, self._qvalue_names)
        with autocast:
            value, found = self._over_runs(loss.qvalue_terms)(
                batch, noise, self.target_actor, qvalue, self.target_qvalue
            )
        self.optimizers["qvalue"].step(torch.autograd.grad(value.sum(), leaves))
        found["loss_qvalue"] = value.detach()
        names, actor_names = self.names
        critics = torch.stack([found[name] for name in names], -1)
        scalars: dict[str, Tensor] = {}
        for i, params in enumerate(self.actors if with_actors else []):
            actor, leaves = _leaves(params, self._actor_names)
            with autocast:
                value, found = loss.jko_terms(
                    batch,
                    noise,
                    actor,
                    self.actors[i - 1] if i else None,
                    self.qvalue,
                    self.weights[i],
                    self.alpha,
                    index=i,
                    over_runs=self._over_runs,
                )
            self.optimizers[f"actor_{i}"].step(torch.autograd.grad(value.sum(), leaves))
            scalars.update(found)
        if self.tau is not None:
            self._move_targets(self.tau)
        if not with_actors:
            return critics, None
        return critics, torch.stack([scalars[name] for name in actor_names], -1)

    @torch.no_grad()
    def _move_targets(self, tau: float) -> None:
        for target, online in self._targets:
            for key, values in target.items(True, True):
                values.lerp_(online.get(key), tau)

    def _over_runs(self, terms: Callable[..., Any]) -> Callable[..., Any]:
        if not self.stacked:
            return terms

        def call(*args: Any) -> Any:
            dims = tuple(None if arg is None or isinstance(arg, float) else 0 for arg in args)
            # Noise that an actor draws by itself differs from run to run.
            return torch.vmap(terms, dims, randomness="different")(*args)

        return call

    def _side_by_side(self, name: str, dim: int = 0) -> TensorDict:
        """The parameters of one name of all losses, stacked in memory that the losses share."""
        every = [getattr(loss, name) for loss in self.losses]
        if len(every) == 1:
            own = every[0].data
            return own.unsqueeze(dim) if self.stacked else own
        stacked: Any = torch.stack([params.data for params in every], dim)
        for own, params in zip(stacked.unbind(dim), every):
            for key, values in params.items(True, True):
                values.data = own.get(key)
        return stacked

    @staticmethod
    def _keep_own_part(loss: POGOLoss) -> None:
        """Have a loss's state be a copy: a file would take the whole stack with a part of it."""

        def copied(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
            for key, values in state.items():
                if isinstance(values, Tensor):
                    state[key] = values.clone()

        loss.register_state_dict_post_hook(copied)


@contextmanager
def _matmul_precision(like: Tensor) -> Iterator[None]:
    """Let oneDNN multiply float32 matrices where it does so in float32: nothing else is changed.

    Asked for "bf16" it takes over from torch's BLAS. Processors without bfloat16 then compute in
    float32, AMD's twice as fast as before; the others really round, which :func:`_is_exact` sees.
    """
    chosen = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    wanted = chosen == "none" and like.device.type == "cpu" and _is_exact()
    with _onednn() if wanted else nullcontext():
        yield


@contextmanager
def _onednn() -> Iterator[None]:
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


@functools.cache
def _is_exact() -> bool:
    """Whether oneDNN's product, asked for bfloat16, has the accuracy of float32 all the same."""
    if not torch.backends.mkldnn.is_available():
        return False
    x = torch.linspace(-1, 1, 256 * 256).view(256, 256).cos()
    with _onednn():
        product = x @ x
    expected = x.double() @ x.double()
    return bool((product - expected).abs().max() < 1e-5 * expected.abs().max())


def _trainable(params: TensorDictBase) -> list[NestedKey]:
    return [k for k, v in params.items(True, True) if isinstance(v, nn.Parameter)]


def _leaves(params: TensorDict, names: Sequence[NestedKey]) -> tuple[TensorDict, list[Tensor]]:
    """The same parameters, and of them those to differentiate by."""
    leaves = [params.get(name).detach().requires_grad_() for name in names]
    params = params.clone(False)
    for name, leaf in zip(names, leaves):
        params.set(name, leaf)
    return params, leaves


_instances = itertools.count()


def _compiled(update: Callable[..., Any], device: str) -> Callable[..., Any]:
    """The update as one graph: losses, gradients and optimizers together."""

    # torch.compile keeps one cache for all instances: a number tells them apart, once it is used.
    def numbered(number: int, *arguments: Any) -> Any:
        assert number >= 0
        return update(*arguments)

    compiled = torch.compile(
        numbered,
        fullgraph=True,
        dynamic=False,
        options={
            # With torch's own generator, so that draws are those of the update as it is written.
            "fallback_random": True,
            "guard_filter_fn": _on_arguments,
            # What launches the kernels is compiled too; on a GPU, where CUDA graphs do away with it
            # but for stacks, that is untried.
            "cpp_wrapper": device == "cpu",
            # It would move the masks of ReLU's gradient up to where its inputs are still at hand,
            # which then are kept for them beside the outputs.
            "reorder_for_locality": False,
            # The guards look at the arguments, and parameters keep their shapes.
            "size_asserts": False,
        },
    )
    number = next(_instances)

    def run(*arguments: Any) -> Any:
        # Off by default in torch 2.13; without it a graph ends at each autograd.grad.
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            return compiled(number, *arguments)

    return run


def _on_arguments(guards: Sequence[Any]) -> list[bool]:
    """Guards on the arguments: of what else the graph was made from, nothing changes.

    Looking at all of it at each call would take a tenth of the time.
    """
    return [guard.name == "number" or "arguments" in guard.name for guard in guards]
