"""Run what is missing of a study, and write its tables.

    python benchmarks/study/study.py FILE.yaml --data FOLDER [--out FOLDER] [--jobs N] [--stack]
    python benchmarks/study/study.py FILE.yaml --source d4rl

Runs are written to OUT/STUDY/FILE/SETTING, tables to OUT/STUDY/tables. Every process uses one
thread. Ctrl-C saves and stops all runs; the same command continues them and retries failed ones.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from baselines import is_done, read_settings
from study_file import DataFile, Study, data_files, describe_data, read_study, sweep_runs
from study_tables import write_tables

from pogo_torchrl.experiments.console import exit_with_error
from pogo_torchrl.experiments.jobs import DONE, FAILED, STDERR, STOPPED, Worker, run_state
from pogo_torchrl.experiments.planner import format_duration
from pogo_torchrl.experiments.signals import on_signals
from pogo_torchrl.experiments.sweep import make_jobs
from pogo_torchrl.files import atomic_write

HERE = Path(__file__).parent

ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}


@dataclass
class Process:
    """A process of the study: a baseline, or the runs of a setting that are trained together."""

    name: str
    run: Callable[[Mapping[str, str]], str]
    """Waits for the process and returns what became of it, in one line."""
    signal: Callable[[int], None]


def setting_processes(
    study: Study, data: DataFile, setting: str, root: Path, stack: bool
) -> list[Process]:
    """Processes for the missing runs of a setting on a data file."""
    runs = [run for run in sweep_runs(study, data, setting, root) if run_state(run) != DONE]
    return [
        _setting_process(f"{data.name}/{setting}", Worker(job))
        for job in make_jobs(runs, stack=stack)
    ]


def _setting_process(name: str, worker: Worker) -> Process:
    seeds = ", ".join(str(run.cfg.seed) for run in worker.job.runs)

    def run(environment: Mapping[str, str]) -> str:
        outcomes = worker(environment)
        states = {outcome.status for outcome in outcomes}
        if FAILED in states:
            states = {FAILED}
        errors = {outcome.error for outcome in outcomes if outcome.error}
        return "; ".join([", ".join(sorted(states)), *sorted(errors)])

    return Process(f"{name}, seed {seeds}", run, worker.signal)


def baseline_processes(study: Study, data: DataFile, method: str, root: Path) -> list[Process]:
    """Processes for the missing runs of a baseline on a data file."""
    processes = []
    for seed in study.seeds:
        folder = root / data.name / method / f"seed_{seed}"
        arguments = [
            method,
            f"task={data.task}",
            f"seed={seed}",
            f"total_steps={study.total_steps}",
            f"eval_interval={study.eval_interval}",
            f"eval_episodes={study.eval_episodes}",
            f"folder={folder}",
            *(f"data.{key}={value}" for key, value in data.options.items()),
        ]
        if not is_done(folder, read_settings(arguments)):
            worker = BaselineWorker(folder, arguments)
            name = f"{data.name}/{method}, seed {seed}"
            processes.append(Process(name, worker.run, worker.stop))
    return processes


class BaselineWorker:
    """Runs baselines.py in a process, which ends when this one does.

    Args:
        folder: the folder of the run.
        arguments: the arguments of baselines.py.
    """

    def __init__(self, folder: Path, arguments: Sequence[str]) -> None:
        self.folder = folder
        self.command = [sys.executable, str(HERE / "baselines.py"), *arguments, "worker=true"]
        self._process: subprocess.Popen | None = None
        self._stopped = False

    def run(self, environment: Mapping[str, str]) -> str:
        """Train, and return ``done``, ``stopped``, or the reason of the failure."""
        if self._stopped:
            return STOPPED
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self.folder / STDERR
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                self.command, env={**os.environ, **environment}, stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True,
            )  # fmt: skip
        if self._stopped:  # by a signal in the lines above
            self._process.terminate()
        with self._process as process:
            code = process.wait()
        if self._stopped:
            return STOPPED
        failure = self.folder / "failed.json"
        if code == 0:
            failure.unlink(missing_ok=True)
            log.unlink()
            return DONE
        lines = [line for line in log.read_text(errors="replace").split("\n") if line.strip()]
        reason = (lines or [f"the process ended with exit code {code}"])[-1].removeprefix("pogo: ")
        with atomic_write(failure, "x") as file:
            json.dump({"error": reason, "exit_code": code}, file)
        return f"{FAILED}; {reason}"

    def stop(self, number: int) -> None:
        """Stop the run; it starts over next time."""
        self._stopped = True
        if self._process is not None:
            self._process.terminate()


def execute(processes: Sequence[Process], jobs: int) -> list[str]:
    """Run all processes, ``jobs`` at a time, and print what becomes of each.

    Args:
        processes: the processes.
        jobs: number of processes at a time.

    Returns:
        The names of those that failed.

    Raises:
        KeyboardInterrupt: if a signal stopped them.
    """
    received: list[int] = []
    failed: list[str] = []

    def stop(number: int) -> None:
        received.append(number)
        for process in processes:
            process.signal(number)

    def run(process: Process) -> None:
        if received:
            return
        started = time.monotonic()
        print(f"start {process.name}", flush=True)
        result = process.run(ONE_THREAD)
        if result.startswith(FAILED):
            failed.append(process.name)
        duration = format_duration(time.monotonic() - started)
        print(f"{process.name}: {result}, {duration}", flush=True)

    with on_signals(stop), ThreadPoolExecutor(jobs) as pool:
        for future in as_completed([pool.submit(run, process) for process in processes]):
            future.result()
    if received:
        raise KeyboardInterrupt("stopped; run the same command again to continue")
    return failed


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("study", type=Path, help="study file")
    parser.add_argument("--data", type=Path, help="folder of HDF5 files {task without -v2}.hdf5")
    parser.add_argument("--source", default="hdf5", choices=("hdf5", "d4rl", "local"))
    parser.add_argument("--out", type=Path, default=Path("study"), help="folder of all studies")
    parser.add_argument(
        "--jobs", type=int, default=1, help="processes at a time, of one thread each"
    )
    parser.add_argument(
        "--stack", action="store_true", help="train the seeds of a setting together"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what is missing")
    parser.add_argument("--tables", action="store_true", help="only write the tables")
    options = parser.parse_args(arguments)
    try:
        failed = run_study(options)
    except (ValueError, OSError) as error:
        exit_with_error(error)
    except KeyboardInterrupt as error:
        exit_with_error(error, 128 + signal.SIGINT)
    if failed:
        exit_with_error(RuntimeError(f"failed: {'; '.join(failed)}"), 1)


def run_study(options: argparse.Namespace) -> list[str]:
    """Run what is missing of a study, then write its tables; returns what failed."""
    if (options.source == "hdf5") != (options.data is not None):
        raise ValueError("give --data FOLDER, a folder of HDF5 files, or --source d4rl or local.")
    if options.jobs < 1:
        raise ValueError(f"--jobs {options.jobs} must be an integer >= 1.")
    study = read_study(options.study)
    root = options.out / options.study.stem
    files = data_files(study, options.source, options.data, root)
    processes = [
        process
        for data in files
        for missing in (
            *(setting_processes(study, data, name, root, options.stack) for name in study.settings),
            *(baseline_processes(study, data, method, root) for method in study.baselines),
        )
        for process in missing
    ]
    print(f"{options.study}: {len(processes)} processes to run, {options.jobs} at a time")
    if options.dry_run:
        print("\n".join(process.name for process in processes))
        return []
    for data in files:
        describe_data(data, root)
    names = [*study.settings, *study.baselines]
    try:
        return [] if options.tables else execute(processes, options.jobs)
    finally:  # also of an unfinished study
        write_tables(root, [data.name for data in files], names)
        print(f"Tables: {root / 'tables'}", flush=True)


if __name__ == "__main__":
    main()
