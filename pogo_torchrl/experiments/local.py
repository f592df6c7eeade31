"""The engine ``local``: a bounded number of processes on this machine."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from queue import SimpleQueue

import torch
from omegaconf import DictConfig

from pogo_torchrl.experiments.jobs import Interrupted, Job, Outcome, ProgressReporter, Worker
from pogo_torchrl.experiments.signals import on_signals


def run_locally(
    jobs: Sequence[Job], options: DictConfig, screen: ProgressReporter
) -> list[Outcome]:
    """The engine ``local``: a bounded number of processes on this machine.

    A signal is passed on to all of them, each of which saves and stops; a second one stops them at
    once.
    """
    environments: SimpleQueue[dict[str, str]] = SimpleQueue()
    for environment in process_environments(options.jobs, jobs):
        environments.put(environment)
    workers = [Worker(job) for job in jobs]
    outcomes: list[Outcome] = []
    signals: list[int] = []

    def carry_out(worker: Worker) -> list[Outcome]:
        environment = environments.get()
        try:
            return worker(environment, screen.started)
        finally:
            environments.put(environment)

    def stop(number: int) -> None:
        if not signals:
            name = signal.Signals(number).name
            print(f"{name}: the runs save and stop (once more stops at once).", file=sys.stderr)
        signals.append(number)
        for worker in workers:
            worker.signal(number)

    with on_signals(stop), ThreadPoolExecutor(environments.qsize()) as pool:
        for future in as_completed([pool.submit(carry_out, worker) for worker in workers]):
            for outcome in future.result():
                screen.ended(outcome)
                outcomes.append(outcome)
    if signals:
        raise Interrupted(signals[0])
    return outcomes


def process_environments(most: int | None, jobs: Sequence[Job]) -> list[dict[str, str]]:
    """The environment of each of the processes that run at once: its threads, and its GPU.

    Args:
        most: how many; ``None``: one for each GPU, without one as many as usable cores allow with
            ``OMP_NUM_THREADS`` threads each (1 where that is not set).
        jobs: what is to be done.
    """
    devices = {run.cfg.device for job in jobs for run in job.runs}
    gpus = _gpus() if devices != {"cpu"} else []
    cores = _usable_cores()
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    threads = max(int(wanted), 1) if wanted.isdecimal() else None
    count = most or len(gpus) or max(cores // (threads or 1), 1)
    # Not by the number of jobs: what is left of a sweep shall round as the whole would have.
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
    """The GPUs that may be used, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    numbers = [str(i) for i in range(torch.cuda.device_count())]
    return visible.split(",")[: len(numbers)] if visible else numbers


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
