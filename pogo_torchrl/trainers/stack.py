"""Train runs that differ in seed, w2_weights or alpha as one batched computation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from operator import itemgetter

import torch
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictModule

from pogo_torchrl.torchrl_private import count_updates, run_stage
from pogo_torchrl.trainers.fused.update import Update
from pogo_torchrl.trainers.ticks import OfflineStepIterator
from pogo_torchrl.trainers.trainer import POGOTrainer

_SHARED_SETTINGS = ("policy_freq", "tau", "clip_grad_norm", "bf16", "freeze_at")

# Stages of TorchRL's trainer that a stack runs.
_SUPPORTED_STAGES = {
    "setup",
    "process_optim_batch",
    "post_optim",
    "post_optim_log",
    "post_steps",
    "shutdown",
}


class TrainerStack:
    """Trains several trainers in lockstep: one update of the stack updates each of them.

    Each trainer keeps its own data stream, noise, lambda, hooks and checkpoints, and its result is
    that of training it alone, except for the rounding of batched products. An error in the hooks
    of one trainer ends only that trainer.

    Args:
        trainers: trainers at the same update, whose losses share one architecture and all settings
            except ``w2_weights`` and ``alpha``, and whose optimizers are Adam or AdamW.
        active: function from a trainer's index to a context manager in which the global random
            state is that of the trainer. Entered at each update.

    Keyword Args:
        around_hooks: like ``active``, but entered for the trainer's hooks and checkpoints. Defaults
            to ``active``.
        compile: run the update of the stack as one graph of ``torch.compile``. Defaults to
            ``False``.

    Raises:
        ValueError: if the trainers are at different updates, if their settings differ, if an actor
            is a ``ProbabilisticActor``, or if a trainer has a target updater, a replay buffer or
            hooks that a stack does not support.
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
            raise ValueError(
                f"trainers of a stack must be at the same update, not at {sorted(steps)}."
            )
        self.trainers = list(trainers)
        self.steppers = [trainer.optimization_stepper for trainer in trainers]
        self.active, self.around_hooks = active, around_hooks or active
        self.errors: list[Exception | None] = [None] * len(trainers)
        self.compile = compile
        shared = [{name: getattr(one, name) for name in _SHARED_SETTINGS} for one in self.steppers]
        if any(settings != shared[0] for settings in shared):
            raise ValueError(f"trainers of a stack must share their settings, not {shared}.")
        actors = [one.loss_module.actor_network for one in self.steppers]
        modules = (module for actor in actors for module in actor.modules())
        if any(isinstance(module, ProbabilisticTensorDictModule) for module in modules):
            raise ValueError(
                "a stack does not support actors that sample from distributions "
                "(ProbabilisticActor): train them one by one, or use TransportActor."
            )
        others = sorted(
            {stage for trainer in trainers for stage in trainer.stages} - _SUPPORTED_STAGES
        )
        if others:
            raise ValueError(
                f"a stack does not support the stages {', '.join(others)}, for which its trainers "
                "have hooks (a prioritised replay buffer registers one): train them one by one."
            )
        self._update: Update | None = None

    def train(self) -> list[Exception | None]:
        """Train all trainers to their end.

        Returns:
            For each trainer the exception that ended it early, or ``None``.

        Raises:
            ValueError: if the optimizers of the trainers differ in settings or learning rates.
        """
        first = self.trainers[0]
        self._for_each(lambda trainer: run_stage(trainer, "setup"))
        ticks = OfflineStepIterator(first.total_frames)
        ticks.step = first.collected_frames
        ticks.intervals = sorted(
            {i for trainer in self.trainers for i in trainer.collector.intervals}
        )
        ticks.stops = sorted({s for trainer in self.trainers for s in trainer.collector.stops})
        for tick in ticks:
            for trainer in self.trainers:
                trainer.collected_frames = trainer.collector.step = ticks.step
            self._prepare()
            for _ in range(tick.numel()):
                self.update()
            self._for_each(self._finish_tick)
            if not any(map(self._is_running, range(len(self.trainers)))):
                break
        self._for_each(lambda trainer: run_stage(trainer, "shutdown"))
        return self.errors

    def update(self) -> None:
        """Update all trainers once.

        Trainers that have ended are included: they keep their index in the stack, and do not affect
        the others.
        """
        if self._update is None:
            self._prepare()
        assert self._update is not None
        batches, noises = [], []
        for index, (trainer, stepper) in enumerate(zip(self.trainers, self.steppers)):
            with self.active(index):
                count_updates(trainer, 1)
                batches.append(run_stage(trainer, "process_optim_batch", TensorDict()))
                noises.append(stepper.draw_noise(batches[-1]))
        first = self.steppers[0]
        noise = {name: torch.stack([one[name] for one in noises]) for name in noises[0]}
        stacked = self._update(torch.stack(batches), noise, first.lr(), first.trained)
        for index, (trainer, stepper) in enumerate(zip(self.trainers, self.steppers)):
            own = stacked.map(itemgetter(index))
            stepper.record_metrics(own, batches[index])
            stepper.advance(1)
            run_stage(trainer, "post_optim")
            run_stage(trainer, "post_optim_log", batches[index])

    def _prepare(self) -> None:
        """Bind the update to the current memory of the losses and the optimizers."""
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
    def _finish_tick(trainer: POGOTrainer) -> None:
        """Run what TorchRL's trainer runs after the updates of a tick."""
        run_stage(trainer, "post_steps")
        ends = trainer.stopping or trainer.collected_frames >= trainer.total_frames
        trainer.save_trainer(force_save=ends)

    def _for_each(self, action: Callable[[POGOTrainer], None]) -> None:
        for index, trainer in enumerate(self.trainers):
            if self.errors[index] is not None:
                continue
            try:
                with self.around_hooks(index):
                    action(trainer)
            except Exception as error:  # ends only this trainer
                self.errors[index] = error

    def _is_running(self, index: int) -> bool:
        return self.errors[index] is None and not self.trainers[index].stopping
