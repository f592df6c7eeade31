"""One run from its settings to its last file, alone or as one of a stack."""

from __future__ import annotations

import json
import logging
import math
import os
import random
import shutil
import signal
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
import yaml
from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torchrl.checkpoint import GlobalRNGState
from tqdm import tqdm

from pogo_torchrl.data import OfflineReplayBuffer, make_replay_buffer
from pogo_torchrl.envs import BACKENDS, make_env, max_episode_steps, score, split_task
from pogo_torchrl.evaluation import Evaluation, Evaluator, format_evaluation
from pogo_torchrl.experiments import config
from pogo_torchrl.experiments.csv_log import CSVSink, LoggerSink, check_logger, make_logger
from pogo_torchrl.export import on_raw_observations, save_actors
from pogo_torchrl.files import atomic_write, cannot_write, make_writable, physical_memory
from pogo_torchrl.modules import TransportActor, make_actor, make_qvalue
from pogo_torchrl.objectives import POGOLoss
from pogo_torchrl.report import plot_curves, score_table
from pogo_torchrl.trainers import LR_SCHEDULES, POGOTrainer, TrainerStack, lr_scheduler
from pogo_torchrl.trainers.fused.update import COMPILABLE
from pogo_torchrl.trainers.hooks import Evaluate, LogMetrics, StopOnDivergence
from pogo_torchrl.trainers.optimizers import adam

LOGGER = logging.getLogger("pogo_torchrl")

# What may change between a run and its continuation; everything else shapes the training.
_FREE_ON_RESUME = {
    "total_steps", "eval_interval", "eval_episodes", "log_interval", "checkpoint_interval",
    "resume", "device", "compile", "log_dir", "checkpoint_dir", "save_model", "logger",
    "progress_bar", "env",
    "data",  # its content is compared, not its place
}  # fmt: skip


class RunFolder(NamedTuple):
    """Where a run writes."""

    training: Path
    checkpoints: Path

    @property
    def root(self) -> Path:
        """The run's folder."""
        return self.training.parent

    @property
    def done(self) -> Path:
        """Written when the run is complete: a JSON object with the ``total_steps`` it has made."""
        return self.root / "done.json"

    @classmethod
    def of(cls, cfg: DictConfig) -> RunFolder:
        """``log_dir/task/w2_.../seed_.../{training,checkpoints}``."""
        weights = "_".join(f"{w:g}" for w in cfg.w2_weights)
        root = Path(cfg.log_dir) / cfg.task / f"w2_{weights}" / f"seed_{cfg.seed}"
        checkpoints = cfg.checkpoint_dir or root / "checkpoints"
        return cls(root / "training", Path(checkpoints))


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
    with claim(one.folder), deterministic(cfg.deterministic), log_to(Screen()):
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
    streams = [_Stream() for _ in cfgs]

    @contextmanager
    def guarded(place: int) -> Iterator[None]:
        try:
            with streams[place]:
                yield
        except Exception as error:
            errors[place] = error
            runs.pop(place, None)

    with ExitStack() as held, log_to(Screen()), deterministic(cfgs[0].deterministic):
        replay_buffer = None
        for place, cfg in enumerate(cfgs):
            with guarded(place):
                one = RunInProgress(cfg, stacked=True)
                held.enter_context(claim(one.folder))
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
    runs: Sequence[RunInProgress], streams: Sequence[_Stream]
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


class _Stream(AbstractContextManager):
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
        config.check(cfg)
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
        _seed(cfg.seed)
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
        check_folder(self.folder, cfg)
        LOGGER.info(
            "POGO on %s, %d updates; run folder %s", cfg.task, cfg.total_steps, self.folder.root
        )
        if replay_buffer is None:
            replay_buffer = make_replay_buffer(
                cfg.task, batch_size=cfg.batch_size, device=self.device, **cfg.data
            )
            _check_data(replay_buffer, self.evaluator, cfg.data)
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
            fingerprint=_fingerprint(cfg, replay_buffer),
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
        return log_to(_File(self.folder.training / "train.log"))

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
            raise Stopped(trainer.collected_frames, trainer._stop_reason)
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
            save_actors(policy, chain, hidden_sizes=cfg.hidden_sizes)
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


def env_fn(task: str, cfg: DictConfig) -> Callable[[], gymnasium.Env]:
    """Makes the task's environment, or the one that ``env.id`` names."""
    if cfg.backend not in BACKENDS:
        raise ValueError(
            f"env.backend={cfg.backend} is unknown; choose one of {', '.join(BACKENDS)}."
        )
    own = f"pogo_torchrl/{'-'.join(split_task(task))}-v2"
    horizon = cfg.max_episode_steps or max_episode_steps(task)
    if cfg.id in (None, own) and horizon == max_episode_steps(task):
        return partial(make_env, task, backend=cfg.backend)
    if cfg.backend != "mujoco":
        raise ValueError(
            f"env.backend={cfg.backend} takes the environment and the horizon of the task; leave "
            "env.id and env.max_episode_steps out."
        )
    make = partial(gymnasium.make, cfg.id or own, max_episode_steps=horizon)
    try:
        make().close()
    except (gymnasium.error.Error, ImportError) as error:
        raise ValueError(
            f"env.id={cfg.id} is no Gymnasium environment ({error}): choose one that "
            "gymnasium.make knows, MODULE:ID where a module registers it."
        ) from error
    return make


def check_memory(cfg: DictConfig, evaluator: Evaluator) -> None:
    """Refuse networks and batches that no memory holds, before any is taken."""
    inputs = evaluator.observation_dim + evaluator.action_dim
    widths = [inputs, *cfg.hidden_sizes, evaluator.action_dim]
    weights = sum(n * m for n, m in pairwise(widths))
    # Twin critics and their targets; gradients and Adam's two moments; four bytes a number.
    networks = 16 * weights * (len(cfg.w2_weights) + 4)
    costs = cfg.num_samples if cfg.w2_backend in ("tensorized", "fast") else 1
    batch = 4 * cfg.batch_size * (1 + cfg.num_samples) * (sum(widths) + costs)
    for needed, what in (
        (networks, f"hidden_sizes={cfg.hidden_sizes} with {len(cfg.w2_weights)} actors"),
        (batch, f"num_samples={cfg.num_samples} with batch_size={cfg.batch_size}"),
    ):
        if needed > physical_memory():
            raise ValueError(
                f"{what} would take {needed / 1e9:.3g} GB, this machine has "
                f"{physical_memory() / 1e9:.3g} GB: choose smaller numbers."
            )


def make_loss(cfg: DictConfig, evaluator: Evaluator, device: torch.device) -> POGOLoss:
    """The chain and its critics, newly initialised."""
    actor = make_actor(evaluator.observation_dim, evaluator.action_spec, cfg.hidden_sizes)
    qvalue = make_qvalue(
        evaluator.observation_dim, evaluator.action_dim, cfg.hidden_sizes, cfg.critic_layer_norm
    )
    loss = POGOLoss(
        actor,
        qvalue,
        w2_weights=list(cfg.w2_weights),
        num_samples=cfg.num_samples,
        blur=cfg.blur,
        w2_backend=cfg.w2_backend,
        w2_fraction=cfg.w2_fraction,
        shared_noise=cfg.shared_noise,
        policy_noise=cfg.policy_noise,
        noise_clip=cfg.noise_clip,
        q_normalization=cfg.q_normalization,
        alpha=cfg.alpha,
        delay_actor=cfg.delay_actor,
    ).to(device)
    loss.make_value_estimator(gamma=cfg.gamma)
    return loss


def optimizer_settings(cfg: DictConfig, device: torch.device) -> dict[str, Any]:
    """Optimizers and schedules of a run, as :class:`~pogo_torchrl.POGOTrainer` takes them.

    Raises:
        ValueError: for learning rates or a weight decay out of range, or an unknown schedule.
    """
    found: dict[str, Any] = {"clip_grad_norm": cfg.clip_grad_norm}
    if not (0 <= cfg.weight_decay < math.inf):
        raise ValueError(f"weight_decay={cfg.weight_decay} must be a number >= 0, e.g. 0.01.")
    for option, name in (("critic", "qvalue"), ("actor", "actor")):
        rate, schedule = cfg[f"lr_{option}"], cfg[f"lr_schedule_{option}"]
        rate, key = (cfg.lr, "lr") if rate is None else (rate, f"lr_{option}")
        if not 0 < rate < math.inf:
            raise ValueError(f"{key}={rate} must be a positive number, e.g. 3e-4.")
        schedule, own = (cfg.lr_schedule, "") if schedule is None else (schedule, f"_{option}")
        if schedule not in LR_SCHEDULES:
            raise ValueError(
                f"lr_schedule{own}={schedule} is unknown; choose one of {', '.join(LR_SCHEDULES)}."
            )
        found[f"{name}_optimizer"] = adam(rate, cfg.weight_decay, device=device)
        found[f"{name}_lr_scheduler"] = lr_scheduler(schedule, cfg.total_steps)
    return found


def choose_device(name: str) -> torch.device:
    """The device that ``device=name`` means here; refuses one that is not there."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(
            f"device={name} is unknown; choose one of auto, cpu, cuda (which GPU that "
            "is says the environment variable CUDA_VISIBLE_DEVICES)."
        )
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch sees no GPU; use device=cpu or device=auto.")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def choose_compile(choice: str, total_steps: int, w2_backend: str = "fast") -> bool:
    """Whether ``compile=choice`` compiles a run of so many updates; refuses what cannot be."""
    if str(choice).lower() not in ("auto", "true", "false"):
        raise ValueError(f"compile={choice} is unknown; choose one of auto, true, false.")
    if str(choice).lower() != "auto":
        wanted = str(choice).lower() == "true"
        if wanted and w2_backend not in COMPILABLE:
            raise ValueError(
                f"compile=true needs w2_backend={' or '.join(COMPILABLE)}, not {w2_backend}, which "
                "reads numbers on the host."
            )
    else:
        # Compiling is won back after 3,000 to 6,000 updates (docs/speed.md).
        wanted = total_steps >= 10_000 and w2_backend in COMPILABLE
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    headers = Path(sysconfig.get_path("include"), "Python.h").exists()
    if not wanted or (compiler and headers):
        return wanted
    lacking = "Python's headers (python3-dev)" if compiler else "a C++ compiler (g++)"
    if str(choice).lower() == "true":
        raise ValueError(f"compile=true needs {lacking}: install it, or use compile=false.")
    LOGGER.warning("The update is not compiled and slower for it: %s is missing.", lacking)
    return False


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - third parties may draw from it
    torch.manual_seed(seed)


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """Have torch refuse operations whose result may differ from call to call (on a GPU)."""
    before = torch.are_deterministic_algorithms_enabled()
    if on:
        # What cuBLAS needs for it; read when its first handle is made.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def claim(folder: RunFolder) -> Iterator[None]:
    """Hold a run's folder: no second process may write there; nothing stays if nothing is written.

    The lock is one of the operating system: it goes with the process, however that ends.
    """
    places = {folder.root: "log_dir", folder.checkpoints: "checkpoint_dir"}
    missing = {p for place in places for p in (place, *place.parents) if not p.exists()}
    lock = folder.root / ".lock"
    try:
        for place, option in places.items():
            make_writable(place, option)
        with FileLock(lock, timeout=0):
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)  # while it is ours
    except Timeout:
        raise FileExistsError(
            f"{folder.root} is in use by another process. Wait for it or stop it, or choose "
            "another seed or log_dir."
        ) from None
    finally:
        for path in sorted(missing, key=lambda path: len(path.parts), reverse=True):
            with suppress(OSError):  # it holds something, or was never made
                path.rmdir()


def _fingerprint(cfg: DictConfig, replay_buffer: OfflineReplayBuffer) -> dict[str, Any]:
    """What a checkpoint must share with a run to be continued by it."""
    settings = {
        key: OmegaConf.to_object(cfg[key]) if OmegaConf.is_config(cfg[key]) else cfg[key]
        for key in config.top_level_options()
        if key not in _FREE_ON_RESUME
    }
    if not _constant_lr(cfg):
        settings["total_steps"] = cfg.total_steps
    return {**settings, "data": replay_buffer.fingerprint()}


def _check_data(replay_buffer: OfflineReplayBuffer, evaluator: Evaluator, cfg: DictConfig) -> None:
    origin = f"data.path={cfg.path}" if cfg.path else f"data.source={cfg.source}"
    row = replay_buffer[0]
    data = row["observation"].shape[-1], row["action"].shape[-1]
    task = evaluator.observation_dim, evaluator.action_dim
    if data != task:
        raise ValueError(
            f"{origin} holds observations and actions of size {data}, task={evaluator.task} has "
            f"{task}: give data of this task, or the task (or env.id) of these data."
        )
    spec = evaluator.action_spec.space
    actions = replay_buffer[:]["action"].cpu()
    beyond = torch.maximum(spec.low - actions, actions - spec.high).max()
    if beyond > 1e-4 * (spec.high - spec.low).max():
        raise ValueError(
            f"{origin} holds actions up to {beyond:.3g} beyond the bounds of task="
            f"{evaluator.task} ({spec.low.min():g} to {spec.high.max():g}): rescale or clip them "
            "in the file."
        )


def check_folder(folder: RunFolder, cfg: DictConfig) -> None:
    """Never mix two runs in one folder.

    Raises:
        FileExistsError: when it holds a run and ``resume`` is off.
        ValueError: when it holds a run that was started with other settings.
    """
    file = folder.training / "config.yaml"
    if not file.exists():
        return
    if not cfg.resume:
        raise FileExistsError(
            f"{folder.training.parent} already holds a run. Continue it with resume=true, or "
            "choose another seed or log_dir, or delete that folder."
        )
    try:
        before: Any = OmegaConf.load(file)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError):
        before = None
    if not isinstance(before, DictConfig):
        raise ValueError(
            f"{file} cannot be read: delete the folder {folder.root}, or choose another log_dir."
        )
    # An option that the release of then did not have had its default.
    defaults = OmegaConf.structured(config.RunConfig)
    free = _FREE_ON_RESUME if _constant_lr(cfg) else _FREE_ON_RESUME - {"total_steps"}
    changed = [
        f"{key}: {before.get(key, defaults[key])} -> {cfg[key]}"
        for key in config.top_level_options()
        if key not in free and before.get(key, defaults[key]) != cfg[key]
    ]
    if changed:
        raise ValueError(
            f"resume=true would change the run in {folder.training.parent} "
            f"({'; '.join(changed)}). Give the values it was started with."
        )


def _constant_lr(cfg: DictConfig) -> bool:
    """Whether the training does not depend on ``total_steps``."""
    names = (cfg.lr_schedule, cfg.lr_schedule_actor, cfg.lr_schedule_critic)
    return set(names) <= {"constant", None}


class Stopped(Exception):
    """A signal ended the training before its last update."""

    def __init__(self, step: int, reason: str | None) -> None:
        super().__init__(f"Stopped at update {step}; resume=true continues from there.")
        self.exit_code = 128 + signal.Signals[reason or "SIGINT"]


@contextmanager
def on_signals(handler: Callable[[int], None]) -> Iterator[dict[int, Any]]:
    """Have SIGINT, SIGTERM and SIGUSR1 call ``handler`` with their number.

    The context gives what they called before, by number.
    """
    before = {
        int(number): signal.signal(number, lambda number, frame: handler(number))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    }
    try:
        yield before
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


@contextmanager
def stop_on_signals(runs: Sequence[RunInProgress]) -> Iterator[None]:
    """First signal: save and stop after the current updates; the second acts at once.

    SIGUSR1 is what Slurm sends ahead of the end of a job's time (``--signal=USR1@60``). It signals
    every process of a job, and those that started this one may pass it on: within a second of the
    first, a signal is the same one.
    """
    asked: dict[int, float] = {}

    def handler(number: int) -> None:
        if number in asked:
            if time.monotonic() - asked[number] >= 1:
                signal.signal(number, before[number])
                signal.raise_signal(number)
            return
        asked[number] = time.monotonic()
        name = signal.Signals(number).name
        LOGGER.warning("%s: saving a checkpoint, then stopping (once more stops at once).", name)
        for one in runs:
            one.stop(name)

    with on_signals(handler) as before:
        try:
            yield
        finally:
            for moment in asked.values():  # the same signal may come once more
                time.sleep(max(moment + 1 - time.monotonic(), 0))


class Screen(logging.StreamHandler):
    """Prints to stdout without tearing the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


class _File(logging.FileHandler):
    """What the screen shows, with the time; no run is lost for it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, delay=True)
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s"))

    def handleError(self, record: logging.LogRecord) -> None:
        """A full disk is reported by the files that count."""


@contextmanager
def log_to(handler: logging.Handler) -> Iterator[None]:
    LOGGER.setLevel(logging.INFO)
    LOGGER.addHandler(handler)
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        handler.close()
