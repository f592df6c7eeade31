"""Command ``pogo sweep``: plan, execute and report many runs."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from itertools import groupby

from omegaconf import DictConfig

from pogo_torchrl import report
from pogo_torchrl.experiments import config
from pogo_torchrl.experiments.config import SweepConfig
from pogo_torchrl.experiments.jobs import (
    CONFLICT,
    DONE,
    FAILED,
    FAILED_BEFORE,
    HELD,
    STOPPED,
    Job,
    Outcome,
    ProgressReporter,
    last_failure,
    run_state,
)
from pogo_torchrl.experiments.local import run_locally
from pogo_torchrl.experiments.overrides import from_flags, sweep_options, wants_help
from pogo_torchrl.experiments.planner import Plan, format_duration, remaining_updates
from pogo_torchrl.experiments.signals import Interrupted, interruptible
from pogo_torchrl.experiments.slurm import run_by_submitit, run_on_slurm
from pogo_torchrl.experiments.sweep_file import Run, group_stackable, read_sweep

ENGINES: dict[str, Callable[[Sequence[Job], DictConfig, ProgressReporter], list[Outcome]]] = {
    "local": run_locally,
    "slurm": run_on_slurm,
    "submitit_local": run_by_submitit,
}
"""Engines by the value of ``launcher``; see :mod:`pogo_torchrl.experiments.jobs`."""


STACKABLE = ("fast", "exact")
"""Values of ``w2_backend`` for which a run in a stack equals a single run."""


# Seconds between two checks of runs that are locked by another process.
_POLL_SECONDS = 2.0


def sweep(arguments: Sequence[str]) -> int:
    """Plan and execute a sweep, then write the report; this is ``pogo sweep``.

    Args:
        arguments: options of :class:`~pogo_torchrl.experiments.config.SweepConfig` as
            ``option=value``.

    Returns:
        The exit code: 0 if all runs are done, 1 if any has failed.

    Raises:
        ValueError: for invalid options or an invalid sweep file.
        OSError: if the disk is too small for the runs, or not writable.
    """
    options, overrides = sweep_options(arguments)
    if options.sweep is None:
        raise ValueError(
            "sweep is missing: write sweep=FILE, or the name of a bundled sweep (--help)."
        )
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
        print("Failed (run the same command again to retry):")
        print("\n".join(f"  {outcome.run.name}: {outcome.error}" for outcome in failed))
    if len(failed) < len(runs):
        report.write_report(runs[0].cfg.log_dir, options.results_dir)
        print(f"Report: {options.results_dir}", flush=True)
    return 1 if failed else 0


def make_jobs(runs: Sequence[Run], *, stack: bool = False) -> list[Job]:
    """Group runs into jobs.

    Args:
        runs: the runs.
        stack: whether to train runs together where possible. Defaults to ``False``: one job per
            run.

    Returns:
        The jobs.

    Raises:
        ValueError: if the ``algorithm`` or ``w2_backend`` of a run cannot be used in a stack.
    """
    if not stack:
        return [Job.of(run) for run in runs]
    for run in runs:
        if run.cfg.algorithm != "pogo":
            raise ValueError(
                f"stack=true trains algorithm=pogo only, but {run.name} has algorithm="
                f"{run.cfg.algorithm}: leave stack out, or sweep the two apart."
            )
        if run.cfg.w2_backend not in STACKABLE:
            raise ValueError(
                f"stack=true needs w2_backend={' or '.join(STACKABLE)}, but {run.name} has "
                f"{run.cfg.w2_backend}, whose schedule depends on the whole batch of a run."
            )
    return [Job.of(*group) for group in group_stackable(runs)]


def _execute(jobs: Sequence[Job], options: DictConfig, screen: Progress) -> list[Outcome]:
    """Execute all jobs, waiting for runs that other processes have locked; returns failures."""
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
    """Prints a line when a run starts or ends, with an estimate of the remaining time.

    Args:
        runs: the runs that are to be executed.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self._remaining = {run.name: remaining_updates(run) for run in runs}
        self._total = len(runs)
        self._completed_updates = 0
        self._start = time.monotonic()
        self._lock = threading.Lock()
        self._is_waiting = False

    def started(self, runs: Sequence[Run]) -> None:
        """Print that runs have been started."""
        with self._lock:
            for run in runs:
                print(f"start   {run.name}", flush=True)

    def ended(self, outcome: Outcome) -> None:
        """Print the outcome of a run."""
        if outcome.status == HELD or (outcome.status == STOPPED and not outcome.seconds):
            return  # the run was not started
        with self._lock:
            self._remaining.pop(outcome.run.name)
            self._completed_updates += outcome.updates
            number = self._total - len(self._remaining)
            left = ""
            if self._remaining and self._completed_updates and outcome.status != STOPPED:
                speed = self._completed_updates / (time.monotonic() - self._start)
                left = f"; about {format_duration(sum(self._remaining.values()) / speed)} left"
            status = outcome.status
            if outcome.seconds:
                status += f" after {format_duration(outcome.seconds)}"
            elif outcome.status == DONE:
                status += " by another process"
            error = f" ({outcome.error})" if outcome.error else ""
            print(
                f"{number:>3}/{self._total:<3} {outcome.run.name}: {status}{error}{left}",
                flush=True,
            )

    def waiting(self, number: int) -> None:
        """Print, once, that the remaining runs are locked by other processes.

        Args:
            number: how many runs remain.
        """
        if not self._is_waiting:
            print(f"Waiting for {number} runs in progress in other processes.", flush=True)
        self._is_waiting = True


def _table(states: dict[Run, str]) -> str:
    """Table of the runs by task and weights, with the states of their seeds."""
    rows = []
    for (task, weights), runs in groupby(states, lambda run: (run.cfg.task, run.label)):
        seeds: dict[str, list[str]] = {}
        for run in runs:
            seeds.setdefault(states[run], []).append(str(run.cfg.seed))
        cell = "; ".join(f"{', '.join(group)} {state}" for state, group in seeds.items())
        rows.append((task, weights, cell))
    rows = [("task", "w2_weights", "seeds"), *rows]
    first, second = (max(len(row[i]) for row in rows) + 2 for i in (0, 1))
    lines = [f"  {task:<{first}}{weights:<{second}}{cell}" for task, weights, cell in rows]
    for run, state in states.items():
        earlier = last_failure(run.folder)
        if state == FAILED_BEFORE and earlier is not None:
            lines.append(f"  {run.name} failed before: {earlier['error']}")
        elif state == CONFLICT:
            lines.append(f"  {run.name} will fail: its folder contains a run with other settings")
    return "\n".join(lines)


def _help() -> str:
    all_options, run_options = config.options(SweepConfig), config.options()
    own = {name: help for name, help in all_options.items() if name not in run_options}
    return "\n".join(
        [
            "Execute all runs of a sweep file and report on them. Run the same command again to "
            "continue unfinished runs.",
            "",
            "  pogo sweep sweep=FILE [option=value ...]",
            "",
            "Options:",
            *config.option_lines(own),
            "",
            "The options of `pogo train` apply to all runs; `pogo train --help` lists them.",
        ]
    )


def main(arguments: Sequence[str]) -> None:
    """Run ``pogo sweep``.

    Exit codes: 0 if all runs are done; 1 if any has failed; 128 + signal number if stopped by a
    signal.

    Args:
        arguments: options of :class:`~pogo_torchrl.experiments.config.SweepConfig` as
            ``option=value`` or ``--option value``.

    Raises:
        ValueError: for invalid options or a sweep file that is not valid.
        OSError: if the disk is too small, or a file cannot be read or written.
    """
    if wants_help(arguments):
        print(_help())
        return
    try:
        with interruptible():
            code = sweep(from_flags(arguments, SweepConfig, hydra=False))
    except Interrupted as stop:
        print("Stopped; run the same command again to continue.", file=sys.stderr)
        sys.exit(128 + stop.args[0])
    sys.exit(code)
