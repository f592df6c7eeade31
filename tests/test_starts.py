"""Starts of runs: in threads, in Hydra applications, and those that fail before an update."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.version import getbase
from runs import run_folder, state

from pogo_torchrl.cli import main
from pogo_torchrl.configs import compose
from pogo_torchrl.experiments import run as run_module
from pogo_torchrl.experiments.run import run
from pogo_torchrl.experiments.run_stack import run_stack
from pogo_torchrl.experiments.signals import on_signals
from pogo_torchrl.trainers import POGOOptimizationStepper, TrainerStack

SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


# --------------------------------------------------------------------------- threads


def test_a_run_in_another_thread_leaves_signals_alone(make_cfg, tmp_path):
    before = [signal.getsignal(number) for number in SIGNALS]
    evaluations = asyncio.run(asyncio.to_thread(run, make_cfg()))
    assert sorted(e.actor for e in evaluations) == [0, 0, 1, 1]
    assert json.loads((run_folder(tmp_path) / "done.json").read_text()) == {"total_steps": 6}
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_signals_are_handled_in_the_main_thread_only():
    found = []

    def enter():
        with on_signals(print) as previous:
            found.append(sorted(previous))

    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
    enter()
    signal.signal(signal.SIGHUP, before)
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [sorted(map(int, SIGNALS)), []]


# --------------------------------------------------------------------------- failed starts


def fail(*args, **kwargs):
    raise RuntimeError("no start today")


FAILURES = {
    "logger": (run_module, "make_logger"),
    "csv": (run_module, "CSVSink"),
    "config": (run_module, "atomic_write"),
    "signals": (run_module, "stop_on_signals"),
    "first update": (POGOOptimizationStepper, "update_on"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_start_that_failed_leaves_nothing(make_cfg, tmp_path, monkeypatch, failure):
    with monkeypatch.context() as patch:
        patch.setattr(*FAILURES[failure], fail)
        patch.setattr(run_module, "check_logger", lambda name, stacked: None)
        with pytest.raises(RuntimeError, match="no start today"):
            run(make_cfg("logger.backend=tensorboard" if failure == "logger" else "seed=0"))
    assert list(tmp_path.iterdir()) == []
    run(make_cfg())
    assert (run_folder(tmp_path) / "done.json").exists()


def test_wrong_data_give_the_error_only(tmp_path, monkeypatch, capsys):
    """Not the line that a run has started, which would come first."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.hdf5").write_text("no data")
    for path, message in (("none", "is not a file"), ("bad.hdf5", "is not a readable HDF5 file")):
        with pytest.raises(SystemExit):
            main(["train", "task=mine", "env.id=null", "data.source=hdf5", f"data.path={path}"])
        out, error = capsys.readouterr()
        assert out == ""
        assert message in error
        assert error.count("\n") == 1


def test_files_that_were_there_before_stay(make_cfg, tmp_path, monkeypatch):
    notes = run_folder(tmp_path) / "training" / "notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    monkeypatch.setattr(POGOOptimizationStepper, "update_on", fail)
    with pytest.raises(RuntimeError):
        run(make_cfg())
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [notes]


def test_a_failed_start_of_a_resumed_run_leaves_the_run(make_cfg, tmp_path, monkeypatch):
    run(make_cfg())
    before = state(run_folder(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(POGOOptimizationStepper, "update_on", fail)
        with pytest.raises(RuntimeError):
            run(make_cfg("resume=true", "total_steps=8"))
    after = state(run_folder(tmp_path))
    assert after.keys() == before.keys()
    assert after["metrics"] == before["metrics"]
    run(make_cfg("resume=true", "total_steps=8"))
    assert json.loads((run_folder(tmp_path) / "done.json").read_text()) == {"total_steps": 8}


@pytest.mark.parametrize("failure", [(TrainerStack, "train"), (TrainerStack, "update")])
def test_a_stack_that_failed_leaves_nothing(make_cfg, tmp_path, monkeypatch, failure):
    monkeypatch.setattr(*failure, fail)
    with pytest.raises(RuntimeError):
        run_stack([make_cfg("seed=0"), make_cfg("seed=1")])
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------- Hydra applications


@pytest.fixture
def application(tmp_path):
    """Folder with the configuration of another Hydra application."""
    (tmp_path / "other.yaml").write_text("answer: 42\n")
    return initialize_config_dir(str(tmp_path), version_base="1.2")


def test_compose_works_within_a_hydra_application(application):
    with application:
        outer, version = GlobalHydra.instance(), getbase()
        assert compose(["seed=3"]).seed == 3
        with pytest.raises(ValueError, match="unknown option 'sead'"):
            compose(["sead=3"])
        assert GlobalHydra.instance() is outer
        assert getbase() == version
        assert hydra_compose("other").answer == 42
    assert not GlobalHydra.instance().is_initialized()


def test_compose_works_in_many_threads():
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda seed: compose([f"seed={seed}"]).seed, range(8))
        assert list(found) == list(range(8))
