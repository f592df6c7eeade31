"""One run from its settings to its last file, alone or as one of a stack."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torchrl.checkpoint import GlobalRNGState

from pogo_torchrl.data import OfflineReplayBuffer, make_replay_buffer
from pogo_torchrl.envs import score
from pogo_torchrl.evaluation import Evaluation, Evaluator, format_evaluation
from pogo_torchrl.experiments.build import (
    check_data,
    check_memory,
    choose_compile,
    choose_device,
    deterministic,
    env_fn,
    make_loss,
    optimizer_settings,
    seed_everything,
)
from pogo_torchrl.experiments.console import LOGGER, ConsoleHandler, TrainLogHandler, log_to
from pogo_torchrl.experiments.csv_log import CSVSink, LoggerSink, check_logger, make_logger
from pogo_torchrl.experiments.overrides import check_options
from pogo_torchrl.experiments.run_folder import (
    RunFolder,
    check_run_folder,
    fingerprint,
    lock_run_folder,
)
from pogo_torchrl.experiments.signals import Stopped, stop_on_signals
from pogo_torchrl.export import on_raw_observations, save_actors
from pogo_torchrl.files import atomic_write, cannot_write
from pogo_torchrl.modules import TransportActor
from pogo_torchrl.report import plot_curves, score_table
from pogo_torchrl.trainers import POGOTrainer, TrainerStack
from pogo_torchrl.trainers.hooks import Evaluate, LogMetrics, StopOnDivergence


def run(cfg: DictConfig) -> list[Evaluation]:
    """Train and evaluate one chain as ``cfg`` says; the work of ``examples/pogo_offline.py``.

    Args:
        cfg: a :class:`~pogo_torchrl.experiments.config.RunConfig`.

    Returns:
        The last evaluation.

    Raises:
        ValueError: for settings that make no sense; the message names them.
        FileExistsError: when the run's folder holds a run and ``resume`` is off.
    """
    one = RunInProgress(cfg)
    with lock_run_folder(one.folder), deterministic(cfg.deterministic), log_to(ConsoleHandler()):
        one.read_data()
        with one.opened():
            if one.settings["compile"]:
                LOGGER.info("The first update compiles all of them: about a minute.")
            with stop_on_signals([one]):
                one.trainer.train()
            one.finish()
    return one.last


def run_stack(cfgs: Sequence[DictConfig]) -> list[Exception | None]:
    """Train and evaluate several runs in one process, as one batched computation.

    Each writes what it would have written alone; what fails in one ends that one only.

    Args:
        cfgs: of one task, differing in ``seed``, ``w2_weights`` (of one length) and ``alpha``.

    Returns:
        For each run what has kept it from its end, or ``None``.
    """
    errors: list[Exception | None] = [None] * len(cfgs)
    runs: dict[int, RunInProgress] = {}
    streams = [_RandomStream() for _ in cfgs]

    @contextmanager
    def guarded(place: int) -> Iterator[None]:
        try:
            with streams[place]:
                yield
        except Exception as error:
            errors[place] = error
            runs.pop(place, None)

    with ExitStack() as held, log_to(ConsoleHandler()), deterministic(cfgs[0].deterministic):
        replay_buffer = None
        for place, cfg in enumerate(cfgs):
            with guarded(place):
                one = RunInProgress(cfg, stacked=True)
                held.enter_context(lock_run_folder(one.folder))
                one.read_data(replay_buffer)
                replay_buffer = one.replay_buffer
                with one.opened():
                    runs[place] = one
        # Those that were cut at another update go in a stack of their own.
        stacks: dict[int, list[int]] = {}
        for place, one in runs.items():
            stacks.setdefault(one.trainer.collected_frames, []).append(place)
        with stop_on_signals(list(runs.values())):
            for places in stacks.values():
                members = [runs[place] for place in places]
                ended = _train_stack(members, [streams[place] for place in places])
                for place, error in zip(places, ended):
                    errors[place] = error
        for place, one in list(runs.items()):
            if errors[place] is None:
                with guarded(place), one.logged():
                    one.finish()
    return errors


def _train_stack(
    runs: Sequence[RunInProgress], streams: Sequence[_RandomStream]
) -> list[Exception | None]:
    cfg = runs[0].cfg

    @contextmanager
    def around_hooks(place: int) -> Iterator[None]:
        with streams[place], runs[place].logged():
            yield

    stack = TrainerStack(
        [one.trainer for one in runs],
        streams.__getitem__,
        around_hooks=around_hooks,
        compile=choose_compile(cfg.compile, cfg.total_steps, cfg.w2_backend),
    )
    return stack.train()


class _RandomStream(AbstractContextManager):
    """A context in which the global random state is a run's own."""

    def __init__(self) -> None:
        self._state = GlobalRNGState()
        self._inside: dict[str, Any] | None = None

    def __enter__(self) -> None:
        self._outside = self._state.state_dict()
        if self._inside is not None:
            self._state.load_state_dict(self._inside)

    def __exit__(self, *_: object) -> None:
        self._inside = self._state.state_dict()
        self._state.load_state_dict(self._outside)


class RunInProgress:
    """A run from its settings to its last file; :func:`run` trains it alone.

    Making one refuses everything that can be refused before data are made or files written.

    Args:
        cfg: a :class:`~pogo_torchrl.experiments.config.RunConfig`.
        stacked: the trainer is one of a :class:`~pogo_torchrl.stack.TrainerStack`.

    Raises:
        ValueError: for settings that make no sense; the message names them.
    """

    def __init__(self, cfg: DictConfig, *, stacked: bool = False) -> None:
        check_options(cfg)
        self.cfg = cfg
        self.folder = RunFolder.of(cfg)
        self.evaluator = Evaluator(
            cfg.task, episodes=cfg.eval_episodes, seed=cfg.seed, env_fn=env_fn(cfg.task, cfg.env)
        )
        self.device = choose_device(cfg.device)
        self.settings = {
            **optimizer_settings(cfg, self.device),
            "policy_freq": cfg.policy_freq,
            "tau": cfg.tau,
            "compile": not stacked and choose_compile(cfg.compile, cfg.total_steps, cfg.w2_backend),
            "bf16": cfg.bf16,
            "checkpoint_dir": self.folder.checkpoints,
            "checkpoint_interval": cfg.checkpoint_interval,
            "progress_bar": cfg.progress_bar and not stacked,
        }
        POGOTrainer.check_settings(cfg.total_steps, **self.settings)
        check_memory(cfg, self.evaluator)
        if cfg.logger.backend:
            check_logger(cfg.logger.backend)
        seed_everything(cfg.seed)
        self.loss = make_loss(cfg, self.evaluator, self.device)
        self.metrics = LogMetrics([], cfg.log_interval)
        self.evaluate = Evaluate(
            lambda: self.evaluator(self._chain()), report=self._report, interval=cfg.eval_interval
        )
        self.last: list[Evaluation] = []

    def read_data(self, replay_buffer: OfflineReplayBuffer | None = None) -> None:
        """Get the data, or take those of another run, and make the trainer.

        Raises:
            FileExistsError: when the run's folder holds a run and ``resume`` is off.
            ValueError: for data that do not fit, or a checkpoint of another run.
        """
        cfg = self.cfg
        check_run_folder(self.folder, cfg)
        LOGGER.info(
            "POGO on %s, %d updates; run folder %s", cfg.task, cfg.total_steps, self.folder.root
        )
        if replay_buffer is None:
            replay_buffer = make_replay_buffer(
                cfg.task, batch_size=cfg.batch_size, device=self.device, **cfg.data
            )
            check_data(replay_buffer, self.evaluator, cfg.data)
        self.replay_buffer = replay_buffer
        self.behaviour = score(cfg.task, float(replay_buffer.episode_returns.mean()))
        rewards = replay_buffer[:]["next", "reward"]
        guard = StopOnDivergence(
            self.metrics,
            float(rewards.abs().max()) / (1 - cfg.gamma) if cfg.gamma < 1 else None,
            warn=LOGGER.warning,
        )
        self.trainer = POGOTrainer(
            self.loss,
            replay_buffer,
            cfg.total_steps,
            fingerprint=fingerprint(cfg, replay_buffer),
            hooks=[guard, self.metrics, self.evaluate],
            **self.settings,
        )
        self.resumed = self.trainer.resume() if cfg.resume else None

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Write what is known before the training; log to the run's files."""
        cfg, training = self.cfg, self.folder.training
        training.mkdir(parents=True, exist_ok=True)
        with self.logged():
            with atomic_write(training / "config.yaml", "x") as file:
                file.write(OmegaConf.to_yaml(cfg, resolve=True))
            LOGGER.info("Data: %d transitions, %d episodes, mean D4RL score %.1f",
                        len(self.replay_buffer), len(self.replay_buffer.episode_returns),
                        self.behaviour)  # fmt: skip
            if cfg.resume and self.resumed is None:
                LOGGER.info("No usable checkpoint to resume from: starting afresh.")
            elif self.resumed is not None:
                LOGGER.info("Resumed at update %d.", self.resumed)
            backend = cfg.logger.backend
            logger = make_logger(backend, training, cfg.task) if backend else None
            for hook, name in ((self.metrics, "metrics"), (self.evaluate, "evaluations")):
                sink = CSVSink(training / f"{name}.csv", resume_step=self.resumed)
                hook.sinks = [sink, LoggerSink(logger, name)] if logger else [sink]
                if hook is self.evaluate:
                    self.evaluate.last_step = sink.last_step
            yield

    def logged(self) -> AbstractContextManager[None]:
        """Log to the run's ``train.log``."""
        return log_to(TrainLogHandler(self.folder.training / "train.log"))

    def stop(self, name: str) -> None:
        """Have it save and stop as soon as it can."""
        self.trainer.request_stop(name)
        self.evaluator.interrupt()

    def finish(self) -> None:
        """Write what is left after the last update.

        Raises:
            Stopped: when a signal ended the training before.
        """
        trainer = self.trainer
        if trainer.collected_frames < self.cfg.total_steps or not self.evaluate.up_to_date():
            raise Stopped(trainer.collected_frames, trainer.stop_reason)
        _finish(self.cfg, self.folder, self._chain(), self.behaviour)

    def _chain(self) -> list[TransportActor]:
        """The chain as it is, for raw observations."""
        return [
            on_raw_observations(self.loss.actor(i), *self.replay_buffer.normalization)
            for i in range(self.loss.num_actors)
        ]

    def _report(self, evaluations: list[Evaluation]) -> None:
        self.last = evaluations
        LOGGER.info("%s", format_evaluation(evaluations))


def _finish(
    cfg: DictConfig, folder: RunFolder, chain: list[TransportActor], behaviour: float
) -> None:
    evaluations, curves = folder.training / "evaluations.csv", folder.training / "curves.png"
    policy = folder.checkpoints / "policy.safetensors"
    if cfg.save_model:
        try:
            save_actors(
                policy,
                chain,
                hidden_sizes=cfg.hidden_sizes,
                environment={"task": cfg.task, **cfg.env},
            )
        except OSError as error:
            raise cannot_write(folder.checkpoints, "checkpoint_dir", error) from error
    LOGGER.info("%s", score_table(evaluations, behaviour))
    plot_curves(evaluations, curves, title=cfg.task, behaviour_score=behaviour)
    LOGGER.info("Logs:        %s", folder.training)
    LOGGER.info("Curves:      %s", curves)
    LOGGER.info("Checkpoints: %s", folder.checkpoints)
    if cfg.save_model:
        LOGGER.info("Policy:      %s (load_actors(...)[-1] is the last actor)", policy)
    with atomic_write(folder.done, "x") as file:  # last of all
        json.dump({"total_steps": cfg.total_steps}, file)
