"""Lost screens: closed pipes, full disks, closed descriptors and encodings; and hung-up signals."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from runs import command, run_folder

from pogo_torchrl.cli import main
from pogo_torchrl.experiments.console import TrainLogHandler, log_to
from pogo_torchrl.experiments.run import RunInProgress, run
from pogo_torchrl.experiments.run_stack import run_stack
from pogo_torchrl.experiments.signals import Stopped, on_signals
from pogo_torchrl.screen import ExpendableStream, expendable_screen


class Lost(io.TextIOBase):
    """Stream of which the other side is gone."""

    def __init__(self, code: int = errno.EPIPE) -> None:
        super().__init__()
        self.code = code

    def write(self, text):
        raise OSError(self.code, os.strerror(self.code))

    def flush(self):
        self.write("")


@pytest.fixture
def lost_screen(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Lost())
    monkeypatch.setattr(sys, "stderr", Lost(errno.ENOSPC))


def done(tmp_path) -> dict:
    return json.loads((run_folder(tmp_path) / "done.json").read_text())


@pytest.mark.usefixtures("lost_screen")
def test_a_run_without_a_screen(make_cfg, tmp_path):
    run(make_cfg("progress_bar=true"))
    assert done(tmp_path) == {"total_steps": 6}
    assert "Checkpoints: " in (run_folder(tmp_path) / "training" / "train.log").read_text()


@pytest.mark.usefixtures("lost_screen")
def test_a_stack_without_a_screen(make_cfg, tmp_path):
    assert run_stack([make_cfg("seed=0"), make_cfg("seed=1")]) == [None, None]
    assert done(tmp_path) == {"total_steps": 6}


def test_reports_and_evaluations_without_a_screen(make_cfg, tmp_path, monkeypatch):
    run(make_cfg())
    policy = run_folder(tmp_path) / "checkpoints" / "policy.safetensors"
    for arguments in (
        ["report", f"log_dir={tmp_path / 'logs'}", f"results_dir={tmp_path / 'results'}"],
        ["evaluate", str(policy), "episodes=1"],
    ):
        monkeypatch.setattr(sys, "stdout", Lost())
        monkeypatch.setattr(sys, "stderr", Lost())
        main(arguments)  # its exit code is 0
    assert (tmp_path / "results" / "README.md").exists()


@pytest.mark.parametrize("log", ["/dev/full", "/dev/null/train.log"])
def test_a_log_that_cannot_be_written(log):
    logger = logging.getLogger("pogo_torchrl")
    with log_to(TrainLogHandler(Path(log))):
        logger.info("text")


def test_streams_that_fail():
    for stream in (None, Lost(), Lost(errno.EIO), Lost(errno.ENOSPC)):
        print("text", file=ExpendableStream(stream), flush=True)
    with io.StringIO() as closed:
        pass
    print("text", file=ExpendableStream(closed), flush=True)
    before = sys.stdout, sys.stderr
    with expendable_screen(), expendable_screen():
        assert sys.stdout.stream is before[0]
    assert (sys.stdout, sys.stderr) == before


# Descriptors that are closed, and an encoding that cannot show the path of the run.
@pytest.mark.parametrize("lost", ["closed", "full"])
def test_processes_without_a_screen(cache, tmp_path, lost):
    def close():
        for descriptor in (0, 1, 2):
            os.close(descriptor)

    log_dir = tmp_path / "Läufe"
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            command(f"log_dir='{log_dir}'", f"data.cache_dir={cache}", "total_steps=6"),
            stdout=full,
            stderr=full,
            preexec_fn=close if lost == "closed" else None,
            env=os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"},
            timeout=300,
        )
    assert process.returncode == 0
    (found,) = log_dir.rglob("done.json")
    training = found.parent / "training"
    assert "Läufe" in (training / "train.log").read_text(encoding="utf-8")
    assert "Läufe" in (training / "config.yaml").read_text(encoding="utf-8")


# --------------------------------------------------------------------------- SIGHUP


def test_a_closed_terminal_saves_and_stops(make_cfg, tmp_path, monkeypatch):
    report = RunInProgress._report

    def hang_up(self, evaluations):
        report(self, evaluations)
        signal.raise_signal(signal.SIGHUP)

    monkeypatch.setattr(RunInProgress, "_report", hang_up)
    monkeypatch.setattr(sys, "stdout", Lost(errno.EIO))
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with pytest.raises(Stopped) as stop:
            run(make_cfg("total_steps=12"))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert stop.value.exit_code == 128 + signal.SIGHUP
    assert (run_folder(tmp_path) / "checkpoints" / "step-000000000006").is_dir()


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with on_signals(pytest.fail):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
