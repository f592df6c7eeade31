"""Engine ``local``: a bounded number of processes on this machine."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from queue import SimpleQueue

import torch
from omegaconf import DictConfig

from pogo_torchrl.experiments.jobs import Job, Outcome, ProgressReporter, Worker
from pogo_torchrl.experiments.signals import Interrupted, on_signals
from pogo_torchrl.machine import usable_cores


def run_locally(
    jobs: Sequence[Job], options: DictConfig, screen: ProgressReporter
) -> list[Outcome]:
    """Execute jobs in a bounded number of parallel processes on this machine.

    A signal is forwarded to all processes, which save and stop; a second signal stops them
    immediately.

    Args:
        jobs: the jobs.
        options: a :class:`~pogo_torchrl.experiments.config.SweepConfig`; ``jobs`` is the number of
            parallel processes.
        screen: receives progress.

    Returns:
        One outcome per run.

    Raises:
        Interrupted: if a signal ended the sweep.
    """
    environments: SimpleQueue[dict[str, str]] = SimpleQueue()
    for environment in process_environments(options.jobs, jobs):
        environments.put(environment)
    workers = [Worker(job) for job in jobs]
    outcomes: list[Outcome] = []
    signals: list[int] = []

    def execute(worker: Worker) -> list[Outcome]:
        environment = environments.get()
        try:
            return worker(environment, screen.started)
        finally:
            environments.put(environment)

    def stop(number: int) -> None:
        if not signals:
            name = signal.Signals(number).name
            print(
                f"{name}: saving checkpoints and stopping all runs "
                "(send the signal again to stop immediately).",
                file=sys.stderr,
            )
        signals.append(number)
        for worker in workers:
            worker.signal(number)

    with on_signals(stop), ThreadPoolExecutor(environments.qsize()) as pool:
        for future in as_completed([pool.submit(execute, worker) for worker in workers]):
            for outcome in future.result():
                screen.ended(outcome)
                outcomes.append(outcome)
    if signals:
        raise Interrupted(signals[0])
    return outcomes


def process_environments(most: int | None, jobs: Sequence[Job]) -> list[dict[str, str]]:
    """Environment variables of each parallel process: its number of threads and its GPU.

    Args:
        most: maximum number of parallel processes; ``None``: one per GPU or, without a GPU, as many
            as the usable cores allow with ``OMP_NUM_THREADS`` threads each (1 if unset).
        jobs: the jobs to execute.

    Returns:
        One dictionary per process, no more than there are jobs.
    """
    devices = {run.cfg.device for job in jobs for run in job.runs}
    gpus = _gpus() if devices != {"cpu"} else []
    cores = usable_cores()
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    threads = max(int(wanted), 1) if wanted.isdecimal() else None
    count = most or len(gpus) or max(cores // (threads or 1), 1)
    # Independent of the number of jobs: a resumed sweep must use the same number of threads, and
    # so round in the same way, as an uninterrupted one.
    threads = threads or max(cores // count, 1)
    count = min(count, len(jobs))
    pinned = {name: str(threads) for name in _THREADS}
    if len(gpus) > 1:
        return [{**pinned, "CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} for i in range(count)]
    return [pinned] * count


_THREADS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "TORCHINDUCTOR_COMPILE_THREADS",
)


def _gpus() -> list[str]:
    """Usable GPUs, as values for CUDA_VISIBLE_DEVICES."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    indices = [str(i) for i in range(torch.cuda.device_count())]
    return visible.split(",")[: len(indices)] if visible else indices
