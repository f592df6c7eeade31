"""Hooks of POGOTrainer: metrics, evaluations, and a stop where training has diverged."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torchrl.trainers import TrainerHookBase
from tqdm import tqdm

from pogo_torchrl.modules import TransportActor
from pogo_torchrl.trainers.stepper import RunningMean


class DivergenceError(FloatingPointError):
    """Training has diverged; the message says what, at which step, and what to try."""


class EvaluationError(RuntimeError):
    """An evaluation failed; the message says when, and how to go on."""


class Evaluation(NamedTuple):
    """What one actor reached in one mode."""

    actor: int
    mode: str
    returns: np.ndarray
    """Undiscounted return of each episode."""
    lengths: np.ndarray
    """Steps of each episode."""
    scores: np.ndarray
    """D4RL score of each episode, 0 for random and 100 for expert."""


class EvaluationInterrupted(Exception):
    """The evaluation was told to stop, see :meth:`pogo_torchrl.evaluation.Evaluator.interrupt`."""


class Sink(Protocol):
    """Where rows of numbers go: a CSV file, TensorBoard, ..."""

    def write(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take the rows of one step."""


class LogMetrics(TrainerHookBase):
    """Trainer hook: averages all losses and writes them every ``interval`` updates.

    Adds ``std_i``, the spread of actor i's actions over z (standard deviation over 16 draws,
    averaged over the last batch and the action dimensions): 0 means that the actor ignores z.
    Its draws come from a stream of their own, so that logging leaves the training as it is.

    Args:
        sinks: where the rows go.
        interval: updates between two rows. Defaults to ``1000``.
    """

    num_spread_samples = 16

    def __init__(self, sinks: Sequence[Sink], interval: int = 1000) -> None:
        if interval < 1:
            raise ValueError(f"log_interval={interval} must be an integer >= 1.")
        self.sinks = sinks
        self.interval = interval
        self._clock = time.perf_counter
        self._started = self._last = (0.0, 0)

    def register(self, trainer: Any, name: str = "log_metrics") -> None:
        """Register at the trainer's boundaries."""
        self.trainer = trainer
        self.means: RunningMean = trainer.optimization_stepper.track()
        trainer.add_interval(self.interval)
        trainer.register_op("setup", self._start)
        trainer.register_op("post_steps", self._emit)

    def _start(self) -> None:
        self._started = self._last = (self._clock(), self.trainer.collected_frames)

    def _emit(self) -> None:
        step = self.trainer.collected_frames
        due = step % self.interval == 0 or step >= self.trainer.total_frames
        if not due or not self.means.count:
            return
        row = self.means()
        row.update(self._spread())
        now, (before, earlier) = self._clock(), self._last
        # wall-clock columns last
        row["updates_per_second"] = (step - earlier) / max(now - before, 1e-9)
        row["seconds"] = now - self._started[0]
        self._last = (now, step)
        self.means.reset()
        for sink in self.sinks:
            sink.write(step, [row])
        if self.trainer.bar is not None:
            self.trainer.bar.show(loss_q=row["loss_qvalue"])

    @torch.no_grad()
    def _spread(self) -> dict[str, float]:
        loss, spread = self.trainer.loss_module, {}
        batch = self.trainer.optimization_stepper.last_batch
        generator = torch.Generator().manual_seed(0)
        for i in range(loss.num_actors):
            actor = loss.actor(i)
            if not isinstance(actor, TransportActor):
                continue
            observation = batch.get(actor.in_keys[0])
            states = observation.expand(self.num_spread_samples, *observation.shape)
            noise = torch.randn((*states.shape[:-1], actor.noise_dim), generator=generator)
            actions = actor(states, noise.to(states))
            spread[f"std_{i}"] = actions.std(0).mean().item()
        return spread


class Evaluate(TrainerHookBase):
    """Trainer hook: evaluates the chain every ``interval`` updates and at the end.

    Args:
        evaluate: takes no argument and returns the evaluations of the chain as it is.
        report: called with each list of evaluations, e.g. to print it.
        sinks: where the rows go.
        interval: updates between two evaluations.

    Attributes:
        last_step: the step of the last evaluation; set it to that of the last row in the sinks
            before a resumed run goes on.
    """

    def __init__(
        self,
        evaluate: Callable[[], list[Evaluation]],
        *,
        sinks: Sequence[Sink] = (),
        report: Callable[[list[Evaluation]], None] = lambda evaluations: None,
        interval: int = 10_000,
    ) -> None:
        if interval < 1:
            raise ValueError(f"eval_interval={interval} must be an integer >= 1.")
        self.evaluate = evaluate
        self.sinks = sinks
        self.report = report
        self.interval = interval
        self.last_step: int | None = None

    def register(self, trainer: Any, name: str = "evaluate") -> None:
        """Register at the trainer's boundaries."""
        self.trainer = trainer
        trainer.add_interval(self.interval)
        trainer.register_op("setup", self._catch_up)
        trainer.register_op("post_steps", self._run)

    def up_to_date(self) -> bool:
        """Whether the evaluation of this step, if one is due, is written."""
        return not self._due() or self.last_step == self.trainer.collected_frames

    def _due(self) -> bool:
        step = self.trainer.collected_frames
        return step % self.interval == 0 or step >= self.trainer.total_frames

    def _catch_up(self) -> None:
        """The evaluation that was cut off where a resumed run goes on."""
        step = self.trainer.collected_frames
        if step > 0 and not self.up_to_date():
            try:
                self._evaluate(step)
            except EvaluationInterrupted:
                self.trainer.collector.stop()  # this step's evaluation is still to come

    def _run(self) -> None:
        if not self._due() or self.trainer.stopping:
            return
        try:
            self._evaluate(self.trainer.collected_frames)
        except EvaluationInterrupted:
            pass  # the run is about to stop; it catches up when it is resumed
        except FloatingPointError as error:
            raise DivergenceError(str(error)) from error
        except Exception as error:
            # Whatever it is, it shall not cost the training up to here.
            self.trainer.save_trainer(force_save=True)
            raise EvaluationError(
                f"The evaluation at update {self.trainer.collected_frames} failed: {error}. A "
                "checkpoint of this update is kept; resume=true repeats the evaluation."
            ) from error

    def _evaluate(self, step: int) -> None:
        started = time.perf_counter()
        evaluations = self.evaluate()
        seconds = time.perf_counter() - started
        rows = [
            {
                "actor": e.actor,
                "mode": e.mode,
                "return_mean": float(e.returns.mean()),
                "return_std": float(e.returns.std()),
                "score": float(e.scores.mean()),
                "episode_length": float(e.lengths.mean()),
                "seconds": seconds,
            }
            for e in evaluations
        ]
        for sink in self.sinks:
            sink.write(step, rows)
        self.last_step = step
        self.report(evaluations)


class ProgressBar(TrainerHookBase):
    """Trainer hook: a progress bar over the updates of the whole run, also of a resumed one."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def register(self, trainer: Any, name: str = "progress_bar") -> None:
        """Register at the trainer's boundaries."""
        self.trainer = trainer
        trainer.register_op("setup", self._start)
        trainer.register_op("post_steps", self._update)
        trainer.register_op("shutdown", self._close)

    def show(self, **numbers: float) -> None:
        """Show numbers beside the bar."""
        if self._bar is not None:
            self._bar.set_postfix(numbers, refresh=False)

    def _start(self) -> None:
        done, total = self.trainer.collected_frames, self.trainer.total_frames
        self._bar = tqdm(total=total, initial=done, unit=" updates")

    def _update(self) -> None:
        if self._bar is not None:
            self._bar.update(self.trainer.collected_frames - self._bar.n)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class StopOnDivergence(TrainerHookBase):
    """Trainer hook: stops the run where a loss is not finite or the critics have exploded.

    It reads the averages that ``metrics`` keeps on the device, at the boundaries of the other hooks
    and of checkpoints: no synchronisation per update, and no checkpoint of a diverged run.
    Register it before the hooks that shall not act after a divergence.

    Args:
        metrics: the hook that averages the losses.
        largest_return: the largest discounted return, in magnitude, that the data's rewards
            allow, ``max|r| / (1 - gamma)``; ``None``: unknown. Critics whose mean lies beyond it
            get one warning; beyond ``explosion`` times it, the run stops.
        warn: called with the text of the warning.

    Raises:
        DivergenceError: from the trainer's loop, where training has diverged.

    Example:
        >>> StopOnDivergence(LogMetrics([]), largest_return=300.0).explosion
        100.0
    """

    explosion = 100.0

    def __init__(
        self,
        metrics: LogMetrics,
        largest_return: float | None = None,
        *,
        warn: Callable[[str], None] = print,
    ) -> None:
        self.metrics = metrics
        self.largest_return = largest_return or None  # rewards of 0 bound nothing
        self.warn = warn
        self._warned = False

    def register(self, trainer: Any, name: str = "stop_on_divergence") -> None:
        """Register at the trainer's boundaries."""
        self.trainer = trainer
        trainer.register_op("post_steps", self._check)

    def _check(self) -> None:
        step = self.trainer.collected_frames
        if not (self.trainer.at_boundary() or self.trainer.stopping):
            return
        means = self.metrics.means()
        broken = [name for name, value in means.items() if not math.isfinite(value)]
        if broken:
            raise DivergenceError(
                f"Training has diverged: at update {step}, since the last row of metrics.csv, "
                f"{', '.join(broken)} became infinite or NaN. {_ADVICE}"
            )
        value = abs(means.get("pred_value", 0.0))
        if self.largest_return is None or value <= self.largest_return:
            return
        size = (
            f"at update {step} Q is {value:.3g} on average, and the data's rewards allow no return "
            f"beyond {self.largest_return:.3g}"
        )
        if value > self.explosion * self.largest_return:
            raise DivergenceError(f"Training has diverged: {size}. {_ADVICE}")
        if not self._warned:
            self._warned = True
            self.warn(f"The critics overestimate: {size}. {_ADVICE}")

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Nothing to load."""


_ADVICE = (
    "Try larger w2_weights, a smaller alpha, q_normalization=mean_abs, critic_layer_norm=true or "
    "a smaller lr."
)
