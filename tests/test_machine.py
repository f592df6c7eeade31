"""Limits of containers, and what other systems than Linux lack."""

from __future__ import annotations

import errno
import math
import os
import signal
import subprocess
import sys

import pytest

from pogo_torchrl import machine
from pogo_torchrl.experiments import jobs
from pogo_torchrl.files import sync

GB = 1e9
# Content of /proc/self/cgroup, files below /sys/fs/cgroup, expected memory and cores.
GROUPS = {
    "version 2": (
        "0::/docker/abc\n",
        {"docker/abc/memory.max": "1500000000", "docker/abc/cpu.max": "250000 100000"},
        (1.5 * GB, 3),
    ),
    "version 2, in its own namespace": (
        "0::/\n", {"memory.max": "2000000000", "cpu.max": "50000 100000"}, (2 * GB, 1),
    ),
    "version 2, limits of a parent": (
        "0::/slice/job/task\n",
        {"slice/job/memory.max": "1000000000", "slice/job/task/memory.max": "max",
         "slice/job/task/cpu.max": "max 100000", "slice/cpu.max": "200000 100000"},
        (GB, 2),
    ),
    "version 1": (
        "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/\n",
        {"memory/docker/abc/memory.limit_in_bytes": "1500000000",
         "cpu/docker/abc/cpu.cfs_quota_us": "400000",
         "cpu/docker/abc/cpu.cfs_period_us": "100000"},
        (1.5 * GB, 4),
    ),
    "version 1, path of the host": (
        "4:memory:/docker/abc\n", {"memory/memory.limit_in_bytes": "3000000000"}, (3 * GB, 8),
    ),
    "version 1, no limits": (
        "5:cpu:/\n4:memory:/\n",
        {"memory/memory.limit_in_bytes": "9223372036854771712", "cpu/cpu.cfs_quota_us": "-1",
         "cpu/cpu.cfs_period_us": "100000"},
        (64 * GB, 8),
    ),
    "damaged": ("0::/\n", {"memory.max": "", "cpu.max": "much"}, (64 * GB, 8)),
    "none": (None, {}, (64 * GB, 8)),
}  # fmt: skip


@pytest.mark.parametrize("name", GROUPS)
def test_limits_of_containers(name, tmp_path, monkeypatch):
    membership, files, expected = GROUPS[name]
    if membership is not None:
        (tmp_path / "membership").write_text(membership)
    for path, text in files.items():
        file = tmp_path / "groups" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    monkeypatch.setattr(machine, "_MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(machine, "_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    sizes = {"SC_PHYS_PAGES": 64 * 10**6, "SC_PAGE_SIZE": 1000}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
    assert (machine.physical_memory(), machine.usable_cores()) == expected


def test_a_system_that_reports_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_MEMBERSHIP", tmp_path / "none")
    monkeypatch.delattr(os, "sysconf")
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert (machine.physical_memory(), machine.usable_cores()) == (math.inf, 1)


def test_folders_that_cannot_be_flushed(tmp_path, monkeypatch):
    file = tmp_path / "a"
    file.write_text("x")

    def fail(number):
        def fsync(descriptor):
            raise OSError(number, os.strerror(number))

        return fsync

    monkeypatch.setattr(os, "fsync", fail(errno.EINVAL))  # some network file systems
    sync(tmp_path)
    with pytest.raises(OSError, match="Invalid argument"):
        sync(file)
    monkeypatch.setattr(os, "fsync", fail(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        sync(tmp_path)
    monkeypatch.setattr(os, "open", lambda *args: fail(errno.EACCES)(0))  # Windows
    sync(tmp_path)
    with pytest.raises(PermissionError):
        sync(file)


class Process:
    """A worker process whose stdin is closed, instead of receiving a signal."""

    def __init__(self):
        self.stdin, self.received = self, []

    def close(self):
        self.received.append("end of stdin")

    def send_signal(self, number):
        self.received.append(number)


@pytest.mark.parametrize(
    ("platform", "received"), [("linux", signal.SIGINT), ("win32", "end of stdin")]
)
def test_workers_are_told_to_stop(monkeypatch, platform, received):
    process = Process()
    monkeypatch.setattr(sys, "platform", platform)
    jobs._send_signal(process, signal.SIGINT)
    assert process.received == [received]


WINDOWS = """
import os, signal
del signal.pthread_sigmask
import gymnasium, mujoco, torch._dynamo, torchrl.trainers  # which know that this is Linux
for name in ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGPIPE", "SIGKILL"):
    delattr(signal, name)
for name in ("sysconf", "sched_getaffinity", "getuid", "geteuid"):
    delattr(os, name)
opened = os.open
def open_file(path, *arguments, **options):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return opened(path, *arguments, **options)
os.open = open_file
from pogo_torchrl.configs import compose
from pogo_torchrl.experiments.run import run
from pogo_torchrl.report import write_report
run(compose(["total_steps=4", "eval_episodes=20", "hidden_sizes=[8]", "batch_size=16",
             "data.size=500", "data.cache_dir=cache", "progress_bar=false",
             "w2_weights=[0.1,0.2]", "freeze_critics_at=null"]))
write_report("logs", "results")
"""


def test_a_run_needs_nothing_that_windows_lacks(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", WINDOWS],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "4"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.rglob("done.json"))
