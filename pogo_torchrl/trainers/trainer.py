"""The trainer of POGO, built on TorchRL's: sequential JKO steps, hooks, checkpoints, resuming."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tensordict import TensorDict, TensorDictBase
from torch.optim import Optimizer
from torchrl.checkpoint import CheckpointError, CheckpointRotation
from torchrl.data import ReplayBuffer
from torchrl.objectives import SoftUpdate
from torchrl.objectives.utils import TargetNetUpdater
from torchrl.record.loggers import Logger
from torchrl.trainers import EarlyStopping, Trainer, TrainerHookBase
from torchrl.trainers.trainers import OptimizationStepper

from pogo_torchrl.objectives import POGOLoss
from pogo_torchrl.objectives.settings import plain_number
from pogo_torchrl.trainers.buffers import check_buffer, prioritized_sampler, rows_for_hooks
from pogo_torchrl.trainers.checkpoints import (
    FORMAT_VERSION,
    DurableCheckpoint,
    PriorityState,
    check_fingerprint,
    check_unused,
    is_intact,
    plain,
    remove_unfinished,
)
from pogo_torchrl.trainers.freeze import FreezeThenFlow
from pogo_torchrl.trainers.hooks import DivergenceError, ProgressBar
from pogo_torchrl.trainers.optimizers import MakeOptimizer, MakeScheduler, optimizer_settings
from pogo_torchrl.trainers.stepper import POGOOptimizationStepper
from pogo_torchrl.trainers.ticks import OfflineStepIterator
from pogo_torchrl.trainers.torchrl_hooks import BATCH_STAGES, check_hook

_LOGGER = logging.getLogger(__name__)

# Stages of each update in TorchRL's loop. With a hook in any of them, updates run one by one.
_PER_UPDATE_STAGES = {"process_optim_batch", "post_loss", "post_optim", "post_optim_log"}


class POGOTrainer(Trainer):
    """TorchRL's Trainer for POGO, which learns from an offline replay buffer.

    Every update samples one batch, steps the critics and then the actors in the order of the chain
    (:class:`POGOOptimizationStepper`), and updates the targets. The global random state of torch is
    the only source of randomness. Checkpoints contain it, but not the dataset.

    TorchRL's hooks run as with its own trainers, or are refused when they are registered with a
    message that says what to use instead (docs/running.md lists them); the stages ``process_loss``
    and ``optimizer``, between the loss and the optimizer step, do not exist. The command line uses
    :class:`LogMetrics` and :class:`Evaluate`. TorchRL's collected "batch" is a tick here: up to 25
    updates, ending at the next multiple of an interval. Hooks that look at it see as many rows of
    the dataset, drawn without affecting the training. ``collected_frames`` counts updates.

    As in TorchRL's own trainers, a prioritised replay buffer receives the squared TD error of each
    sample as its priority after each update.

    Args:
        loss_module: the objective.
        replay_buffer: replay buffer with a ``sample()`` method, e.g. from
            :func:`~pogo_torchrl.data.make_replay_buffer` or one of TorchRL's datasets.
        total_steps: total number of updates.

    Keyword Args:
        lr: learning rate of the default optimizers. Defaults to ``3e-4``.
        qvalue_optimizer: optimizer of the critics: a ``torch.optim`` class, a function from
            parameters to an optimizer (``functools.partial(torch.optim.AdamW, lr=1e-3)``), or an
            optimizer of ``loss_module.qvalue_params()``. Defaults to Adam.
        actor_optimizer: optimizers of the actors: a class or function that is called for each
            actor, or a list with an optimizer of ``loss_module.actor_params(i)`` for each actor i.
            Defaults to Adam.
        qvalue_lr_scheduler: function from the critics' optimizer to its scheduler
            (``functools.partial(CosineAnnealingLR, T_max=total_steps)``), which is stepped after
            each update. Defaults to ``None``: a constant learning rate.
        actor_lr_scheduler: the same for the optimizer of each actor. Defaults to ``None``.
        clip_grad_norm: maximum gradient norm, applied separately to the critics and to each actor.
            Defaults to ``None``: no clipping.
        policy_freq: number of critic updates per update of the actors. Defaults to ``1``.
        freeze_critics_at: number of updates, or fraction of ``total_steps`` in (0, 1), after which
            the critics and actor 0 are frozen, and until which the later actors are not trained
            (:class:`~pogo_torchrl.trainers.freeze.FreezeThenFlow`). Defaults to ``None``: all
            networks are trained throughout.
        tau: Polyak step of the targets, as in TorchRL's ``SoftUpdate``. Defaults to ``0.005``.
        target_net_updater: TorchRL target updater of ``loss_module``, which replaces ``tau``.
            Defaults to ``SoftUpdate(loss_module, tau=tau)``.
        compile: run the update as one graph of ``torch.compile`` (Adam and AdamW only). On a GPU,
            also replay CUDA graphs of many updates
            (:mod:`pogo_torchrl.trainers.fused.cuda_graphs`), provided that no hook runs at each
            update. Defaults to ``False``.
        bf16: run the networks in bfloat16 during updates. Defaults to ``False``.
        checkpoint_dir: folder for rotated checkpoints. Defaults to ``None``: no checkpoints.
        checkpoint_interval: number of updates between two checkpoints; a final one is always
            written. Defaults to ``50_000``.
        keep_checkpoints: number of checkpoints to keep; older ones are deleted. Defaults to ``2``.
        fingerprint: JSON-serialisable description of the run (its data and settings). It is stored
            in every checkpoint, and :meth:`resume` rejects checkpoints with another fingerprint.
            Defaults to the settings of the loss and the trainer when training starts
            (:meth:`settings`); settings that a checkpoint does not record are then not compared.
        progress_bar: show a progress bar with speed and remaining time. Defaults to ``True``.
        hooks: TorchRL trainer hooks to register. Defaults to none.
        logger: TorchRL logger for the losses and for the values that hooks return. Defaults to
            ``None``.
        log_interval: number of updates between two values of a quantity in ``logger``. Defaults to
            ``10_000``.

    Raises:
        ValueError: if a setting is out of range (see :meth:`check_settings`), if the replay buffer
            is empty, or if an optimizer is invalid.
        FileExistsError: by :meth:`train`, if ``checkpoint_dir`` has another training's checkpoints.

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
        freeze_critics_at: float | None = None,
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
        logger: Logger | None = None,
        log_interval: int = 10_000,
    ) -> None:
        total_steps, policy_freq, checkpoint_interval, keep_checkpoints, log_interval = map(
            plain_number,
            (total_steps, policy_freq, checkpoint_interval, keep_checkpoints, log_interval),
        )
        lr, clip_grad_norm, tau, freeze_critics_at = map(
            plain_number, (lr, clip_grad_norm, tau, freeze_critics_at)
        )
        self.check_settings(
            total_steps,
            lr=lr,
            clip_grad_norm=clip_grad_norm,
            policy_freq=policy_freq,
            tau=tau,
            checkpoint_interval=checkpoint_interval,
            keep_checkpoints=keep_checkpoints,
            log_interval=log_interval,
        )
        check_buffer(replay_buffer)

        delays = (getattr(loss_module, f"delay_{name}", False) for name in ("qvalue", "actor"))
        if target_net_updater is None and any(delays):
            target_net_updater = SoftUpdate(loss_module, tau=tau)
        # A SoftUpdate's step is part of the update; other updaters are called after it.
        soft = target_net_updater if type(target_net_updater) is SoftUpdate else None
        self.fingerprint = None if fingerprint is None else dict(fingerprint)
        self._has_own_fingerprint = fingerprint is not None
        self.freeze_critics_at = freeze_critics_at
        self.stages: dict[str, list[tuple[Callable, dict[str, Any]]]] = {}  # hooks, arguments
        self._has_per_update_hooks = self._has_batch_hooks = False
        self.stopping = self._has_resumed = False
        self.stop_reason: str | None = None
        self._tick: TensorDictBase | None = None  # set if the stepper runs the whole tick at once
        ticks, rotation = OfflineStepIterator(total_steps), None
        if checkpoint_dir is not None:
            ticks.intervals.append(checkpoint_interval)
            rotation = CheckpointRotation(checkpoint_dir, keep_last=keep_checkpoints, prefix="step")
        super().__init__(
            collector=ticks,
            total_frames=total_steps,
            frame_skip=1,
            optim_steps_per_batch=1,  # set for each tick by optim_steps()
            loss_module=loss_module,
            optimization_stepper=self.make_stepper(
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
            progress_bar=False,  # replaced by ProgressBar, which supports resumed runs
            # Trainer saves only when more than the interval has passed
            save_trainer_interval=checkpoint_interval - 1,
            checkpoint=DurableCheckpoint(),
            checkpoint_rotation=rotation,
            checkpoint_metadata=self._checkpoint_metadata if rotation else None,
            logger=logger,
            log_interval=log_interval - 1,  # as for save_trainer_interval
            auto_log_optim_steps=False,  # it would keep all metrics of every step in memory
        )
        # Set after super().__init__(), which would add the dataset to every checkpoint.
        self.dataset = replay_buffer
        self.register_op("process_optim_batch", self._sample)
        self.register_op("shutdown", self.optimization_stepper.synchronize)
        if target_net_updater is not None and soft is None:
            self.register_op("post_optim", target_net_updater.step)
        self._register_priority_updates(replay_buffer)
        if logger is not None:
            self.add_interval(log_interval)
            self.register_op("post_optim_complete_log", self._losses)
        self.bar = ProgressBar() if progress_bar else None
        freeze = None if freeze_critics_at is None else FreezeThenFlow(freeze_critics_at)
        for hook in (freeze, *hooks, self.bar):
            if hook is not None:
                hook.register(self)
        self.register_op("setup", self._start)

    def make_stepper(self, loss_module: POGOLoss, **settings: Any) -> OptimizationStepper:
        """Create the optimization stepper."""
        return POGOOptimizationStepper(loss_module, **settings)

    def register_op(self, dest: Any, op: Callable, **kwargs: Any) -> None:
        """Register an operation to run at a stage, as in TorchRL's trainer.

        Args:
            dest: name of the stage.
            op: the operation.
            **kwargs: keyword arguments that the operation is called with.

        Raises:
            ValueError: if the operation would not affect the training, or cannot run; the message
                says what to use instead.
        """
        check_hook(self, op, dest)
        if dest in BATCH_STAGES and not self._has_batch_hooks:
            self._has_batch_hooks = True
            super().register_op("batch_process", self._rows)
        super().register_op(dest, op, **kwargs)
        self.stages.setdefault(dest, []).append((op, kwargs))
        if dest in _PER_UPDATE_STAGES and op != self._sample:
            self._has_per_update_hooks = True
        if isinstance(op, EarlyStopping) and op.monitor in self.optimization_stepper.names:
            self.register_op(
                "post_optim_complete_log", lambda _, losses: {op.monitor: losses[op.monitor]}
            )

    register_hook = register_op

    def register_module(self, module_name: str, module: Any) -> None:
        """Register a module to be saved in checkpoints, as in TorchRL's trainer.

        Args:
            module_name: name of the module.
            module: the module, e.g. a hook.

        Raises:
            ValueError: if the module is a hook that would not affect the training, or cannot run.
        """
        check_hook(self, module)
        super().register_module(module_name, module)

    def _register_priority_updates(self, replay_buffer: ReplayBuffer) -> None:
        """Write TD errors to a prioritised replay buffer, and checkpoint its priorities."""
        sampler = prioritized_sampler(replay_buffer, self.loss_module.tensor_keys.priority)
        if sampler is None:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # TorchRL may rename this stage
            self.register_op("post_loss", replay_buffer.update_tensordict_priority)
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
        log_interval: int = 10_000,
        **others: Any,
    ) -> None:
        """Validate settings of the constructor without a dataset.

        Args:
            total_steps: see :class:`POGOTrainer`, as for all other arguments.

        Keyword Args:
            lr: positive and finite.
            clip_grad_norm: positive and finite, or ``None``.
            policy_freq: at least 1.
            tau: in (0, 1].
            checkpoint_interval: at least 1.
            keep_checkpoints: at least 1.
            log_interval: at least 1.
            **others: ignored.

        Raises:
            ValueError: naming the first out-of-range value.

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
            "log_interval": log_interval,
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
        """Run the ``post_steps`` hooks at every multiple of ``interval`` updates."""
        self.collector.intervals.append(interval)

    def add_stop(self, step: int) -> None:
        """Run the ``post_steps`` hooks after update ``step``."""
        self.collector.stops.append(step)

    def at_boundary(self) -> bool:
        """Whether the completed updates are a multiple of any interval, a stop, or the total."""
        return self.collector.at_boundary(self.collected_frames)

    def optim_steps(self, batch: TensorDictBase) -> None:
        """Run the updates of a tick, with TorchRL's stages around them.

        Args:
            batch: tick, a tensordict whose batch size is the number of updates.

        Raises:
            DivergenceError: if a loss cannot be computed because training has diverged.
            ValueError: if a hook changed the batch size of the tick.
        """
        if self.collected_frames != self.collector.step:
            raise ValueError(
                f"after {self.collector.step} updates, a hook at 'batch_process' changed the batch "
                f"size to {list(batch.shape)}, which counts the next updates: keep the number of "
                "rows, or register it at 'process_optim_batch' to change the sampled batches."
            )
        # Unless a hook runs at each update, the stepper runs the whole tick in one step.
        self._tick = None if self._has_per_update_hooks else TensorDict({}, batch.shape)
        self.optim_steps_per_batch = batch.numel() if self._tick is None else 1
        try:
            super().optim_steps(batch)
        except FloatingPointError as error:
            raise DivergenceError(
                f"Training has diverged: at update {self.optimization_stepper.steps + 1}, {error}"
            ) from error

    def sample(self) -> TensorDictBase:
        """Sample a batch from the replay buffer."""
        return self.dataset.sample()

    def _sample(self, batch: TensorDictBase) -> TensorDictBase:
        return self.sample() if self._tick is None else self._tick

    def _rows(self, tick: TensorDictBase) -> TensorDictBase:
        return rows_for_hooks(self.dataset, tick.numel(), seed=self.collected_frames)

    def _losses(self, count: int, losses: TensorDictBase) -> dict[str, Any] | None:
        return losses.to_dict() if self.at_boundary() else None

    def settings(self) -> dict[str, Any]:
        """Return the settings of the loss, the optimizers and the updates, by name."""
        stepper, found = self.optimization_stepper, self.loss_settings()
        for name in ("policy_freq", "clip_grad_norm", "tau", "bf16"):
            found[name] = getattr(stepper, name)
        found["freeze_critics_at"] = self.freeze_critics_at
        for name, optimizer in stepper.optimizers.items():
            found |= optimizer_settings(name, optimizer, stepper.schedulers.get(name))
        return {name: plain(value) for name, value in found.items()}

    def loss_settings(self) -> dict[str, Any]:
        """Return the settings of the loss, by name."""
        return self.loss_module.settings()

    def _start(self) -> None:
        if not (self.collected_frames or self._has_resumed):
            check_unused(self.checkpoint_rotation)
        self._record_settings()

    def _record_settings(self) -> None:
        """Use the current settings as fingerprint, before hooks such as step control change any."""
        if self.fingerprint is None:
            self.fingerprint = self.settings()

    def resume(self) -> int | None:
        """Load the newest intact checkpoint of ``checkpoint_dir``, skipping damaged ones.

        Returns:
            The number of updates at which it was written; ``None`` if there is no checkpoint.

        Raises:
            ValueError: if the checkpoint belongs to another run or has another format version. The
                trainer is unchanged in these cases.
        """
        rotation, self._has_resumed = self.checkpoint_rotation, True
        if rotation is None:
            return None
        remove_unfinished(rotation)
        for path in sorted(rotation.directory.glob(f"{rotation.prefix}-*"), reverse=True):
            if not is_intact(path):
                _LOGGER.warning("Skipping damaged or incomplete checkpoint %s.", path)
                continue
            self._record_settings()
            check_fingerprint(path, self.fingerprint or {}, complete=self._has_own_fingerprint)
            try:
                self.load_from_file(path)
            except CheckpointError as error:
                raise ValueError(f"{path} does not fit this run: {error}") from error
            return self.collected_frames
        return None

    def _checkpoint_metadata(self, trainer: Trainer) -> dict[str, Any]:
        self._record_settings()
        return {"format_version": FORMAT_VERSION, "fingerprint": self.fingerprint}

    def request_stop(self, reason: str | None = None) -> None:
        """Stop training after the current tick and write a checkpoint.

        Args:
            reason: reason for stopping, stored in ``stop_reason``. Defaults to ``None``.
        """
        super().request_stop(reason)
        self.stopping, self.stop_reason = True, reason

    def save_trainer(self, force_save: bool = False) -> None:
        """Write a checkpoint if one is due.

        Args:
            force_save: write a checkpoint even if none is due. Defaults to ``False``.

        Raises:
            OSError: if the checkpoint cannot be written, e.g. because the disk is full.
        """
        try:
            super().save_trainer(force_save)
        except (OSError, RuntimeError) as error:  # torch.save raises either on a full disk
            reason = str(error).splitlines()[0]
            kept = self.checkpoint_rotation.latest()
            raise OSError(
                f"cannot write a checkpoint at update {self.collected_frames}: {reason}. The last "
                f"checkpoint is {kept}. Free disk space or fix the folder, then continue with "
                "resume=true."
            ) from error
