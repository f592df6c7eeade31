"""Execution of a run, alone or in a stack: data, training, evaluation and result files."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import (
    AbstractContextManager,
    ExitStack,
    closing,
    contextmanager,
    nullcontext,
    suppress,
)
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch.nn.utils import parameters_to_vector
from torchrl.record.loggers import Logger

from pogo_torchrl.data import OfflineReplayBuffer, make_replay_buffer
from pogo_torchrl.envs import Measure
from pogo_torchrl.envs.registration import read_action_bounds
from pogo_torchrl.evaluation import Evaluation, Evaluator, format_evaluation
from pogo_torchrl.experiments import algorithms
from pogo_torchrl.experiments.build import (
    action_dim,
    check_data,
    check_memory,
    choose_compile,
    choose_device,
    deterministic,
    optimizer_settings,
    seed_everything,
    step_control,
)
from pogo_torchrl.experiments.console import LOGGER, ConsoleHandler, TrainLogHandler, log_to
from pogo_torchrl.experiments.csv_log import (
    CSVSink,
    LoggerSink,
    check_logger,
    close_logger,
    make_logger,
)
from pogo_torchrl.experiments.overrides import check_options
from pogo_torchrl.experiments.results import write_results
from pogo_torchrl.experiments.run_folder import (
    RunFolder,
    check_run_folder,
    fingerprint,
    lock_run_folder,
)
from pogo_torchrl.experiments.signals import Stopped, stop_on_signals
from pogo_torchrl.experiments.simulator import (
    DataSpaces,
    has_simulator,
    make_evaluator,
    resolve_environment,
)
from pogo_torchrl.experiments.typed_text import expand_paths
from pogo_torchrl.export import on_raw_observations
from pogo_torchrl.files import atomic_write
from pogo_torchrl.modules import TransportActor
from pogo_torchrl.screen import expendable_screen
from pogo_torchrl.trainers import POGOTrainer
from pogo_torchrl.trainers.checkpoints import remove_unfinished
from pogo_torchrl.trainers.freeze import FreezeThenFlow
from pogo_torchrl.trainers.hooks import POGO_HINT, Evaluate, LogMetrics, StopOnDivergence


def run(cfg: DictConfig) -> list[Evaluation]:
    """Train and evaluate one chain, and write the files of the run; this is ``pogo train``.

    If it fails before the first update, it leaves no files. In the main thread, SIGHUP, SIGINT,
    SIGTERM and SIGUSR1 save a checkpoint and stop the run; in other threads signals are left alone.

    Args:
        cfg: a :class:`~pogo_torchrl.experiments.config.RunConfig`.

    Returns:
        The last evaluation, one entry per actor and action mode.

    Raises:
        ValueError: for invalid settings; the message names them.
        FileExistsError: if the run folder already contains a run and ``resume`` is ``False``.
        Interrupted: if a signal stopped the training before its first update.
    """
    one = RunInProgress(cfg)
    with (
        expendable_screen(),
        one.environments(),
        lock_run_folder(one.folder),
        deterministic(cfg.deterministic),
        log_to(ConsoleHandler()),
        closing(one),
    ):
        one.read_data()
        with one.opened():
            if one.settings["compile"]:
                LOGGER.info("Compiling the update, which takes about a minute.")
            with stop_on_signals([one]):
                one.trainer.train()
            one.finish()
    return one.last


class RunInProgress:
    """A run with its data, loss, trainer and files.

    The constructor checks all settings before data are generated or files written. Then
    :meth:`read_data`, :meth:`opened` (training happens within this context) and :meth:`finish`
    are called in this order, and :meth:`close` at the end.

    Args:
        cfg: a :class:`~pogo_torchrl.experiments.config.RunConfig`.
        stacked: whether the run is part of a :class:`~pogo_torchrl.trainers.TrainerStack`.
            Defaults to ``False``.

    Raises:
        ValueError: for invalid settings; the message names them.
    """

    def __init__(self, cfg: DictConfig, *, stacked: bool = False) -> None:
        check_options(cfg)
        cfg = copy.deepcopy(cfg)
        expand_paths(cfg)
        self.cfg = cfg = resolve_environment(algorithms.resolve(cfg))
        self.is_pogo = cfg.algorithm == algorithms.POGO
        self.folder = RunFolder.of(cfg)
        self.averaged = cfg.average_actors is not None
        self.measure = Measure.of(cfg.task, cfg.env.reference_scores)
        self.evaluator = make_evaluator(cfg) if has_simulator(cfg) else None
        with ExitStack() as stack:
            stack.enter_context(self.environments())
            self._prepare(cfg, stacked)
            if not stacked:
                stack.pop_all()  # opened again by evaluations, which a stack runs one by one

    def _prepare(self, cfg: DictConfig, stacked: bool) -> None:
        self.stacked = stacked
        self.spaces: Any = self.evaluator
        self.device = choose_device(cfg.device)
        self.settings = {
            **optimizer_settings(cfg, self.device),
            "policy_freq": cfg.policy_freq,
            "freeze_critics_at": cfg.freeze_critics_at,
            "tau": cfg.tau,
            "compile": self.is_pogo
            and not stacked
            and choose_compile(cfg.compile, cfg.total_steps, cfg.w2_backend),
            "bf16": cfg.bf16,
            "checkpoint_dir": self.folder.checkpoints,
            "checkpoint_interval": cfg.checkpoint_interval,
            "progress_bar": cfg.progress_bar and not stacked,
        }
        POGOTrainer.check_settings(cfg.total_steps, **self.settings)
        self.step_control = step_control(cfg)
        if cfg.freeze_critics_at is not None:
            FreezeThenFlow(cfg.freeze_critics_at)  # checks the value
        if cfg.logger.backend:
            check_logger(cfg.logger.backend, stacked=stacked)
        if self.evaluator is not None:
            self._make_loss(self.evaluator)
        columns = {"alpha": lambda: self.loss.alpha} if self.step_control else {}
        if cfg.algorithm == "iql":  # its losses do not tell Q
            columns["pred_value"] = self._mean_q
        self.metrics = LogMetrics([], cfg.log_interval, columns, self.policy)
        self.evaluate = None
        if self.evaluator is not None:
            self.evaluate = Evaluate(
                self._evaluations, report=self._report, interval=cfg.eval_interval
            )
        self.last: list[Evaluation] = []
        self._files: set[Path] | None = None  # before this start wrote any
        self._logger: Logger | None = None

    def _make_loss(self, spaces: Evaluator | DataSpaces) -> None:
        check_memory(self.cfg, spaces)
        seed_everything(self.cfg.seed)
        self.loss = algorithms.make_loss(self.cfg, spaces, self.device)

    def environments(self) -> AbstractContextManager[Any]:
        """Context manager that closes the environments at its end."""
        return nullcontext() if self.evaluator is None else closing(self.evaluator)

    def read_data(self, replay_buffer: OfflineReplayBuffer | None = None) -> None:
        """Load the data and create the trainer, resuming from a checkpoint if requested.

        Args:
            replay_buffer: data of another run to share. Defaults to ``None``: load the data.

        Raises:
            FileExistsError: if the run folder already contains a run and ``resume`` is ``False``.
            ValueError: for data that do not match the task, or a checkpoint of another run.
        """
        cfg = self.cfg
        check_run_folder(self.folder, cfg)
        shared, horizon = replay_buffer is not None, cfg.env.max_episode_steps
        if replay_buffer is None:
            bounds: Any = True  # [-1, 1]
            if self.evaluator is not None:
                space = self.evaluator.action_spec.space
                bounds = (space.low.cpu(), space.high.cpu())
            elif cfg.data.clip_actions and cfg.env.action_bounds is not None:
                found = read_action_bounds(cfg.env.action_bounds, action_dim(cfg))
                bounds = tuple(map(torch.from_numpy, found))
            replay_buffer = make_replay_buffer(
                cfg.task,
                batch_size=cfg.batch_size,
                next_action=cfg.critic_bc_weight > 0,
                return_temperature=cfg.return_temperature,
                max_episode_steps=self.evaluator.max_episode_steps if self.evaluator else horizon,
                dict_space=self.evaluator.dict_space if self.evaluator else None,
                device=self.device,
                progress=cfg.progress_bar,
                **{**cfg.data, "clip_actions": cfg.data.clip_actions and bounds},
            )
        self.spaces = self.evaluator or DataSpaces.of(cfg, replay_buffer)
        if not shared:
            check_data(replay_buffer, self.spaces, cfg.data)
        if self.evaluator is None:
            self._make_loss(self.spaces)
        self.make_trainer(replay_buffer, replay_buffer, fingerprint(cfg, replay_buffer))
        remove_unfinished(self.trainer.checkpoint_rotation)  # also of a start that left no run
        self.resumed = self.trainer.resume() if cfg.resume else None
        LOGGER.info(
            "%s on %s, %d updates; run folder %s",
            "POGO" if self.is_pogo else f"{cfg.algorithm} with chain={cfg.chain}",
            cfg.task,
            cfg.total_steps,
            self.folder.root,
        )

    def make_trainer(
        self, replay_buffer: OfflineReplayBuffer, batches: Any, fingerprint: dict[str, Any]
    ) -> None:
        """Create the trainer with its hooks.

        Args:
            replay_buffer: the data.
            batches: the replay buffer that the trainer samples from.
            fingerprint: what a checkpoint must share with a run that resumes from it.
        """
        cfg = self.cfg
        self.replay_buffer = replay_buffer
        self.reward_scale = algorithms.scale_rewards(cfg, replay_buffer)
        returns = replay_buffer.episode_returns
        self.behaviour = self.measure.values(float(returns.mean())) if len(returns) else math.nan
        rewards = replay_buffer[:]["next", "reward"]
        # The penalty on the next action is part of the values: at most 4 per action dimension.
        penalty = cfg.critic_bc_weight * 4 * self.spaces.action_dim
        guard = StopOnDivergence(
            self.metrics,
            (float(rewards.abs().max()) + penalty) / (1 - cfg.gamma) if cfg.gamma < 1 else None,
            untrained=1.0,  # tiny rewards are no reason to stop
            warn=LOGGER.warning,
            hint=POGO_HINT if self.is_pogo else "Try critic_layer_norm=true or a smaller lr.",
        )
        hooks = [guard, self.metrics, self.step_control, self.evaluate]
        self.trainer = algorithms.make_trainer(cfg)(
            self.loss,
            batches,
            cfg.total_steps,
            fingerprint=fingerprint,
            hooks=[hook for hook in hooks if hook is not None],
            **self.settings,
        )

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Write the configuration and open the run's logs for the duration of the context."""
        cfg, training = self.cfg, self.folder.training
        self._files = self._list_files()
        training.mkdir(parents=True, exist_ok=True)
        with self.logged():
            for path in filter(None, (self.folder.config, self.folder.claim)):
                with atomic_write(path, "x") as file:
                    file.write(OmegaConf.to_yaml(cfg, resolve=True))
            episodes, shown = len(self.replay_buffer.episode_returns), self.measure.name
            noun = shown.split()[-1]
            LOGGER.info("Data: %d transitions, %s", len(self.replay_buffer),
                        f"{episodes} episodes, mean {shown} {self.behaviour:.1f}" if episodes
                        else f"not in episodes, so their {noun} is unknown")  # fmt: skip
            if self.evaluate is None:
                LOGGER.info("The actors are not evaluated: the run has no environment.")
            elif self.averaged:
                LOGGER.info("Evaluations show the averaged actors (average_actors=%g).",
                            cfg.average_actors)  # fmt: skip
            if cfg.resume and self.resumed is None:
                LOGGER.info("No usable checkpoint found: starting from scratch.")
            elif self.resumed is not None:
                LOGGER.info("Resumed at update %d.", self.resumed)
            backend = cfg.logger.backend
            if backend:
                settings: Any = OmegaConf.to_container(cfg, resolve=True)
                self._logger = make_logger(
                    backend,
                    training,
                    cfg.task,
                    run=self.folder.root.relative_to(cfg.log_dir).as_posix(),
                    settings=settings,
                    resume=self.resumed is not None,
                )
            logger = self._logger
            for hook, name in ((self.metrics, "metrics"), (self.evaluate, "evaluations")):
                if hook is None:
                    continue
                sink = CSVSink(training / f"{name}.csv", resume_step=self.resumed)
                hook.sinks = [sink, LoggerSink(logger, name)] if logger else [sink]
                if isinstance(hook, Evaluate):
                    hook.last_step = sink.last_step
            yield

    def close(self) -> None:
        """Close the logger, and remove the files of a start that failed before the first update."""
        if self._logger is not None:
            try:
                close_logger(self._logger)
            except Exception as error:  # the run's own files are complete
                LOGGER.warning("Closing %s failed: %s", self.cfg.logger.backend, error)
        if self._files is None or self.trainer.optimization_stepper.steps:
            return
        for path in sorted(self._list_files() - self._files, reverse=True):
            with suppress(OSError):  # the reason of the failure is more useful
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()

    def _list_files(self) -> set[Path]:
        training, claim = self.folder.training, self.folder.claim
        found = {training, *training.rglob("*")} if training.exists() else set()
        return found | ({claim} if claim is not None and claim.exists() else set())

    def logged(self) -> AbstractContextManager[None]:
        """Context manager that logs to the run's ``train.log``."""
        return log_to(TrainLogHandler(self.folder.training / "train.log"))

    def has_updates(self) -> bool:
        """Whether the run has made updates since it was started or resumed."""
        return self.trainer.optimization_stepper.steps > (self.resumed or 0)

    def stop(self, name: str) -> None:
        """Request the run to save a checkpoint and stop as soon as possible.

        Args:
            name: name of the signal.
        """
        self.trainer.request_stop(name)
        if self.evaluator is not None:
            self.evaluator.interrupt()

    def finish(self) -> None:
        """Write the results of the run after the last update.

        Raises:
            Stopped: if a signal ended the training earlier.
        """
        trainer = self.trainer
        evaluated = self.evaluate is None or self.evaluate.up_to_date()
        if trainer.collected_frames < self.cfg.total_steps or not evaluated:
            raise Stopped(trainer.collected_frames, trainer.stop_reason)
        write_results(
            self.cfg,
            self.folder,
            self._chain(averaged=self.averaged),
            trainer.collected_frames,
            behaviour=self.behaviour,
            measure=None if self.evaluate is None else self.measure.name,
        )

    def deployed_actors(self) -> list[TransportActor]:
        """The current actors to be deployed, on normalised observations."""
        return [self.policy(i, averaged=self.averaged) for i in range(self.loss.num_actors)]

    def policy(self, index: int, *, averaged: bool = False) -> TransportActor:
        """An actor that shares the parameters being trained, or its average."""
        return algorithms.policy(self.loss, index, averaged=averaged)

    def _chain(self, *, averaged: bool) -> list[TransportActor]:
        """The current chain, acting on raw observations."""
        actors = [self.policy(i, averaged=averaged) for i in range(self.loss.num_actors)]
        return [on_raw_observations(actor, *self.replay_buffer.normalization) for actor in actors]

    def _mean_q(self) -> float:
        """Mean Q on the last batch, in units of the data's rewards."""
        batch = self.trainer.optimization_stepper.last_batch
        return algorithms.mean_q(self.loss, batch) / self.reward_scale

    def _evaluations(self) -> list[Evaluation]:
        """Evaluate the chain to be deployed: its averages, if any, beside the raw weights."""
        assert self.evaluator is not None
        with self.environments() if self.stacked else nullcontext():
            raw = self._chain(averaged=False)
            if not self.averaged:
                return self.evaluator(raw)
            chain = [*raw, *self._chain(averaged=True)]
            evaluations = self.evaluator([_first_equal(actor, chain) for actor in chain])
        half = len(evaluations) // 2
        return [
            average._replace(actor=own.actor, raw=own)
            for own, average in zip(evaluations[:half], evaluations[half:])
        ]

    def _report(self, evaluations: list[Evaluation]) -> None:
        self.last = evaluations
        LOGGER.info("%s", format_evaluation(evaluations, self.measure.name))


def _first_equal(actor: TransportActor, chain: Sequence[TransportActor]) -> TransportActor:
    """The first actor of the chain with the weights of the given one: it is evaluated once."""
    weights = parameters_to_vector(actor.parameters())
    equal = (x for x in chain if torch.equal(parameters_to_vector(x.parameters()), weights))
    return next(equal, actor)  # NaN equals nothing
