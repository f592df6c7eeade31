"""Killed and stopped runs, full disks and damaged files, in real processes."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import time

import pytest
from processes import Pogo
from runs import assert_same, rows, run_folder, start, state, train

from pogo_torchrl.data import behaviour_dataset

STEPS = "total_steps=48"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Cache folder with data, shared by all runs of this file."""
    folder = tmp_path_factory.mktemp("cache")
    behaviour_dataset("hopper-medium-v2", size=2000, cache_dir=folder, progress=False)
    return f"data.cache_dir={folder}"


@pytest.fixture(scope="module")
def uninterrupted(cache, tmp_path_factory):
    """State of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    process = train(folder, cache, STEPS)
    assert process.returncode == 0, process.stderr
    return state(run_folder(folder))


def wait_for(condition, process: Pogo) -> None:
    deadline = time.monotonic() + 120
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_kill_9_at_random_times(cache, uninterrupted, tmp_path, kills):
    moments = random.Random(kills)
    metrics = run_folder(tmp_path) / "training" / "metrics.csv"
    killed = 0
    while killed < kills:
        before = len(rows(metrics)) if metrics.exists() else 0
        process = start(tmp_path, cache, STEPS, "resume=true")
        if killed:  # the first kill may also hit data loading or start-up
            wait_for(lambda n=before: metrics.exists() and len(rows(metrics)) != n, process)
        time.sleep(moments.uniform(0, 0.4 if killed else 1.5))
        if process.poll() is not None:
            break  # the run was faster
        process.kill()
        process.communicate()
        killed += 1
    process = train(tmp_path, cache, STEPS, "resume=true")
    assert process.returncode == 0, process.stderr
    assert killed > 0
    assert_same(state(run_folder(tmp_path)), uninterrupted)
    left = [p.name for p in run_folder(tmp_path).rglob(".*")]
    assert left == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signal_saves_and_the_run_resumes(cache, uninterrupted, tmp_path, number):
    metrics = run_folder(tmp_path) / "training" / "metrics.csv"
    process = start(tmp_path, cache, STEPS)
    wait_for(metrics.exists, process)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number, stderr
    step = int(max((run_folder(tmp_path) / "checkpoints").glob("step-*")).name.split("-")[1])
    assert stderr.strip() == f"Stopped at update {step}; continue with resume=true."
    resumed = train(tmp_path, cache, STEPS, "resume=true")
    assert resumed.returncode == 0, resumed.stderr
    assert f"Resumed at update {step}." in resumed.stdout
    assert_same(state(run_folder(tmp_path)), uninterrupted)


def test_forwarded_signal_counts_once(cache, uninterrupted, tmp_path):
    metrics = run_folder(tmp_path) / "training" / "metrics.csv"
    process = start(tmp_path, cache, STEPS)
    wait_for(metrics.exists, process)
    process.terminate()
    time.sleep(0.05)
    process.terminate()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, stderr
    assert train(tmp_path, cache, STEPS, "resume=true").returncode == 0
    assert_same(state(run_folder(tmp_path)), uninterrupted)


FAULTY = """
import os, time
import gymnasium
from pogo_torchrl.envs import make_env

class Faulty(gymnasium.Wrapper):
    steps = 0
    def step(self, action):
        Faulty.steps += 1
        if Faulty.steps > 5:
            open("faulty", "w").close()
            if "SLOW" in os.environ:
                time.sleep(0.2)
            if "STUCK" in os.environ:
                time.sleep(60)
            if "BROKEN" in os.environ:
                raise RuntimeError("the simulator is gone")
        return super().step(action)

gymnasium.register("Faulty-v0", lambda **kwargs: Faulty(make_env("hopper-medium-v2")))
"""


@pytest.fixture
def faulty(tmp_path):
    """The environment of the task, made slow, stuck or broken by environment variables."""
    (tmp_path / "faulty.py").write_text(FAULTY)

    def options(*variables: str) -> dict:
        return {"env": os.environ | {"PYTHONPATH": str(tmp_path)} | dict.fromkeys(variables, "1")}

    return options


def test_signal_during_an_evaluation(cache, uninterrupted, tmp_path, faulty):
    arguments = (cache, STEPS, "env.id=faulty:Faulty-v0")
    process = start(tmp_path, *arguments, **faulty("SLOW"))
    wait_for((tmp_path / "faulty").exists, process)  # in the evaluation of update 6
    asked = time.monotonic()
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert time.monotonic() - asked < 20
    assert not (run_folder(tmp_path) / "training" / "evaluations.csv").exists()
    resumed = train(tmp_path, *arguments, "resume=true", **faulty())
    assert resumed.returncode == 0, resumed.stderr
    assert_same(state(run_folder(tmp_path)), uninterrupted)


def test_second_signal_stops_immediately(cache, tmp_path, faulty):
    process = start(tmp_path, cache, STEPS, "env.id=faulty:Faulty-v0", **faulty("STUCK"))
    log = run_folder(tmp_path) / "training" / "train.log"
    wait_for((tmp_path / "faulty").exists, process)  # in the evaluation of update 6, which hangs
    process.terminate()
    wait_for(lambda: "SIGTERM: saving a checkpoint" in log.read_text(), process)
    time.sleep(1.1)  # signals within one second count as one
    assert process.poll() is None
    process.terminate()
    process.communicate(timeout=10)
    assert process.returncode == -signal.SIGTERM


def test_evaluation_environment_that_raises(cache, uninterrupted, tmp_path, faulty):
    arguments = (cache, STEPS, "env.id=faulty:Faulty-v0")
    process = train(tmp_path, *arguments, **faulty("BROKEN"))
    assert process.returncode == 1
    assert "faulty.py" in process.stderr  # where it was raised
    last = process.stderr.strip().splitlines()[-1]
    assert "The evaluation at update 6 failed: the simulator is gone" in last
    assert "resume=true" in last
    resumed = train(tmp_path, *arguments, "resume=true", **faulty())
    assert resumed.returncode == 0, resumed.stderr
    assert "Resumed at update 6." in resumed.stdout
    assert_same(state(run_folder(tmp_path)), uninterrupted)


def test_disk_full_while_saving_a_checkpoint(cache, tmp_path):
    wide = (cache, "hidden_sizes=[256,256]", "total_steps=8")  # its checkpoints are larger
    full = start(tmp_path, *wide)
    resource.prlimit(full.pid, resource.RLIMIT_FSIZE, (900_000, 900_000))  # no larger files
    _, error = full.communicate()
    assert full.returncode == 2
    assert error.startswith("pogo: cannot write a checkpoint at update 4: ")
    assert error.count("\n") == 1
    assert not list((run_folder(tmp_path) / "checkpoints").glob("*"))
    resumed = train(tmp_path, *wide, "resume=true")
    assert resumed.returncode == 0, resumed.stderr


def test_folder_that_cannot_be_written(cache, tmp_path):
    (tmp_path / "logs").write_text("a file where the folder should be")
    process = train(tmp_path, cache, STEPS)
    assert process.returncode == 2
    assert process.stderr.startswith("pogo: cannot write to logs/hopper-medium-v2")
    assert process.stderr.count("\n") == 1


def test_two_processes_in_one_folder(cache, uninterrupted, tmp_path):
    log = run_folder(tmp_path) / "training" / "train.log"
    first = start(tmp_path, cache, "total_steps=1000000", "eval_interval=1000000")
    wait_for(log.exists, first)
    second = train(tmp_path, cache, STEPS, "resume=true")
    assert second.returncode == 2
    assert "is in use by another process" in second.stderr
    assert second.stderr.count("\n") == 1
    assert first.poll() is None
    first.kill()  # its lock file is stale now and must be ignored
    first.communicate()
    shutil.rmtree(run_folder(tmp_path) / "training")
    shutil.rmtree(run_folder(tmp_path) / "checkpoints", ignore_errors=True)
    third = train(tmp_path, cache, STEPS)
    assert third.returncode == 0, third.stderr
    assert_same(state(run_folder(tmp_path)), uninterrupted)


@pytest.mark.parametrize("seed", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in (1, 2, 3))])
def test_checkpoint_truncated_at_a_random_byte(cache, uninterrupted, tmp_path, seed):
    process = train(tmp_path, cache, "total_steps=44")
    assert process.returncode == 0, process.stderr
    chance = random.Random(seed)
    newest = max((run_folder(tmp_path) / "checkpoints").glob("step-*"))
    file = chance.choice(sorted(p for p in newest.rglob("*") if p.stat().st_size and p.is_file()))
    content = file.read_bytes()
    file.write_bytes(content[: chance.randrange(len(content))])
    resumed = train(tmp_path, cache, STEPS, "resume=true")
    assert resumed.returncode == 0, resumed.stderr
    skipping = "Skipping damaged or incomplete checkpoint"
    (skipped,) = (line for line in resumed.stdout.splitlines() if skipping in line)
    assert skipped.endswith(f"{newest.name}.")
    assert "Resumed at update 40." in resumed.stdout
    found = state(run_folder(tmp_path))
    assert_same(found["metrics"], uninterrupted["metrics"])
    assert_same(found["step-000000000048/0001-loss_module"],
                uninterrupted["step-000000000048/0001-loss_module"])  # fmt: skip


def test_checkpoint_of_another_run(cache, tmp_path):
    shared = "checkpoint_dir=shared"
    assert train(tmp_path, cache, "total_steps=4", shared).returncode == 0
    for change, named in (
        ("w2_weights=[0.1,0.5,0.5]", "w2_weights: [0.1, 0.5] -> [0.1, 0.5, 0.5]"),
        ("data.size=3000", "data: "),
    ):
        again = ("total_steps=8", "log_dir=b", shared, change, "resume=true")
        process = train(tmp_path, cache, *again)
        assert process.returncode == 2
        assert f"is a checkpoint of another run ({named}" in process.stderr.splitlines()[-1]
        assert not (tmp_path / "b").exists()


def test_divergence_stops_the_run(cache, tmp_path):
    process = train(
        tmp_path, cache, "total_steps=2000", "eval_interval=2000", "lr=1e18", "log_interval=10",
        "checkpoint_interval=10",
    )  # fmt: skip
    assert process.returncode == 3, process.stderr
    assert process.stderr.startswith("pogo: Training has diverged: at update ")
    assert "larger w2_weights" in process.stderr
    assert process.stderr.count("\n") == 1
