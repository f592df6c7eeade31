"""Tables of a study, from the files of its runs."""

from __future__ import annotations

import csv
import json
import math
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from pogo_torchrl.files import atomic_write
from pogo_torchrl.report import Estimate, bootstrap
from pogo_torchrl.report.intervals import mean
from pogo_torchrl.report.tables import Cell, Table

LAST = 4
"""Number of evaluations at the end of a run that its score averages."""

RAW, AVERAGED = "raw", "averaged"
"""Values of the column ``weights`` of evaluations.csv, which runs without averages lack."""


class Curve(NamedTuple):
    """Deterministic scores of one actor, by step."""

    steps: list[int]
    scores: list[float]

    @property
    def last(self) -> float:
        """Mean score of the last evaluations."""
        return float(np.mean(self.scores[-LAST:]))

    @property
    def swing(self) -> float:
        """Mean absolute difference of successive evaluations; NaN for a single one."""
        return float(np.abs(np.diff(self.scores)).mean()) if len(self.scores) > 1 else math.nan


@dataclass(frozen=True)
class StudyRun:
    """One run of a study."""

    data: str
    """Name of the data file."""
    setting: str
    seed: int
    status: str
    """``done``, ``failed`` or ``unfinished``."""
    error: str
    updates: int
    """Number of updates at the last evaluation or row of metrics."""
    curves: dict[tuple[str, int], Curve]
    """Curves by weights (raw, averaged) and actor."""
    metrics: list[dict[str, float]]
    """Rows of metrics.csv."""

    @property
    def weights(self) -> list[str]:
        """The weights that were evaluated, the deployed ones first."""
        found = {weights for weights, _ in self.curves}
        return [weights for weights in (AVERAGED, RAW) if weights in found]

    def actors(self, weights: str) -> list[int]:
        """Indices of the evaluated actors."""
        return sorted(actor for name, actor in self.curves if name == weights)

    def metric(self, name: str) -> float:
        """Mean of a column of metrics.csv over the time of the last evaluations; NaN if absent."""
        steps = next(iter(self.curves.values())).steps if self.curves else []
        start = steps[-LAST - 1] if len(steps) > LAST else 0
        rows = [row[name] for row in self.metrics if row["step"] > start and name in row]
        return float(np.mean(rows)) if rows else math.nan


class Group(NamedTuple):
    """The evaluated runs of a setting on one data file, with the same weights, one per seed."""

    data: str
    setting: str
    weights: str
    runs: list[StudyRun]

    @property
    def actors(self) -> list[int]:
        """Actors that all runs have."""
        return sorted(set.intersection(*(set(run.actors(self.weights)) for run in self.runs)))

    def last(self, actor: int) -> list[float]:
        """Score of an actor over the last evaluations, of each run."""
        return [run.curves[self.weights, actor].last for run in self.runs]

    def gain(self, actor: int) -> list[float]:
        """Difference of an actor's score to actor 0's, paired by seed."""
        return [x - y for x, y in zip(self.last(actor), self.last(0))]

    def swing(self, actor: int) -> float:
        """Mean swing of an actor."""
        return _mean(run.curves[self.weights, actor].swing for run in self.runs)

    def metric(self, name: str) -> float:
        """Mean of a metric over the runs."""
        return _mean(run.metric(name) for run in self.runs)

    @property
    def updates(self) -> str:
        """Updates of the runs: ``20000``, or the range ``5000-20000``."""
        made = [run.updates for run in self.runs]
        return str(max(made)) if min(made) == max(made) else f"{min(made)}-{max(made)}"

    @property
    def seeds(self) -> str:
        """Number of runs, and how many of them are done if not all are."""
        return _number_of(self.runs)


def read_study_runs(root: Path, data: Sequence[str], settings: Sequence[str]) -> list[StudyRun]:
    """Read all runs of a study, also those of settings that its file no longer has.

    Args:
        root: folder of the study.
        data: names of the data files, in the order of the tables.
        settings: names of the settings and baselines, in the order of the tables.

    Returns:
        The runs, sorted by data file, setting and seed.
    """
    found = []
    for folder in root.glob("*/*/**/seed_*"):
        if (folder / "training").is_dir() or (folder / "failed.json").is_file():
            name, setting, *_ = folder.relative_to(root).parts
            found.append(_read_run(folder, name, setting))

    def position(names: Sequence[str], name: str) -> tuple[int, str]:
        return (names.index(name) if name in names else len(names), name)

    return sorted(
        found, key=lambda r: (position(data, r.data), position(settings, r.setting), r.seed)
    )


def _read_run(folder: Path, data: str, setting: str) -> StudyRun:
    curves = read_curves(folder / "training" / "evaluations.csv")
    metrics = [
        {name: float(value) for name, value in row.items() if value}
        for row in _read_rows(folder / "training" / "metrics.csv")
    ]
    done = _read_json(folder / "done.json").get("total_steps", 0)
    wanted = _read_total_steps(folder / "training" / "config.yaml")
    error = str(_read_json(folder / "failed.json").get("error", ""))
    is_done = done > 0 and done >= wanted
    steps = [step for curve in curves.values() for step in curve.steps]
    return StudyRun(
        data,
        setting,
        int(folder.name.removeprefix("seed_")),
        "done" if is_done else "failed" if error else "unfinished",
        "" if is_done else error,
        max([*steps, *(int(row["step"]) for row in metrics)], default=0),
        curves,
        metrics,
    )


def read_curves(path: Path) -> dict[tuple[str, int], Curve]:
    """Read the deterministic scores of an ``evaluations.csv``, skipping damaged rows.

    Args:
        path: the file; without it there are no curves.

    Returns:
        The curves by weights and actor.
    """
    curves: dict[tuple[str, int], Curve] = defaultdict(lambda: Curve([], []))
    for row in _read_rows(path):
        if row["mode"] == "deterministic":
            curve = curves[row.get("weights") or RAW, int(row["actor"])]
            curve.steps.append(int(row["step"]))
            curve.scores.append(float(row["score"]))
    return dict(curves)


def _read_rows(path: Path) -> Iterator[dict[str, str]]:
    """Complete rows of a CSV file that may be missing or end in a truncated line."""
    try:
        complete = path.read_text().rpartition("\n")[0]
    except OSError:
        return
    for row in csv.DictReader(complete.splitlines()):
        if None not in row and None not in row.values():
            yield row


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _read_total_steps(path: Path) -> int:
    try:
        return int(yaml.safe_load(path.read_text())["total_steps"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return 0


def groups(runs: Iterable[StudyRun]) -> list[Group]:
    """Group runs by data file, setting and weights; runs without an evaluation are left out."""
    found: dict[tuple[str, str, str], list[StudyRun]] = {}
    for run in runs:
        for weights in run.weights:
            found.setdefault((run.data, run.setting, weights), []).append(run)
    return [Group(*key, members) for key, members in found.items()]


def actors_table(found: Sequence[Group], largest_returns: dict[str, float]) -> Table:
    """One row per data file, setting, weights and actor.

    Args:
        found: the groups of runs.
        largest_returns: largest discounted return of each data file.
    """
    rows: list[tuple[Cell, ...]] = []
    for group in found:
        value = abs(group.metric("pred_value"))
        for actor in group.actors:
            rows.append(
                (
                    group.data, group.setting, group.weights, actor, group.seeds, group.updates,
                    _estimate(group.last(actor)), group.swing(actor),
                    _estimate(group.gain(actor)) if actor else None,
                    _decimals(group.metric(f"data_mse_{actor}"), 3),
                    _decimals(group.metric(f"step_mse_{actor}"), 3) if actor else "",
                    value, _decimals(value / largest_returns.get(group.data, math.nan), 2),
                )
            )  # fmt: skip
    return Table(
        "actors",
        f"Deterministic D4RL scores: means over seeds and the last {LAST} evaluations, with 95 % "
        "bootstrap intervals over seeds.",
        ("data", "setting", "weights", "actor", "seeds", "updates", "score", "swing",
         "minus actor 0", "from the data", "from actor before", "Q", "Q / largest return"),
        rows,
        ("An interval over two seeds is their range.",
         "Swing: mean absolute difference of successive evaluations.",
         "Minus actor 0: paired by seed.",
         "From the data, from actor before: mean squared displacements per action dimension of the "
         "raw actors.",
         "Q: magnitude of the mean critic value; largest return: the data's largest discounted "
         "return."),
    )  # fmt: skip


def settings_table(runs: Sequence[StudyRun]) -> Table:
    """One row per setting and weights, over all data files, the best last actor first.

    Args:
        runs: all runs, also those without an evaluation, which count as runs only.
    """
    by_setting: dict[tuple[str, str], list[Group]] = {}
    for group in groups(runs):
        by_setting.setdefault((group.setting, group.weights), []).append(group)
    evaluated = {setting for setting, _ in by_setting}
    rows: list[tuple[Cell, ...]] = []
    for (setting, weights), members in by_setting.items():
        first, last = ([g.last(g.actors[i]) for g in members] for i in (0, -1))
        gains = [g.gain(g.actors[-1]) for g in members]
        least = min(float(np.mean(gain)) for gain in gains)
        swing = _mean(g.swing(g.actors[-1]) for g in members)
        scores = (_estimate(*last), _estimate(*first), _estimate(*gains), least, swing)
        rows.append((setting, weights, len(members), _count(runs, setting), *scores))
    rows.sort(key=lambda row: (-row[2], -row[4].value))
    for setting in dict.fromkeys(run.setting for run in runs if run.setting not in evaluated):
        rows.append((setting, "", 0, _count(runs, setting), *[None] * 5))
    return Table(
        "settings",
        f"Deterministic D4RL scores over data files: means of the last {LAST} evaluations over "
        "files and seeds, with 95 % bootstrap intervals over seeds, stratified by file.",
        ("setting", "weights", "files", "runs", "last actor", "actor 0", "last minus actor 0",
         "least on a file", "swing"),
        rows,
        ("Settings with all files come first, by the score of the last actor.",
         "Least on a file: the least difference of the last actor to actor 0, mean over seeds.",
         "Swing: of the last actor.",
         "Where averaged weights were evaluated, they are the ones to deploy."),
    )  # fmt: skip


def _count(runs: Iterable[StudyRun], setting: str) -> str:
    """Number of runs of a setting, and how many of them are done if not all are."""
    return _number_of([run for run in runs if run.setting == setting])


def _number_of(runs: Sequence[StudyRun]) -> str:
    done = sum(run.status == "done" for run in runs)
    return str(done) if done == len(runs) else f"{len(runs)} ({done} done)"


def runs_table(runs: Sequence[StudyRun]) -> Table:
    """All runs that were made, also those that failed."""
    rows: list[tuple[Cell, ...]] = []
    for run in runs:
        deployed = next(iter(run.weights), "")
        curves = [run.curves[deployed, actor] for actor in run.actors(deployed)]
        scores = " / ".join(f"{curve.last:.1f}" for curve in curves)
        swing = curves[-1].swing if curves else math.nan
        rows.append(
            (run.data, run.setting, run.seed, run.status, run.updates, deployed, scores, swing,
             textwrap.shorten(run.error, 120, placeholder=" ..."))
        )  # fmt: skip
    return Table(
        "runs",
        f"All runs: deterministic D4RL scores of the actors, means over the last {LAST} "
        "evaluations, and the swing of the last actor.",
        ("data", "setting", "seed", "status", "updates", "weights", "scores", "swing", "error"),
        rows,
    )


def write_tables(root: Path, data: Sequence[str], settings: Sequence[str]) -> list[Table]:
    """Write the tables of a study as Markdown and CSV to ``root/tables``.

    Args:
        root: folder of the study.
        data: names of its data files.
        settings: names of its settings and baselines.

    Returns:
        The tables.
    """
    runs = read_study_runs(root, data, settings)
    found = groups(runs)
    largest = {
        path.parent.name: _read_json(path).get("largest_return", math.nan)
        for path in root.glob("*/data.json")
    }
    tables = [settings_table(runs), actors_table(found, largest), runs_table(runs)]
    folder = root / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    for table in tables:
        for suffix, text in (
            ("md", f"{table.full_caption}\n\n{table.markdown()}\n"),
            ("csv", table.csv()),
        ):
            with atomic_write(folder / f"{table.name}.{suffix}", "x") as file:
                file.write(text)
    return tables


def _estimate(*strata: Sequence[float]) -> Estimate:
    return bootstrap(strata, mean)


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan


def _decimals(value: float, decimals: int) -> str:
    return "" if math.isnan(value) else f"{value:.{decimals}f}"
