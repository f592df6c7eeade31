"""Engines that give the jobs of a sweep to Slurm, through submitit; see docs/sweeps.md.

Each element of a Slurm array carries out a :class:`Batch`: one job, or several side by side on one
GPU. What has become of a run is read from its folder, as everywhere; whether its job is still there
is asked of ``squeue``, which every Slurm has (submitit asks ``sacct``, which needs accounting).

How a job ends before its runs do:

* its time is up: Slurm sends USR1 ``signal_delay_s`` before. The runs save, the job has itself
  queued again and goes on when it is started anew;
* it is pre-empted with a grace time: Slurm sends TERM, as for ``scancel``, but still counts the job
  as running. A job that ends now would be over, so this one is queued again, too;
* it is killed without a warning, or its node is lost: Slurm queues it again if it may; otherwise
  its runs are failures, and the same command retries them. Either way they go on from their newest
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
    Interrupted,
    Job,
    Outcome,
    ProgressReporter,
    completed_updates,
    is_done,
    last_failure,
    run_state,
)
from pogo_torchrl.experiments.local import run_locally
from pogo_torchrl.experiments.signals import on_signals
from pogo_torchrl.experiments.sweep_file import Run
from pogo_torchrl.files import make_writable

if TYPE_CHECKING:
    import submitit

# Read when a job imports submitit: the signal that our runs know, not USR2.
_SIGNAL = {"SUBMITIT_PREEMPT_SIGNAL": "USR1"}

# The longest array that Slurm takes where its administrator has not said otherwise.
_MAX_ARRAY_SIZE = 1000

# How often a job may run out of time. Only runs that never reach a checkpoint need more.
_MAX_TIMEOUTS = 1000


@dataclass
class Batch:
    """What one job on the cluster does: jobs of the sweep, all at once.

    Args:
        jobs: the jobs.
    """

    jobs: tuple[Job, ...]

    def __call__(self) -> None:
        """Carry out the jobs; where a signal cuts them short that calls for it, be queued again."""
        requeue: Any = signal.getsignal(signal.SIGUSR1)  # submitit's, which ends the process
        if cpus := os.environ.get("SLURM_CPUS_PER_TASK"):
            threads = max(int(cpus) // len(self.jobs), 1)
            os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        options = OmegaConf.structured(SweepConfig(jobs=len(self.jobs)))
        try:
            run_locally(self.jobs, options, _Log())
        except Interrupted as stop:
            number = stop.args[0]
            if number == signal.SIGUSR1 or (number == signal.SIGTERM and _is_still_scheduled()):
                requeue(signal.SIGUSR1, None)
            raise

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What is queued again; called by submitit."""
        from submitit.helpers import DelayedSubmission

        # What has failed up to now is tried once more.
        return DelayedSubmission(Batch(tuple(Job.of(*job.runs) for job in self.jobs)))


class _Log:
    """The screen of a job: submitit keeps what it prints."""

    def started(self, runs: Sequence[Run]) -> None:
        print("start", *(run.name for run in runs), flush=True)

    def ended(self, outcome: Outcome) -> None:
        print(outcome.run.name, outcome.status, outcome.error, flush=True)


def run_on_slurm(
    jobs: Sequence[Job], options: DictConfig, screen: ProgressReporter
) -> list[Outcome]:
    """The engine ``slurm``: arrays of jobs on a cluster.

    A signal ends the waiting, not the jobs; the same command waits for them again.
    """
    if shutil.which("sbatch") is None:
        raise ValueError(
            "launcher=slurm, but there is no sbatch here: start the sweep where jobs are submitted "
            "to Slurm, or use launcher=local."
        )
    return _run(_Slurm(jobs, options), jobs, options.slurm.runs_per_job, screen)


def run_by_submitit(
    jobs: Sequence[Job], options: DictConfig, screen: ProgressReporter
) -> list[Outcome]:
    """The engine ``submitit_local``: what the cluster would do, in processes here, all at once.

    A signal is passed on to the jobs, whose runs save and stop.
    """
    return _run(_Local(jobs, options), jobs, options.slurm.runs_per_job, screen)


class _Cluster:
    """Where batches go."""

    poll_seconds: float
    """Seconds between two questions for its states."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.folder = Path(jobs[0].runs[0].cfg.log_dir) / ".submitit"
        make_writable(self.folder, "log_dir")
        self.executor: submitit.Executor

    def submit(self, batches: Sequence[Batch]) -> list[str]:
        """Hand over batches; the numbers of their jobs."""
        from submitit.core.utils import FailedJobError

        numbers: list[str] = []
        for i in range(0, len(batches), _MAX_ARRAY_SIZE):
            try:
                jobs = self.executor.submit_array(batches[i : i + _MAX_ARRAY_SIZE])
            except FailedJobError as error:
                raise ValueError(
                    f"sbatch refuses the job: {error}; see the options slurm.*"
                ) from error
            self.submitted(jobs)
            numbers += [job.job_id for job in jobs]
        return numbers

    def submitted(self, jobs: Sequence[submitit.Job]) -> None:
        """Called with the jobs that batches have become."""

    def states(self) -> dict[str, str] | None:
        """The states of the jobs that have not ended; none while they cannot be told."""
        raise NotImplementedError

    def stop(self, number: int, ids: Sequence[str]) -> None:
        """A signal ends the sweep."""
        raise NotImplementedError


class _Slurm(_Cluster):
    poll_seconds = 10.0  # many users ask the same controller

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
            "setup": [f"export {name}={value}" for name, value in _SIGNAL.items()],
        }
        self.executor = _submitit().SlurmExecutor(self.folder, max_num_timeout=_MAX_TIMEOUTS)
        self.executor.update_parameters(**{k: v for k, v in parameters.items() if v is not None})

    def states(self) -> dict[str, str] | None:
        return _states()

    def stop(self, number: int, ids: Sequence[str]) -> None:
        arrays = sorted({job_id.partition("_")[0] for job_id in ids})
        print(f"The jobs stay in Slurm's queue; scancel {' '.join(arrays)} ends them.")


class _Local(_Cluster):
    poll_seconds = 0.5

    def __init__(self, jobs: Sequence[Job], options: DictConfig) -> None:
        super().__init__(jobs)
        self.executor = _submitit().LocalExecutor(self.folder, max_num_timeout=_MAX_TIMEOUTS)
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
        for process in self.states():  # submitit's number of a job here
            os.kill(int(process), signal.SIGTERM)
        while self.states():
            time.sleep(0.1)


def _submitit() -> Any:
    os.environ.update(_SIGNAL)
    try:
        import submitit
    except ImportError as error:
        raise ImportError(
            "this launcher needs submitit: pip install 'pogo_torchrl[slurm]', or use "
            "launcher=local."
        ) from error
    return submitit


def _states() -> dict[str, str] | None:
    """The states of this user's jobs; none where Slurm does not answer."""
    command = ["squeue", "--noheader", "--array", f"--user={os.getuid()}", "--format=%i %T"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(line.split() for line in answer.stdout.splitlines())


def _is_still_scheduled() -> bool:
    """In a job that got SIGTERM: whether Slurm would have it go on, i.e. it is no scancel."""
    return (_states() or {}).get(_submitit().JobEnvironment().job_id) == "RUNNING"


def _run(
    cluster: _Cluster, jobs: Sequence[Job], runs_per_job: int, screen: ProgressReporter
) -> list[Outcome]:
    numbers = _queued(cluster)
    held = [
        run
        for job in jobs
        for run in job.runs
        if run.name not in numbers and run_state(run) == RUNNING  # by another kind of sweep
    ]
    new = [job for job in jobs if not any(r in held or r.name in numbers for r in job.runs)]
    batches = [Batch(tuple(new[i : i + runs_per_job])) for i in range(0, len(new), runs_per_job)]
    for number, batch in zip(cluster.submit(batches), batches):
        names = [run.name for job in batch.jobs for run in job.runs]
        (cluster.folder / f"{number}.json").write_text(json.dumps(names))
        numbers.update(dict.fromkeys(names, number))
    waiting = {run: numbers[run.name] for job in jobs for run in job.runs if run.name in numbers}

    def stop(number: int) -> NoReturn:
        cluster.stop(number, list(waiting.values()))
        raise Interrupted(number)

    with on_signals(stop):
        return [Outcome(run, HELD) for run in held] + _wait(waiting, cluster, screen)


def _queued(cluster: _Cluster) -> dict[str, str]:
    """The runs that jobs of an earlier start of the sweep still have, and the jobs' numbers."""
    alive = cluster.states() or {}
    files = [file for file in cluster.folder.glob("*.json") if file.stem in alive]
    return {name: file.stem for file in files for name in json.loads(file.read_text())}


def _wait(waiting: dict[Run, str], cluster: _Cluster, screen: ProgressReporter) -> list[Outcome]:
    """Tell of runs, given with the numbers of their jobs, as they start and end, until all have."""
    outcomes: list[Outcome] = []
    made = {run: completed_updates(run) for run in waiting}
    begun = dict.fromkeys(waiting, time.monotonic())
    before: dict[str, str] = {}
    missed: set[str] = set()
    while waiting:
        time.sleep(cluster.poll_seconds)
        states = cluster.states()
        if states is None:
            continue
        for run, number in list(waiting.items()):
            if states.get(number) == "RUNNING" != before.get(number):  # also when it goes on
                screen.started([run])
                begun[run] = time.monotonic()
            # Files made elsewhere may show late: a job must be missed twice.
            if is_done(run) or (number not in states and number in missed):
                seconds, updates = time.monotonic() - begun[run], completed_updates(run) - made[run]
                outcomes.append(_outcome(run, number, cluster.folder, seconds, max(updates, 0)))
                screen.ended(outcomes[-1])
                del waiting[run]
        before, missed = states, {number for number in waiting.values() if number not in states}
    return outcomes


def _outcome(run: Run, number: str, folder: Path, seconds: float, updates: int) -> Outcome:
    """What has become of a run whose job has ended."""
    if is_done(run):
        return Outcome(run, DONE, "", seconds, updates)
    if run_state(run) == RUNNING:
        return Outcome(run, HELD)
    found = last_failure(run.folder)
    error = (
        found["error"]
        if found
        else (
            f"its job {number} ended before the run did (scancel, time, memory, a lost node); see "
            f"{folder / number}_0_log.err"
        )
    )
    return Outcome(run, FAILED, error, seconds, updates)
