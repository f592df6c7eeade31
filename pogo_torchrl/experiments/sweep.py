"""The command line of sweeps: plan, runs, report."""

from __future__ import annotations

import gc
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import NoReturn

import torch
from omegaconf import DictConfig

from pogo_torchrl import report
from pogo_torchrl.envs import split_task
from pogo_torchrl.experiments import config
from pogo_torchrl.experiments.jobs import (
    DONE,
    FAILED,
    FAILED_BEFORE,
    HELD,
    OTHER,
    STOPPED,
    Interrupted,
    Job,
    Outcome,
    Screen,
    failure,
    run_locally,
    slots,
    state,
    updates_made,
)
from pogo_torchrl.experiments.planner import Cost, measure
from pogo_torchrl.experiments.run import on_signals
from pogo_torchrl.experiments.slurm import run_by_submitit, run_on_slurm
from pogo_torchrl.experiments.sweep_file import Run, read_sweep, stacks
from pogo_torchrl.experiments.train import refuse

ENGINES: dict[str, Callable[[Sequence[Job], DictConfig, Screen], list[Outcome]]] = {
    "local": run_locally,
    "slurm": run_on_slurm,
    "submitit_local": run_by_submitit,
}
"""What carries out the jobs, by the name that ``launcher`` takes; see `jobs`."""

STACKABLE = ("fast", "exact")
"""Values of ``w2_backend`` that give each run of a stack what it gets alone."""

# Seconds that a run takes beside its updates and evaluations: imports, data, the last files.
_START = 5.0

# Seconds between two looks at runs that another process holds.
_PATIENCE = 2.0


def sweep(arguments: Sequence[str]) -> int:
    """Plan and carry out a sweep; the work of ``examples/pogo_sweep.py``.

    Args:
        arguments: ``"option=value"``, see
            :class:`~pogo_torchrl.experiments.config.SweepConfig`.

    Returns:
        The exit code: 0 when all runs are done, 1 when any has failed.

    Raises:
        ValueError: for what cannot be a sweep; the message names it.
        OSError: when the disk cannot take the runs.
    """
    options, overrides = config.sweep_options(arguments)
    if options.sweep is None:
        raise ValueError("sweep is missing: give a sweep file, or the name of one (--help).")
    if options.launcher not in ENGINES:
        raise ValueError(
            f"launcher={options.launcher} is unknown; choose one of {', '.join(ENGINES)}."
        )
    runs = read_sweep(options.sweep, overrides)
    states = {run: state(run) for run in runs}
    jobs = make_jobs([run for run in runs if states[run] != DONE], stack=options.stack)
    print(f"Sweep {options.sweep}")
    print(_table(states), flush=True)
    plan = _Plan(jobs, options)
    print(plan.text(len(runs)), flush=True)
    plan.check_disk()
    if options.dry_run:
        return 0
    screen = Progress([run for job in jobs for run in job.runs])
    failed = _carry_out(jobs, options, screen)
    print(f"{len(runs) - len(failed)} of {len(runs)} runs are done.")
    if failed:
        print("Failed, and tried again by the same command:")
        print("\n".join(f"  {outcome.run.name}: {outcome.error}" for outcome in failed))
    if len(failed) < len(runs):
        report.write_report(runs[0].cfg.log_dir, options.results_dir)
        print(f"Report: {options.results_dir}", flush=True)
    return 1 if failed else 0


def make_jobs(runs: Sequence[Run], *, stack: bool = False) -> list[Job]:
    """One job for each run, or for those that can be trained together.

    Raises:
        ValueError: when a run's distance cannot be computed for a stack.
    """
    if not stack:
        return [Job.of(run) for run in runs]
    for run in runs:
        if run.cfg.w2_backend not in STACKABLE:
            raise ValueError(
                f"stack=true needs w2_backend={' or '.join(STACKABLE)}, {run.name} has "
                f"{run.cfg.w2_backend}: GeomLoss's schedule depends on the whole batch of a run."
            )
    return [Job.of(*group) for group in stacks(runs)]


def _carry_out(jobs: Sequence[Job], options: DictConfig, screen: Progress) -> list[Outcome]:
    """All jobs to their end, those that other processes hold at last; the failures."""
    failed: list[Outcome] = []
    while jobs:
        outcomes = ENGINES[options.launcher](jobs, options, screen)
        failed += [outcome for outcome in outcomes if outcome.status == FAILED]
        held = {outcome.run.name for outcome in outcomes if outcome.status == HELD}
        jobs = [job for job in jobs if any(run.name in held for run in job.runs)]
        if jobs:
            screen.waiting(len(held))
            time.sleep(_PATIENCE)
    return failed


class Progress:
    """A line as each run starts and ends, with the time that is left."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._left = {run.name: _updates_left(run) for run in runs}
        self._total = len(runs)
        self._made = 0
        self._begun = time.monotonic()
        self._lock = threading.Lock()
        self._waits = False

    def started(self, runs: Sequence[Run]) -> None:
        """Tell that a process has been started."""
        with self._lock:
            for run in runs:
                print(f"start   {run.name}", flush=True)

    def ended(self, outcome: Outcome) -> None:
        """Tell how a run has ended."""
        if outcome.status == HELD or (outcome.status == STOPPED and not outcome.seconds):
            return  # nothing has happened
        with self._lock:
            self._left.pop(outcome.run.name)
            self._made += outcome.updates
            number = self._total - len(self._left)
            rest = ""
            if self._left and self._made and outcome.status != STOPPED:
                speed = self._made / (time.monotonic() - self._begun)
                rest = f"; about {_duration(sum(self._left.values()) / speed)} left"
            how = outcome.status
            if outcome.seconds:
                how += f" after {_duration(outcome.seconds)}"
            elif outcome.status == DONE:
                how += " by another process"
            error = f" ({outcome.error})" if outcome.error else ""
            print(
                f"{number:>3}/{self._total:<3} {outcome.run.name}: {how}{error}{rest}", flush=True
            )

    def waiting(self, number: int) -> None:
        """Tell, once, that other processes are at the runs that are left."""
        if not self._waits:
            print(f"Waiting for {number} runs that other processes are at.", flush=True)
        self._waits = True


def _updates_left(run: Run) -> int:
    return run.cfg.total_steps - updates_made(run)


def _table(states: dict[Run, str]) -> str:
    """Runs by task and weights, with the states of their seeds."""
    rows = []
    for (task, weights), runs in groupby(
        states, lambda run: (run.cfg.task, ", ".join(f"{w:g}" for w in run.cfg.w2_weights))
    ):
        seeds: dict[str, list[str]] = {}
        for run in runs:
            seeds.setdefault(states[run], []).append(str(run.cfg.seed))
        found = "; ".join(f"{', '.join(numbers)} {what}" for what, numbers in seeds.items())
        rows.append((task, weights, found))
    rows = [("task", "w2_weights", "seeds"), *rows]
    first, second = (max(len(row[i]) for row in rows) + 2 for i in (0, 1))
    lines = [f"  {task:<{first}}{weights:<{second}}{found}" for task, weights, found in rows]
    for run, what in states.items():
        earlier = failure(run.folder)
        if what == FAILED_BEFORE and earlier is not None:
            lines.append(f"  {run.name} failed before: {earlier['error']}")
        elif what == OTHER:
            lines.append(f"  {run.name} holds a run with other settings and will fail")
    return "\n".join(lines)


class _Plan:
    """What the jobs will take: updates, time, disk."""

    def __init__(self, jobs: Sequence[Job], options: DictConfig) -> None:
        self.runs = [run for job in jobs for run in job.runs]
        self.costs: dict[tuple, Cost | None] = {}
        self.errors: list[str] = []
        if not jobs:
            return
        places = slots(options.jobs, jobs)
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
            return measure(run.cfg)
        except (
            Exception
        ) as error:  # what is wrong with a run shows when it runs, and stops no other
            self.errors.append(f"No estimate for runs like {run.name}: {error}")
            return None

    def text(self, total: int) -> str:
        """The plan below its table."""
        updates = sum(map(_updates_left, self.runs))
        count = f"{len(self.runs)} of {total} runs" if len(self.runs) < total else f"{total} runs"
        lines = [f"To do: {count}, {updates:,} updates"]
        if any(self.costs.values()):
            free = shutil.disk_usage(self._place()).free
            updating, evaluating = self._seconds()
            lines += [
                f"Time:  about {_duration(updating)}, an estimate from half a second of updates "
                f"that were not compiled, and at most {_duration(evaluating)} of evaluation; on "
                f"this machine with {self.at_once} at once",
                f"Disk:  about {_size(self._disk())}; {_size(free)} are free",
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
                f"log_dir={self.runs[0].cfg.log_dir}: the runs need about {_size(needed)}, "
                f"{_size(free)} are free; free some space there or choose another log_dir."
            )

    def _place(self) -> Path:
        """The nearest folder of log_dir that exists."""
        path = Path(self.runs[0].cfg.log_dir).absolute()
        return next(place for place in (path, *path.parents) if place.is_dir())

    def _seconds(self) -> tuple[float, float]:
        """Time of updates and start-up, and time of evaluations."""
        updating = evaluating = 0.0
        for run, cost in self._costs():
            updates = _updates_left(run)
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


def _kind(cfg: DictConfig) -> tuple:
    """Runs of one kind take the same time for an update."""
    shapes = ("hidden_sizes", "batch_size", "num_samples", "w2_backend", "policy_freq", "bf16")
    environment = split_task(cfg.task)[0], len(cfg.w2_weights), cfg.eval_episodes
    return (*environment, str(cfg.env.max_episode_steps), *(str(cfg[key]) for key in shapes))


def _duration(seconds: float) -> str:
    """Seconds for people.

    Example:
        >>> _duration(5.2), _duration(200), _duration(9000), _duration(300_000)
        ('5 s', '3 min 20 s', '2 h 30 min', '3 d 11 h')
    """
    for size, name, smaller, part in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"),
                                      (60, "min", 1, "s")):  # fmt: skip
        if seconds >= size:
            return f"{int(seconds // size)} {name} {int(seconds % size // smaller)} {part}"
    return f"{seconds:.0f} s"


def _size(number: float) -> str:
    """Bytes for people.

    Example:
        >>> _size(1_234_567)
        '1.23 MB'
    """
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.1f} GB"


def _help() -> str:
    own = config.options(config.SweepConfig)
    of_runs = config.options()
    width = max(map(len, own)) + 2
    return "\n".join(
        [
            "Many runs of POGO, from a sweep file to a table.",
            "",
            "  python examples/pogo_sweep.py sweep=FILE [option=value ...]",
            "",
            "Options:",
            *(f"  {name:<{width}}{own[name]}" for name in own if name not in of_runs),
            "",
            "and those of pogo_offline.py, for all runs (pogo_offline.py --help lists them).",
        ]
    )


def main() -> None:
    """Command line.

    Exit codes: 0 when all runs are done, 1 when any has failed, 2 for bad input, after one
    sentence; 128 + signal when stopped.
    """
    arguments = sys.argv[1:]
    flags = [argument for argument in arguments if argument.startswith("-")]
    if flags and {"-h", "--help"}.issuperset(flags):
        print(_help())
        return
    try:
        if flags:
            raise ValueError(f"{flags[0]} is no option of a sweep; write option=value (--help).")
        with on_signals(_interrupt):
            code = sweep(arguments)
    except Interrupted as stop:
        print("Stopped; the same command goes on from here.", file=sys.stderr)
        sys.exit(128 + stop.args[0])
    except (ValueError, OSError, ImportError) as error:
        refuse(error)
    sys.exit(code)


def _interrupt(number: int) -> NoReturn:
    raise Interrupted(number)
