"""Jobs of a sweep and the interface of engines, which execute them.

A :class:`Job` is the work of one process: one run, or several runs that are trained together. A
:class:`Worker` executes one job on the machine where it is called: it locks the run folders, starts
the process, waits for it, and stores the reason of a failure in ``failed.json``. An engine decides
where and when workers are called::

    def engine(jobs: Sequence[Job], options: DictConfig, screen: ProgressReporter) -> list[Outcome]

* ``options`` is the :class:`~pogo_torchrl.experiments.config.SweepConfig` of the command line.
* ``screen.started(runs)`` and ``screen.ended(outcome)`` report progress; from any thread.
* The engine returns one :class:`Outcome` per run when all jobs have ended. Runs that are locked by
  another process are returned as ``HELD``, and the sweep submits them again.
* The engine handles signals while it runs; if one ends it early, it raises :class:`Interrupted`.

Jobs, workers that have not been called, and outcomes can be pickled and sent to other machines.
Engines are registered in :data:`pogo_torchrl.experiments.sweep.ENGINES`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from pogo_torchrl.experiments.run_folder import RunFolder, check_run_folder
from pogo_torchrl.experiments.signals import Interrupted as Interrupted  # for engines
from pogo_torchrl.experiments.sweep_file import Run
from pogo_torchrl.files import atomic_write, make_writable
from pogo_torchrl.locks import Held, hold, is_held

# Status of a run after a job.
DONE, FAILED, HELD, STOPPED = "done", "failed", "held", "stopped"


# States of a run before it is started, in addition to DONE.
NEW, INTERRUPTED, FAILED_BEFORE, CONFLICT, RUNNING = (
    "to run",
    "to resume",
    "failed before",
    "conflicting",
    "running elsewhere",
)


STACK = "--stack"
"""First argument of a worker process that trains a stack; the second contains its runs as JSON."""


STDERR = "stderr.log"
"""Name of the file with the stderr of a run's process; kept in the run's folder if it failed."""


class Outcome(NamedTuple):
    """Result of a job for one run."""

    run: Run
    status: str
    """``DONE``, ``FAILED``, ``HELD`` (locked by another process) or ``STOPPED`` (by a signal)."""
    error: str = ""
    """Reason of a failure, as one line."""
    seconds: float = 0.0
    """Wall time of the job's process."""
    updates: int = 0
    """Number of updates that the job completed."""


class ProgressReporter(Protocol):
    """Interface through which engines report progress."""

    def started(self, runs: Sequence[Run]) -> None:
        """Report that a process has been started for these runs."""

    def ended(self, outcome: Outcome) -> None:
        """Report that a run has ended, or is locked by another process."""


def run_state(run: Run) -> str:
    """Determine the state of a run from its folder.

    Returns:
        ``DONE``, ``NEW``, ``INTERRUPTED``, ``FAILED_BEFORE``, ``CONFLICT`` or ``RUNNING``.
    """
    folder = run.folder
    try:
        check_run_folder(folder, run.cfg)
    except ValueError:
        return CONFLICT
    if is_done(run):
        return DONE
    if is_held(folder.root / ".sweep.lock") or is_held(folder.root / ".lock"):
        return RUNNING
    if last_failure(folder) is not None:
        return FAILED_BEFORE
    return INTERRUPTED if (folder.training / "config.yaml").exists() else NEW


def is_done(run: Run) -> bool:
    """Whether the run has completed at least the requested number of updates."""
    found = _read_json(run.folder.done)
    return found is not None and found.get("total_steps", 0) >= run.cfg.total_steps


def last_failure(folder: RunFolder) -> dict[str, Any] | None:
    """Content of ``failed.json``: error, exit code and time of the last attempt, if it failed."""
    return _read_json(folder.root / "failed.json")


def completed_updates(run: Run) -> int:
    """Number of updates at the newest checkpoint, at most ``total_steps``."""
    steps = [int(path.name.split("-")[1]) for path in run.folder.checkpoints.glob("step-*[0-9]")]
    return min(max(steps, default=0), run.cfg.total_steps)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


@contextmanager
def _lock_run(folder: RunFolder) -> Iterator[bool]:
    """Try to lock a run for this sweep; yields whether no other process is working on it.

    The process of the run acquires a second lock, ``.lock``, a few seconds later.
    """
    make_writable(folder.root, "log_dir")
    with ExitStack() as stack:
        try:
            stack.enter_context(hold(folder.root / ".sweep.lock"))
        except Held:
            yield False
            return
        yield not is_held(folder.root / ".lock")


@dataclass(frozen=True)
class Job:
    """Work of one process.

    Args:
        runs: the runs to train; several runs are trained as a stack.
        failures: for each run, the failure of an earlier attempt when the job was created, or
            ``None``. These runs are retried; runs that another process fails later are not.
    """

    runs: tuple[Run, ...]
    failures: tuple[dict[str, Any] | None, ...]

    @classmethod
    def of(cls, *runs: Run) -> Job:
        """Create a job for these runs."""
        return cls(runs, tuple(last_failure(run.folder) for run in runs))

    @staticmethod
    def command(runs: Sequence[Run]) -> list[str]:
        """Command line of the worker process that trains ``runs``."""
        command = [sys.executable, "-m", "pogo_torchrl.experiments.worker"]
        if len(runs) == 1:
            return [*command, *runs[0].arguments]
        return [*command, STACK, json.dumps([run.arguments for run in runs])]


@dataclass
class Worker:
    """Executes a job on this machine in a separate process.

    If that process crashes, only the runs of this job fail.

    Args:
        job: the job.
    """

    job: Job
    _signal: int | None = field(default=None, init=False)
    _process: subprocess.Popen | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        # Reentrant, because a signal handler may call signal() during __call__.
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {"job": self.job, "_signal": None, "_process": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    def signal(self, number: int) -> None:
        """Forward a signal to the runs, which save and stop.

        A worker that has not been called yet will not start its runs.

        Args:
            number: the signal number.
        """
        with self._lock:
            self._signal = number
            if self._process is not None:
                _send_signal(self._process, number)

    def __call__(
        self,
        environment: Mapping[str, str] | None = None,
        started: Callable[[Sequence[Run]], None] = lambda runs: None,
    ) -> list[Outcome]:
        """Execute the job and wait for it to end.

        Args:
            environment: environment variables of the process, in addition to those of this one.
                Defaults to none.
            started: called with the runs that are trained, if any, when the process starts.

        Returns:
            The outcome of each run.
        """
        try:
            return self._execute(environment or {}, started)
        except OSError as error:  # e.g. a folder that is not writable
            return [Outcome(run, FAILED, str(error)) for run in self.job.runs]

    def _execute(
        self, environment: Mapping[str, str], started: Callable[[Sequence[Run]], None]
    ) -> list[Outcome]:
        with ExitStack() as locks:
            skipped = []
            for run, known in zip(self.job.runs, self.job.failures):
                acquired = locks.enter_context(_lock_run(run.folder))
                skipped.append(_outcome_if_skipped(run, acquired, known))
            todo = [run for run, outcome in zip(self.job.runs, skipped) if outcome is None]
            executed = iter(self._run_process(todo, environment, started) if todo else ())
            return [outcome or next(executed) for outcome in skipped]

    def _run_process(
        self,
        runs: Sequence[Run],
        environment: Mapping[str, str],
        started: Callable[[Sequence[Run]], None],
    ) -> list[Outcome]:
        stopped = [Outcome(run, STOPPED) for run in runs]
        if self._signal is not None:
            return stopped
        started(runs)
        start, before = time.monotonic(), [completed_updates(run) for run in runs]
        log = runs[0].folder.root / STDERR
        with log.open("wb") as stderr, self._lock:
            if self._signal is not None:
                return stopped
            # In a new session, Ctrl-C in the terminal reaches the process only once, through
            # signal(). Its stdout is also in train.log. The process stops when stdin is closed.
            self._process = subprocess.Popen(
                Job.command(runs),
                env={**os.environ, **_WORKER_ENVIRONMENT, **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )
            if self._signal is not None:  # set by a handler that ran in the lines above
                _send_signal(self._process, self._signal)
        with self._process as process:
            code = process.wait()
        seconds = time.monotonic() - start
        outcomes = []
        for run, steps in zip(runs, before):
            updates = max(completed_updates(run) - steps, 0)
            if is_done(run):
                status, error = DONE, ""
                (run.folder.root / "failed.json").unlink(missing_ok=True)
            elif self._signal is not None:
                status, error = STOPPED, ""
            else:
                status, error = FAILED, _failure_reason(code, log, run)
                _record_failure(run.folder, error, code)
            outcomes.append(Outcome(run, status, error, seconds, updates))
        if all(outcome.status != FAILED for outcome in outcomes):
            log.unlink()
        return outcomes


def _send_signal(process: subprocess.Popen, number: int) -> None:
    """Let a worker save and stop; Windows cannot send signals, but workers watch their stdin."""
    if sys.platform == "win32":
        assert process.stdin is not None
        process.stdin.close()
    else:
        process.send_signal(number)


# Write tracebacks of crashes and of Python errors to stderr.
_WORKER_ENVIRONMENT = {"PYTHONFAULTHANDLER": "1", "HYDRA_FULL_ERROR": "1"}


def _outcome_if_skipped(run: Run, acquired: bool, known: dict[str, Any] | None) -> Outcome | None:
    """Outcome of a run that need not or cannot be started; ``None`` if it is to be started."""
    if not acquired:
        return Outcome(run, HELD)
    try:
        check_run_folder(run.folder, run.cfg)
    except ValueError as error:
        return Outcome(run, FAILED, str(error))  # the folder belongs to another run: leave it alone
    if is_done(run):
        return Outcome(run, DONE)
    found = last_failure(run.folder)
    if found is not None and found != known:
        return Outcome(run, FAILED, found["error"])
    return None


def _record_failure(folder: RunFolder, error: str, code: int) -> None:
    with atomic_write(folder.root / "failed.json", "x") as file:
        json.dump({"error": error, "exit_code": code, "time": time.time()}, file)


def _failure_reason(code: int, log: Path, run: Run) -> str:
    """Reason why a process did not complete a run."""
    if code < 0:
        known = {number.value: number.name for number in signal.Signals}
        name = known.get(-code, f"signal {-code}")
        cause = " (the system may have run out of memory)" if name == "SIGKILL" else ""
        return f"the process was killed by {name}{cause}; see {log}"
    lines = log.read_text("utf-8", "replace").split("\n")
    lines = [line.split("\r")[-1].strip() for line in lines if line.strip()]
    of_run = [line for line in lines if line.startswith(f"pogo: {run.name}: ")]  # in a stack
    last = (of_run or lines or [f"the process ended with exit code {code}"])[-1]
    return last.removeprefix("pogo: ").removeprefix(f"{run.name}: ")
