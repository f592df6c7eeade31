"""Folders of runs: two runs are never mixed, and a start that left no run can be repeated."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import urllib.request
from functools import partial
from pathlib import Path

import pytest
from runs import SMALL, assert_same, rows, run_folder, state

from pogo_torchrl.cli import main
from pogo_torchrl.configs import compose
from pogo_torchrl.data import behaviour_dataset, read_hdf5, rollouts
from pogo_torchrl.data.download import download
from pogo_torchrl.experiments import algorithms, results
from pogo_torchrl.experiments import run as run_module
from pogo_torchrl.experiments.run import RunInProgress, run
from pogo_torchrl.experiments.run_folder import RunFolder, lock_run_folder
from pogo_torchrl.experiments.run_stack import run_stack
from pogo_torchrl.experiments.signals import Interrupted, interruptible
from pogo_torchrl.files import _writer, atomic_write, cache_folder, cannot_write, make_writable
from pogo_torchrl.trainers import POGOOptimizationStepper


@pytest.fixture(scope="module")
def uninterrupted(cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    run(compose([*SMALL, "total_steps=6", f"log_dir={folder / 'logs'}", f"data.cache_dir={cache}"]))
    return state(run_folder(folder))


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --------------------------------------------------------------------------- one folder, two runs


def test_two_runs_with_one_checkpoint_dir(make_cfg, tmp_path):
    shared = tmp_path / "shared"
    both = f"checkpoint_dir={shared}"
    run(make_cfg(both))
    before = content(shared)
    with pytest.raises(FileExistsError, match=r"shared already contains step-0+6 of another run"):
        run(make_cfg(both, "seed=1"))
    with pytest.raises(ValueError, match=r"is a checkpoint of another run \(seed: 0 -> 1\)"):
        run(make_cfg(both, "seed=1", "resume=true"))
    for path in shared.glob("step-*"):
        shutil.rmtree(path)  # to save space
    for resume, error, message in (
        ("false", FileExistsError, r"shared already contains policy\.safetensors of another run"),
        ("true", ValueError, r"is the policy of another run \(seed: 0 -> 1\)"),
    ):
        with pytest.raises(error, match=message):
            run(make_cfg(both, "seed=1", f"resume={resume}"))
    assert content(shared).items() <= before.items()
    assert not (run_folder(tmp_path).parent / "seed_1").exists()
    assert [p.name for p in shared.glob(".*")] == []


def test_a_run_with_a_checkpoint_dir_resumes(make_cfg, tmp_path, uninterrupted):
    shared = f"checkpoint_dir={tmp_path / 'shared'}"
    run(make_cfg(shared, "total_steps=4"))
    (tmp_path / "logs").rename(tmp_path / "moved")
    run(make_cfg(shared, "resume=true", f"log_dir={tmp_path / 'moved'}"))
    shutil.copytree(tmp_path / "moved", tmp_path / "logs")
    shutil.copytree(tmp_path / "shared", run_folder(tmp_path) / "checkpoints")
    found = state(run_folder(tmp_path))
    assert_same(found["metrics"], uninterrupted["metrics"])


def test_the_checkpoints_of_another_run_in_its_own_folder(make_cfg, tmp_path):
    run(make_cfg())
    theirs = run_folder(tmp_path) / "checkpoints"
    before = content(theirs)
    with pytest.raises(FileExistsError, match="checkpoints already contains step-"):
        run(make_cfg("seed=1", f"checkpoint_dir={theirs}"))
    for path in theirs.glob("step-*"):
        shutil.rmtree(path)
    with pytest.raises(ValueError, match=r"is the policy of another run \(seed: 0 -> 1\)"):
        run(make_cfg("seed=1", f"checkpoint_dir={theirs}", "resume=true"))
    assert content(theirs).items() <= before.items()


def test_a_checkpoint_dir_is_locked(make_cfg, tmp_path):
    shared = f"checkpoint_dir={tmp_path / 'shared'}"
    with lock_run_folder(RunFolder.of(make_cfg(shared))):
        message = r"shared is in use by another process.*choose another checkpoint_dir"
        with pytest.raises(FileExistsError, match=message):
            run(make_cfg(shared, "seed=1"))
    first, second = run_stack([make_cfg(shared), make_cfg(shared, "seed=1")])
    assert first is None
    assert isinstance(second, FileExistsError)


# --------------------------------------------------------------------------- starts without a run


@pytest.fixture
def killed(monkeypatch):
    """Context in which runs leave their files as if they were killed after some updates."""

    class Killed(BaseException):
        pass

    def kill_at(step, cfg):
        advance = POGOOptimizationStepper.advance

        def die(self, count):
            if self.steps >= step:
                raise Killed
            advance(self, count)

        with monkeypatch.context() as patch:
            patch.setattr(RunInProgress, "close", lambda self: None)
            patch.setattr(POGOOptimizationStepper, "advance", die)
            with pytest.raises(Killed):
                run(cfg)

    return kill_at


def test_killed_before_the_first_update(make_cfg, tmp_path, uninterrupted, killed):
    killed(0, make_cfg("lr=1e-5"))
    folder = run_folder(tmp_path)
    assert (folder / "training" / "config.yaml").exists()
    (folder / "checkpoints" / ".step-000000000004-abc").mkdir(parents=True)
    (folder / "training" / f".metrics.csv.{_writer(2**30)}.ab.tmp").touch()
    run(make_cfg())  # also with another lr
    assert_same(state(folder), uninterrupted)
    assert [p.name for p in folder.rglob(".*")] == []


def test_killed_before_the_first_checkpoint(make_cfg, tmp_path, uninterrupted, killed):
    few = ("checkpoint_interval=6", "log_interval=2")
    killed(5, make_cfg(*few))
    assert len(rows(run_folder(tmp_path) / "training" / "metrics.csv")) == 2
    with pytest.raises(FileExistsError, match="already contains a run"):
        run(make_cfg(*few, "lr=1e-5"))  # another run
    with pytest.raises(FileExistsError, match="already contains a run"):
        killed(5, make_cfg(*few, "data.source=local", "seed=0", "gamma=0.9"))
    run(make_cfg(*few))
    assert len(rows(run_folder(tmp_path) / "training" / "metrics.csv")) == 3
    assert_same(
        rows(run_folder(tmp_path) / "training" / "evaluations.csv"), uninterrupted["evaluations"]
    )
    with pytest.raises(FileExistsError, match="already contains a run"):
        run(make_cfg(*few))


def test_a_run_whose_checkpoints_are_elsewhere_stays(make_cfg, tmp_path, killed):
    killed(5, make_cfg())  # it has saved at update 4
    (run_folder(tmp_path) / "checkpoints").rename(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError, match="already contains a run"):
        run(make_cfg())


# --------------------------------------------------------------------------- signals at any time


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_before_the_first_update(options, tmp_path, monkeypatch, capsys, number):
    def receive(*args, **kwargs):
        signal.raise_signal(number)

    owner, name = {
        signal.SIGTERM: (run_module, "make_replay_buffer"),  # reading or generating data
        signal.SIGHUP: (POGOOptimizationStepper, "update_on"),  # compiling
        signal.SIGUSR1: (algorithms, "make_loss"),
        signal.SIGINT: (POGOOptimizationStepper, "update_on"),
    }[number]
    monkeypatch.setattr(owner, name, receive)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    arguments = sys.argv
    try:
        with pytest.raises(SystemExit) as stop:
            main(["train", *options])
    finally:
        signal.signal(signal.SIGHUP, before)
        sys.argv = arguments
    assert stop.value.code == 128 + number
    assert capsys.readouterr().err == (
        f"pogo: stopped by {number.name} before the first update; the same command starts again.\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_signal_before_a_resumed_run_continues(make_cfg, tmp_path, monkeypatch, uninterrupted):
    run(make_cfg("total_steps=4"))
    with monkeypatch.context() as patch:
        patch.setattr(
            POGOOptimizationStepper, "update_on", lambda *_: signal.raise_signal(signal.SIGTERM)
        )
        with pytest.raises(Interrupted):
            run(make_cfg("resume=true"))
    run(make_cfg("resume=true"))
    assert_same(state(run_folder(tmp_path))["metrics"], uninterrupted["metrics"])


@pytest.mark.parametrize("where", ["download", "generation"])
def test_a_signal_leaves_no_partial_files(tmp_path, monkeypatch, where):
    class Response:
        def __init__(self):
            self.headers = {"Content-Length": "10"}

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def read(self, size):
            assert len(list(tmp_path.iterdir())) == 1
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: Response())
    monkeypatch.setattr(rollouts, "_to_hdf5", lambda *_: signal.raise_signal(signal.SIGTERM))
    work = {
        "download": partial(download, "http://127.0.0.1/file", tmp_path / "file", progress=False),
        "generation": partial(
            behaviour_dataset, "hopper-medium-v2", size=10, cache_dir=tmp_path, progress=False
        ),
    }[where]
    with interruptible(), pytest.raises(Interrupted) as stop:
        work()
    assert stop.value.exit_code == 143
    assert list(tmp_path.iterdir()) == []


def test_partial_files_of_dead_processes_are_removed(tmp_path):
    with atomic_write(tmp_path / "a") as file:
        file.write(b"own")
        (own,) = tmp_path.iterdir()
        dead = own.with_name(own.name.replace(f"-{os.getpid()}.", f"-{2**30}."))
        other = tmp_path / f".a.0123abcd-{2**30}.ab.tmp"  # of another machine
        foreign = tmp_path / ".notes.tmp"
        for path in (dead, other, foreign):
            path.touch()
        make_writable(tmp_path, "log_dir")
        assert sorted(tmp_path.iterdir()) == sorted([own, other, foreign])
    assert (tmp_path / "a").read_bytes() == b"own"


# --------------------------------------------------------------------------- messages


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
def test_messages_tell_permission_from_a_full_disk(tmp_path, code):
    error = cannot_write(tmp_path, "log_dir", OSError(code, os.strerror(code)))
    remedy = "free disk space, or " if code in (errno.ENOSPC, errno.EDQUOT) else ""
    assert str(error) == (
        f"cannot write to {tmp_path} ({os.strerror(code)}): {remedy}choose another folder with "
        "log_dir."
    )


def test_a_user_without_a_home_folder(monkeypatch):
    def unknown():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", unknown)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with pytest.raises(OSError, match=r"no home folder: choose one with data\.cache_dir"):
        cache_folder()


def test_full_disk_at_the_very_end(make_cfg, tmp_path, monkeypatch):
    def full(path, *args, **kwargs):
        if path.name == "done.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        return atomic_write(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(results, "atomic_write", full)
        with pytest.raises(OSError, match=r"seed_0 \(No space left on device\): free disk space"):
            run(make_cfg())
    run(make_cfg("resume=true"))
    assert json.loads((run_folder(tmp_path) / "done.json").read_text()) == {"total_steps": 6}


def test_folders_that_must_not_be_searched(tmp_path, monkeypatch, capsys):
    """Without permission (x) for a folder, it is unknown which files are in it."""
    error = PermissionError(13, "Permission denied", str(tmp_path / "file"))

    def refuse(path, *args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", refuse)
        with pytest.raises(PermissionError, match=r"looked up .*\(x\).* with data\.cache_dir"):
            cache_folder(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_file", refuse)
        with pytest.raises(PermissionError, match=r"data\.hdf5 cannot be read .*ask its owner"):
            read_hdf5(tmp_path / "data.hdf5")
    with monkeypatch.context() as patch:
        patch.setattr("pogo_torchrl.report.write_report", refuse)
        with pytest.raises(SystemExit) as stop:
            main(["report"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        f"pogo: no access to {tmp_path}/file (Permission denied): ask its owner for permission, or "
        "choose another file or folder.\n"
    )
