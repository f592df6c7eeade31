"""The state of a training: runs updates, averages what they give, saves and restores it all."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.optim import Optimizer
from torchrl.checkpoint import GlobalRNGState
from torchrl.trainers import Trainer
from torchrl.trainers.trainers import OptimizationStepper

from pogo_torchrl.objectives import POGOLoss
from pogo_torchrl.torchrl_private import count_updates, run_stage
from pogo_torchrl.trainers.fused.compilation import check_backend
from pogo_torchrl.trainers.fused.cuda_graphs import CUDAGraph, DeviceGraph, UpdateGraphs
from pogo_torchrl.trainers.fused.update import Results, Update, scalar_names
from pogo_torchrl.trainers.optimizers import ChainOptimizers, MakeOptimizer, MakeScheduler, adam


class Batches(Protocol):
    """Where batches come from: a replay buffer."""

    def sample(self) -> TensorDictBase:
        """The next batch."""


class RunningMean:
    """The mean of an update's scalars over all updates since it was last reset.

    Kept on the device, in one place for good, so that a CUDA graph can add to it.
    """

    def __init__(self, names: Sequence[str], like: Tensor) -> None:
        self.names = list(names)
        self.sums = like.new_zeros(len(names) + 1)  # the last one counts

    def add(self, scalars: Tensor) -> None:
        """Take those of one more update."""
        self.sums[:-1].add_(scalars)
        self.sums[-1].add_(1)

    @property
    def count(self) -> int:
        """Updates since the last reset."""
        return int(self.sums[-1])

    def __call__(self) -> dict[str, float]:
        """The means by name; empty before the first update."""
        if not self.count:
            return {}
        return dict(sorted(zip(self.names, (self.sums[:-1] / self.sums[-1]).tolist())))

    def tensors(self) -> TensorDict:
        """The means by name, without waiting for the device."""
        return TensorDict(dict(zip(self.names, (self.sums[:-1] / self.sums[-1]).unbind())))

    def reset(self) -> None:
        """Start again."""
        self.sums.zero_()

    def to(self, like: Tensor) -> None:
        """Move it to where, and to what dtype, another tensor is."""
        self.sums = self.sums.to(like)

    def state_dict(self) -> Tensor:
        """The sums, and their number."""
        return self.sums.clone()

    def load_state_dict(self, state_dict: Tensor) -> None:
        """Restore them."""
        self.sums.copy_(state_dict)


class POGOOptimizationStepper(OptimizationStepper):
    """One update of POGO on one batch, or many: all that changes during a training, in one place.

    What it trains is read from the loss module whenever training starts or goes on: the loss may
    have been moved, cast or loaded in between.

    Args:
        loss_module: the objective.

    Keyword Args:
        lr: learning rate of the default optimizers. Defaults to ``3e-4``.
        qvalue_optimizer: of the critics: a ``torch.optim`` class, a function of their parameters
            that returns an optimizer, or an optimizer made from ``loss.qvalue_params()``. Defaults
            to Adam.
        actor_optimizer: of the actors: what makes an optimizer for each, or a list of them, each
            made from ``loss.actor_params(i)``. Defaults to Adam.
        qvalue_lr_scheduler: makes a scheduler of the critics' optimizer, stepped after each update.
            Defaults to ``None``: the learning rate is constant.
        actor_lr_scheduler: the same for each actor.
        clip_grad_norm: largest norm of the gradient of the critics, and of that of each actor.
            Defaults to ``None``: gradients are not clipped.
        policy_freq: critic steps per chain of actor steps. Defaults to ``1``.
        tau: also move the targets, by this Polyak step. Defaults to ``None``: they are moved
            elsewhere.
        compile: run the whole update as one graph of ``torch.compile``. It is given the same noise
            and gives the same numbers, up to rounding. Takes Adam and AdamW. Defaults to ``False``.
        bf16: run the networks in bfloat16 (autocast); parameters, moments and the divergence stay
            in float32. Defaults to ``False``.

    Raises:
        ValueError: for optimizers that are none, or are not one for each actor, and a divergence
            that cannot be compiled; when training starts, for optimizers of other parameters than
            the loss's, or that cannot be compiled.

    Example:
        >>> import torch
        >>> from functools import partial
        >>> from torchrl.data import Bounded
        >>> from pogo_torchrl import POGOLoss, make_actor, make_qvalue
        >>> spec = Bounded(low=-torch.ones(2), high=torch.ones(2))
        >>> loss = POGOLoss(make_actor(3, spec), make_qvalue(3, 2), w2_weights=(0.2, 0.5))
        >>> stepper = POGOOptimizationStepper(
        ...     loss, actor_optimizer=partial(torch.optim.AdamW, lr=1e-4, weight_decay=0.01))
        >>> list(stepper.optimizers)
        ['qvalue', 'actor_0', 'actor_1']
    """

    max_graph_updates = 25  # updates in one CUDA graph

    def __init__(
        self,
        loss_module: POGOLoss,
        *,
        lr: float = 3e-4,
        qvalue_optimizer: Optimizer | MakeOptimizer | None = None,
        actor_optimizer: Sequence[Optimizer] | MakeOptimizer | None = None,
        qvalue_lr_scheduler: MakeScheduler | None = None,
        actor_lr_scheduler: MakeScheduler | None = None,
        clip_grad_norm: float | None = None,
        policy_freq: int = 1,
        tau: float | None = None,
        compile: bool = False,
        bf16: bool = False,
    ) -> None:
        if compile:
            check_backend(loss_module)
        self.loss_module = loss_module
        self.clip_grad_norm, self.policy_freq, self.tau = clip_grad_norm, policy_freq, tau
        self.compile, self.bf16 = compile, bf16
        default = adam(lr, device=loss_module.min_action.device)
        self._optimizers = ChainOptimizers(
            loss_module,
            default if qvalue_optimizer is None else qvalue_optimizer,
            default if actor_optimizer is None else actor_optimizer,
            qvalue_lr_scheduler,
            actor_lr_scheduler,
        )
        self.steps = 0
        critics, actors = scalar_names(loss_module)
        self.names, self._num_qvalue = critics + actors, len(critics)
        # Always the same memory: a CUDA graph writes it.
        self.scalars = loss_module.min_action.new_zeros(len(self.names))
        self._means: list[RunningMean] = []
        self._tick = RunningMean(self.names, self.scalars)  # of one call of run()
        self._update: Update | None = None
        self._graphs: UpdateGraphs | None = None
        self._lr: tuple[list[float], Any] = ([], None)
        self.last_batch: TensorDictBase | None = None

    @property
    def optimizers(self) -> dict[str, Optimizer]:
        """The optimizers by name: ``qvalue``, ``actor_0``, ``actor_1``, ...; made where needed."""
        return self._optimizers.by_name

    # ------------------------------------------------------------------ updates

    def step(self, trainer: Any, sub_batch: TensorDictBase) -> TensorDictBase:
        """Update on one batch, and write each sample's TD error to it for prioritised replay.

        Args:
            trainer: whose loop makes this step.
            sub_batch: the batch; an empty one stands for as many updates as it is long, on batches
                that ``trainer`` samples.

        Returns:
            The detached scalars of all losses, or their means over the updates.
        """
        if sub_batch.is_empty():
            count_updates(trainer, sub_batch.numel() - 1)
            return self.run(sub_batch.numel(), trainer.dataset)
        self._prepare()
        self.loss_module.check_batch(sub_batch)
        results = self.update_on(sub_batch, self.lr())
        sub_batch.set(self.loss_module.tensor_keys.priority, results.td_error)
        self.advance(1)
        if isinstance(trainer, Trainer):  # whose loop leaves the stage to steppers
            run_stage(trainer, "post_loss", sub_batch)
        return self.metrics

    def run(self, count: int, batches: Batches) -> TensorDictBase:
        """Make ``count`` updates on batches as they are sampled.

        On a GPU a compiled update is replayed as CUDA graphs of many updates
        (:mod:`pogo_torchrl.trainers.fused.cuda_graphs`).

        Args:
            count: how many.
            batches: where they come from.

        Returns:
            The means of the detached scalars of all losses.
        """
        self._prepare()
        self._tick.reset()
        if self._graphs is not None:
            self._graphs.run(count, batches)
        else:
            for place in range(count):
                batch = batches.sample()
                if place == 0:
                    self.loss_module.check_batch(batch)
                self.update_on(batch, self.lr())
                self.advance(1)
        return self._tick.tensors()

    def update_on(self, batch: TensorDictBase, lr: Any) -> Results:
        """The work of one update on the device; :meth:`advance` counts it."""
        assert self._update is not None
        results = self._update(batch, self.draw_noise(batch), lr, self.with_actors)
        self.record_metrics(results, batch)
        return results

    @property
    def with_actors(self) -> bool:
        """Whether the next update is one of the actors, too."""
        return self.steps % self.policy_freq == 0

    def draw_noise(self, batch: TensorDictBase) -> dict[str, Tensor]:
        """What the next update draws."""
        return self.loss_module.draw_noise(batch, actors=None if self.with_actors else ())

    def record_metrics(self, results: Results, batch: TensorDictBase) -> None:
        """Keep the scalars of an update, add them to the means, and remember its batch."""
        self.scalars[: self._num_qvalue].copy_(results.qvalue)
        # Updates without the actors repeat their last values: means are over updates.
        if results.actors is not None:
            self.scalars[self._num_qvalue :].copy_(results.actors)
        for mean in (self._tick, *self._means):
            mean.add(self.scalars)
        self.last_batch = batch

    def advance(self, count: int) -> None:
        """Count updates that were made, and move the learning rates on."""
        for _ in range(count):
            self.steps += 1
            self._optimizers.step_schedulers()

    def lr(self) -> Any:
        """The learning rates of the next update, as it takes them."""
        rates = self.rates()
        if rates != self._lr[0]:
            like = self.loss_module.min_action
            tensor = torch.tensor(rates, dtype=torch.float64).to(like.device, non_blocking=True)
            self._lr = rates, tensor
        return self._lr[1]

    def rates(self) -> list[float]:
        """The learning rates of the next update: of the critics and of each actor."""
        return [float(one.param_groups[0]["lr"]) for one in self.optimizers.values()]

    # ------------------------------------------------------------------ what it gives

    def track(self) -> RunningMean:
        """A mean of the scalars over the updates from now on, for a hook to read and reset."""
        mean = RunningMean(self.names, self.scalars)
        self._means.append(mean)
        return mean

    @property
    def metrics(self) -> TensorDict:
        """The scalars of the last update, by name."""
        return TensorDict(dict(zip(self.names, self.scalars.clone().unbind())))

    # ------------------------------------------------------------------ its state

    def _prepare(self) -> None:
        """Find the memory that the loss and the optimizers have now."""
        update = self._update
        if update is not None and update.is_current():
            return
        if update is None or not update.refresh():
            self.synchronize()
            self._match_device()
            self._update = Update(
                [self.loss_module],
                [self.optimizers],
                tau=self.tau,
                clip_grad_norm=self.clip_grad_norm,
                compile=self.compile,
                bf16=self.bf16,
            )
        make = self.graph_maker()
        self._graphs = (
            UpdateGraphs(self, make, self.max_graph_updates) if make is not None else None
        )

    def graph_maker(self) -> Callable[[], DeviceGraph] | None:
        """What makes graphs of updates; ``None`` where there are none."""
        loss = self.loss_module
        device = loss.min_action.device
        # GeomLoss reads numbers on the host, the exact backend copies tables to the device.
        free = loss.num_actors == 1 or loss.w2_backend == "fast"
        wanted = self.compile and free and device.type == "cuda"
        return partial(CUDAGraph, device) if wanted else None

    def _match_device(self) -> None:
        """Have the scalars where the loss is."""
        like = self.loss_module.min_action
        self.scalars = self.scalars.to(like)
        self._lr = [], None
        for mean in (self._tick, *self._means):
            mean.to(like)

    @contextmanager
    def preserve_state(self) -> Iterator[None]:
        """Restore all training state at the end, in place: updates within leave no trace."""
        assert self._update is not None
        memory = [
            *self._update.memory(),
            self.scalars,
            *(m.sums for m in (self._tick, *self._means)),
        ]
        rng, steps = GlobalRNGState(), self.steps
        before = [tensor.clone() for tensor in memory], copy.deepcopy(rng.state_dict())
        try:
            yield
        finally:
            self.steps = steps
            rng.load_state_dict(before[1])
            for tensor, values in zip(memory, before[0]):
                tensor.copy_(values)

    def use_update(self, update: Update) -> None:
        """Have the updates of this run made by a stack's."""
        self._update = update

    def synchronize(self) -> None:
        """Tell the optimizers how many steps were made, where a compiled update counts them."""
        if self._update is not None:
            self._update.write_steps()

    def state_dict(self) -> dict[str, Any]:
        """Optimizers, schedules, counters and means; the loss's own state is not among them."""
        self.synchronize()
        return {
            "steps": self.steps,
            "scalars": self.scalars.clone(),
            "means": [mean.state_dict() for mean in self._means],
            **self._optimizers.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore them from a checkpoint."""
        self._match_device()
        self.steps = state_dict["steps"]
        self.scalars.copy_(state_dict["scalars"])
        for mean, sums in zip(self._means, state_dict["means"]):
            mean.load_state_dict(sums)
        self._optimizers.load_state_dict(state_dict)
