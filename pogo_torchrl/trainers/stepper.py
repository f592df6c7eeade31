"""The optimization stepper: runs updates, averages their metrics, saves and restores the state."""

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
from torch.optim.lr_scheduler import LRScheduler
from torchrl.checkpoint import GlobalRNGState
from torchrl.trainers import Trainer
from torchrl.trainers.trainers import OptimizationStepper

from pogo_torchrl.objectives import POGOLoss
from pogo_torchrl.objectives.chain_loss import actor_scalars
from pogo_torchrl.torchrl_private import count_updates, run_stage
from pogo_torchrl.trainers.fused.compilation import check_backend
from pogo_torchrl.trainers.fused.cuda_graphs import CUDAGraph, DeviceGraph, UpdateGraphs
from pogo_torchrl.trainers.fused.update import Results, Update, scalar_names
from pogo_torchrl.trainers.optimizers import ChainOptimizers, MakeOptimizer, MakeScheduler, adam


class Batches(Protocol):
    """Source of batches, such as a replay buffer."""

    def sample(self) -> TensorDictBase:
        """Return the next batch."""


class RunningMean:
    """Running mean of the scalars of all updates since the last reset.

    It is accumulated on the device, always in the same memory, so that a CUDA graph can add to it.

    Args:
        names: names of the scalars.
        like: tensor whose device and dtype are used.
    """

    def __init__(self, names: Sequence[str], like: Tensor) -> None:
        self.names = list(names)
        self.sums = like.new_zeros(len(names) + 1)  # the last entry counts the updates

    def add(self, scalars: Tensor) -> None:
        """Add the scalars of one update, in the order of ``names``."""
        self.sums[:-1].add_(scalars)
        self.sums[-1].add_(1)

    @property
    def count(self) -> int:
        """Number of updates since the last reset; waits for the device."""
        return int(self.sums[-1])

    def __call__(self) -> dict[str, float]:
        """Return the means by name; empty before the first update. Waits for the device."""
        if not self.count:
            return {}
        return dict(sorted(zip(self.names, (self.sums[:-1] / self.sums[-1]).tolist())))

    def tensors(self) -> TensorDict:
        """Return the means by name, without waiting for the device."""
        return TensorDict(dict(zip(self.names, (self.sums[:-1] / self.sums[-1]).unbind())))

    def reset(self) -> None:
        """Reset the sums and the count to zero."""
        self.sums.zero_()

    def to(self, like: Tensor) -> None:
        """Move the sums to the device and dtype of ``like``."""
        self.sums = self.sums.to(like)

    def state_dict(self) -> Tensor:
        """Return the sums and the count, as one vector."""
        return self.sums.clone()

    def load_state_dict(self, state_dict: Tensor) -> None:
        """Restore the state returned by :meth:`state_dict`."""
        self.sums.copy_(state_dict)


class POGOOptimizationStepper(OptimizationStepper):
    """Optimization stepper of POGO: runs updates and owns all state that changes during training.

    The parameters are read from the loss module whenever training starts or continues, so the loss
    may be moved, cast or loaded in between.

    Args:
        loss_module: the objective.

    Keyword Args:
        lr: learning rate of the default optimizers. Defaults to ``3e-4``.
        qvalue_optimizer: optimizer of the critics: a ``torch.optim`` class, a function from
            parameters to an optimizer, or an optimizer of ``loss_module.qvalue_params()``. Defaults
            to Adam.
        actor_optimizer: optimizers of the actors: a class or function that is called for each
            actor, or a list with an optimizer of ``loss_module.actor_params(i)`` for each actor i.
            Defaults to Adam.
        qvalue_lr_scheduler: function from the critics' optimizer to its scheduler, which is stepped
            after each update. Defaults to ``None``: a constant learning rate.
        actor_lr_scheduler: the same for the optimizer of each actor. Defaults to ``None``.
        clip_grad_norm: maximum gradient norm, applied separately to the critics and to each actor.
            Defaults to ``None``: no clipping.
        policy_freq: number of critic updates per update of the actors. Defaults to ``1``.
        tau: Polyak step of the target networks. Defaults to ``None``: the stepper does not update
            the targets.
        compile: run the whole update as one graph of ``torch.compile``. It uses the same noise and
            gives the same values, except for rounding. Supports Adam and AdamW only. Defaults to
            ``False``.
        bf16: run the networks in bfloat16 (autocast); parameters, moments and the divergence stay
            in float32. Defaults to ``False``.

    Attributes:
        freeze_at: number of updates after which the critics and actor 0 are frozen, and until which
            the later actors are not trained; set by
            :class:`~pogo_torchrl.trainers.freeze.FreezeThenFlow`. Defaults to ``None``.
        hold_first_actor: with ``freeze_at``, do not train actor 0 either: the critics evaluate it
            as it is. Defaults to ``False``.

    Raises:
        ValueError: if an optimizer is invalid, if there is not one optimizer per actor, if
            parameters are float16, or if the divergence cannot be compiled. When training starts:
            if an optimizer does not hold the parameters of the loss, or cannot be compiled.

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

    max_graph_updates = 25  # maximum number of updates per CUDA graph

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
        _check_dtype(loss_module)
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
        self.freeze_at: int | None = None
        self.hold_first_actor = False
        critics, actors = scalar_names(loss_module)
        self.names, self._num_qvalue = critics + actors, len(critics)
        # Always the same memory, because CUDA graphs write to it.
        self.scalars = loss_module.min_action.new_zeros(len(self.names))
        self._means: list[RunningMean] = []
        self._run_means = RunningMean(self.names, self.scalars)  # means over one call of run()
        self._update: Update | None = None
        self._graphs: UpdateGraphs | None = None
        self._lr: tuple[list[float], Any] = ([], None)
        self.last_batch: TensorDictBase | None = None

    @property
    def optimizers(self) -> dict[str, Optimizer]:
        """Optimizers by name: ``qvalue``, ``actor_0``, ``actor_1``, ...; created on first use."""
        return self._optimizers.by_name

    @property
    def schedulers(self) -> dict[str, LRScheduler]:
        """Learning-rate schedules by the name of their optimizer."""
        return self._optimizers.schedulers

    # ------------------------------------------------------------------ updates

    def step(self, trainer: Any, sub_batch: TensorDictBase) -> TensorDictBase:
        """Run one update and write the TD error of each sample to the batch, or run many updates.

        Args:
            trainer: trainer whose loop calls this method.
            sub_batch: a batch of transitions ``[*B]``. A tensordict without entries stands for
                ``sub_batch.numel()`` updates on batches sampled from ``trainer.dataset``.

        Returns:
            The detached scalars of all losses, or their means over the updates.
        """
        if sub_batch.is_empty():
            count_updates(trainer, sub_batch.numel() - 1)
            return self.run(sub_batch.numel(), trainer.dataset)
        self._prepare()
        self.loss_module.check_batch(sub_batch)
        results = self.update_on(sub_batch, self.lr())
        if results.td_error is not None:
            sub_batch.set(self.loss_module.tensor_keys.priority, results.td_error)
        self.advance(1)
        if isinstance(trainer, Trainer):  # its loop leaves this stage to the stepper
            run_stage(trainer, "post_loss", sub_batch)
        return self.metrics

    def run(self, count: int, batches: Batches) -> TensorDictBase:
        """Run ``count`` updates, sampling a batch for each.

        On a GPU, compiled updates are replayed as CUDA graphs
        (:mod:`pogo_torchrl.trainers.fused.cuda_graphs`).

        Args:
            count: number of updates.
            batches: source of the batches, usually a replay buffer.

        Returns:
            The means over the updates of the detached scalars of all losses.
        """
        self._prepare()
        self._run_means.reset()
        if self._graphs is not None:
            assert self._update is not None
            self._update.write_coefficients()  # hooks may have changed them
            self._graphs.run(count, batches)
        else:
            for index in range(count):
                batch = batches.sample()
                if index == 0:
                    self.loss_module.check_batch(batch)
                self.update_on(batch, self.lr())
                self.advance(1)
        return self._run_means.tensors()

    def update_on(self, batch: TensorDictBase, lr: Any) -> Results:
        """Run one update without counting it, see :meth:`advance`.

        Args:
            batch: transitions ``[*B]``.
            lr: learning rates as returned by :meth:`lr`.

        Returns:
            The scalars of the losses and the TD errors ``[*B]``.
        """
        assert self._update is not None
        results = self._update(batch, self.draw_noise(batch), lr, self.trained)
        self.record_metrics(results, batch)
        return results

    @property
    def with_actors(self) -> bool:
        """Whether the next update also updates actors."""
        return self.steps % self.policy_freq == 0 or self.frozen

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the networks that the next update trains.

        With :attr:`freeze_at`, the critics and actor 0 before that update and the later actors
        from then on, at each update, since there are no critic updates to wait for.
        """
        critics: tuple[str, ...] = () if self.frozen else ("qvalue",)
        return (*critics, *(f"actor_{i}" for i in self._trained_actors))

    @property
    def _trained_actors(self) -> range:
        """Indices of the actors that the next update trains."""
        if not self.with_actors:
            return range(0)
        if self.frozen:
            return range(1, self.loss_module.num_actors)
        if self.freeze_at is not None:
            return range(0 if self.hold_first_actor else 1)
        return range(self.loss_module.num_actors)

    @property
    def frozen(self) -> bool:
        """Whether the critics and actor 0 are frozen in the next update."""
        return self.freeze_at is not None and self.steps >= self.freeze_at

    def draw_noise(self, batch: TensorDictBase) -> dict[str, Tensor]:
        """Draw the noise of the next update for a batch of transitions."""
        return self.loss_module.draw_noise(
            batch, critic=not self.frozen, actors=self._trained_actors
        )

    def record_metrics(self, results: Results, batch: TensorDictBase) -> None:
        """Store the scalars of an update, add them to the running means and keep its batch."""
        # Networks that are not trained repeat their last values: means are over all updates.
        if results.qvalue is not None:
            self.scalars[: self._num_qvalue].copy_(results.qvalue)
        if results.actors is not None:
            first = self._num_qvalue + self._trained_actors.start * len(actor_scalars(0))
            self.scalars[first : first + len(results.actors)].copy_(results.actors)
        for mean in (self._run_means, *self._means):
            mean.add(self.scalars)
        self.last_batch = batch

    def advance(self, count: int) -> None:
        """Count ``count`` completed updates and step the learning-rate schedulers."""
        for _ in range(count):
            self.steps += 1
            self._optimizers.step_schedulers()

    def lr(self) -> Any:
        """Return the learning rates of the next update as a float64 tensor on the device."""
        rates = self.rates()
        if rates != self._lr[0]:
            like = self.loss_module.min_action
            tensor = torch.tensor(rates, dtype=torch.float64).to(like.device, non_blocking=True)
            self._lr = rates, tensor
        return self._lr[1]

    def rates(self) -> list[float]:
        """Return the learning rates of the next update: of the critics, then of each actor."""
        return [float(one.param_groups[0]["lr"]) for one in self.optimizers.values()]

    # ------------------------------------------------------------------ metrics

    def track(self) -> RunningMean:
        """Create a running mean of the scalars, which a hook may read and reset."""
        mean = RunningMean(self.names, self.scalars)
        self._means.append(mean)
        return mean

    @property
    def metrics(self) -> TensorDict:
        """The scalars of the last update, by name."""
        return TensorDict(dict(zip(self.names, self.scalars.clone().unbind())))

    # ------------------------------------------------------------------ state

    def _prepare(self) -> None:
        """Bind the update to the current memory of the loss and the optimizers."""
        update = self._update
        if update is not None and update.is_current():
            return
        if update is None or not update.refresh():
            _check_dtype(self.loss_module)  # it may have been cast since
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
        """Return a factory of CUDA graphs, or ``None`` if updates run without graphs."""
        loss = self.loss_module
        device = loss.min_action.device
        # Neither other backend can be captured: GeomLoss reads values on the host, the exact
        # backend copies tables to the device.
        free = loss.num_actors == 1 or loss.w2_backend == "fast"
        wanted = self.compile and free and device.type == "cuda"
        return partial(CUDAGraph, device) if wanted else None

    def _match_device(self) -> None:
        """Move the scalars and their means to the device and dtype of the loss."""
        like = self.loss_module.min_action
        self.scalars = self.scalars.to(like)
        self._lr = [], None
        for mean in (self._run_means, *self._means):
            mean.to(like)

    @contextmanager
    def preserve_state(self) -> Iterator[None]:
        """Context manager that restores all training state in place on exit."""
        assert self._update is not None
        memory = [
            *self._update.memory(),
            self.scalars,
            *(m.sums for m in (self._run_means, *self._means)),
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
        """Use the update of a stack of runs.

        Args:
            update: the stack's update, which also updates the parameters of this run.
        """
        self._update = update

    def synchronize(self) -> None:
        """Write the step counts of a compiled or stacked update to the optimizers."""
        if self._update is not None:
            self._update.write_steps()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of optimizers, schedulers, counters and means, not of the loss."""
        self.synchronize()
        return {
            "steps": self.steps,
            "scalars": self.scalars.clone(),
            "means": [mean.state_dict() for mean in self._means],
            **self._optimizers.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the state returned by :meth:`state_dict`."""
        self._match_device()
        self.steps = state_dict["steps"]
        self.scalars.copy_(state_dict["scalars"])
        for mean, sums in zip(self._means, state_dict["means"]):
            mean.load_state_dict(sums)
        self._optimizers.load_state_dict(state_dict)


def _check_dtype(loss: POGOLoss) -> None:
    """Refuse float16 parameters: small numbers such as Adam's epsilon are 0 in float16."""
    if any(parameter.dtype == torch.float16 for parameter in loss.parameters()):
        raise ValueError(
            "the loss has parameters of dtype torch.float16, which become infinite or NaN in "
            "training: convert it back with loss.float(), and pass bf16=True to run the networks "
            "in bfloat16."
        )
