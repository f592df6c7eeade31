"""Locks of run folders and caches, with and without the locks of the file system."""

from __future__ import annotations

import errno
import fcntl
import os
import threading

import pytest
from runs import SMALL, run_folder

from pogo_torchrl.configs import compose
from pogo_torchrl.data import behaviour_dataset
from pogo_torchrl.experiments import jobs
from pogo_torchrl.experiments.run import run
from pogo_torchrl.experiments.run_folder import RunFolder, lock_run_folder
from pogo_torchrl.experiments.sweep_file import Run
from pogo_torchrl.locks import Held, hold, is_held

NO_LOCKS = (None, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@pytest.fixture(params=NO_LOCKS, ids=lambda code: errno.errorcode.get(code, "locks"))
def file_system(request, monkeypatch):
    """File systems by the error of flock, if any."""

    def flock(descriptor, operation):
        raise OSError(request.param, os.strerror(request.param))

    if request.param is not None:
        monkeypatch.setattr(fcntl, "flock", flock)
    return request.param


@pytest.mark.usefixtures("file_system")
def test_one_holder_at_a_time(tmp_path):
    path = tmp_path / ".lock"
    with hold(path):
        assert is_held(path)
        with pytest.raises(Held), hold(path):
            pytest.fail("held twice")
    assert not is_held(path)
    with hold(path):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("file_system")
def test_waiting(tmp_path):
    path, order = tmp_path / ".lock", []

    def wait():
        with hold(path, wait=True):
            order.append("second")

    with hold(path):
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("file_system")
def test_runs_and_caches(tmp_path):
    small = [*SMALL, "total_steps=6", "data.size=200", f"log_dir={tmp_path / 'logs'}"]
    cfg = compose([*small, f"data.cache_dir={tmp_path / 'cache'}", "resume=true"])
    one = Run((), cfg)
    with lock_run_folder(RunFolder.of(cfg)):
        with pytest.raises(FileExistsError, match="seed_0 is in use by another process"):
            run(cfg)
        assert jobs.run_state(one) == jobs.RUNNING
    run(cfg)
    assert jobs.run_state(one) == jobs.DONE
    assert (run_folder(tmp_path) / "done.json").exists()
    assert [p.name for p in tmp_path.rglob(".*")] == []


def test_the_holder_is_named_where_locks_are_files(tmp_path, monkeypatch):
    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    path = tmp_path / ".lock"
    with hold(path):
        with pytest.raises(Held) as error, hold(path):
            pytest.fail("held twice")
        assert str(error.value).startswith(f" (process {os.getpid()} on ")
        assert f"if it has ended, delete {path}.held)" in str(error.value)


def test_other_errors_are_not_taken_for_missing_locks(tmp_path, monkeypatch):
    def flock(descriptor, operation):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output error"):
        behaviour_dataset("hopper-medium-v2", size=10, cache_dir=tmp_path, progress=False)
