"""Engines: what carries out the runs of a sweep.

The sweep hands an engine its *jobs*. A :class:`Job` is what one process does: one run, or several
runs that :meth:`Job.command` trains in one process. A :class:`Worker` carries out one job on the
machine it is called on: it claims the runs' folders, starts the process, waits for it, and keeps
the reason of a failure in ``failed.json``. An engine decides where and when workers are called::

    def engine(jobs: Sequence[Job], options: DictConfig, screen: ProgressReporter) -> list[Outcome]

* ``options`` is the :class:`~pogo_torchrl.experiments.config.SweepConfig` of the command line.
* ``screen.started(runs)`` and ``screen.ended(outcome)`` tell the user; from any thread.
* It returns one :class:`Outcome` a run when all of its jobs have ended. Runs that another process
  holds come back as ``HELD``, and the sweep hands them in again.
* Signals are the engine's while it works; one that ends it early raises :class:`Interrupted`.

A job, a worker before its call, and outcomes can be pickled, to be sent to other machines. An
engine is made known in :data:`pogo_torchrl.experiments.sweep.ENGINES`.
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

from filelock import FileLock, Timeout

from pogo_torchrl.experiments.run_folder import RunFolder, check_run_folder
from pogo_torchrl.experiments.sweep_file import Run
from pogo_torchrl.files import atomic_write, make_writable

# How a job found or left a run.
DONE, FAILED, HELD, STOPPED = "done", "failed", "held", "stopped"


# A run's state before it is started, beside DONE.
NEW, INTERRUPTED, FAILED_BEFORE, CONFLICT, RUNNING = (
    "to run",
    "to resume",
    "failed before",
    "holds another run",
    "running elsewhere",
)


STACK = "--stack"
"""First argument of a worker process that trains several runs; the second has their arguments."""


STDERR = "stderr.log"
"""What the process of a run has written to stderr; kept in the run's folder if it failed."""


class Outcome(NamedTuple):
    """What has become of a run: ``DONE``, ``FAILED``, ``HELD`` or ``STOPPED``."""

    run: Run
    status: str
    error: str = ""
    """Why it failed, in a sentence."""
    seconds: float = 0.0
    updates: int = 0
    """Updates made by this job."""


class ProgressReporter(Protocol):
    """Where an engine tells what happens."""

    def started(self, runs: Sequence[Run]) -> None:
        """A process has been started for these runs."""

    def ended(self, outcome: Outcome) -> None:
        """A run has ended, or another process holds it."""


class Interrupted(BaseException):
    """A signal has ended the sweep; its number is the first argument."""


def run_state(run: Run) -> str:
    """What is to be done for a run, from its folder alone."""
    folder = run.folder
    try:
        check_run_folder(folder, run.cfg)
    except ValueError:
        return CONFLICT
    if is_done(run):
        return DONE
    if _is_locked(folder.root / ".sweep.lock") or _is_locked(folder.root / ".lock"):
        return RUNNING
    if last_failure(folder) is not None:
        return FAILED_BEFORE
    return INTERRUPTED if (folder.training / "config.yaml").exists() else NEW


def is_done(run: Run) -> bool:
    """Whether it has made all the updates that are wanted now."""
    found = _read(run.folder.done)
    return found is not None and found.get("total_steps", 0) >= run.cfg.total_steps


def last_failure(folder: RunFolder) -> dict[str, Any] | None:
    """What is known of the failure of the run's last attempt."""
    return _read(folder.root / "failed.json")


def completed_updates(run: Run) -> int:
    """Updates up to the newest checkpoint."""
    steps = [int(path.name.split("-")[1]) for path in run.folder.checkpoints.glob("step-*[0-9]")]
    return min(max(steps, default=0), run.cfg.total_steps)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _is_locked(path: Path) -> bool:
    """Whether a process holds a lock; the file alone, left by a killed one, means nothing."""
    if not path.exists():
        return False
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True


@contextmanager
def _lock_run(folder: RunFolder) -> Iterator[bool]:
    """Try to be the one sweep process that works on a run; true if nobody else does.

    The run's own lock is taken by its process, seconds later.
    """
    make_writable(folder.root, "log_dir")
    path = folder.root / ".sweep.lock"
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        yield not _is_locked(folder.root / ".lock")
    finally:
        path.unlink(missing_ok=True)  # while it is ours
        lock.release()


@dataclass(frozen=True)
class Job:
    """What one process does.

    Args:
        runs: one, or several for one process.
        failures: the failures of earlier attempts, by run, as known when the job was made; they
            are tried again. One that appears later is another process's, and is not.
    """

    runs: tuple[Run, ...]
    failures: tuple[dict[str, Any] | None, ...]

    @classmethod
    def of(cls, *runs: Run) -> Job:
        """A job for these runs."""
        return cls(runs, tuple(last_failure(run.folder) for run in runs))

    @staticmethod
    def command(runs: Sequence[Run]) -> list[str]:
        """The process that makes ``runs``, those of the job's that are still to be made."""
        command = [sys.executable, "-m", "pogo_torchrl.experiments.worker"]
        if len(runs) == 1:
            return [*command, *runs[0].arguments]
        return [*command, STACK, json.dumps([run.arguments for run in runs])]


@dataclass
class Worker:
    """Carries out a job on this machine, in a process of its own.

    A hard crash of that process is a failure of its runs, and of nothing else.
    """

    job: Job
    _signal: int | None = field(default=None, init=False)
    _process: subprocess.Popen | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        # Reentrant: a signal handler may run within __call__.
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {"job": self.job, "_signal": None, "_process": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    def signal(self, number: int) -> None:
        """Pass a signal on: the runs save and stop; a worker not yet called starts nothing."""
        with self._lock:
            self._signal = number
            if self._process is not None:
                self._process.send_signal(number)

    def __call__(
        self,
        environment: Mapping[str, str] | None = None,
        started: Callable[[Sequence[Run]], None] = lambda runs: None,
    ) -> list[Outcome]:
        """Carry out the job; returns when it has ended.

        Args:
            environment: variables of the process beside those of this one.
            started: called with the runs that the process makes, when it makes any.
        """
        try:
            return self._execute(environment or {}, started)
        except OSError as error:  # a folder that cannot be written
            return [Outcome(run, FAILED, str(error)) for run in self.job.runs]

    def _execute(
        self, environment: Mapping[str, str], started: Callable[[Sequence[Run]], None]
    ) -> list[Outcome]:
        with ExitStack() as claims:
            found = []
            for run, known in zip(self.job.runs, self.job.failures):
                is_ours = claims.enter_context(_lock_run(run.folder))
                found.append(_outcome_without_work(run, is_ours, known))
            todo = [run for run, outcome in zip(self.job.runs, found) if outcome is None]
            made = iter(self._run_process(todo, environment, started) if todo else ())
            return [outcome or next(made) for outcome in found]

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
        begun, before = time.monotonic(), [completed_updates(run) for run in runs]
        log = runs[0].folder.root / STDERR
        with log.open("wb") as stderr, self._lock:
            if self._signal is not None:
                return stopped
            # A session of its own: the terminal's Ctrl-C reaches it through signal() only, once.
            # What it prints stands in train.log. While stdin is open, the process goes on.
            self._process = subprocess.Popen(
                Job.command(runs),
                env={**os.environ, **_WORKER_ENVIRONMENT, **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )
            if self._signal is not None:  # it came from a handler in the lines above
                self._process.send_signal(self._signal)
        with self._process as process:
            code = process.wait()
        seconds = time.monotonic() - begun
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
                _record(run.folder, error, code)
            outcomes.append(Outcome(run, status, error, seconds, updates))
        if all(outcome.status != FAILED for outcome in outcomes):
            log.unlink()
        return outcomes


# Faults and Python's errors leave their trace in stderr.
_WORKER_ENVIRONMENT = {"PYTHONFAULTHANDLER": "1", "HYDRA_FULL_ERROR": "1"}


def _outcome_without_work(run: Run, is_ours: bool, known: dict[str, Any] | None) -> Outcome | None:
    """The outcome of a run that is not to be started."""
    if not is_ours:
        return Outcome(run, HELD)
    try:
        check_run_folder(run.folder, run.cfg)
    except ValueError as error:
        return Outcome(run, FAILED, str(error))  # not of the run in that folder: nothing is kept
    if is_done(run):
        return Outcome(run, DONE)
    found = last_failure(run.folder)
    if found is not None and found != known:
        return Outcome(run, FAILED, found["error"])
    return None


def _record(folder: RunFolder, error: str, code: int) -> None:
    with atomic_write(folder.root / "failed.json", "x") as file:
        json.dump({"error": error, "exit_code": code, "time": time.time()}, file)


def _failure_reason(code: int, log: Path, run: Run) -> str:
    """Why a process has not brought a run to its end."""
    if code < 0:
        name = signal.Signals(-code).name
        cause = " (the system may have run out of memory)" if name == "SIGKILL" else ""
        return f"the process was ended by {name}{cause}; see {log}"
    lines = log.read_text(errors="replace").split("\n")
    said = [line.split("\r")[-1].strip() for line in lines if line.strip()]
    of_run = [line for line in said if line.startswith(f"pogo: {run.name}: ")]  # in a stack
    last = (of_run or said or [f"the process ended with exit code {code}"])[-1]
    return last.removeprefix("pogo: ").removeprefix(f"{run.name}: ")
