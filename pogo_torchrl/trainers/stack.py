"""Runs that differ in seed, w2_weights or alpha, trained together as one batched computation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from operator import itemgetter

import torch
from tensordict import TensorDict

from pogo_torchrl.torchrl_private import count_updates, run_stage
from pogo_torchrl.trainers.fused.update import Update
from pogo_torchrl.trainers.trainer import OfflineStepIterator, POGOTrainer

_SHARED = ("policy_freq", "tau", "clip_grad_norm", "bf16")

# Of TorchRL's stages, those that a stack runs.
_STAGES = {
    "setup",
    "process_optim_batch",
    "post_optim",
    "post_optim_log",
    "post_steps",
    "shutdown",
}


class TrainerStack:
    """Trainers in step: one update of the stack is an update of each of them.

    Each trainer keeps its own data stream, noise, lambda, hooks and checkpoints, and ends where it
    would have ended alone, up to the rounding of batched products. What fails in the hooks of one
    ends that one only.

    Args:
        trainers: whose losses have one architecture and one set of settings, up to ``w2_weights``
            and ``alpha``, with Adam or AdamW; all at the same update.
        active: called with a trainer's place; a context in which the global random state is that
            trainer's.
        around_hooks: the same, where its hooks and checkpoints act, not at each update. Defaults to
            ``active``.
        compile: run the update of the stack as one graph. Defaults to ``False``.

    Raises:
        ValueError: when the trainers are at different updates, when their settings differ, or have
            a target updater, a replay buffer or hooks that a stack cannot follow.
    """

    def __init__(
        self,
        trainers: Sequence[POGOTrainer],
        active: Callable[[int], AbstractContextManager],
        *,
        around_hooks: Callable[[int], AbstractContextManager] | None = None,
        compile: bool = False,
    ) -> None:
        steps = {trainer.collected_frames for trainer in trainers}
        if len(steps) > 1:
            raise ValueError(f"trainers of a stack must be at one update, not at {sorted(steps)}.")
        self.trainers = list(trainers)
        self.steppers = [trainer.optimization_stepper for trainer in trainers]
        self.active, self.around_hooks = active, around_hooks or active
        self.errors: list[Exception | None] = [None] * len(trainers)
        self.compile = compile
        shared = [{name: getattr(one, name) for name in _SHARED} for one in self.steppers]
        if any(settings != shared[0] for settings in shared):
            raise ValueError(f"trainers of a stack must share their settings, not {shared}.")
        others = sorted({stage for trainer in trainers for stage in trainer.stages} - _STAGES)
        if others:
            raise ValueError(
                f"a stack has no stages {', '.join(others)}, for which its trainers have hooks (a "
                "prioritised replay buffer is one): train these alone."
            )
        self._update: Update | None = None

    def train(self) -> list[Exception | None]:
        """Train all to their end; returns what has ended each of them early, if anything."""
        first = self.trainers[0]
        self._each(lambda trainer: run_stage(trainer, "setup"))
        ticks = OfflineStepIterator(first.total_frames)
        ticks.step = first.collected_frames
        ticks.intervals = sorted(
            {i for trainer in self.trainers for i in trainer.collector.intervals}
        )
        for tick in ticks:
            for trainer in self.trainers:
                trainer.collected_frames = trainer.collector.step = ticks.step
            self._prepare()
            for _ in range(tick.numel()):
                self.update()
            self._each(self._after)
            if not any(map(self._is_running, range(len(self.trainers)))):
                break
        self._each(lambda trainer: run_stage(trainer, "shutdown"))
        return self.errors

    def update(self) -> None:
        """One update of all, those that have ended included: the others do not notice."""
        if self._update is None:
            self._prepare()
        assert self._update is not None
        batches, noises = [], []
        for place, (trainer, stepper) in enumerate(zip(self.trainers, self.steppers)):
            with self.active(place):
                count_updates(trainer, 1)
                batches.append(run_stage(trainer, "process_optim_batch", TensorDict()))
                noises.append(stepper.draw_noise(batches[-1]))
        first = self.steppers[0]
        noise = {name: torch.stack([one[name] for one in noises]) for name in noises[0]}
        stacked = self._update(torch.stack(batches), noise, first.lr(), first.with_actors)
        for place, (trainer, stepper) in enumerate(zip(self.trainers, self.steppers)):
            own = stacked.map(itemgetter(place))
            stepper.record_metrics(own, batches[place])
            stepper.advance(1)
            run_stage(trainer, "post_optim")
            run_stage(trainer, "post_optim_log", batches[place])

    def _prepare(self) -> None:
        """Find the memory that the losses and the optimizers have now."""
        rates = [stepper.rates() for stepper in self.steppers]
        if any(own != rates[0] for own in rates):
            raise ValueError(f"trainers of a stack must share their learning rates, not {rates}.")
        if self._update is not None and (self._update.is_current() or self._update.refresh()):
            return
        losses = [stepper.loss_module for stepper in self.steppers]
        optimizers = [stepper.optimizers for stepper in self.steppers]
        first = self.steppers[0]
        self._update = Update(
            losses,
            optimizers,
            tau=first.tau,
            clip_grad_norm=first.clip_grad_norm,
            bf16=first.bf16,
            stacked=True,
            compile=self.compile,
        )
        for stepper in self.steppers:
            stepper.use_update(self._update)

    @staticmethod
    def _after(trainer: POGOTrainer) -> None:
        """What follows the updates of a tick in TorchRL's trainer."""
        run_stage(trainer, "post_steps")
        ends = trainer.stopping or trainer.collected_frames >= trainer.total_frames
        trainer.save_trainer(force_save=ends)

    def _each(self, action: Callable[[POGOTrainer], None]) -> None:
        for place, trainer in enumerate(self.trainers):
            if self.errors[place] is not None:
                continue
            try:
                with self.around_hooks(place):
                    action(trainer)
            except Exception as error:  # it ends this one, whatever it is
                self.errors[place] = error

    def _is_running(self, place: int) -> bool:
        return self.errors[place] is None and not self.trainers[place].stopping
