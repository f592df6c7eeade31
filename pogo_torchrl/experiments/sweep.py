"""The command line of sweeps: plan, runs, report."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NoReturn

from omegaconf import DictConfig

from pogo_torchrl import report
from pogo_torchrl.experiments import config
from pogo_torchrl.experiments.config import SweepConfig
from pogo_torchrl.experiments.console import exit_with_error
from pogo_torchrl.experiments.jobs import (
    CONFLICT,
    DONE,
    FAILED,
    FAILED_BEFORE,
    HELD,
    STOPPED,
    Interrupted,
    Job,
    Outcome,
    ProgressReporter,
    last_failure,
    run_state,
)
from pogo_torchrl.experiments.local import run_locally
from pogo_torchrl.experiments.overrides import from_flags, sweep_options, wants_help
from pogo_torchrl.experiments.planner import Plan, format_duration, remaining_updates
from pogo_torchrl.experiments.signals import on_signals
from pogo_torchrl.experiments.slurm import run_by_submitit, run_on_slurm
from pogo_torchrl.experiments.sweep_file import Run, group_stackable, read_sweep

ENGINES: dict[str, Callable[[Sequence[Job], DictConfig, ProgressReporter], list[Outcome]]] = {
    "local": run_locally,
    "slurm": run_on_slurm,
    "submitit_local": run_by_submitit,
}
"""What carries out the jobs, by the name that ``launcher`` takes; see `jobs`."""


STACKABLE = ("fast", "exact")
"""Values of ``w2_backend`` that give each run of a stack what it gets alone."""


# Seconds between two looks at runs that another process holds.
_POLL_SECONDS = 2.0


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
    options, overrides = sweep_options(arguments)
    if options.sweep is None:
        raise ValueError("sweep is missing: give a sweep file, or the name of one (--help).")
    if options.launcher not in ENGINES:
        raise ValueError(
            f"launcher={options.launcher} is unknown; choose one of {', '.join(ENGINES)}."
        )
    runs = read_sweep(options.sweep, overrides)
    states = {run: run_state(run) for run in runs}
    jobs = make_jobs([run for run in runs if states[run] != DONE], stack=options.stack)
    print(f"Sweep {options.sweep}")
    print(_table(states), flush=True)
    plan = Plan(jobs, options)
    print(plan.text(len(runs)), flush=True)
    plan.check_disk()
    if options.dry_run:
        return 0
    screen = Progress([run for job in jobs for run in job.runs])
    failed = _execute(jobs, options, screen)
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
    return [Job.of(*group) for group in group_stackable(runs)]


def _execute(jobs: Sequence[Job], options: DictConfig, screen: Progress) -> list[Outcome]:
    """All jobs to their end, those that other processes hold at last; the failures."""
    failed: list[Outcome] = []
    while jobs:
        outcomes = ENGINES[options.launcher](jobs, options, screen)
        failed += [outcome for outcome in outcomes if outcome.status == FAILED]
        held = {outcome.run.name for outcome in outcomes if outcome.status == HELD}
        jobs = [job for job in jobs if any(run.name in held for run in job.runs)]
        if jobs:
            screen.waiting(len(held))
            time.sleep(_POLL_SECONDS)
    return failed


class Progress:
    """A line as each run starts and ends, with the time that is left."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._left = {run.name: remaining_updates(run) for run in runs}
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
                rest = f"; about {format_duration(sum(self._left.values()) / speed)} left"
            how = outcome.status
            if outcome.seconds:
                how += f" after {format_duration(outcome.seconds)}"
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
        earlier = last_failure(run.folder)
        if what == FAILED_BEFORE and earlier is not None:
            lines.append(f"  {run.name} failed before: {earlier['error']}")
        elif what == CONFLICT:
            lines.append(f"  {run.name} holds a run with other settings and will fail")
    return "\n".join(lines)


def _help() -> str:
    own, of_runs = config.options(SweepConfig), config.options()
    return "\n".join(
        [
            "Many runs, from a sweep file to a table; the same command continues unfinished ones.",
            "",
            "  pogo sweep sweep=FILE [option=value ...]",
            "",
            "Options:",
            *config.option_lines({name: own[name] for name in own if name not in of_runs}),
            "",
            "and those of `pogo train`, for all runs (`pogo train --help` lists them).",
        ]
    )


def main(arguments: Sequence[str]) -> None:
    """The command ``pogo sweep``.

    Args:
        arguments: options of :class:`~pogo_torchrl.experiments.config.SweepConfig` as
            ``option=value`` or ``--option value``.

    Exit codes: 0 when all runs are done, 1 when any has failed, 2 for bad input, after one
    sentence; 128 + signal when stopped.
    """
    if wants_help(arguments):
        print(_help())
        return
    try:
        with on_signals(_interrupt):
            code = sweep(from_flags(arguments, SweepConfig, hydra=False))
    except Interrupted as stop:
        print("Stopped; the same command continues from here.", file=sys.stderr)
        sys.exit(128 + stop.args[0])
    except (ValueError, OSError, ImportError) as error:
        exit_with_error(error)
    sys.exit(code)


def _interrupt(number: int) -> NoReturn:
    raise Interrupted(number)
