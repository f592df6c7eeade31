"""Engines that submit the jobs of a sweep to Slurm through submitit; see docs/sweeps.md.

Each element of a Slurm array executes a :class:`Batch`: one job, or several jobs in parallel on one
GPU. The result of a run is read from its folder, as in all engines. Whether a Slurm job still
exists is queried with ``squeue``, which is always available (submitit uses ``sacct``, which
requires accounting).

A Slurm job may end before its runs do:

* Time limit: Slurm sends USR1 ``signal_delay_s`` seconds before. The runs save, and the job
  requeues itself and resumes when it starts again.
* Preemption with a grace time: Slurm sends TERM, as for ``scancel``, but still lists the job as
  running. A job that exits now would not be requeued by Slurm, so it requeues itself as well.
* Kill without warning, or a lost node: Slurm requeues the job if allowed. Otherwise its runs count
  as failed and are retried by the same command. In both cases they resume from their newest
  checkpoints.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from omegaconf import DictConfig, OmegaConf

from pogo_torchrl.experiments.config import SweepConfig
from pogo_torchrl.experiments.jobs import (
    DONE,
    FAILED,
    HELD,
    RUNNING,
    Job,
    Outcome,
    ProgressReporter,
    completed_updates,
    is_done,
    last_failure,
    run_state,
)
from pogo_torchrl.experiments.local import run_locally
from pogo_torchrl.experiments.signals import Interrupted, on_signals
from pogo_torchrl.experiments.sweep_file import Run
from pogo_torchrl.files import make_writable
from pogo_torchrl.screen import protect_screen

if TYPE_CHECKING:
    import submitit

# Read when submitit is imported in a job: make it use the signal that runs handle, not USR2.
_SUBMITIT_ENVIRONMENT = {"SUBMITIT_PREEMPT_SIGNAL": "USR1"}

# Slurm's default limit for the size of an array.
_MAX_ARRAY_SIZE = 1000

# How often a job may reach its time limit. Only runs that never reach a checkpoint need more.
_MAX_TIMEOUTS = 1000


@dataclass
class Batch:
    """Work of one job on the cluster: one or several jobs of the sweep, in parallel.

    Args:
        jobs: jobs of the sweep.
    """

    jobs: tuple[Job, ...]

    def __call__(self) -> None:
        """Execute the jobs; requeue the Slurm job if its time is up or it is preempted."""
        protect_screen()
        requeue: Any = signal.getsignal(signal.SIGUSR1)  # submitit's handler, which exits
        if cpus := os.environ.get("SLURM_CPUS_PER_TASK"):
            threads = max(int(cpus) // len(self.jobs), 1)
            os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        options = OmegaConf.structured(SweepConfig(jobs=len(self.jobs)))
        try:
            run_locally(self.jobs, options, _PrintReporter())
        except Interrupted as stop:
            number = stop.args[0]
            if number == signal.SIGUSR1 or (number == signal.SIGTERM and _is_still_scheduled()):
                requeue(signal.SIGUSR1, None)
            raise

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Work of the requeued job; called by submitit."""
        from submitit.helpers import DelayedSubmission

        # New jobs, so that runs that have failed by now are retried.
        return DelayedSubmission(Batch(tuple(Job.of(*job.runs) for job in self.jobs)))


class _PrintReporter:
    """Prints progress to the job's log, which submitit captures."""

    def started(self, runs: Sequence[Run]) -> None:
        print("start", *(run.name for run in runs), flush=True)

    def ended(self, outcome: Outcome) -> None:
        print(outcome.run.name, outcome.status, outcome.error, flush=True)


def run_on_slurm(
    jobs: Sequence[Job], options: DictConfig, screen: ProgressReporter
) -> list[Outcome]:
    """Engine ``slurm``: submit arrays of jobs to a cluster and wait for them.

    A signal ends the waiting, not the jobs; the same command waits for them again.

    Args:
        jobs: jobs of the sweep.
        options: a :class:`~pogo_torchrl.experiments.config.SweepConfig`.
        screen: receives progress.

    Returns:
        One outcome per run.

    Raises:
        ValueError: if ``sbatch`` does not exist or rejects a job.
        ImportError: if submitit is not installed.
        Interrupted: if a signal ended the waiting.
    """
    if shutil.which("sbatch") is None:
        raise ValueError(
            "launcher=slurm needs the command sbatch, which was not found: start the sweep where "
            "jobs can be submitted to Slurm, or use launcher=local."
        )
    return _submit_and_wait(_SlurmBackend(jobs, options), jobs, options.slurm.runs_per_job, screen)


def run_by_submitit(
    jobs: Sequence[Job], options: DictConfig, screen: ProgressReporter
) -> list[Outcome]:
    """Engine ``submitit_local``: execute the cluster's jobs as local processes, all at once.

    A signal is forwarded to the jobs, whose runs save and stop.

    Args:
        jobs: jobs of the sweep.
        options: a :class:`~pogo_torchrl.experiments.config.SweepConfig`.
        screen: receives progress.

    Returns:
        One outcome per run.

    Raises:
        ImportError: if submitit is not installed.
        Interrupted: if a signal ended the sweep.
    """
    return _submit_and_wait(_LocalBackend(jobs, options), jobs, options.slurm.runs_per_job, screen)


class _Backend:
    """Base class of the systems that batches are submitted to."""

    poll_seconds: float
    """Seconds between two queries of the job states."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.folder = Path(jobs[0].runs[0].cfg.log_dir) / ".submitit"
        make_writable(self.folder, "log_dir")
        self.executor: submitit.Executor

    def submit(self, batches: Sequence[Batch]) -> list[str]:
        """Submit batches; returns the IDs of their jobs."""
        from submitit.core.utils import FailedJobError

        job_ids: list[str] = []
        for i in range(0, len(batches), _MAX_ARRAY_SIZE):
            try:
                jobs = self.executor.submit_array(batches[i : i + _MAX_ARRAY_SIZE])
            except FailedJobError as error:
                raise ValueError(
                    f"sbatch rejected the job: {error}; check the options slurm.*"
                ) from error
            self.submitted(jobs)
            job_ids += [job.job_id for job in jobs]
        return job_ids

    def submitted(self, jobs: Sequence[submitit.Job]) -> None:
        """Called with the jobs after each submission."""

    def states(self) -> dict[str, str] | None:
        """States of all jobs that have not ended, by ID; ``None`` if they are not available."""
        raise NotImplementedError

    def stop(self, number: int, ids: Sequence[str]) -> None:
        """Called when a signal ends the sweep, with the IDs of the remaining jobs."""
        raise NotImplementedError


class _SlurmBackend(_Backend):
    poll_seconds = 10.0  # the controller serves many users

    def __init__(self, jobs: Sequence[Job], options: DictConfig) -> None:
        super().__init__(jobs)
        wanted = options.slurm
        parameters = {
            "job_name": "pogo",
            "partition": wanted.partition,
            "time": wanted.timeout_min,
            "gpus_per_node": wanted.gpus_per_node,
            "cpus_per_task": wanted.cpus_per_task,
            "mem": None if wanted.mem_gb is None else f"{wanted.mem_gb}GB",
            "array_parallelism": wanted.array_parallelism,
            "additional_parameters": {
                "signal": f"USR1@{wanted.signal_delay_s}",
                **wanted.additional_parameters,
            },
            "setup": [f"export {name}={value}" for name, value in _SUBMITIT_ENVIRONMENT.items()],
        }
        self.executor = _import_submitit().SlurmExecutor(self.folder, max_num_timeout=_MAX_TIMEOUTS)
        self.executor.update_parameters(**{k: v for k, v in parameters.items() if v is not None})

    def states(self) -> dict[str, str] | None:
        return _query_squeue()

    def stop(self, number: int, ids: Sequence[str]) -> None:
        arrays = sorted({job_id.partition("_")[0] for job_id in ids})
        print(f"The jobs stay in Slurm's queue; cancel them with scancel {' '.join(arrays)}.")


class _LocalBackend(_Backend):
    poll_seconds = 0.5

    def __init__(self, jobs: Sequence[Job], options: DictConfig) -> None:
        super().__init__(jobs)
        self.executor = _import_submitit().LocalExecutor(self.folder, max_num_timeout=_MAX_TIMEOUTS)
        self.executor.update_parameters(
            timeout_min=options.slurm.timeout_min,
            signal_delay_s=options.slurm.signal_delay_s,
            gpus_per_node=options.slurm.gpus_per_node or 0,
        )
        self._jobs: list[submitit.Job] = []

    def submitted(self, jobs: Sequence[submitit.Job]) -> None:
        self._jobs += jobs

    def states(self) -> dict[str, str]:
        return {job.job_id: "RUNNING" for job in self._jobs if not job.done()}

    def stop(self, number: int, ids: Sequence[str]) -> None:
        for process in self.states():  # the ID of a local job is its process ID
            os.kill(int(process), signal.SIGTERM)
        while self.states():
            time.sleep(0.1)


def _import_submitit() -> Any:
    os.environ.update(_SUBMITIT_ENVIRONMENT)
    try:
        import submitit
    except ImportError as error:
        raise ImportError(
            "this launcher needs submitit, which is not installed: pip install "
            "'pogo_torchrl[slurm]', or use launcher=local."
        ) from error
    return submitit


def _query_squeue() -> dict[str, str] | None:
    """States of this user's jobs by ID; ``None`` if Slurm does not respond."""
    command = ["squeue", "--noheader", "--array", f"--user={os.getuid()}", "--format=%i %T"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(line.split() for line in answer.stdout.splitlines())


def _is_still_scheduled() -> bool:
    """In a job that received SIGTERM: whether it was preempted rather than cancelled by scancel."""
    return (_query_squeue() or {}).get(_import_submitit().JobEnvironment().job_id) == "RUNNING"


def _submit_and_wait(
    backend: _Backend, jobs: Sequence[Job], runs_per_job: int, screen: ProgressReporter
) -> list[Outcome]:
    job_ids = _queued_runs(backend)
    held = [
        run
        for job in jobs
        for run in job.runs
        if run.name not in job_ids and run_state(run) == RUNNING  # e.g. by a local sweep
    ]
    new = [job for job in jobs if not any(r in held or r.name in job_ids for r in job.runs)]
    batches = [Batch(tuple(new[i : i + runs_per_job])) for i in range(0, len(new), runs_per_job)]
    for job_id, batch in zip(backend.submit(batches), batches):
        names = [run.name for job in batch.jobs for run in job.runs]
        (backend.folder / f"{job_id}.json").write_text(json.dumps(names))
        job_ids.update(dict.fromkeys(names, job_id))
    waiting = {run: job_ids[run.name] for job in jobs for run in job.runs if run.name in job_ids}

    def stop(number: int) -> NoReturn:
        backend.stop(number, list(waiting.values()))
        raise Interrupted(number)

    with on_signals(stop):
        return [Outcome(run, HELD) for run in held] + _wait_for_runs(waiting, backend, screen)


def _queued_runs(backend: _Backend) -> dict[str, str]:
    """Job IDs, by run name, of the jobs that an earlier start of the sweep has submitted."""
    alive = backend.states() or {}
    files = [file for file in backend.folder.glob("*.json") if file.stem in alive]
    return {name: file.stem for file in files for name in json.loads(file.read_text())}


def _wait_for_runs(
    waiting: dict[Run, str], backend: _Backend, screen: ProgressReporter
) -> list[Outcome]:
    """Wait for runs, given with the IDs of their jobs, and report when they start and end."""
    outcomes: list[Outcome] = []
    initial_updates = {run: completed_updates(run) for run in waiting}
    start = dict.fromkeys(waiting, time.monotonic())
    previous: dict[str, str] = {}
    missing: set[str] = set()
    while waiting:
        time.sleep(backend.poll_seconds)
        states = backend.states()
        if states is None:
            continue
        for run, job_id in list(waiting.items()):
            if states.get(job_id) == "RUNNING" != previous.get(job_id):  # also after a requeue
                screen.started([run])
                start[run] = time.monotonic()
            # Files written on other nodes may appear late: wait until a job is missing twice.
            if is_done(run) or (job_id not in states and job_id in missing):
                seconds = time.monotonic() - start[run]
                updates = max(completed_updates(run) - initial_updates[run], 0)
                outcomes.append(_final_outcome(run, job_id, backend.folder, seconds, updates))
                screen.ended(outcomes[-1])
                del waiting[run]
        previous, missing = states, {i for i in waiting.values() if i not in states}
    return outcomes


def _final_outcome(run: Run, job_id: str, folder: Path, seconds: float, updates: int) -> Outcome:
    """Outcome of a run whose job has ended."""
    if is_done(run):
        return Outcome(run, DONE, "", seconds, updates)
    if run_state(run) == RUNNING:
        return Outcome(run, HELD)
    found = last_failure(run.folder)
    error = (
        found["error"]
        if found
        else (
            f"its job {job_id} ended before the run did (scancel, time limit, memory or lost "
            f"node); see {folder / job_id}_0_log.err"
        )
    )
    return Outcome(run, FAILED, error, seconds, updates)
