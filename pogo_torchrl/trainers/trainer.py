"""POGO's training on TorchRL's Trainer: sequential JKO steps, hooks, checkpoints, resume."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tensordict import TensorDict, TensorDictBase
from torch.optim import Optimizer
from torchrl.checkpoint import CheckpointError, CheckpointRotation
from torchrl.data import ReplayBuffer
from torchrl.data.replay_buffers.samplers import PrioritizedSampler
from torchrl.objectives import SoftUpdate
from torchrl.objectives.utils import TargetNetUpdater
from torchrl.trainers import Trainer, TrainerHookBase

from pogo_torchrl.objectives import POGOLoss
from pogo_torchrl.trainers.checkpoints import (
    FORMAT_VERSION,
    DurableCheckpoint,
    PriorityState,
    is_intact,
    metadata,
    remove_unfinished,
)
from pogo_torchrl.trainers.hooks import DivergenceError, ProgressBar
from pogo_torchrl.trainers.optimizers import MakeOptimizer, MakeScheduler
from pogo_torchrl.trainers.stepper import POGOOptimizationStepper

_LOGGER = logging.getLogger(__name__)

# A tick is the stretch of updates between two looks at hooks, signals and the progress bar.
_MAX_STEP_LENGTH = 25

# Stages that TorchRL's loop runs at each update: with a hook in any of them, updates are made one
# by one.
_PER_UPDATE_STAGES = {"process_optim_batch", "post_loss", "post_optim", "post_optim_log"}

# Those that come between the loss and the optimizer's step, which are one here; TorchRL's own
# trainer leaves them out, without a word, where it has an OptimizationStepper.
_UNSUPPORTED_STAGES = {
    "process_loss": "change the loss itself (subclass POGOLoss)",
    "optimizer": "give POGOTrainer the optimizers (qvalue_optimizer, actor_optimizer)",
}


class OfflineStepIterator:
    """Stands where an online trainer has its collector: yields stretches of updates.

    Each item is an empty tensordict whose batch size is the number of updates until the next
    multiple of any of ``intervals`` (or the end), so that hooks meet their steps exactly.

    Example:
        >>> ticks = OfflineStepIterator(total=25, intervals=[10])
        >>> [tick.numel() for tick in ticks]
        [10, 10, 5]
    """

    init_random_frames = 0

    def __init__(self, total: int, intervals: Sequence[int] = ()) -> None:
        self.total = total
        self.intervals = [total, *intervals]
        self.step = 0

    def __iter__(self) -> Iterator[TensorDict]:
        while self.step < self.total:
            ahead = [interval - self.step % interval for interval in self.intervals]
            length = min(*ahead, self.total - self.step, _MAX_STEP_LENGTH)
            self.step += length
            yield TensorDict({}, [length])

    def stop(self) -> None:
        """Yield no more."""
        self.total = self.step

    def state_dict(self) -> dict[str, Any]:
        """The step reached."""
        return {"step": self.step}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a step."""
        self.step = state_dict["step"]

    def set_seed(self, seed: int, static_seed: bool = False) -> int:
        """Nothing is collected, so nothing is seeded."""
        return seed

    def update_policy_weights_(self, *args: Any, **kwargs: Any) -> None:
        """No policy collects data."""

    def shutdown(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to shut down."""


class POGOTrainer(Trainer):
    """TorchRL's Trainer for POGO: learns from an offline replay buffer, no environment needed.

    Every update samples one batch, steps the critics and the chain in the method's order
    (:class:`POGOOptimizationStepper`) and moves the targets. The global random state of torch is
    the only source of randomness; it is part of the checkpoints, the dataset is not.

    Hooks are TorchRL's (``register_op``), of all stages but ``process_loss`` and ``optimizer``,
    which lie between the loss and the step of its optimizer; :class:`LogMetrics` and
    :class:`Evaluate` are those of our command line. TorchRL's "batch" is a tick: the stretch of up
    to 25 updates to the next multiple of an interval. ``collected_frames`` counts updates.

    A prioritised replay buffer gets each sample's squared TD error as its priority after each
    update, as TorchRL's own trainers give it.

    Args:
        loss_module: the objective.
        replay_buffer: anything with ``sample()``, e.g. of
            :func:`~pogo_torchrl.data.make_replay_buffer` or one of TorchRL's datasets.
        total_steps: updates to reach.

    Keyword Args:
        lr: learning rate of the default optimizers, Adam for all. Defaults to ``3e-4``.
        qvalue_optimizer: of the critics: a ``torch.optim`` class, a function of their parameters
            that returns an optimizer (``functools.partial(torch.optim.AdamW, lr=1e-3)``), or an
            optimizer made from ``loss_module.qvalue_params()``. Defaults to Adam.
        actor_optimizer: of the actors: what makes an optimizer for each, or a list of them, each
            made from ``loss_module.actor_params(i)``. Defaults to Adam.
        qvalue_lr_scheduler: makes a scheduler of the critics' optimizer
            (``functools.partial(CosineAnnealingLR, T_max=total_steps)``), stepped after each
            update. Defaults to ``None``: the learning rate is constant.
        actor_lr_scheduler: the same for each actor.
        clip_grad_norm: largest norm of the gradient of the critics, and of that of each actor.
            Defaults to ``None``: gradients are not clipped.
        policy_freq: critic steps per chain of actor steps. Defaults to ``1``.
        tau: Polyak step of the targets, as of TorchRL's ``SoftUpdate``. Defaults to ``0.005``.
        target_net_updater: TorchRL target updater of ``loss_module`` instead. Defaults to
            ``SoftUpdate(loss_module, tau=tau)``.
        compile: run the update as one graph of ``torch.compile`` (with Adam and AdamW); on a GPU
            also replay CUDA graphs of many updates
            (:mod:`pogo_torchrl.trainers.fused.cuda_graphs`), as long as no hooks act on each
            update. Defaults to ``False``.
        bf16: run the networks in bfloat16 during updates. Defaults to ``False``.
        checkpoint_dir: folder for rotated checkpoints; ``None``: none are written.
        checkpoint_interval: updates between two of them; one is always written at the end.
            Defaults to ``50_000``.
        keep_checkpoints: how many of the newest to keep. Defaults to ``2``.
        fingerprint: what identifies the run (JSON: its data, its settings). It is kept in every
            checkpoint, and :meth:`resume` refuses checkpoints with another one.
        progress_bar: show one, with speed and remaining time. Defaults to ``True``.
        hooks: TorchRL trainer hooks to register.

    Raises:
        ValueError: for step counts or intervals below 1, an empty replay buffer, or optimizers
            that are none.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.data import Bounded, LazyTensorStorage, TensorDictReplayBuffer
        >>> from pogo_torchrl import POGOLoss, POGOTrainer, make_actor, make_qvalue
        >>> spec = Bounded(low=-torch.ones(2), high=torch.ones(2))
        >>> rb = TensorDictReplayBuffer(storage=LazyTensorStorage(64), batch_size=16)
        >>> _ = rb.extend(TensorDict({
        ...     "observation": torch.randn(64, 3), "action": spec.rand([64]),
        ...     ("next", "observation"): torch.randn(64, 3),
        ...     ("next", "reward"): torch.randn(64, 1),
        ...     ("next", "done"): torch.zeros(64, 1, dtype=torch.bool),
        ...     ("next", "terminated"): torch.zeros(64, 1, dtype=torch.bool)}, [64]))
        >>> loss = POGOLoss(make_actor(3, spec), make_qvalue(3, 2), w2_weights=(0.2, 0.5))
        >>> trainer = POGOTrainer(loss, rb, total_steps=3, progress_bar=False)
        >>> trainer.train()
        >>> trainer.collected_frames
        3
    """

    def __init__(
        self,
        loss_module: POGOLoss,
        replay_buffer: ReplayBuffer,
        total_steps: int,
        *,
        lr: float = 3e-4,
        qvalue_optimizer: Optimizer | MakeOptimizer | None = None,
        actor_optimizer: Sequence[Optimizer] | MakeOptimizer | None = None,
        qvalue_lr_scheduler: MakeScheduler | None = None,
        actor_lr_scheduler: MakeScheduler | None = None,
        clip_grad_norm: float | None = None,
        policy_freq: int = 1,
        tau: float = 0.005,
        target_net_updater: TargetNetUpdater | None = None,
        compile: bool = False,
        bf16: bool = False,
        checkpoint_dir: str | Path | None = None,
        checkpoint_interval: int = 50_000,
        keep_checkpoints: int = 2,
        fingerprint: Mapping[str, Any] | None = None,
        progress_bar: bool = True,
        hooks: Sequence[TrainerHookBase] = (),
    ) -> None:
        self.check_settings(
            total_steps,
            lr=lr,
            clip_grad_norm=clip_grad_norm,
            policy_freq=policy_freq,
            tau=tau,
            checkpoint_interval=checkpoint_interval,
            keep_checkpoints=keep_checkpoints,
        )
        if len(replay_buffer) == 0:
            raise ValueError("The replay buffer is empty: there is nothing to learn from.")

        if target_net_updater is None and (loss_module.delay_qvalue or loss_module.delay_actor):
            target_net_updater = SoftUpdate(loss_module, tau=tau)
        # A SoftUpdate's step is a part of the update.
        soft = target_net_updater if type(target_net_updater) is SoftUpdate else None
        self.fingerprint = dict(fingerprint or {})
        self.stages: dict[str, list[tuple[Callable, dict[str, Any]]]] = {}  # hooks with arguments
        self._has_per_update_hooks = False  # whether any hook does
        self.stopping = False
        self.stop_reason: str | None = None
        self._tick: TensorDictBase | None = None  # that is to be one step
        ticks, rotation = OfflineStepIterator(total_steps), None
        if checkpoint_dir is not None:
            ticks.intervals.append(checkpoint_interval)
            rotation = CheckpointRotation(checkpoint_dir, keep_last=keep_checkpoints, prefix="step")
        super().__init__(
            collector=ticks,
            total_frames=total_steps,
            frame_skip=1,
            optim_steps_per_batch=1,  # each tick has its own, see optim_steps()
            loss_module=loss_module,
            optimization_stepper=POGOOptimizationStepper(
                loss_module,
                lr=lr,
                qvalue_optimizer=qvalue_optimizer,
                actor_optimizer=actor_optimizer,
                qvalue_lr_scheduler=qvalue_lr_scheduler,
                actor_lr_scheduler=actor_lr_scheduler,
                clip_grad_norm=clip_grad_norm,
                policy_freq=policy_freq,
                tau=None if soft is None else 1 - soft.eps,
                compile=compile,
                bf16=bf16,
            ),
            progress_bar=False,  # ours shows the whole run, also after a resume
            # the trainer saves once MORE than the interval has passed
            save_trainer_interval=checkpoint_interval - 1,
            checkpoint=DurableCheckpoint(),
            checkpoint_rotation=rotation,
            checkpoint_metadata=self._checkpoint_metadata if rotation else None,
            auto_log_optim_steps=False,  # it would keep every number of every step
        )
        # After super().__init__(), which would make the dataset a part of each checkpoint.
        self.dataset = replay_buffer
        self.register_op("process_optim_batch", self._sample)
        self.register_op("shutdown", self.optimization_stepper.synchronize)
        if target_net_updater is not None and soft is None:
            self.register_op("post_optim", target_net_updater.step)
        self._register_priority_updates(replay_buffer)
        self.bar = ProgressBar() if progress_bar else None
        for hook in (*hooks, self.bar):
            if hook is not None:
                hook.register(self)

    def register_op(self, dest: Any, op: Callable, **kwargs: Any) -> None:
        """Register an operation, as TorchRL's trainer does.

        Raises:
            ValueError: for the stages between the loss and the step of its optimizer.
        """
        if dest in _UNSUPPORTED_STAGES:
            raise ValueError(
                f"POGOTrainer has no {dest!r} stage, since losses and steps are one update here: "
                f"{_UNSUPPORTED_STAGES[dest]}, or write your own loop "
                "(examples/pogo_in_torchrl.py)."
            )
        super().register_op(dest, op, **kwargs)
        self.stages.setdefault(dest, []).append((op, kwargs))
        if dest in _PER_UPDATE_STAGES and op != self._sample:
            self._has_per_update_hooks = True

    def _register_priority_updates(self, replay_buffer: ReplayBuffer) -> None:
        """Give a prioritised replay buffer the TD errors, and checkpoint its priorities."""
        sampler = getattr(replay_buffer, "sampler", None)
        if not isinstance(sampler, PrioritizedSampler):
            return
        update = getattr(replay_buffer, "update_tensordict_priority", None)
        key = self.loss_module.tensor_keys.priority
        theirs = getattr(replay_buffer, "priority_key", None)
        if update is None or theirs != key:
            raise ValueError(
                f"the prioritised replay buffer reads priorities from {theirs!r}, the loss writes "
                f"them to {key!r}: use a TensorDictReplayBuffer with priority_key={key!r}, or "
                f"loss.set_keys(priority=...)."
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of a stage that TorchRL may rename
            self.register_op("post_loss", update)
        self.register_module("priorities", PriorityState(sampler))

    @staticmethod
    def check_settings(
        total_steps: int,
        *,
        lr: float = 3e-4,
        clip_grad_norm: float | None = None,
        policy_freq: int = 1,
        tau: float = 0.005,
        checkpoint_interval: int = 50_000,
        keep_checkpoints: int = 2,
        **others: Any,
    ) -> None:
        """Check the numbers that the constructor takes, without a dataset.

        Raises:
            ValueError: naming the first that is out of range.

        Example:
            >>> POGOTrainer.check_settings(10, lr=-1.0)
            Traceback (most recent call last):
                ...
            ValueError: lr=-1.0 must be a positive number, e.g. 3e-4.
        """
        for name, value in {
            "total_steps": total_steps,
            "policy_freq": policy_freq,
            "checkpoint_interval": checkpoint_interval,
            "keep_checkpoints": keep_checkpoints,
        }.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value} must be an integer >= 1.")
        if not (lr > 0 and math.isfinite(lr)):
            raise ValueError(f"lr={lr} must be a positive number, e.g. 3e-4.")
        if clip_grad_norm is not None and not 0 < clip_grad_norm < math.inf:
            raise ValueError(
                f"clip_grad_norm={clip_grad_norm} must be a positive number, e.g. 1.0, or None."
            )
        if not 0 < tau <= 1:
            raise ValueError(f"tau={tau} must be in (0, 1], e.g. 0.005.")

    def add_interval(self, interval: int) -> None:
        """Make every multiple of ``interval`` updates a boundary where ``post_steps`` hooks run."""
        self.collector.intervals.append(interval)

    def at_boundary(self) -> bool:
        """Whether the updates so far are a multiple of any interval, or all."""
        return any(self.collected_frames % interval == 0 for interval in self.collector.intervals)

    def optim_steps(self, batch: TensorDictBase) -> None:
        """As many updates as the tick is long, with TorchRL's stages around them."""
        # Without hooks that see single updates the stepper makes all of the tick's in one step.
        self._tick = None if self._has_per_update_hooks else batch
        self.optim_steps_per_batch = batch.numel() if self._tick is None else 1
        try:
            super().optim_steps(batch)
        except FloatingPointError as error:
            raise DivergenceError(
                f"Training has diverged: at update {self.optimization_stepper.steps + 1}, {error}"
            ) from error

    def sample(self) -> TensorDictBase:
        """A batch of the replay buffer."""
        return self.dataset.sample()

    def _sample(self, batch: TensorDictBase) -> TensorDictBase:
        return self.sample() if self._tick is None else self._tick

    def resume(self) -> int | None:
        """Load the newest checkpoint of ``checkpoint_dir`` that is whole; damaged ones are skipped.

        Returns:
            The step it was taken at; ``None`` where there is none.

        Raises:
            ValueError: when the checkpoint is of another run or version; nothing is changed then.
        """
        rotation = self.checkpoint_rotation
        if rotation is None:
            return None
        remove_unfinished(rotation)
        for path in sorted(rotation.directory.glob(f"{rotation.prefix}-*"), reverse=True):
            if not is_intact(path):
                _LOGGER.warning("%s is damaged or unfinished and is passed over.", path)
                continue
            self._check_fingerprint(path)
            try:
                self.load_from_file(path)
            except CheckpointError as error:
                raise ValueError(f"{path} does not fit this run: {error}") from error
            return self.collected_frames
        return None

    def _checkpoint_metadata(self, trainer: Trainer) -> dict[str, Any]:
        return {"format_version": FORMAT_VERSION, "fingerprint": self.fingerprint}

    def _check_fingerprint(self, path: Path) -> None:
        found = metadata(path)
        version, theirs = found.get("format_version"), found.get("fingerprint", {})
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{path} has format version {version}, this release reads {FORMAT_VERSION}: "
                "resume it with the release that wrote it."
            )
        keys = self.fingerprint.keys() | theirs.keys()
        changed = [
            f"{key}: {theirs.get(key)} -> {self.fingerprint.get(key)}"
            for key in sorted(keys)
            if theirs.get(key) != self.fingerprint.get(key)
        ]
        if changed:
            raise ValueError(
                f"{path} is a checkpoint of another run ({'; '.join(changed)}). Give the values "
                "that it was started with, or another checkpoint_dir."
            )

    def request_stop(self, reason: str | None = None) -> None:
        """Stop after the current tick, with a checkpoint.

        Args:
            reason: why, kept in ``stop_reason``.
        """
        super().request_stop(reason)
        self.stopping, self.stop_reason = True, reason

    def save_trainer(self, force_save: bool = False) -> None:
        """Write a checkpoint if one is due, or in any case.

        Args:
            force_save: whether to write one now. Defaults to ``False``.

        Raises:
            OSError: when it cannot be written, e.g. on a full disk.
        """
        try:
            super().save_trainer(force_save)
        except (OSError, RuntimeError) as error:  # torch.save raises either on a full disk
            reason = str(error).splitlines()[0]
            kept = self.checkpoint_rotation.latest()
            raise OSError(
                f"cannot write a checkpoint at update {self.collected_frames}: {reason}. The last "
                f"one is {kept}. Free some space or mend the folder, then go on with resume=true."
            ) from error
