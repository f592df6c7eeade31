"""The main job: data, chain, training, evaluation and report of one run."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import gymnasium
import hydra
import numpy as np
import torch
import yaml
from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm

from pogo_torchrl import configs
from pogo_torchrl.data import OfflineReplayBuffer, make_replay_buffer
from pogo_torchrl.envs import BACKENDS, make_env, max_episode_steps, score, split_task
from pogo_torchrl.evaluation import Evaluation, Evaluator, format_evaluation
from pogo_torchrl.files import atomic_write, cannot_write, make_writable, physical_memory
from pogo_torchrl.hooks import (
    DivergenceError,
    Evaluate,
    EvaluationError,
    LogMetrics,
    StopOnDivergence,
)
from pogo_torchrl.logging import CSVSink, LoggerSink, check_logger, make_logger
from pogo_torchrl.modules import TransportActor, make_actor, make_qvalue
from pogo_torchrl.objectives import POGOLoss
from pogo_torchrl.policies import on_raw_observations, save_actors
from pogo_torchrl.report import plot_curves, score_table
from pogo_torchrl.training import POGOTrainer

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
        cfg: a :class:`~pogo_torchrl.configs.RunConfig`.

    Returns:
        The last evaluation.

    Raises:
        ValueError: for settings that make no sense; the message names them.
        FileExistsError: when the run's folder holds a run and ``resume`` is off.
    """
    # Everything that can be refused is refused before data are made or files written.
    configs.check(cfg)
    folder = RunFolder.of(cfg)
    device = choose_device(cfg.device)
    evaluator = Evaluator(
        cfg.task, episodes=cfg.eval_episodes, seed=cfg.seed, env_fn=env_fn(cfg.task, cfg.env)
    )
    settings = {
        "lr": cfg.lr,
        "policy_freq": cfg.policy_freq,
        "tau": cfg.tau,
        "compile": _compile(cfg.compile, cfg.total_steps),
        "bf16": cfg.bf16,
        "checkpoint_dir": folder.checkpoints,
        "checkpoint_interval": cfg.checkpoint_interval,
        "progress_bar": cfg.progress_bar,
    }
    POGOTrainer.check_settings(cfg.total_steps, **settings)
    check_memory(cfg, evaluator)
    _seed(cfg.seed)
    loss = make_loss(cfg, evaluator, device)
    metrics = LogMetrics([], cfg.log_interval)
    evaluate = Evaluate(
        lambda: evaluator(_raw_chain(loss, replay_buffer)), interval=cfg.eval_interval
    )
    backend = cfg.logger.backend
    if backend:
        check_logger(backend)
    with _claim(folder), _deterministic(cfg.deterministic), _log_to(_Screen()):
        check_folder(folder, cfg)
        LOGGER.info("POGO on %s, %d updates; run folder %s", cfg.task, cfg.total_steps, folder.root)
        replay_buffer = make_replay_buffer(
            cfg.task, batch_size=cfg.batch_size, device=device, **cfg.data
        )
        _check_data(replay_buffer, evaluator, cfg.data)
        rewards = replay_buffer[:]["next", "reward"]
        guard = StopOnDivergence(
            metrics,
            float(rewards.abs().max()) / (1 - cfg.gamma) if cfg.gamma < 1 else None,
            warn=LOGGER.warning,
        )
        trainer = POGOTrainer(
            loss,
            replay_buffer,
            cfg.total_steps,
            fingerprint=_fingerprint(cfg, replay_buffer),
            hooks=[guard, metrics, evaluate],
            **settings,
        )
        step = trainer.resume() if cfg.resume else None
        folder.training.mkdir(parents=True, exist_ok=True)
        with _log_to(_File(folder.training / "train.log")):
            with atomic_write(folder.training / "config.yaml", "x") as file:
                file.write(OmegaConf.to_yaml(cfg, resolve=True))
            behaviour = score(cfg.task, float(replay_buffer.episode_returns.mean()))
            LOGGER.info("Data: %d transitions, %d episodes, mean D4RL score %.1f",
                        len(replay_buffer), len(replay_buffer.episode_returns),
                        behaviour)  # fmt: skip
            if cfg.resume and step is None:
                LOGGER.info("No usable checkpoint to resume from: starting afresh.")
            elif step is not None:
                LOGGER.info("Resumed at update %d.", step)
            logger = make_logger(backend, folder.training, cfg.task) if backend else None
            for hook, name in ((metrics, "metrics"), (evaluate, "evaluations")):
                sink = CSVSink(folder.training / f"{name}.csv", resume_step=step)
                hook.sinks = [sink, LoggerSink(logger, name)] if logger else [sink]
                if hook is evaluate:
                    evaluate.last_step = sink.last_step
            last: list[Evaluation] = []
            evaluate.report = lambda evaluations: _report(evaluations, last)

            if settings["compile"]:
                LOGGER.info("The first update compiles all of them: about a minute.")
            with _stop_on_signals(trainer, evaluator):
                trainer.train()
            if trainer.collected_frames < cfg.total_steps or not evaluate.up_to_date():
                raise _Stopped(trainer.collected_frames, trainer._stop_reason)
            _finish(cfg, folder, _raw_chain(loss, replay_buffer), behaviour)
            return last


def _report(evaluations: list[Evaluation], last: list[Evaluation]) -> None:
    last[:] = evaluations
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
        shared_noise=cfg.shared_noise,
        policy_noise=cfg.policy_noise,
        noise_clip=cfg.noise_clip,
        q_normalization=cfg.q_normalization,
        alpha=cfg.alpha,
        delay_actor=cfg.delay_actor,
    ).to(device)
    loss.make_value_estimator(gamma=cfg.gamma)
    return loss


def _raw_chain(loss: POGOLoss, replay_buffer: OfflineReplayBuffer) -> list[TransportActor]:
    """The chain as it is, for raw observations."""
    return [
        on_raw_observations(loss.actor(i), *replay_buffer.normalization)
        for i in range(loss.num_actors)
    ]


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


def _compile(choice: str, total_steps: int) -> bool:
    if str(choice).lower() not in ("auto", "true", "false"):
        raise ValueError(f"compile={choice} is unknown; choose one of auto, true, false.")
    if str(choice).lower() != "auto":
        wanted = str(choice).lower() == "true"
    else:
        # Shorter runs are over before the minute that compiling takes is won back.
        wanted = total_steps >= 20_000
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
def _deterministic(on: bool) -> Iterator[None]:
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
def _claim(folder: RunFolder) -> Iterator[None]:
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
        for key in configs.top_level_options()
        if key not in _FREE_ON_RESUME
    }
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
    changed = [
        f"{key}: {before.get(key)} -> {cfg[key]}"
        for key in configs.top_level_options()
        if key not in _FREE_ON_RESUME and before.get(key) != cfg[key]
    ]
    if changed:
        raise ValueError(
            f"resume=true would change the run in {folder.training.parent} "
            f"({'; '.join(changed)}). Give the values it was started with."
        )


class _Stopped(Exception):
    """A signal ended the training before its last update."""

    def __init__(self, step: int, reason: str | None) -> None:
        super().__init__(f"Stopped at update {step}; resume=true continues from there.")
        self.exit_code = 128 + signal.Signals[reason or "SIGINT"]


@contextmanager
def _stop_on_signals(trainer: POGOTrainer, evaluator: Evaluator) -> Iterator[None]:
    """First signal: save and stop after the current updates; the second acts at once.

    SIGUSR1 is what Slurm sends ahead of the end of a job's time (``--signal=USR1@60``). It signals
    every process of a job, and those that started this one may pass it on: within a second of the
    first, a signal is the same one.
    """
    asked: dict[int, float] = {}

    def handler(number: int, frame: Any) -> None:
        if number in asked:
            if time.monotonic() - asked[number] >= 1:
                signal.signal(number, before[number])
                signal.raise_signal(number)
            return
        asked[number] = time.monotonic()
        name = signal.Signals(number).name
        LOGGER.warning("%s: saving a checkpoint, then stopping (once more stops at once).", name)
        trainer.request_stop(name)
        evaluator.interrupt()

    before: dict[int, Any] = {}
    for number in map(int, (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)):
        before[number] = signal.getsignal(number)
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


class _Screen(logging.StreamHandler):
    """Prints to stdout without tearing the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


class _File(logging.FileHandler):
    """What the screen shows, with the time; no run is lost for it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s"))

    def handleError(self, record: logging.LogRecord) -> None:
        """A full disk is reported by the files that count."""


@contextmanager
def _log_to(handler: logging.Handler) -> Iterator[None]:
    LOGGER.setLevel(logging.INFO)
    LOGGER.addHandler(handler)
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        handler.close()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def _hydra_main(cfg: DictConfig) -> None:
    try:
        run(cfg)
    except _Stopped as stop:
        print(stop, file=sys.stderr)
        sys.exit(stop.exit_code)
    except DivergenceError as error:
        refuse(error, exit_code=3)
    except EvaluationError as error:
        traceback.print_exception(error.__cause__)  # the environment may be the user's own
        refuse(error, exit_code=1)
    except (ValueError, OSError, ImportError) as error:
        refuse(error)
    except (MemoryError, torch.OutOfMemoryError) as error:
        refuse(
            MemoryError(
                f"out of memory ({error}): lower batch_size, num_samples, hidden_sizes or the "
                "number of w2_weights, or use less data."
            )
        )
    except KeyboardInterrupt:
        print("pogo: stopped at once", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def refuse(error: Exception, exit_code: int = 2) -> NoReturn:
    """End the process with one line."""
    sentence = " ".join(line.strip() for line in str(error).splitlines())
    print(f"pogo: {sentence}", file=sys.stderr)
    sys.exit(exit_code)


def main() -> None:
    """Command line.

    Exit codes: 1 where an evaluation has failed, 2 for bad input and files that cannot be read or
    written, 3 where training has diverged, each after one sentence; 128 + signal when stopped.
    """
    try:
        configs.check_overrides(sys.argv[1:])
    except ValueError as error:
        refuse(error)
    _hydra_main()
