"""What the runs of a sweep will take, from a short measurement on noise."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import gymnasium
import numpy as np
import torch
from omegaconf import DictConfig
from tensordict import TensorDict

from pogo_torchrl.data.replay_buffer import Normalization, OfflineReplayBuffer
from pogo_torchrl.envs import max_episode_steps, split_task
from pogo_torchrl.evaluation import Evaluator
from pogo_torchrl.experiments.build import (
    check_memory,
    choose_device,
    env_fn,
    make_loss,
    optimizer_settings,
)
from pogo_torchrl.experiments.jobs import (
    Job,
    completed_updates,
)
from pogo_torchrl.experiments.local import process_environments
from pogo_torchrl.experiments.sweep_file import Run
from pogo_torchrl.objectives import POGOLoss
from pogo_torchrl.objectives.chain_loss import Params
from pogo_torchrl.trainers import POGOTrainer
from pogo_torchrl.trainers.hooks import LogMetrics

# Checkpoints that a trainer keeps; bytes of a row of metrics.csv, and of the figure, the logs and
# what a checkpoint holds beside the networks.
_CHECKPOINTS = 2


_ROW = 400


_REST = 200_000


# Steps of the episodes that are timed; few policies fall before. No more of them than this.
_STEPS = 20


_EPISODES = 10


class Cost(NamedTuple):
    """What one run of a kind takes."""

    update: float
    """Seconds of an update, not compiled."""
    evaluation: float
    """Seconds of an evaluation whose episodes all last to the horizon."""
    checkpoint: int
    """Bytes of a checkpoint."""
    policy: int
    """Bytes of the trained chain."""

    def disk(self, cfg: DictConfig) -> int:
        """Bytes that a finished run leaves behind."""
        rows = cfg.total_steps // cfg.log_interval
        return _CHECKPOINTS * self.checkpoint + cfg.save_model * self.policy + _ROW * rows + _REST


def measure_cost(cfg: DictConfig, seconds: float = 0.5) -> Cost:
    """Measure a run of this configuration on this machine, in about three times ``seconds``.

    Updates are those of training, on noise of the task's dimensions; evaluations those of the
    task's environment, cut short.

    Raises:
        ValueError: for settings that the run would refuse, too.
    """
    make_env = env_fn(cfg.task, cfg.env)
    evaluator = Evaluator(
        cfg.task,
        episodes=min(cfg.eval_episodes, _EPISODES),
        env_fn=lambda: gymnasium.wrappers.TimeLimit(make_env(), _STEPS),
    )
    check_memory(cfg, evaluator)
    loss = make_loss(cfg, evaluator, choose_device(cfg.device))
    update = _time_updates(loss, cfg, evaluator, seconds)

    chain = [loss.actor(i) for i in range(loss.num_actors)]
    evaluator(chain)  # makes the environments
    begun = time.perf_counter()
    steps = max(int(e.lengths.max()) for e in evaluator(chain))
    elapsed = time.perf_counter() - begun
    horizon = cfg.env.max_episode_steps or max_episode_steps(cfg.task)
    evaluation = elapsed * horizon / steps * cfg.eval_episodes / evaluator.episodes

    first = _bytes(loss.params("actor_network_0"))
    policy = loss.num_actors * first
    trained = policy + _bytes(loss.params("qvalue_network"))
    # TorchRL's checkpoints hold the loss's actor_network once more, as the policy.
    others = _bytes(loss.params("target_qvalue_network")) + first
    others += first if cfg.delay_actor else 0
    return Cost(update, evaluation, 3 * trained + others, policy)  # Adam keeps two moments


def _time_updates(loss: POGOLoss, cfg: DictConfig, evaluator: Evaluator, seconds: float) -> float:
    rows, spec = 4 * cfg.batch_size, evaluator.action_spec
    observation = torch.randn(rows, evaluator.observation_dim)
    flags = torch.zeros(rows, 1, dtype=torch.bool)
    ends = {"observation": observation, "reward": torch.randn(rows, 1), "done": flags}
    noise = TensorDict(
        {
            "observation": observation,
            "action": spec.rand([rows]),
            "next": {**ends, "terminated": flags},
        },
        [rows],
    )
    train = partial(
        POGOTrainer,
        loss,
        OfflineReplayBuffer(
            noise.to(next(loss.parameters()).device),
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
    while elapsed < seconds / 2:  # until it is long enough to be told from the start-up
        steps = min(2 * steps, int(steps * seconds / elapsed) + 1) if elapsed else steps
        trainer = train(total_steps=steps, hooks=[LogMetrics([], steps)])
        begun = time.perf_counter()
        trainer.train()  # its metrics are read at the end: a GPU has finished by then
        elapsed = time.perf_counter() - begun
    return elapsed / steps


def _bytes(parameters: Params) -> int:
    return sum(value.numel() * value.element_size() for value in parameters.values())


# Seconds that a run takes beside its updates and evaluations: imports, data, the last files.
_START = 5.0


class Plan:
    """What the jobs will take: updates, time, disk."""

    def __init__(self, jobs: Sequence[Job], options: DictConfig) -> None:
        self.runs = [run for job in jobs for run in job.runs]
        self.costs: dict[tuple, Cost | None] = {}
        self.errors: list[str] = []
        if not jobs:
            return
        places = process_environments(options.jobs, jobs)
        self.at_once = len(places)
        torch.set_num_threads(int(places[0]["OMP_NUM_THREADS"]))
        for run in self.runs:
            if _kind(run.cfg) not in self.costs:
                self.costs[_kind(run.cfg)] = self._measure(run)
        if torch.cuda.is_available():  # the runs need the memory
            gc.collect()
            torch.cuda.empty_cache()

    def _measure(self, run: Run) -> Cost | None:
        try:
            return measure_cost(run.cfg)
        except Exception as error:  # the run itself reports it, and the others still run
            self.errors.append(f"No estimate for runs like {run.name}: {error}")
            return None

    def text(self, total: int) -> str:
        """The plan below its table."""
        updates = sum(map(remaining_updates, self.runs))
        count = f"{len(self.runs)} of {total} runs" if len(self.runs) < total else f"{total} runs"
        lines = [f"To do: {count}, {updates:,} updates"]
        if any(self.costs.values()):
            free = shutil.disk_usage(self._place()).free
            updating, evaluating = self._seconds()
            lines += [
                f"Time:  about {format_duration(updating)}, an estimate from half a second of "
                f"updates that were not compiled, and at most {format_duration(evaluating)} of "
                f"evaluation; on this machine with {self.at_once} at once",
                f"Disk:  about {format_bytes(self._disk())}; {format_bytes(free)} are free",
            ]
        return "\n".join([*lines, *self.errors])

    def check_disk(self) -> None:
        """Refuse a sweep that would fill the disk."""
        if not self.runs:
            return
        place, needed = self._place(), self._disk()
        free = shutil.disk_usage(place).free
        if needed > free:
            raise OSError(
                f"log_dir={self.runs[0].cfg.log_dir}: the runs need about {format_bytes(needed)}, "
                f"{format_bytes(free)} are free; free some space there or choose another log_dir."
            )

    def _place(self) -> Path:
        """The nearest folder of log_dir that exists."""
        path = Path(self.runs[0].cfg.log_dir).absolute()
        return next(place for place in (path, *path.parents) if place.is_dir())

    def _seconds(self) -> tuple[float, float]:
        """Time of updates and start-up, and time of evaluations."""
        updating = evaluating = 0.0
        for run, cost in self._costs():
            updates = remaining_updates(run)
            updating += _START
            if cost is not None:
                updating += updates * cost.update
                evaluating += max(updates // run.cfg.eval_interval, 1) * cost.evaluation
        return updating / self.at_once, evaluating / self.at_once

    def _disk(self) -> int:
        """Bytes that the runs will take beside what they already have."""
        needed = 0
        for run, cost in self._costs():
            if cost is not None:
                files = [f for f in run.folder.root.rglob("*") if f.is_file()]
                needed += max(cost.disk(run.cfg) - sum(f.stat().st_size for f in files), 0)
        return needed

    def _costs(self) -> list[tuple[Run, Cost | None]]:
        return [(run, self.costs[_kind(run.cfg)]) for run in self.runs]


def remaining_updates(run: Run) -> int:
    return run.cfg.total_steps - completed_updates(run)


def _kind(cfg: DictConfig) -> tuple:
    """Runs of one kind take the same time for an update."""
    shapes = ("hidden_sizes", "batch_size", "num_samples", "w2_backend", "policy_freq", "bf16")
    environment = split_task(cfg.task)[0], len(cfg.w2_weights), cfg.eval_episodes
    return (*environment, str(cfg.env.max_episode_steps), *(str(cfg[key]) for key in shapes))


def format_duration(seconds: float) -> str:
    """Seconds for people.

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
    """Bytes for people.

    Example:
        >>> format_bytes(1_234_567)
        '1.23 MB'
    """
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.1f} GB"
