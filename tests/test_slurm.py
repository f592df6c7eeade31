"""Sweeps through submitit, with local processes and with a fake Slurm.

tests/slurm/check.sh runs a sweep on a real Slurm.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from runs import assert_same, state
from test_sweep import finish, start, started, wait_for, workers

from pogo_torchrl.data import behaviour_dataset
from pogo_torchrl.experiments import slurm as engines
from pogo_torchrl.experiments.jobs import DONE, FAILED, Interrupted, Job
from pogo_torchrl.experiments.overrides import sweep_options
from pogo_torchrl.experiments.run import run as train
from pogo_torchrl.experiments.sweep import sweep
from pogo_torchrl.experiments.sweep_file import read_sweep

pytest.importorskip("submitit")

FILE = """
common:
  total_steps: 40
  eval_interval: 40
  eval_episodes: 1
  checkpoint_interval: 4
  log_interval: 4
  batch_size: 16
  hidden_sizes: [16]
  compile: false
  device: cpu
  data: {size: 2000}
  seeds: [0, 1]
environments: {hopper: {medium: {w2_weights: [0.1]}}}
"""
RUNS = [f"hopper-medium-v2/w2_0.1/seed_{seed}" for seed in (0, 1)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "sweep.yaml").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def threads():
    """Restore the number of threads of this process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def parent_process(worker: int) -> int:
    """Process of the submitit job that started a worker."""
    status = Path(f"/proc/{worker}/status").read_text()
    return int(status.partition("PPid:")[2].split()[0])


def test_preempted_jobs_are_requeued_and_killed_runs_fail(folder, threads, capsys):
    behaviour_dataset("hopper-medium-v2", size=2000, cache_dir="cache", progress=False)
    longer = ("data.cache_dir=cache", "total_steps=300", "eval_interval=300")
    longer = (*longer, "checkpoint_interval=20")
    arguments = (*longer, "launcher=submitit_local")
    process = start(folder, *arguments)
    saved = [folder / "logs" / run / "checkpoints" for run in RUNS]
    wait_for(lambda: list(saved[0].glob("step-*/sha256.json")))  # written last
    (worker,) = workers(folder, "seed=0")
    os.kill(worker, signal.SIGUSR1)  # like Slurm, signal every process of the job
    os.kill(parent_process(worker), signal.SIGUSR1)
    wait_for(lambda: list(saved[1].glob("step-*/sha256.json")))
    os.kill(*workers(folder, "seed=1"), signal.SIGKILL)
    code, out, err = finish(process)
    assert code == 1, err
    assert started(out) == sorted(RUNS)
    assert f"{RUNS[1]}: failed after" in out
    assert "the process was killed by SIGKILL" in out

    capsys.readouterr()
    assert sweep(["sweep=sweep.yaml", *arguments, "slurm.runs_per_job=2"]) == 0
    assert started(capsys.readouterr().out) == [RUNS[1]]
    torch.set_num_threads(1)  # like the runs above
    for name, run in zip(RUNS, read_sweep("sweep.yaml", [*longer, "log_dir=uninterrupted"])):
        train(run.cfg)
        assert "Resumed at" in (folder / "logs" / name / "training" / "train.log").read_text()
        assert_same(state(folder / "logs" / name), state(folder / "uninterrupted" / name))


class RecordingReporter:
    """Progress reporter that records what is reported."""

    def __init__(self):
        self.lines = []

    def started(self, runs):
        self.lines += [("started", run.name) for run in runs]

    def ended(self, outcome):
        self.lines.append((outcome.status, outcome.run.name))


@pytest.fixture
def slurm(folder, monkeypatch):
    """Fake Slurm commands: jobs are queued but never executed."""
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    scripts = {
        "srun": "",
        "sbatch": 'n=$(ls queued.* 2>/dev/null | wc -l); cp "$1" queued.$n; '
        'test -e refuse && { echo "sbatch: error: invalid partition" >&2; exit 1; }; '
        'echo "Submitted batch job $((n + 7))"',
        "squeue": "cat states",
    }
    for name, text in scripts.items():
        (bin_folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (bin_folder / name).chmod(0o755)
    (folder / "states").touch()
    monkeypatch.setenv("PATH", f"{bin_folder}:{os.environ['PATH']}")
    monkeypatch.setattr(engines._SlurmBackend, "poll_seconds", 0.05)
    return folder


def execute(*arguments: str, screen=None, engine=engines.run_on_slurm):
    options, _ = sweep_options(["launcher=slurm", *arguments])
    jobs = [Job.of(run) for run in read_sweep("sweep.yaml")]
    return engine(jobs, options, screen or RecordingReporter())


def test_options_reach_sbatch_and_lost_jobs_fail(slurm):
    screen = RecordingReporter()
    outcomes = execute(
        "slurm.partition=gpu", "slurm.timeout_min=30", "slurm.gpus_per_node=1", "slurm.mem_gb=8",
        "slurm.cpus_per_task=4", "slurm.array_parallelism=1", "slurm.signal_delay_s=45",
        "slurm.additional_parameters={qos: long}", screen=screen,
    )  # fmt: skip
    script = (slurm / "queued.0").read_text()
    for line in (
        "partition=gpu", "time=30", "gpus-per-node=1", "mem=8GB", "cpus-per-task=4",
        "array=0-1%1", "signal=USR1@45", "qos=long",
    ):  # fmt: skip
        assert f"#SBATCH --{line}\n" in script
    assert [outcome.status for outcome in outcomes] == [FAILED, FAILED]
    assert "its job 7_1 ended before the run did" in outcomes[1].error
    assert screen.lines == [("failed", run) for run in RUNS]


def test_parallel_runs_in_one_job(slurm):
    outcomes = execute("slurm.runs_per_job=2")
    assert "--array" not in (slurm / "queued.0").read_text()
    assert {outcome.error.split()[2] for outcome in outcomes} == {"7"}


def test_queued_jobs_are_not_submitted_again(slurm):
    (slurm / "states").write_text("7_0 PENDING\n7_1 PENDING\n")

    class InterruptingReporter(RecordingReporter):
        def started(self, runs):
            super().started(runs)
            os.kill(os.getpid(), signal.SIGINT)

    (slurm / "bin" / "squeue").write_text("#!/bin/sh\ncat states; sed -i s/PENDING/RUNNING/ states")
    screen = InterruptingReporter()
    with pytest.raises(Interrupted):
        execute(screen=screen)
    assert screen.lines == [("started", RUNS[0])]  # it stays in the queue

    for run in read_sweep("sweep.yaml"):
        run.folder.root.mkdir(parents=True)
        run.folder.done.write_text('{"total_steps": 40}')
    assert [outcome.status for outcome in execute()] == [DONE, DONE]
    assert sorted(slurm.glob("queued.*")) == [slurm / "queued.0"]


def test_unresponsive_slurm_does_not_end_runs(slurm):
    (slurm / "bin" / "squeue").write_text(
        "#!/bin/sh\necho >>asked; test $(wc -l <asked) -gt 5 || exit 1"
    )
    assert [outcome.status for outcome in execute()] == [FAILED, FAILED]
    assert len((slurm / "asked").read_text().splitlines()) >= 7


def test_rejected_job_gives_a_clear_error(slurm):
    (slurm / "refuse").touch()
    with pytest.raises(ValueError, match=r"^sbatch rejected the job: .*invalid partition"):
        execute("slurm.partition=none")


def test_missing_slurm_gives_a_clear_error(folder, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(
        ValueError, match=r"^launcher=slurm needs the command sbatch, which was not found"
    ):
        execute()
    with pytest.raises(ValueError, match=r"slurm.runs_per_job=0 must be an integer >= 1"):
        sweep(["sweep=sweep.yaml", "launcher=slurm", "slurm.runs_per_job=0"])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("slurmctld") is None, reason="needs slurm-wlm")
def test_real_slurm():
    script = Path(__file__).parent / "slurm" / "check.sh"
    subprocess.run([script], check=True)
