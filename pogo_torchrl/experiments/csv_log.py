"""Sinks for metrics: CSV files, and optionally TorchRL's loggers."""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchrl.record.loggers import Logger, MLFlowLogger, get_logger

from pogo_torchrl.experiments.console import LOGGER
from pogo_torchrl.files import atomic_write, cannot_write

LOGGERS = ("csv", "mlflow", "trackio", "tensorboard", "wandb")
"""TorchRL's loggers, in addition to the CSV files of a run; all but ``csv`` need a package of the
same name."""


def _current_name(column: str) -> str:
    """Name of a column of an earlier version, so that its runs can be resumed."""
    if column == "w2_0":
        return "bc_mse"
    return re.sub(r"^loss_actor_(\d+)$", r"actor_loss_\1", column)


def last_step(path: Path) -> int:
    """Return the largest step in a CSV file of a run; 0 if it has none or cannot be read.

    Args:
        path: the CSV file.
    """
    try:
        lines = path.read_text(errors="replace").splitlines()[1:]
    except OSError:
        return 0
    steps = [line.split(",")[0] for line in lines]
    return max((int(step) for step in steps if step.isdecimal()), default=0)


class CSVSink:
    """Sink that appends rows of metrics to a CSV file.

    The columns are ``step``, followed by the keys of the first row.

    Args:
        path: the CSV file.
        resume_step: keep the rows of an existing file up to and including this step, and append
            to them; ``None``: start a new file. Defaults to ``None``.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     CSVSink(f"{folder}/a.csv").write(10, [{"score": 1.5}, {"score": 2.0}])
        ...     CSVSink(f"{folder}/a.csv", resume_step=10).write(20, [{"score": 3.0}])
        ...     print(Path(f"{folder}/a.csv").read_text(), end="")
        step,score
        10,1.5
        10,2.0
        20,3.0
    """

    def __init__(self, path: str | Path, *, resume_step: int | None = None) -> None:
        self.path = Path(path)
        self._columns: list[str] | None = None
        self.last_step: int | None = None
        if resume_step is None:
            self.path.unlink(missing_ok=True)
        elif self.path.exists():
            self._drop_rows_after(resume_step)

    def _drop_rows_after(self, step: int) -> None:
        with self.path.open(newline="") as file:
            reader = csv.DictReader(file)
            self._columns = list(map(_current_name, reader.fieldnames or []))
            reader.fieldnames = self._columns
            rows = list(reader)
        # A row cut short by a crash has no value in its last column.
        complete = [row for row in rows if row["step"].isdigit() and None not in row.values()]
        if not self._columns:
            self._columns = None
            return
        kept = [row for row in complete if int(row["step"]) <= step]
        self._rewrite(self._columns, kept)
        self.last_step = int(kept[-1]["step"]) if kept else None

    def _rewrite(self, columns: list[str], rows: Sequence[Mapping[str, Any]]) -> None:
        """Replace the file by these rows, which are empty in columns that they lack."""
        with atomic_write(self.path, "x", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        self._columns = columns

    def write(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append the rows of one step.

        Args:
            step: number of completed updates.
            rows: values by column name; all rows have the same columns.

        Raises:
            ValueError: if columns of the file are missing; new columns are added to it.
            OSError: if the file cannot be written; a truncated row is dropped on resume.
        """
        columns = ["step", *rows[0]]
        if not set(columns) >= set(self._columns or ()):
            raise ValueError(
                f"{self.path} has the columns {self._columns}, but the new row has {columns}: the "
                "file was written by another version of pogo_torchrl. Use another log_dir."
            )
        try:
            if self._columns is not None and len(columns) > len(self._columns):
                with self.path.open(newline="") as file:  # written by an earlier version
                    earlier = list(csv.DictReader(file))
                self._rewrite(columns, earlier)
            with self.path.open("a", newline="") as file:
                writer = csv.DictWriter(file, self._columns or columns, lineterminator="\n")
                if self._columns is None:
                    writer.writeheader()
                writer.writerows({"step": step, **row} for row in rows)
        except OSError as error:
            raise cannot_write(self.path.parent, "log_dir", error) from error
        self._columns, self.last_step = self._columns or columns, step


class LoggerSink:
    """Sink that logs rows as scalars to a TorchRL logger.

    If the logger fails, e.g. because its server is gone, there is one warning, and no more is
    logged to it: the CSV files are complete.

    Args:
        logger: a TorchRL logger.
        group: prefix of the scalar names, e.g. ``"metrics"``.
    """

    def __init__(self, logger: Any, group: str) -> None:
        self.logger = logger
        self.group = group
        self.failed = False

    def write(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log all floating-point values of the rows.

        Args:
            step: number of completed updates.
            rows: values by name; ``actor`` and ``mode``, if present, become part of scalar names.
        """
        if self.failed:
            return
        try:
            self._write(step, rows)
        except Exception as error:  # of many kinds
            self.failed = True
            LOGGER.warning(
                "%s is not logged any more: %s failed at update %d (%s). The CSV files go on.",
                self.group, type(self.logger).__name__, step, error,
            )  # fmt: skip

    def _write(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            prefix = self.group
            if "actor" in row:
                prefix += f"/actor_{row['actor']}_{row['mode']}"
            for name, value in row.items():
                if isinstance(value, float):
                    self.logger.log_scalar(f"{prefix}/{name}", value, step=step)


def check_logger(name: str, *, stacked: bool = False) -> None:
    """Check that a logger is available.

    Args:
        name: name of the logger, one of :data:`LOGGERS`.

    Keyword Args:
        stacked: whether several runs log in this process. Defaults to ``False``.

    Raises:
        ValueError: if the logger is unknown, needs a login, or supports only one run per process.
        ImportError: if its package is not installed; the message tells how to install it.

    Example:
        >>> check_logger("tensorbord")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ValueError: logger.backend='tensorbord' is unknown; choose csv, ..., wandb or null.
    """
    if name not in LOGGERS:
        raise ValueError(
            f"logger.backend={name!r} is unknown; choose {', '.join(LOGGERS)} or null."
        )
    if name == "mlflow" and stacked:
        raise ValueError(
            "logger.backend=mlflow logs one run per process: choose another logger or stack=false."
        )
    if name != "csv" and importlib.util.find_spec(name) is None:
        raise ImportError(
            f"logger.backend={name} needs the package {name}, which is not installed: "
            f'pip install "pogo_torchrl[{name}]", or leave it out (CSV is always written).'
        )
    if name == "wandb" and not _can_log_to_wandb():
        raise ValueError(
            "logger.backend=wandb needs a login: run `wandb login`, set WANDB_API_KEY, or set "
            "WANDB_MODE=offline to keep the files here."
        )


def _can_log_to_wandb() -> bool:
    """Whether W&B has a key, or needs none; without one it would wait for input."""
    try:
        import wandb

        return wandb.setup().settings.mode not in ("online", None) or bool(wandb.api.api_key)
    except Exception:  # an unknown version: its own message tells more when the run starts
        return True


def make_logger(
    name: str,
    folder: str | Path,
    experiment: str,
    *,
    run: str | None = None,
    settings: Mapping[str, Any] | None = None,
    resume: bool = False,
) -> Logger:
    r"""Create one of TorchRL's loggers; each call starts a new run in it, unless it resumes one.

    Args:
        name: name of the logger, one of :data:`LOGGERS`.
        folder: folder for the logger's files. Trackio has its own (``$TRACKIO_DIR``), and MLflow
            logs to ``$MLFLOW_TRACKING_URI`` if that is set.
        experiment: display name of the run.

    Keyword Args:
        run: display name in wandb, whose projects have runs of many tasks, weights and seeds.
            Defaults to ``experiment``.
        settings: the options of the run, which wandb records; its ``logger`` has the project, the
            group and the tags. Defaults to none.
        resume: continue the run that a previous call has started in this folder (wandb). Defaults
            to ``False``.

    Raises:
        ValueError: if the logger is unknown, or cannot be started.
        ImportError: if its package is not installed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     logger = make_logger("csv", folder, "run")
        ...     logger.log_scalar("score", 1.5, step=10)
        ...     Path(folder, "run", "scalars", "score.csv").read_text()
        '10,1.5\n'
    """
    check_logger(name)
    try:
        return _make_logger(
            name, Path(folder).absolute(), experiment, run or experiment, settings or {}, resume
        )
    except Exception as error:  # of many kinds: a server that does not answer, a refused login, ...
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"logger.backend={name} cannot be started: {reason}. Mend that, or leave it out (CSV "
            "is always written)."
        ) from error


def _make_logger(
    name: str, folder: Path, experiment: str, run: str, settings: Mapping[str, Any], resume: bool
) -> Logger:
    if name == "mlflow":  # a database: recent versions of MLflow refuse folders
        if uri := os.environ.get("MLFLOW_TRACKING_URI"):
            return MLFlowLogger(experiment, uri)
        logger = MLFlowLogger(experiment, f"sqlite:///{folder / 'mlflow.db'}")
        os.environ.pop("MLFLOW_TRACKING_URI", None)  # MLflow sets it, also for the next run
        return logger
    options = settings.get("logger", {})
    project = options.get("project") or os.environ.get("WANDB_PROJECT") or "pogo"
    if name == "wandb":
        return get_logger(
            name,
            str(folder),
            run,
            wandb_kwargs={
                "project": project,
                "group": options.get("group") or experiment,
                "tags": options.get("tags"),
                "config": dict(settings),
                "allow_val_change": True,  # of total_steps, for example
                "id": _wandb_id(folder, resume),
                "resume": "allow",
                "reinit": "create_new",  # by default, runs of one process are merged
            },
        )
    trackio = {"project": project, "resume": "never"}
    return get_logger(name, str(folder), experiment, trackio_kwargs=trackio)


def _wandb_id(folder: Path, resume: bool) -> str:
    """Name by which wandb recognises the run in a folder when it is resumed."""
    path = folder / "wandb_id.txt"
    if not (resume and path.exists()):
        with atomic_write(path, "x") as file:
            file.write(uuid.uuid4().hex[:12])
    return path.read_text()


def close_logger(logger: Logger) -> None:
    """Close a logger, so that the next run of this process does not continue its run.

    Args:
        logger: one of TorchRL's loggers.
    """
    if isinstance(logger, MLFlowLogger):  # its run is closed by leaving its context only
        logger.experiment.__exit__(None, None, None)
    logger.shutdown()
