"""POGO's training on TorchRL's Trainer: sequential JKO steps, hooks, checkpoints, resume."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.checkpoint import CheckpointError, CheckpointRotation
from torchrl.data import ReplayBuffer
from torchrl.objectives import SoftUpdate
from torchrl.objectives.utils import TargetNetUpdater
from torchrl.trainers import Trainer, TrainerHookBase
from torchrl.trainers.trainers import OptimizationStepper

from pogo_torchrl.checkpoints import (
    FORMAT_VERSION,
    DurableCheckpoint,
    is_intact,
    metadata,
    remove_unfinished,
)
from pogo_torchrl.graphs import CUDAGraph, UpdateGraphs
from pogo_torchrl.hooks import DivergenceError, LogMetrics
from pogo_torchrl.objectives import POGOLoss
from pogo_torchrl.update import Update

_LOGGER = logging.getLogger(__name__)

# A tick is the stretch of updates between two looks at hooks, signals and the progress bar.
_LONGEST_TICK = 25


class Ticks:
    """Stands where an online trainer has its collector: yields stretches of updates.

    Each item is an empty tensordict whose batch size is the number of updates until the next
    multiple of any of ``intervals`` (or the end), so that hooks meet their steps exactly.

    Example:
        >>> ticks = Ticks(total=25, intervals=[10])
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
            length = min(*ahead, self.total - self.step, _LONGEST_TICK)
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


class POGOOptimizationStepper(OptimizationStepper):
    """One update of POGO on one batch (:class:`~pogo_torchrl.update.Update`).

    Args:
        loss_module: the objective.
        lr: learning rate of every Adam. Defaults to ``3e-4``.
        policy_freq: critic steps per chain of actor steps. Defaults to ``1``.
        tau: also move the targets, by this Polyak step. Defaults to ``None``: they are moved by a
            ``SoftUpdate`` elsewhere.
        compile: run the whole update as one graph of ``torch.compile``. It is given the same noise
            and gives the same numbers, up to rounding. Settings of the loss are read at its first
            call. Defaults to ``False``.
        bf16: run the networks in bfloat16 (autocast); parameters, moments and the divergence stay
            in float32. Defaults to ``False``.
    """

    def __init__(
        self,
        loss_module: POGOLoss,
        *,
        lr: float = 3e-4,
        policy_freq: int = 1,
        tau: float | None = None,
        compile: bool = False,
        bf16: bool = False,
    ) -> None:
        self.loss_module = loss_module
        self.policy_freq = policy_freq
        self.update = Update([loss_module], lr=lr, tau=tau, compile=compile, bf16=bf16)
        self.names = [name for names in self.update.names for name in names]
        self._run = 0  # its place in a stack
        self.steps = 0
        # Always the same memory: a CUDA graph writes it.
        self.scalars = loss_module.min_action.new_zeros(len(self.names))

    def step(self, trainer: Trainer, sub_batch: TensorDictBase) -> TensorDictBase:
        """Update on one batch and return the detached scalars of all losses."""
        self.update_on(sub_batch)
        return self.metrics

    def update_on(self, sub_batch: TensorDictBase) -> None:
        """Update on one batch; :attr:`scalars` holds what it gave."""
        self.take(*self.update(sub_batch, self.draw_noise(sub_batch), self.with_actors))

    @property
    def with_actors(self) -> bool:
        """Whether the next update is one of the actors, too."""
        return self.steps % self.policy_freq == 0

    def draw_noise(self, sub_batch: TensorDictBase) -> dict[str, Tensor]:
        """What the next update draws."""
        return self.loss_module.draw_noise(sub_batch, actors=None if self.with_actors else ())

    def join(self, update: Update, run: int) -> None:
        """Be one run of a stack's update from here on."""
        update.load_state_dict(self.update.state_dict(), run)
        self.update, self._run = update, run

    def take(self, critics: Tensor, actors: Tensor | None) -> None:
        """Count an update and keep its scalars."""
        self.scalars[: len(critics)].copy_(critics)
        # Steps without an actor update repeat the last values: the log averages over steps.
        if actors is not None:
            self._actor_scalars.copy_(actors)
        self.steps += 1

    @property
    def _actor_scalars(self) -> Tensor:
        return self.scalars[len(self.update.names[0]) :]

    @property
    def metrics(self) -> TensorDict:
        """The scalars of the last update, by name."""
        return TensorDict(dict(zip(self.names, self.scalars.clone().unbind())))

    def state_dict(self) -> dict[str, Any]:
        """Optimizer states, and the place in the cycle of ``policy_freq``."""
        return {
            "steps": self.steps,
            "actor_scalars": [self._actor_scalars.clone()] if self.steps else [],
            "optimizers": self.update.state_dict(self._run),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.steps = state_dict["steps"]
        for scalars in state_dict["actor_scalars"]:
            self._actor_scalars.copy_(scalars)
        self.update.load_state_dict(state_dict["optimizers"], self._run)


class POGOTrainer(Trainer):
    """TorchRL's Trainer for POGO: learns from an offline replay buffer, no environment needed.

    Every update samples one batch, steps the critics and the chain in the method's order
    (:class:`POGOOptimizationStepper`) and moves the targets. The global random state of torch is
    the only source of randomness; it is part of the checkpoints, the dataset is not.

    Hooks are TorchRL's (``register_op``); :class:`LogMetrics` and :class:`Evaluate` are those of
    our command line. ``collected_frames`` counts updates.

    Args:
        loss_module: the objective.
        replay_buffer: anything with ``sample()``, e.g. of
            :func:`~pogo_torchrl.data.make_replay_buffer` or one of TorchRL's datasets.
        total_steps: updates to reach.

    Keyword Args:
        lr: learning rate of every Adam. Defaults to ``3e-4``.
        policy_freq: critic steps per chain of actor steps. Defaults to ``1``.
        tau: Polyak step of the targets; used to make ``target_net_updater``. Defaults to
            ``0.005``.
        target_net_updater: TorchRL target updater of ``loss_module``. Defaults to
            ``SoftUpdate(loss_module, tau=tau)``.
        compile: run the update as one graph of ``torch.compile``; on a GPU also replay CUDA graphs
            of many updates (:mod:`pogo_torchrl.graphs`), as long as no other hooks than
            :class:`LogMetrics` act on each update. Defaults to ``False``.
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
        ValueError: for step counts or intervals below 1, or an empty replay buffer.

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

    _at_each_update = False  # whether others' operations run at each update

    def __init__(
        self,
        loss_module: POGOLoss,
        replay_buffer: ReplayBuffer,
        total_steps: int,
        *,
        lr: float = 3e-4,
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
            policy_freq=policy_freq,
            tau=tau,
            checkpoint_interval=checkpoint_interval,
            keep_checkpoints=keep_checkpoints,
        )
        if len(replay_buffer) == 0:
            raise ValueError("The replay buffer is empty: there is nothing to learn from.")

        delayed = loss_module.delay_qvalue or loss_module.delay_actor
        traced_tau = None
        if target_net_updater is None and delayed:
            target_net_updater = SoftUpdate(loss_module, tau=tau)
            if compile:  # within the graph, then
                traced_tau, target_net_updater = tau, None
        self.fingerprint = dict(fingerprint or {})
        self.metrics: list[LogMetrics] = []
        self._graphs: UpdateGraphs | None = None
        ticks, rotation = Ticks(total_steps), None
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
                policy_freq=policy_freq,
                tau=traced_tau,
                compile=compile,
                bf16=bf16,
            ),
            progress_bar=progress_bar,
            # the trainer saves once MORE than the interval has passed
            save_trainer_interval=checkpoint_interval - 1,
            checkpoint=DurableCheckpoint(),
            checkpoint_rotation=rotation,
            checkpoint_metadata=self._checkpoint_metadata if rotation else None,
            auto_log_optim_steps=False,  # it would keep every number of every step
        )
        # After super().__init__(), which would make the dataset a part of each checkpoint.
        self._dataset = replay_buffer
        self.register_op("process_optim_batch", self._sample)
        if target_net_updater is not None:
            self.register_op("post_optim", target_net_updater.step)
        if progress_bar:
            self.register_op("setup", self._start_progress_bar)
            self.register_op("shutdown", self._close_progress_bar)
        for hook in hooks:
            hook.register(self)
        device = loss_module.min_action.device
        # GeomLoss reads numbers on the host, the exact backend copies tables to the device.
        free = loss_module.num_actors == 1 or loss_module.w2_backend == "fast"
        if compile and device.type == "cuda" and free:
            self._graphs = UpdateGraphs(self, partial(CUDAGraph, device), _LONGEST_TICK)

    def register_op(self, dest: Any, op: Callable, **kwargs: Any) -> None:
        """Register an operation, as TorchRL's trainer does."""
        # A replay runs no Python, so that it would leave out what others do at each update.
        function = getattr(op, "__func__", None)
        if dest in ("process_optim_batch", "post_optim", "post_optim_log"):
            self._at_each_update |= function not in (POGOTrainer._sample, LogMetrics._add)
        if function is LogMetrics._add:
            self.metrics.append(op.__self__)  # type: ignore[attr-defined]
        super().register_op(dest, op, **kwargs)

    @staticmethod
    def check_settings(
        total_steps: int,
        *,
        lr: float = 3e-4,
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
        if not 0 < tau <= 1:
            raise ValueError(f"tau={tau} must be in (0, 1], e.g. 0.005.")

    def add_interval(self, interval: int) -> None:
        """Make every multiple of ``interval`` updates a boundary where ``post_steps`` hooks run."""
        self.collector.intervals.append(interval)

    def at_boundary(self) -> bool:
        """Whether the updates so far are a multiple of any interval, or all."""
        return any(self.collected_frames % interval == 0 for interval in self.collector.intervals)

    def optim_steps(self, batch: TensorDictBase) -> None:
        """As many updates as the tick is long."""
        try:
            if self._graphs is not None and not self._at_each_update:
                self._graphs.run(batch.numel())
                return
            for _ in range(batch.numel()):
                self.update_on(self._process_optim_batch_hook(batch))
        except FloatingPointError as error:
            raise DivergenceError(
                f"Training has diverged: at update {self._optim_count}, {error}"
            ) from error

    def update_on(self, sub_batch: TensorDictBase) -> None:
        """One update on one batch, and the operations that follow it."""
        # TorchRL's own loop averages number by number, which takes longer than moving the targets.
        self._optim_count += 1
        self.optimization_stepper.update_on(sub_batch)
        self._post_optim_hook()
        self._post_optim_log(sub_batch)

    def sample(self) -> TensorDictBase:
        """A batch of the replay buffer."""
        return self._dataset.sample()

    def _sample(self, batch: TensorDictBase) -> TensorDictBase:
        return self.sample()

    def _start_progress_bar(self) -> None:
        self._pbar.unit = " updates"
        self._pbar.initial = self._pbar.n = self.collected_frames
        self._pbar.refresh()

    def _close_progress_bar(self) -> None:
        self._pbar.close()

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

    def _save_trainer(self) -> None:
        try:
            super()._save_trainer()
        except (OSError, RuntimeError) as error:  # torch.save raises either on a full disk
            reason = str(error).splitlines()[0]
            kept = self.checkpoint_rotation.latest()
            raise OSError(
                f"cannot write a checkpoint at update {self.collected_frames}: {reason}. The last "
                f"one is {kept}. Free some space or mend the folder, then go on with resume=true."
            ) from error
