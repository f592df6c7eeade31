"""Sweeps in real processes: uninterrupted, killed, stopped, failing, and two at once."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from processes import Pogo
from runs import assert_same, state

from pogo_torchrl.cli import main
from pogo_torchrl.data import behaviour_dataset
from pogo_torchrl.experiments import jobs as engine
from pogo_torchrl.experiments import local, planner
from pogo_torchrl.experiments.planner import Cost, measure_cost
from pogo_torchrl.experiments.run_folder import lock_run_folder
from pogo_torchrl.experiments.sweep import sweep
from pogo_torchrl.experiments.sweep_file import read_sweep

MEDIUM, REPLAY = "hopper-medium-v2/w2_0.1", "hopper-medium-replay-v2/w2_0.2_0.3"
RUNS = [f"{MEDIUM}/seed_0", f"{MEDIUM}/seed_1", f"{REPLAY}/seed_0"]
FILE = """
common:
  total_steps: 24
  eval_interval: 12
  eval_episodes: 1
  checkpoint_interval: 4
  log_interval: 4
  batch_size: 16
  hidden_sizes: [16]
  freeze_critics_at: null  # a fraction would depend on total_steps
  data: {size: 2000}
  seeds: [0, 1]
environments:
  hopper:
    medium: {w2_weights: [0.1]}
    medium-replay: {seeds: [0], w2_weights: [0.2, 0.3]}
"""
LONG = ("total_steps=1000000", "eval_interval=1000000", "compile=false")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Cache folder with the data of all runs of this file."""
    folder = tmp_path_factory.mktemp("cache")
    for task in ("hopper-medium-v2", "hopper-medium-replay-v2"):
        behaviour_dataset(task, size=2000, cache_dir=folder, progress=False)
    return f"data.cache_dir={folder}"


def start(folder: Path, *arguments: str) -> Pogo:
    return Pogo(folder, "sweep", "sweep=sweep.yaml", *arguments)


def finish(process: Pogo) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=200)
    return process.returncode, out, err


def started(output: str) -> list[str]:
    return sorted(re.findall(r"^start +(\S+)$", output, re.MULTILINE))


def workers(folder: Path, *words: str) -> list[int]:
    """Worker processes that run in a folder and have these arguments on their command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (process / "cmdline").read_text().split("\0")
            here = (process / "cwd").resolve() == folder.resolve()
        except OSError:
            continue  # it has just ended, or belongs to another user
        if here and "pogo_torchrl.experiments.worker" in arguments and set(words) <= set(arguments):
            found.append(int(process.name))
    return found


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def states(folder: Path) -> dict[str, dict]:
    """Checkpoint and metrics of every run."""
    logs = folder / "logs"
    roots = [path.parent for path in logs.rglob("training")]
    return {root.relative_to(logs).as_posix(): state(root) for root in roots}


def left_over(folder: Path) -> list[str]:
    """Names of remaining locks, temporary files and failure reports."""
    files = [p for p in folder.rglob("*") if p.name[0] == "." or p.suffix == ".log"]
    files += folder.rglob("failed.json")
    return [path.name for path in files if path.name != "train.log"]


@pytest.fixture(autouse=True)
def _threads():
    """Restore the number of threads, which a sweep in this process changes for its estimate."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _quick_estimates(monkeypatch):
    """Sweeps in this process measure their cost in a fraction of a second."""
    monkeypatch.setattr(planner, "measure_cost", partial(measure_cost, seconds=0.02))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Working folder with the sweep file."""
    (tmp_path / "sweep.yaml").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def uninterrupted(cache, tmp_path_factory):
    """Folder, exit code and output of an uninterrupted sweep of three runs."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    (folder / "sweep.yaml").write_text(FILE)
    return folder, finish(start(folder, cache, "jobs=2"))


def test_sweep_executes_every_run(uninterrupted):
    folder, (code, out, err) = uninterrupted
    assert code == 0, err
    assert "hopper-medium-v2         0.1         0, 1 to run" in out
    assert "To do: 3 runs, 72 updates" in out
    assert started(out) == sorted(RUNS)
    for number in (1, 2, 3):
        assert len(re.findall(f"^ *{number}/3 .*: done after", out, re.MULTILINE)) == 1
    assert "3 of 3 runs are done." in out
    assert sorted(states(folder)) == sorted(RUNS)
    for run in RUNS:
        done = json.loads((folder / "logs" / run / "done.json").read_text())
        assert done == {"total_steps": 24}
    assert left_over(folder) == []


def test_completed_runs_are_not_repeated(uninterrupted, cache, folder, capsys):
    shutil.copytree(uninterrupted[0] / "logs", folder / "logs")
    arguments = ["sweep=sweep.yaml", cache, "total_steps=20"]
    assert sweep(arguments) == 0
    out = capsys.readouterr().out
    assert started(out) == []
    assert "To do: 0 of 3 runs, 0 updates" in out
    shutil.rmtree(folder / "logs" / MEDIUM / "seed_1")
    (folder / "sweep.yaml").write_text(FILE.replace("seeds: [0, 1]", "seeds: [1]"))
    assert sweep([*arguments[:-1], "total_steps=28"]) == 0  # one from scratch, one resumes
    out = capsys.readouterr().out
    assert "0.1         1 to run" in out
    assert "0.2, 0.3    0 to resume" in out
    assert "To do: 2 runs, 32 updates" in out
    assert json.loads((folder / "logs" / REPLAY / "seed_0" / "done.json").read_text()) == {
        "total_steps": 28
    }


def test_folder_of_a_run_with_other_settings(uninterrupted, cache, folder, capsys):
    shutil.copytree(uninterrupted[0] / "logs", folder / "logs")
    shutil.rmtree(folder / "logs" / MEDIUM / "seed_1")
    (folder / "sweep.yaml").write_text(FILE.replace("[0.1]", "[0.1], lr: 1e-3"))
    assert sweep(["sweep=sweep.yaml", cache]) == 1
    out = capsys.readouterr().out
    assert "0 conflicting; 1 to run" in out
    assert started(out) == [f"{MEDIUM}/seed_1"]
    assert "2 of 3 runs are done." in out
    assert f"{MEDIUM}/seed_0: resume=true would change the run" in out
    assert "(lr: 0.0003 -> 0.001)" in out
    assert left_over(folder) == []  # the existing run is not marked as failed


@pytest.mark.parametrize("content", ["", "[1]", "a: [", "5", "\0", "\xff"])
def test_folder_with_a_damaged_config(folder, content):
    run = read_sweep("sweep.yaml")[0]
    run.folder.training.mkdir(parents=True)
    (run.folder.training / "config.yaml").write_bytes(content.encode("latin1"))
    assert engine.run_state(run) == engine.CONFLICT


def test_killed_sweep_resumes(uninterrupted, cache, folder):
    process = start(folder, cache, "jobs=2")
    wait_for(lambda: ": done" in process.output())
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    wait_for(lambda: not workers(folder))  # the workers notice and stop
    before = {run for run in RUNS if (folder / "logs" / run / "done.json").exists()}
    assert 0 < len(before) < 3
    code, out, err = finish(start(folder, cache, "jobs=2"))
    assert code == 0, err
    assert set(started(out)) == set(RUNS) - before
    assert_same(states(folder), states(uninterrupted[0]))
    for run in set(RUNS) - before:
        assert left_over(folder / "logs" / run) == []


def test_failures_do_not_affect_other_runs_and_are_retried(uninterrupted, cache, folder):
    (folder / "sweep.yaml").write_text(FILE.replace("[0.2, 0.3]", "[0.2, 0.3], tau: 2"))
    process = start(folder, cache, "jobs=2")
    wait_for(lambda: workers(folder, "seed=1"))
    os.kill(*workers(folder, "seed=1"), signal.SIGKILL)
    code, out, _ = finish(process)
    assert code == 1
    assert started(out) == sorted(RUNS)
    assert "1 of 3 runs are done." in out
    _, listed = out.split("Failed (run the same command again to retry):")
    assert f"{MEDIUM}/seed_1: the process was killed by SIGKILL" in listed
    assert f"{REPLAY}/seed_0: tau=2.0 must be in (0, 1]" in listed
    failed = json.loads((folder / "logs" / REPLAY / "seed_0" / "failed.json").read_text())
    assert failed["error"].startswith("tau=2.0")
    assert failed["exit_code"] == 2

    # Two sweeps in parallel execute every missing run exactly once.
    (folder / "sweep.yaml").write_text(FILE)
    results = [finish(process) for process in [start(folder, cache, "jobs=1") for _ in range(2)]]
    for code, out, err in results:
        assert code == 0, err
        assert "3 of 3 runs are done." in out
    # The sweep that starts later may find the failed run running again.
    reason = "failed before: the process was killed by SIGKILL"
    assert any(f"{MEDIUM}/seed_1 {reason}" in out for _, out, _ in results)
    assert sorted(started(results[0][1]) + started(results[1][1])) == sorted(RUNS[1:])
    assert_same(states(folder), states(uninterrupted[0]))
    assert left_over(folder) == []


def test_signal_makes_runs_save_and_stop(cache, folder):
    process = start(folder, cache, "jobs=2", *LONG)
    metrics = [folder / "logs" / run / "training" / "metrics.csv" for run in RUNS[:2]]
    wait_for(lambda: all(path.exists() for path in metrics))
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert code == 128 + signal.SIGINT
    assert err.splitlines() == [
        "SIGINT: saving checkpoints and stopping all runs "
        "(send the signal again to stop immediately).",
        "Stopped; run the same command again to continue.",
    ]
    assert not workers(folder)
    assert out.count(": stopped after") == out.count("stopped") == 2
    assert started(out) == RUNS[:2]
    for run in RUNS[:2]:
        assert list((folder / "logs" / run / "checkpoints").glob("step-*"))
        log = (folder / "logs" / run / "training" / "train.log").read_text()
        assert log.count("SIGINT: saving a checkpoint") == 1
    assert left_over(folder) == []


def test_run_locked_by_another_sweep_is_held(cache, folder):
    run = read_sweep("sweep.yaml", [cache])[0]
    job = engine.Job.of(run)
    with engine._lock_run(run.folder) as acquired:
        assert acquired
        assert engine.run_state(run) == engine.RUNNING
        assert [outcome.status for outcome in engine.Worker(job)()] == [engine.HELD]
    # A failure that occurred after the job was created is reported and not retried.
    engine._record_failure(run.folder, "it broke", 1)
    (outcome,) = engine.Worker(job)()
    assert (outcome.status, outcome.error) == (engine.FAILED, "it broke")
    assert engine.run_state(run) == engine.FAILED_BEFORE
    assert not run.folder.training.exists()


def test_run_locked_by_a_single_run_is_held(cache, folder):
    run = read_sweep("sweep.yaml", [cache])[0]
    with lock_run_folder(run.folder):
        (outcome,) = engine.Worker(engine.Job.of(run))()
        assert outcome.status == engine.HELD
    assert engine.run_state(run) == engine.NEW


def test_dry_run_prints_the_plan_and_writes_nothing(cache, folder, capsys):
    assert sweep(["sweep=sweep.yaml", cache, "dry_run=true", "total_steps=1000"]) == 0
    out = capsys.readouterr().out
    assert "To do: 3 runs, 3,000 updates" in out
    assert re.search(r"Time: +about .* an estimate from", out)
    assert re.search(r"Disk: +about .* of .* free", out)
    assert [path.name for path in folder.iterdir()] == ["sweep.yaml"]


def test_too_small_disk_is_rejected(cache, folder, monkeypatch):
    monkeypatch.setattr(planner, "measure_cost", lambda cfg: Cost(1.0, 1.0, 10**6, 10**5))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 1000))
    with pytest.raises(OSError, match=r"log_dir=logs: the runs need about 6\.91 MB, only 1 kB"):
        sweep(["sweep=sweep.yaml", cache])
    assert not (folder / "logs").exists()


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        ([], "sweep is missing"),
        (["sweep=sweep.yaml", "launcher=ship"], "launcher=ship is unknown; choose one of local"),
        (["sweep=sweep.yaml", "jobs=0"], "jobs=0 must be an integer >= 1"),
        (["sweep=sweep.yaml", "job=2"], "unknown option 'job'; did you mean jobs"),
        (["sweep=sweep.yaml", "dry_run=perhaps"], "dry_run=perhaps must be true or false"),
        (["sweep=sweep.yaml", "lr=high"], "lr=high must be a number"),
        (["sweep=sweep.yaml", "--multirun"], "unknown option 'multirun'"),
        (["sweep=gone.yaml"], "sweep=gone.yaml is neither a file"),
    ],
)
def test_bad_input_gives_a_one_line_error(folder, capsys, arguments, answer):
    with pytest.raises(SystemExit) as exit:
        main(["sweep", *arguments])
    assert exit.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("pogo: ")
    assert answer in err
    assert err.count("\n") == 1
    assert not (folder / "logs").exists()


def test_help_lists_the_sweep_options(capsys):
    main(["sweep", "--help"])
    out = capsys.readouterr().out
    for name in ("sweep", "results_dir", "launcher", "jobs", "dry_run"):
        assert f"\n  {name} " in out


def test_estimated_checkpoint_size(uninterrupted, monkeypatch):
    monkeypatch.chdir(uninterrupted[0])
    run = read_sweep("sweep.yaml")[-1]
    cost = measure_cost(run.cfg, seconds=0.1)
    assert cost.update > 0
    assert cost.evaluation > 0
    sizes = 0
    for name, part in state(run.folder.root).items():
        if "rng" not in name:
            leaves = torch.utils._pytree.tree_leaves(part)
            sizes += sum(v.nbytes for v in leaves if isinstance(v, torch.Tensor) and v.dim())
    assert cost.checkpoint == pytest.approx(sizes, rel=0.02)
    files = [path.stat().st_size for path in run.folder.root.rglob("*") if path.is_file()]
    assert cost.disk(run.cfg) == pytest.approx(sum(files), rel=0.5)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Jobs of the sweep file with device=auto and with device=cpu."""
    file = tmp_path_factory.mktemp("jobs") / "sweep.yaml"
    file.write_text(FILE)
    return [
        [engine.Job.of(run) for run in read_sweep(str(file), [option])]
        for option in ("device=auto", "device=cpu")
    ]


@pytest.mark.parametrize(
    ("most", "cores", "gpus", "threads", "count", "each"),
    [
        (None, 8, [], "", 3, "1"),  # at most one per run
        (None, 2, [], "", 2, "1"),
        (None, 8, [], "4", 2, "4"),
        (2, 8, [], "", 2, "4"),
        (None, 8, ["0"], "", 1, "8"),
        (None, 8, ["3", "5"], "", 2, "4"),
        (3, 8, ["3", "5"], "", 3, "2"),
    ],
)
def test_processes_share_cores_and_gpus(jobs, monkeypatch, most, cores, gpus, threads, count, each):
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    monkeypatch.setattr(local, "usable_cores", lambda: cores)
    monkeypatch.setattr(local, "_gpus", lambda: gpus)
    anywhere, on_cpu = jobs
    environments = local.process_environments(most, anywhere)
    assert [e["OMP_NUM_THREADS"] for e in environments] == [each] * count
    seen = [e.get("CUDA_VISIBLE_DEVICES") for e in environments]
    assert seen == ([None] * count if len(gpus) < 2 else (gpus * 2)[:count])
    assert all("CUDA_VISIBLE_DEVICES" not in e for e in local.process_environments(most, on_cpu))
