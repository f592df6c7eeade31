"""What runs beside the training, and must not end it: compilers, figures, loggers, rendering."""

from __future__ import annotations

import copy
import json
import logging
import os
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import matplotlib
import pytest
import torch
from runs import run_folder
from torch.testing import assert_close

from pogo_torchrl import POGOTrainer
from pogo_torchrl.experiments import csv_log, results
from pogo_torchrl.experiments.csv_log import LoggerSink, check_logger, make_logger
from pogo_torchrl.experiments.run import run
from pogo_torchrl.report import drawing, figures, write_report
from pogo_torchrl.trainers import TrainerStack


def fail(*args, **kwargs):
    raise RuntimeError("out of order")


# --------------------------------------------------------------------------- compilers


def warnings_in(caplog):
    return [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]


def broken(function, **options):
    """torch.compile where the compiler fails when the function is called first."""

    def call(*arguments):
        raise OSError("no execution from /tmp")

    return call


@pytest.mark.parametrize("compile", [broken, fail], ids=["at the first call", "at once"])
def test_an_update_that_cannot_be_compiled(make_loss, make_buffer, monkeypatch, caplog, compile):
    loss, buffer, states = make_loss(w2_backend="fast"), make_buffer(), []
    monkeypatch.setattr(torch, "compile", compile)
    for compiled in (False, True):
        trainer = POGOTrainer(
            copy.deepcopy(loss), buffer, 5, progress_bar=False, compile=compiled, policy_freq=2
        )
        torch.manual_seed(1)
        trainer.train()
        states.append((dict(trainer.loss_module.state_dict()), trainer.state_dict()))
    assert_close(states[1], states[0], rtol=0, atol=0)
    (message,) = warnings_in(caplog)
    assert message.startswith("The update runs uncompiled and slower: compiling it failed (")


def test_a_stack_that_cannot_be_compiled(make_loss, make_buffer, monkeypatch, caplog):
    loss, buffer, states = make_loss(w2_backend="fast"), make_buffer(), []
    monkeypatch.setattr(torch, "compile", broken)
    for compiled in (False, True):
        trainers = [
            POGOTrainer(copy.deepcopy(loss), buffer, 3, progress_bar=False) for _ in range(2)
        ]
        torch.manual_seed(1)
        stack = TrainerStack(trainers, lambda index: nullcontext(), compile=compiled)
        assert stack.train() == [None, None]
        states.append([dict(one.loss_module.state_dict()) for one in trainers])
    assert_close(states[1], states[0], rtol=0, atol=0)
    assert len(warnings_in(caplog)) == 1


def test_errors_of_the_update_itself_are_not_hidden(make_loss, make_buffer, monkeypatch):
    trainer = POGOTrainer(
        make_loss(w2_backend="fast"), make_buffer(), 3, progress_bar=False, compile=True
    )

    def compile(function, **options):
        return lambda *arguments: fail()

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr("pogo_torchrl.trainers.fused.update.value_and_gradients", fail)
    with pytest.raises(RuntimeError, match="out of order"):
        trainer.train()


# --------------------------------------------------------------------------- figures


def test_a_run_whose_curves_cannot_be_drawn(make_cfg, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(results, "plot_curves", fail)
    with caplog.at_level(logging.WARNING):
        run(make_cfg())
    assert json.loads((run_folder(tmp_path) / "done.json").read_text()) == {"total_steps": 6}
    assert "The curves cannot be drawn (out of order)." in caplog.messages


def test_settings_of_the_user_do_not_matter(make_cfg, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("PATH", str(tmp_path))  # without LaTeX
    user = {"text.usetex": True, "savefig.dpi": 7, "figure.dpi": 7, "font.family": "no such font"}
    with matplotlib.rc_context(user):
        run(make_cfg())
        first = write_report(tmp_path / "logs", tmp_path / "first")
        assert matplotlib.rcParams["text.usetex"]
    second = write_report(tmp_path / "logs", tmp_path / "second")
    assert (run_folder(tmp_path) / "training" / "curves.png").stat().st_size > 10_000
    files = sorted(p.relative_to(first.parent) for p in first.parent.rglob("*") if p.is_file())
    assert files
    for file in files:
        assert (first.parent / file).read_bytes() == (second.parent / file).read_bytes(), file

    caplog.clear()
    monkeypatch.setattr(figures, "encode", fail)
    third = write_report(tmp_path / "logs", tmp_path / "third")
    assert list((third.parent / "figures").iterdir()) == []
    tables = sorted(p.name for p in (first.parent / "tables").iterdir())
    assert sorted(p.name for p in (third.parent / "tables").iterdir()) == tables
    assert "](figures/" not in third.read_text()
    assert caplog.messages[0].endswith("is left out: it cannot be drawn (out of order).")


def test_a_report_replaces_no_other_readme(tmp_path):
    (tmp_path / "README.md").write_text("# My project\n")
    with pytest.raises(FileExistsError, match=r"README\.md is not an earlier report"):
        write_report(tmp_path / "logs", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]


def test_inherited_backends_of_figures_and_rendering(tmp_path):
    """A notebook hands its MPLBACKEND to commands; MUJOCO_GL may name a library that is missing.

    The user of a container may have no name.
    """
    script = (
        "import os, pogo_torchrl.experiments.run, mujoco\n"
        "from pogo_torchrl.report.drawing import Figure\n"
        "Figure().savefig('figure.png')\n"
        "print(*map(os.environ.get, ('MPLBACKEND', 'MUJOCO_GL', 'PYOPENGL_PLATFORM')))"
    )
    backends = {
        "MPLBACKEND": "module://no_such.backend",
        "MUJOCO_GL": "no-such-library",
        "TORCHINDUCTOR_CACHE_DIR": "/dev/null/cache",
    }
    env = {name: value for name, value in os.environ.items() if name != "PYOPENGL_PLATFORM"}
    process = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=env | backends, text=True,
        capture_output=True, timeout=300,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    (warning,) = process.stderr.splitlines()
    assert warning.startswith("/dev/null/cache, for compiled code, cannot be written: using ")
    assert process.stdout == "module://no_such.backend no-such-library None\n"


@pytest.mark.parametrize(
    ("inherited", "used"),
    [
        ("module://matplotlib_inline.backend_inline", None),  # of Jupyter, installed or not
        ("no-such-backend", None),
        ("svg", "svg"),
    ],
)
def test_inherited_backends_of_figures(inherited, used):
    script = (
        "import os, runpy, sys\n"
        "Figure, matplotlib = map(runpy.run_path(sys.argv[1]).get, ('Figure', 'matplotlib'))\n"
        "Figure().savefig(os.devnull, format='png')\n"
        "print(os.environ['MPLBACKEND'], matplotlib.get_backend())"
    )
    process = subprocess.run(
        [sys.executable, "-c", script, drawing.__file__], text=True, capture_output=True,
        env=os.environ | {"MPLBACKEND": inherited}, timeout=300,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    name, backend = process.stdout.split()
    assert name == inherited
    assert used in (None, backend)


# --------------------------------------------------------------------------- loggers


class BrokenLogger:
    calls = 0

    def log_scalar(self, name, value, step):
        BrokenLogger.calls += 1
        raise ConnectionError("the server is gone")


def test_a_logger_that_fails_is_left_out(caplog):
    sink = LoggerSink(BrokenLogger(), "metrics")
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            sink.write(step, [{"loss": 1.0}])
    assert BrokenLogger.calls == 1
    assert caplog.messages == [
        "metrics is not logged any more: BrokenLogger failed at update 1 (the server is gone). "
        "The CSV files go on."
    ]


def test_a_logger_that_cannot_be_started(tmp_path, monkeypatch):
    monkeypatch.setattr(csv_log, "get_logger", fail)
    with pytest.raises(ValueError, match=r"logger\.backend=csv cannot be started: out of order"):
        make_logger("csv", tmp_path, "run")


@pytest.mark.parametrize(
    ("mode", "key", "works"),
    [("online", None, False), (None, None, False), ("online", "x", True), ("offline", None, True)],
)
def test_wandb_without_a_login(monkeypatch, mode, key, works):
    settings = SimpleNamespace(mode=mode)
    module = SimpleNamespace(
        setup=lambda: SimpleNamespace(settings=settings), api=SimpleNamespace(api_key=key)
    )
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(csv_log.importlib.util, "find_spec", lambda name: object())
    if works:
        check_logger("wandb")
    else:
        with pytest.raises(ValueError, match="needs a login: run `wandb login`, set WANDB_API_KEY"):
            check_logger("wandb")
