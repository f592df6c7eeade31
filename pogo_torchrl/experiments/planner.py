"""Time and disk space that a sweep needs, estimated from a short measurement on random data."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from omegaconf import DictConfig
from tensordict import TensorDict

from pogo_torchrl.data.replay_buffer import Normalization, OfflineReplayBuffer
from pogo_torchrl.envs import is_d4rl_task, max_episode_steps, split_task
from pogo_torchrl.evaluation import Evaluator
from pogo_torchrl.experiments import algorithms
from pogo_torchrl.experiments.build import (
    check_memory,
    choose_device,
    optimizer_settings,
)
from pogo_torchrl.experiments.jobs import (
    Job,
    completed_updates,
)
from pogo_torchrl.experiments.local import process_environments
from pogo_torchrl.experiments.simulator import env_fn, has_simulator, resolve_environment
from pogo_torchrl.experiments.sweep_file import Run
from pogo_torchrl.modules import TransportActor
from pogo_torchrl.objectives import JKOChain, POGOLoss
from pogo_torchrl.trainers.hooks import LogMetrics

# Number of checkpoints that a trainer keeps.
_KEPT_CHECKPOINTS = 2

# Bytes of a row of metrics.csv.
_ROW_BYTES = 400

# Bytes of the figure, the logs, and the content of a checkpoint besides the networks.
_OTHER_BYTES = 200_000

# Length and maximum number of the episodes that are timed; few policies fall within this length.
_TIMED_STEPS = 20
_TIMED_EPISODES = 10

# Seconds that a run takes besides updates and evaluations: imports, data, writing the last files.
_STARTUP_SECONDS = 5.0


class Cost(NamedTuple):
    """Cost of a run with a given configuration."""

    update: float
    """Seconds per update, not compiled."""
    evaluation: float
    """Seconds per evaluation if all episodes reach the maximum length."""
    checkpoint: int
    """Size of a checkpoint in bytes."""
    policy: int
    """Size of the exported chain in bytes."""

    def disk(self, cfg: DictConfig) -> int:
        """Disk space of a finished run in bytes."""
        rows = cfg.total_steps // cfg.log_interval
        networks = _KEPT_CHECKPOINTS * self.checkpoint + cfg.save_model * self.policy
        return networks + _ROW_BYTES * rows + _OTHER_BYTES


def measure_cost(cfg: DictConfig, seconds: float = 0.5) -> Cost:
    """Measure the cost of a run on this machine, in about three times ``seconds``.

    Updates are those of training, on random data of the task's dimensions. Evaluations use the
    environment of the task with truncated episodes.

    Args:
        cfg: a :class:`~pogo_torchrl.experiments.config.RunConfig`.
        seconds: approximate duration of the timed updates in seconds. Defaults to ``0.5``.

    Returns:
        The cost of a run.

    Raises:
        ValueError: for settings that the run would reject as well.
    """
    if not has_simulator(cfg) and not is_d4rl_task(cfg.task):
        raise ValueError("without an environment, only the data know its sizes.")
    cfg = resolve_environment(cfg)
    make_env = env_fn(cfg.task, cfg.env)
    evaluator = Evaluator(
        cfg.task,
        episodes=min(cfg.eval_episodes, _TIMED_EPISODES),
        env_fn=lambda: gymnasium.wrappers.TimeLimit(make_env(), _TIMED_STEPS),
        eval_envs=cfg.eval_envs,
    )
    with closing(evaluator):
        return _measure_cost(cfg, evaluator, seconds)


def _measure_cost(cfg: DictConfig, evaluator: Evaluator, seconds: float) -> Cost:
    check_memory(cfg, evaluator)
    loss = algorithms.make_loss(cfg, evaluator, choose_device(cfg.device))
    update = _time_updates(loss, cfg, evaluator, seconds)

    chain = [algorithms.policy(loss, i) for i in range(loss.num_actors)]
    evaluation = _time_evaluation(chain, cfg, evaluator) if has_simulator(cfg) else 0.0

    first = _num_bytes(chain[0].parameters())
    trained = _num_bytes(value for value in loss.parameters() if value.requires_grad)
    # Adam stores two moments, and TorchRL's checkpoints contain the loss's actor_network a second
    # time, as the policy.
    stored = _num_bytes(loss.state_dict().values()) + 2 * trained + first
    return Cost(update, evaluation, stored, loss.num_actors * first)


def _time_evaluation(chain: list[TransportActor], cfg: DictConfig, evaluator: Evaluator) -> float:
    evaluator(chain)  # creates the environments
    start = time.perf_counter()
    steps = max(int(e.lengths.max()) for e in evaluator(chain))
    elapsed = time.perf_counter() - start
    evaluator.close()  # where only one environment may exist at a time
    env = env_fn(cfg.task, cfg.env)()
    horizon = env.spec.max_episode_steps if env.spec else None
    env.close()
    horizon = horizon or max_episode_steps(cfg.task)  # D4RL's own environments have no spec
    return elapsed * horizon / steps * cfg.eval_episodes / evaluator.episodes


def _time_updates(
    loss: POGOLoss | JKOChain, cfg: DictConfig, evaluator: Evaluator, seconds: float
) -> float:
    rows, spec = 4 * cfg.batch_size, evaluator.action_spec
    observation = torch.randn(rows, evaluator.observation_dim)
    flags = torch.zeros(rows, 1, dtype=torch.bool)
    action = spec.rand([rows])
    outcome = {"observation": observation, "reward": torch.randn(rows, 1), "done": flags}
    data = TensorDict(
        {
            "observation": observation,
            "action": action,
            "trajectory_weight": torch.ones(rows),
            "next": {**outcome, "terminated": flags, "action": action},
        },
        [rows],
    )
    train = partial(
        algorithms.make_trainer(cfg),
        loss,
        OfflineReplayBuffer(
            data.to(next(loss.parameters()).device),
            normalization=Normalization.identity(observation),
            episode_returns=np.zeros(1),
            batch_size=cfg.batch_size,
        ),
        **optimizer_settings(cfg, next(loss.parameters()).device),
        policy_freq=cfg.policy_freq,
        tau=cfg.tau,
        bf16=cfg.bf16,
        progress_bar=False,
    )
    steps, elapsed = 2, 0.0
    while elapsed < seconds / 2:  # long enough to make the start-up negligible
        steps = min(2 * steps, int(steps * seconds / elapsed) + 1) if elapsed else steps
        metrics = LogMetrics([], steps, policy=partial(algorithms.policy, loss))
        trainer = train(total_steps=steps, hooks=[metrics])
        start = time.perf_counter()
        trainer.train()  # reads metrics at the end, which waits for the GPU
        elapsed = time.perf_counter() - start
    return elapsed / steps


def _num_bytes(tensors: Iterable[Any]) -> int:
    """Size of tensors in bytes; a state dict also holds other values."""
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


class Plan:
    """Estimate of the updates, time and disk space that a sweep still needs.

    Args:
        jobs: the jobs to execute.
        options: a :class:`~pogo_torchrl.experiments.config.SweepConfig`.
    """

    def __init__(self, jobs: Sequence[Job], options: DictConfig) -> None:
        self.runs = [run for job in jobs for run in job.runs]
        self.costs: dict[tuple, Cost | None] = {}
        self.errors: list[str] = []
        if not jobs:
            return
        environments = process_environments(options.jobs, jobs)
        self.at_once = len(environments)
        torch.set_num_threads(int(environments[0]["OMP_NUM_THREADS"]))
        for run in self.runs:
            if _cost_key(run.cfg) not in self.costs:
                self.costs[_cost_key(run.cfg)] = self._measure(run)
        if torch.cuda.is_available():  # leave the memory to the runs
            gc.collect()
            torch.cuda.empty_cache()

    def _measure(self, run: Run) -> Cost | None:
        try:
            return measure_cost(run.cfg)
        except Exception as error:  # the run reports it when it starts; other runs are unaffected
            self.errors.append(f"No estimate for runs like {run.name}: {error}")
            return None

    def text(self, total: int) -> str:
        """Format the plan.

        Args:
            total: number of runs of the sweep, including those that are done.
        """
        updates = sum(map(remaining_updates, self.runs))
        count = f"{len(self.runs)} of {total} runs" if len(self.runs) < total else f"{total} runs"
        lines = [f"To do: {count}, {updates:,} updates"]
        if any(self.costs.values()):
            free = shutil.disk_usage(self._existing_folder()).free
            training, evaluating = self._seconds()
            lines += [
                f"Time:  about {format_duration(training)} of training, an estimate from half a "
                f"second of uncompiled updates, and at most {format_duration(evaluating)} of "
                f"evaluation; on this machine, {self.at_once} in parallel",
                f"Disk:  about {format_bytes(self._disk_bytes())} of {format_bytes(free)} free",
            ]
        return "\n".join([*lines, *self.errors])

    def check_disk(self) -> None:
        """Check that the runs fit on the disk.

        Raises:
            OSError: if they do not.
        """
        if not self.runs:
            return
        folder, needed = self._existing_folder(), self._disk_bytes()
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise OSError(
                f"log_dir={self.runs[0].cfg.log_dir}: the runs need about {format_bytes(needed)}, "
                f"only {format_bytes(free)} are free; free some space or choose another log_dir."
            )

    def _existing_folder(self) -> Path:
        """log_dir, or its nearest parent folder that exists."""
        path = Path(self.runs[0].cfg.log_dir).absolute()
        return next(folder for folder in (path, *path.parents) if folder.is_dir())

    def _seconds(self) -> tuple[float, float]:
        """Time of training including start-up, and time of evaluations."""
        training = evaluating = 0.0
        for run, cost in self._costs():
            updates = remaining_updates(run)
            training += _STARTUP_SECONDS
            if cost is not None:
                training += updates * cost.update
                evaluations = updates // max(run.cfg.eval_interval, 1)
                evaluating += max(evaluations, 1) * cost.evaluation
        return training / self.at_once, evaluating / self.at_once

    def _disk_bytes(self) -> int:
        """Disk space that the runs need in addition to their existing files."""
        needed = 0
        for run, cost in self._costs():
            if cost is not None:
                files = [f for f in run.folder.root.rglob("*") if f.is_file()]
                needed += max(cost.disk(run.cfg) - sum(f.stat().st_size for f in files), 0)
        return needed

    def _costs(self) -> list[tuple[Run, Cost | None]]:
        return [(run, self.costs[_cost_key(run.cfg)]) for run in self.runs]


def remaining_updates(run: Run) -> int:
    """Number of updates from the newest checkpoint of a run to its end."""
    return run.cfg.total_steps - completed_updates(run)


def _cost_key(cfg: DictConfig) -> tuple:
    """Key under which runs share a cost estimate."""
    shapes = (
        "algorithm",
        "hidden_sizes",
        "critic_hidden_sizes",
        "num_critics",
        "batch_size",
        "num_samples",
        "w2_backend",
        "policy_freq",
        "bf16",
    )
    family = split_task(cfg.task)[0] if is_d4rl_task(cfg.task) else cfg.task
    own = str(cfg.env.id).startswith("pogo_torchrl/")  # one per family, whatever its level
    env = str(cfg.env.max_episode_steps if own else cfg.env)
    environment = family, len(cfg.w2_weights), cfg.eval_episodes, has_simulator(cfg), cfg.eval_envs
    return (*environment, env, *(str(cfg[key]) for key in shapes))


def format_duration(seconds: float) -> str:
    """Format seconds in a human-readable form.

    Example:
        >>> [format_duration(seconds) for seconds in (5.2, 200, 9000, 300_000)]
        ['5 s', '3 min 20 s', '2 h 30 min', '3 d 11 h']
    """
    for size, name, smaller, part in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"),
                                      (60, "min", 1, "s")):  # fmt: skip
        if seconds >= size:
            return f"{int(seconds // size)} {name} {int(seconds % size // smaller)} {part}"
    return f"{seconds:.0f} s"


def format_bytes(number: float) -> str:
    """Format a number of bytes in a human-readable form.

    Example:
        >>> format_bytes(1_234_567)
        '1.23 MB'
    """
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.1f} GB"
