"""CSV files across resumes, and TorchRL's loggers."""

from __future__ import annotations

import importlib.util
import inspect
import re
import signal
import sqlite3
from pathlib import Path

import pytest
from torchrl.record.loggers import get_logger

from pogo_torchrl.experiments import csv_log
from pogo_torchrl.experiments.csv_log import (
    LOGGERS,
    CSVSink,
    LoggerSink,
    check_logger,
    close_logger,
    make_logger,
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.csv"


def test_header_and_rows(path):
    sink = CSVSink(path)
    sink.write(5, [{"loss": 0.5, "name": "a,b"}])
    sink.write(10, [{"loss": 1e-9, "name": "c"}, {"loss": 2.0, "name": "d"}])
    assert path.read_text() == 'step,loss,name\n5,0.5,"a,b"\n10,1e-09,c\n10,2.0,d\n'


def test_new_run_replaces_the_file(path):
    path.write_text("step,loss\n1,2\n")
    CSVSink(path).write(3, [{"score": 4}])
    assert path.read_text() == "step,score\n3,4\n"


@pytest.mark.parametrize(
    "tail",
    ["", "20,3.0\n30,4.0\n", "20,3.0\n3", "20", "20,3.0\n\x00\x00,1\n"],
    ids=["complete", "later", "truncated step", "truncated row", "garbage"],
)
def test_resume_drops_later_and_truncated_rows(path, tail):
    path.write_text("step,loss\n5,1.0\n10,2.0\n" + tail)
    CSVSink(path, resume_step=10).write(15, [{"loss": 9.0}])
    assert path.read_text() == "step,loss\n5,1.0\n10,2.0\n15,9.0\n"
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("content", [None, "", "step,loss\n"])
def test_resume_without_rows(path, content):
    if content is not None:
        path.write_text(content)
    CSVSink(path, resume_step=10).write(15, [{"loss": 9.0}])
    assert path.read_text() == "step,loss\n15,9.0\n"


@pytest.mark.parametrize("resumed", [True, False])
def test_different_columns_are_rejected(path, resumed):
    sink = CSVSink(path)
    sink.write(5, [{"loss": 1.0}])
    if resumed:
        sink = CSVSink(path, resume_step=5)
    with pytest.raises(ValueError, match=r"metrics\.csv has the columns .*'loss'.*'reward'"):
        sink.write(6, [{"reward": 1.0}])
    assert path.read_text() == "step,loss\n5,1.0\n"


class FakeLogger:
    def __init__(self):
        self.scalars = []

    def log_scalar(self, name, value, step=None):
        self.scalars.append((name, value, step))


def test_names_of_scalars():
    logger = FakeLogger()
    LoggerSink(logger, "metrics").write(4, [{"loss_qvalue": 0.5, "w2_1": 2.0}])
    row = {"actor": 1, "mode": "stochastic", "return_mean": 9.0, "score": 3.0}
    LoggerSink(logger, "evaluations").write(6, [row])
    assert logger.scalars == [
        ("metrics/loss_qvalue", 0.5, 4),
        ("metrics/w2_1", 2.0, 4),
        ("evaluations/actor_1_stochastic/return_mean", 9.0, 6),
        ("evaluations/actor_1_stochastic/score", 3.0, 6),
    ]


@pytest.mark.parametrize("name", sorted({*LOGGERS} - {"csv"}))
def test_missing_package_error_tells_how_to_install_it(monkeypatch, tmp_path, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda *args: None)
    with pytest.raises(ImportError, match=rf'package {name}, .*"pogo_torchrl\[{name}\]"'):
        make_logger(name, tmp_path, "run")


def test_every_logger_of_torchrl_can_be_chosen():
    names = inspect.signature(get_logger).parameters["logger_type"].annotation
    assert set(re.findall(r'["\'](\w+)["\']', names)) == set(LOGGERS)


def test_extras_install_the_packages_of_the_loggers():
    project = Path(__file__).parents[1] / "pyproject.toml"
    extras = re.findall(r"^(\w+) = \[", project.read_text(), re.MULTILINE)
    assert set(extras) >= set(LOGGERS) - {"csv"}


def test_unknown_logger(tmp_path):
    with pytest.raises(ValueError, match=r"logger\.backend='neptune'.*tensorboard, wandb or null"):
        make_logger("neptune", tmp_path, "run")


def test_mlflow_does_not_log_a_stack():
    with pytest.raises(ValueError, match=r"logger\.backend=mlflow .* stack=false"):
        check_logger("mlflow", stacked=True)


def written(name, folder):
    """Value, step and run of each scalar that a logger has written to a folder."""
    if name == "csv":
        (path,) = folder.rglob("metrics/loss.csv")
        return [tuple(map(float, line.split(","))) for line in path.read_text().splitlines()]
    if name == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        files = [EventAccumulator(str(path)) for path in folder.rglob("events*")]
        return [(e.step, e.value) for f in files for e in f.Reload().Scalars("metrics/loss")]
    query = {
        "mlflow": "select step, value from metrics where key = 'metrics/loss'",
        "trackio": "select step, json_extract(metrics, '$.\"metrics/loss\"') from metrics",
    }[name]
    (path,) = folder.rglob("*.db")
    return sqlite3.connect(path).execute(query).fetchall()


@pytest.mark.parametrize("name", sorted({*LOGGERS} - {"wandb"}))
def test_runs_are_logged_one_after_the_other(name, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read on import
    pytest.importorskip(name)
    for value in (0.5, 1.5):
        (tmp_path / str(value)).mkdir()
        logger = make_logger(name, tmp_path / str(value), "run")
        LoggerSink(logger, "metrics").write(4, [{"loss": value}])
        close_logger(logger)
    if name == "trackio":  # it has one folder for all runs
        assert sorted(written(name, tmp_path)) == [(4, 0.5), (4, 1.5)]
        return
    for value in (0.5, 1.5):
        assert written(name, tmp_path / str(value)) == [(4, value)]


def test_wandb_keeps_runs_apart(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    first, second = (make_logger("wandb", tmp_path, name) for name in ("first", "second"))
    assert first.experiment.id != second.experiment.id
    for logger in (first, second):
        LoggerSink(logger, "metrics").write(4, [{"loss": 0.5}])
        close_logger(logger)


def test_wandb_has_one_run_per_run_across_resumes(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(csv_log, "check_logger", lambda *args, **kwargs: None)
    monkeypatch.setattr(csv_log, "get_logger", lambda *args, **kwargs: made.append((args, kwargs)))
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    settings = {"lr": 1e-3, "logger": {"project": None, "group": "mine", "tags": ["a", "b"]}}
    for resume in (False, True, False):
        make_logger(
            "wandb", tmp_path, "task", run="task/w2_1/seed_0", settings=settings, resume=resume
        )
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    make_logger("wandb", tmp_path, "task", resume=True)
    assert [args[2] for args, _ in made] == [*["task/w2_1/seed_0"] * 3, "task"]
    first, resumed, again, other = (kwargs["wandb_kwargs"] for _, kwargs in made)
    assert (first["project"], first["group"], first["tags"]) == ("pogo", "mine", ["a", "b"])
    assert first["config"] == settings
    assert (first["id"], first["resume"]) == (resumed["id"], "allow")
    assert again["id"] != first["id"]  # started anew
    assert (other["project"], other["group"], other["id"]) == ("theirs", "task", again["id"])


def test_wandb_records_and_resumes(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = {"total_steps": 10, "logger": {"project": "p", "group": "g", "tags": ["t"]}}
    ids = []
    for resume in (False, True):
        settings["total_steps"] *= 2
        logger = make_logger("wandb", tmp_path, "run", settings=settings, resume=resume)
        run = logger.experiment
        assert (run.project, run.group, list(run.tags)) == ("p", "g", ["t"])
        assert run.config["total_steps"] == settings["total_steps"]
        ids.append(run.id)
        close_logger(logger)
    assert ids[0] == ids[1]


def test_row_truncated_by_a_full_disk_is_dropped_on_resume(tmp_path):
    resource = pytest.importorskip("resource")
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    row = {"loss": 0.123456789, "score": 12.5}
    path = tmp_path / "metrics.csv"
    sink = CSVSink(path)
    sink.write(1, [row])
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        with pytest.raises(OSError, match=r"cannot write to .* \(File too large\).*log_dir"):
            sink.write(2, [row] * 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.stat().st_size == 100
    CSVSink(path, resume_step=1).write(2, [row])
    assert path.read_text() == "step,loss,score\n1,0.123456789,12.5\n2,0.123456789,12.5\n"


def test_a_file_of_an_earlier_version_gets_new_columns(path):
    CSVSink(path).write(10, [{"loss_qvalue": 1.0, "w2_0": 0.5, "loss_actor_12": -4.0}])
    sink = CSVSink(path, resume_step=10)
    new = {"bc_mse": 0.25, "loss_qvalue": 2.0, "data_mse_0": 0.1, "actor_loss_12": -5.0}
    sink.write(20, [new])
    sink.write(30, [{**new, "bc_mse": 0.5, "loss_qvalue": 3.0, "data_mse_0": 0.2}])
    assert path.read_text().splitlines() == [
        "step,bc_mse,loss_qvalue,data_mse_0,actor_loss_12",
        "10,0.5,1.0,,-4.0",
        "20,0.25,2.0,0.1,-5.0",
        "30,0.5,3.0,0.2,-5.0",
    ]
    assert CSVSink(path, resume_step=20).last_step == 20
    assert len(path.read_text().splitlines()) == 3
