"""Runs that differ in seed, w2_weights or alpha, trained together as one batched computation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from tensordict import TensorDict

from pogo_torchrl.training import POGOTrainer, Ticks
from pogo_torchrl.update import Update


class TrainerStack:
    """Trainers in step: one update of the stack is an update of each of them.

    Each trainer keeps its own data stream, noise, lambda, hooks and checkpoints, and ends where it
    would have ended alone, up to the rounding of batched products. What fails in the hooks of one
    ends that one only.

    Args:
        trainers: whose losses have one architecture and one set of settings, up to ``w2_weights``
            and ``alpha``; all at the same update, and made with ``compile=True``, so that none of
            them moves its targets by itself.
        active: called with a trainer's place; a context in which the global random state is that
            trainer's.
        around_hooks: the same, where its hooks and checkpoints act, not at each update. Defaults to
            ``active``.
        lr: learning rate of every Adam.
        tau: Polyak step of the targets.
        compile: run the update of the stack as one graph.
        bf16: run the networks in bfloat16.

    Raises:
        ValueError: when the trainers are at different updates.
    """

    def __init__(
        self,
        trainers: Sequence[POGOTrainer],
        active: Callable[[int], AbstractContextManager],
        *,
        around_hooks: Callable[[int], AbstractContextManager] | None = None,
        lr: float,
        tau: float,
        compile: bool = False,
        bf16: bool = False,
    ) -> None:
        steps = {trainer.collected_frames for trainer in trainers}
        if len(steps) > 1:
            raise ValueError(f"trainers of a stack must be at one update, not at {sorted(steps)}.")
        self.trainers = list(trainers)
        self.active, self.around_hooks = active, around_hooks or active
        self.errors: list[Exception | None] = [None] * len(trainers)
        self._update = Update(
            [trainer.loss_module for trainer in trainers],
            lr=lr,
            tau=tau,
            stacked=True,
            compile=compile,
            bf16=bf16,
        )
        for place, trainer in enumerate(trainers):
            trainer.optimization_stepper.join(self._update, place)

    def train(self) -> list[Exception | None]:
        """Train all to their end; returns what has ended each of them early, if anything."""
        first = self.trainers[0]
        self._each(lambda trainer: trainer._setup_hook())
        ticks = Ticks(first.total_frames)
        ticks.step = first.collected_frames
        ticks.intervals = sorted(
            {i for trainer in self.trainers for i in trainer.collector.intervals}
        )
        for tick in ticks:
            for trainer in self.trainers:
                trainer.collected_frames = trainer.collector.step = ticks.step
            for _ in range(tick.numel()):
                self.update()
            self._each(self._after)
            if not any(map(self._goes_on, range(len(self.trainers)))):
                break
        self._each(lambda trainer: trainer._shutdown_hook())
        return self.errors

    def update(self) -> None:
        """One update of all, those that have ended included: the others do not notice."""
        batches, noises = [], []
        for place, trainer in enumerate(self.trainers):
            with self.active(place):
                trainer._optim_count += 1
                batches.append(trainer._process_optim_batch_hook(TensorDict()))
                noises.append(trainer.optimization_stepper.draw_noise(batches[-1]))
        noise = {name: torch.stack([one[name] for one in noises]) for name in noises[0]}
        with_actors = self.trainers[0].optimization_stepper.with_actors
        critics, actors = self._update(torch.stack(batches), noise, with_actors)
        for place, trainer in enumerate(self.trainers):
            scalars = None if actors is None else actors[place]
            trainer.optimization_stepper.take(critics[place], scalars)
            trainer._post_optim_hook()
            trainer._post_optim_log(batches[place])

    @staticmethod
    def _after(trainer: POGOTrainer) -> None:
        """What follows the updates of a tick in TorchRL's trainer."""
        trainer._post_steps_hook()
        ends = trainer._stop_training or trainer.collected_frames >= trainer.total_frames
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

    def _goes_on(self, place: int) -> bool:
        return self.errors[place] is None and not self.trainers[place]._stop_training
