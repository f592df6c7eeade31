"""Hooks of POGOTrainer: metrics, evaluation, progress bar and divergence detection."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torchrl.trainers import TrainerHookBase
from tqdm import tqdm

from pogo_torchrl import functional
from pogo_torchrl.modules import noise_reader
from pogo_torchrl.progress import progress_bar
from pogo_torchrl.trainers.stepper import RunningMean

POGO_HINT = (
    "Try larger w2_weights, a smaller alpha, q_normalization=mean_abs, critic_layer_norm=true or "
    "a smaller lr."
)


class DivergenceError(FloatingPointError):
    """Raised when training has diverged; the message states what, at which update, and remedies."""


class EvaluationError(RuntimeError):
    """Raised when an evaluation has failed; the message states when, and how to resume."""


class Evaluation(NamedTuple):
    """Evaluation results of one actor in one mode."""

    actor: int
    """Index of the actor in the chain."""
    mode: str
    """``"deterministic"`` (z = 0) or ``"stochastic"`` (z ~ N(0, I))."""
    returns: np.ndarray
    """Undiscounted return of each episode, ``[E]``."""
    lengths: np.ndarray
    """Number of steps of each episode, ``[E]``."""
    scores: np.ndarray | None
    """D4RL score of each episode, ``[E]``: 0 for random and 100 for expert; ``None`` if the task
    has no reference returns."""
    raw: Evaluation | None = None
    """For an averaged actor, the evaluation of its raw weights."""


class EvaluationInterrupted(Exception):
    """Raised when :meth:`pogo_torchrl.evaluation.Evaluator.interrupt` stops an evaluation."""


class Sink(Protocol):
    """Destination for rows of metrics: a CSV file, TensorBoard, ..."""

    def write(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the rows of one step.

        Args:
            step: number of updates completed so far.
            rows: metrics by column name.
        """


class LogMetrics(TrainerHookBase):
    r"""Trainer hook that averages all losses and writes them every ``interval`` updates.

    It also writes, measured on the last batch and averaged over the action dimensions, ``std_i``,
    the standard deviation of actor i's actions over z (over 16 draws; 0 means that the actor
    ignores z), and the mean squared displacements of its deterministic actions on [-1, 1]:
    ``data_mse_i`` from the data and, for :math:`i \ge 1`, ``step_mse_i`` from the previous actor.
    The draws use a separate random generator, so that logging does not affect training.

    Args:
        sinks: destinations of the rows.
        interval: number of updates between two rows. Defaults to ``1000``.
        columns: functions without arguments that return the values of further columns, by name.
            Defaults to none.
        policy: function from the index of an actor to its policy, whose actions are measured.
            Defaults to the ``actor`` method of the loss.

    Raises:
        ValueError: if ``interval`` is less than 1.
    """

    num_spread_samples = 16

    def __init__(
        self,
        sinks: Sequence[Sink],
        interval: int = 1000,
        columns: Mapping[str, Callable[[], float]] | None = None,
        policy: Callable[[int], Any] | None = None,
    ) -> None:
        if interval < 1:
            raise ValueError(f"log_interval={interval} must be an integer >= 1.")
        self.sinks = sinks
        self.columns = dict(columns or {})
        self.policy = policy
        self.interval = interval
        self._clock = time.perf_counter
        self._started = self._last = (0.0, 0)

    def register(self, trainer: Any, name: str = "log_metrics") -> None:
        """Register the hook with a trainer.

        Args:
            trainer: the :class:`~pogo_torchrl.POGOTrainer`.
            name: unused, part of TorchRL's interface.
        """
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
        row.update(self._action_metrics())
        row.update({name: value() for name, value in self.columns.items()})
        now, (before, earlier) = self._clock(), self._last
        # wall-clock columns last
        row["updates_per_second"] = (step - earlier) / max(now - before, 1e-9)
        row["seconds"] = now - self._started[0]
        self._last = (now, step)
        self.means.reset()
        for sink in self.sinks:
            sink.write(step, [row])
        if self.trainer.bar is not None:
            self.trainer.bar.show(loss_q=row.get("loss_qvalue", math.nan))

    @torch.no_grad()
    def _action_metrics(self) -> dict[str, float]:
        """Spread and displacements of the actors' actions on the last batch."""
        loss, found = self.trainer.loss_module, {}
        batch = self.trainer.optimization_stepper.last_batch
        generator = torch.Generator().manual_seed(0)
        to_unit_box = partial(functional.to_unit_box, low=loss.min_action, high=loss.max_action)
        data, previous = to_unit_box(batch.get(loss.tensor_keys.action)), None
        for i in range(loss.num_actors):
            actor, key = (self.policy or loss.actor)(i), loss.tensor_keys.action
            reader = noise_reader(actor)
            if reader is None:
                continue
            state = batch.select(*actor.in_keys).set(reader.noise_key, torch.zeros_like(data))
            states = state.expand(self.num_spread_samples, *state.shape)
            noise = torch.randn((self.num_spread_samples, *data.shape), generator=generator)
            actions = actor(states.set(reader.noise_key, noise.to(data))).get(key)
            found[f"std_{i}"] = actions.std(0).mean().item()
            action = to_unit_box(actor(state).get(key))
            found[f"data_mse_{i}"] = functional.l2_distance(action, data).mean().item()
            if previous is not None:
                found[f"step_mse_{i}"] = functional.l2_distance(action, previous).mean().item()
            previous = action
        return found


class Evaluate(TrainerHookBase):
    """Trainer hook that evaluates the chain every ``interval`` updates and at the end.

    Args:
        evaluate: function without arguments that evaluates the current chain.

    Keyword Args:
        sinks: destinations of the rows. Defaults to none.
        report: called with each list of evaluations, e.g. to print it. Defaults to a no-op.
        interval: number of updates between two evaluations. Defaults to ``10_000``.

    Attributes:
        last_step: step of the last evaluation; before a resumed run continues, set it to the step
            of the last row in the sinks.

    Raises:
        ValueError: if ``interval`` is less than 1.
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
        """Register the hook with a trainer.

        Args:
            trainer: the :class:`~pogo_torchrl.POGOTrainer`.
            name: unused, part of TorchRL's interface.
        """
        self.trainer = trainer
        trainer.add_interval(self.interval)
        trainer.register_op("setup", self._catch_up)
        trainer.register_op("post_steps", self._run)

    def up_to_date(self) -> bool:
        """Return ``False`` if an evaluation is due at this step and has not been written yet."""
        return not self._due() or self.last_step == self.trainer.collected_frames

    def _due(self) -> bool:
        step = self.trainer.collected_frames
        return step % self.interval == 0 or step >= self.trainer.total_frames

    def _catch_up(self) -> None:
        """Repeat the evaluation that was interrupted at the step where a resumed run starts."""
        step = self.trainer.collected_frames
        if step > 0 and not self.up_to_date():
            try:
                self.evaluate_at(step)
            except EvaluationInterrupted:
                self.trainer.collector.stop()  # the evaluation of this step is still missing

    def _run(self) -> None:
        if not self._due() or self.trainer.stopping:
            return
        try:
            self.evaluate_at(self.trainer.collected_frames)
        except EvaluationInterrupted:
            pass  # the run is stopping; this evaluation is repeated on resume
        except FloatingPointError as error:
            raise DivergenceError(str(error)) from error
        except Exception as error:
            # Save a checkpoint first, so that no training progress is lost.
            self.trainer.save_trainer(force_save=True)
            raise EvaluationError(
                f"The evaluation at update {self.trainer.collected_frames} failed: {error}. A "
                "checkpoint of this update was saved: use resume=true to repeat the evaluation."
            ) from error

    def evaluate_at(self, step: int) -> None:
        """Evaluate the chain and write the rows of this step.

        Args:
            step: number of completed updates.
        """
        started = time.perf_counter()
        evaluations = self.evaluate()
        seconds = time.perf_counter() - started
        rows = [
            {
                "actor": e.actor,
                "mode": e.mode,
                "return_mean": float(e.returns.mean()),
                "return_std": float(e.returns.std()),
                "score": _mean(e.scores),
                "episode_length": float(e.lengths.mean()),
                **_weights_columns(e),
                "seconds": seconds,
            }
            for e in evaluations
        ]
        for sink in self.sinks:
            sink.write(step, rows)
        self.last_step = step
        self.report(evaluations)


def _weights_columns(e: Evaluation) -> dict[str, Any]:
    """Which weights an evaluation shows and, for averages, the results of the raw weights."""
    if e.raw is None:
        return {"weights": "raw"}
    return {
        "weights": "averaged",
        "raw_return_mean": float(e.raw.returns.mean()),
        "raw_score": _mean(e.raw.scores),
    }


def _mean(scores: np.ndarray | None) -> float | None:
    """Mean score, or an empty cell."""
    return None if scores is None else float(scores.mean())


class ProgressBar(TrainerHookBase):
    """Trainer hook that shows a progress bar over all updates of a run, including resumed ones."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def register(self, trainer: Any, name: str = "progress_bar") -> None:
        """Register the hook with a trainer.

        Args:
            trainer: the :class:`~pogo_torchrl.POGOTrainer`.
            name: unused, part of TorchRL's interface.
        """
        self.trainer = trainer
        trainer.register_op("setup", self._start)
        trainer.register_op("post_steps", self._update)
        trainer.register_op("shutdown", self._close)

    def show(self, **metrics: float) -> None:
        """Display metrics next to the bar."""
        if self._bar is not None:
            self._bar.set_postfix(metrics, refresh=False)

    def _start(self) -> None:
        done, total = self.trainer.collected_frames, self.trainer.total_frames
        self._bar = progress_bar(total=total, initial=done, unit=" updates")

    def _update(self) -> None:
        if self._bar is not None:
            self._bar.update(self.trainer.collected_frames - self._bar.n)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class StopOnDivergence(TrainerHookBase):
    """Trainer hook that stops the run if a loss is not finite or the critics have exploded.

    It reads the averages that ``metrics`` keeps on the device, at the intervals of the other hooks
    and of checkpoints: no synchronisation per update, and no checkpoint of a diverged run.
    Register it before the hooks that must not run after a divergence.

    Args:
        metrics: hook that averages the losses.
        largest_return: largest magnitude of a discounted return that the rewards of the dataset
            allow, ``max|r| / (1 - gamma)``. If the mean critic value exceeds it, a warning is
            issued once; if it exceeds ``explosion`` times this value, the run stops. Defaults to
            ``None``: unknown, the critics are not checked.

    Keyword Args:
        untrained: magnitude of the values of untrained critics, whatever the rewards: up to it,
            values are not compared with ``largest_return``. Defaults to ``0.0``.
        warn: called with the text of the warning. Defaults to ``print``.
        hint: remedies that messages name. Defaults to those of POGO.

    Raises:
        DivergenceError: from the trainer's loop, if training has diverged.

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
        untrained: float = 0.0,
        warn: Callable[[str], None] = print,
        hint: str = POGO_HINT,
    ) -> None:
        self.metrics = metrics
        self.largest_return = largest_return or None  # all rewards are 0: no bound
        self.untrained = untrained
        self.warn, self.hint = warn, hint
        self._warned = False

    def register(self, trainer: Any, name: str = "stop_on_divergence") -> None:
        """Register the hook with a trainer.

        Args:
            trainer: the :class:`~pogo_torchrl.POGOTrainer`.
            name: unused, part of TorchRL's interface.
        """
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
                f"Training has diverged: at update {step}, {', '.join(broken)} became infinite or "
                f"NaN since the last row of metrics.csv. {self.hint}"
            )
        value = abs(means.get("pred_value", 0.0))
        if self.largest_return is None or value <= max(self.largest_return, self.untrained):
            return
        size = (
            f"at update {step} the mean Q value is {value:.3g}, but the rewards of the dataset "
            f"allow no return beyond {self.largest_return:.3g}"
        )
        if value > self.explosion * max(self.largest_return, self.untrained):
            raise DivergenceError(f"Training has diverged: {size}. {self.hint}")
        if not self._warned:
            self._warned = True
            self.warn(f"The critics overestimate: {size}. {self.hint}")

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state: the hook has none."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Do nothing: the hook has no state."""
