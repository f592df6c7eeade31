"""Reading run folders, including those of unfinished and damaged runs."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray

from pogo_torchrl.report.intervals import Estimate
from pogo_torchrl.report.published import TASKS

MODES = ("deterministic", "stochastic")

POGO = "pogo"

# Algorithms whose first actor has a weight as well.
_WEIGHTED = (POGO, "paper")

Array = NDArray[np.floating]


class Ranking(NamedTuple):
    """The last ranking of the actors of a run by fitted Q evaluation."""

    step: int
    """Completed updates."""
    values: list[Estimate]
    """Value of each actor with its 95 % interval."""


class Evaluations(NamedTuple):
    """The complete evaluations of a run: those with a row for every actor and action mode."""

    steps: NDArray[np.integer]
    """Completed updates at each evaluation, ``[T]``, ascending."""
    scores: Array
    """Normalised scores, ``[T, N, 2]``: evaluation, actor, mode (in the order of :data:`MODES`);
    NaN if the task has no reference returns."""
    returns: Array
    """Mean returns, ``[T, N, 2]``."""
    damage: str = ""
    """Description of what was skipped; empty if the file is intact."""

    @property
    def scored(self) -> bool:
        """Whether there are scores, for every evaluation."""
        return bool(np.isfinite(self.scores).all())

    @property
    def values(self) -> Array:
        """The scores or, if there are none, the mean returns, ``[T, N, 2]``."""
        return self.scores if self.scored else self.returns


@dataclass(frozen=True)
class RunRecord:
    """Content of one run folder."""

    name: str
    """Path of the folder, relative to ``log_dir``."""
    task: str
    weights: tuple[float, ...]
    seed: int
    total_steps: int
    data_source: str
    evaluations: Evaluations
    steps_made: int
    """Completed updates, judged by the last row of any CSV file."""
    done: bool
    averaged: bool
    """Whether the scores are of averaged actors (``average_actors``)."""
    data_score: float
    """Mean score of the episodes in the dataset, or their mean return for a task without scores;
    NaN if unknown."""
    error: str
    """Why the last attempt failed; empty if it did not."""
    ranking: Ranking | None = None
    """The last ranking in ``ranking.csv``; ``None`` if there is none."""
    variant: str = ""
    """Name of runs that differ in other options (``variant``)."""
    algorithm: str = POGO
    """The algorithm of actor 0 and the critics."""
    trains_only: bool = False
    """Whether the run has no environment and is not evaluated."""

    @property
    def num_actors(self) -> int:
        """Number of actors N."""
        return count_actors(self.algorithm, self.weights)

    @property
    def label(self) -> str:
        """The weights and the variant, if any, see :func:`setting_label`."""
        return setting_label(self.algorithm, self.weights, self.variant)

    @property
    def evaluated(self) -> bool:
        """Whether the run has at least one complete evaluation."""
        return len(self.evaluations.steps) > 0

    @property
    def last(self) -> Array:
        """Scores of the last checkpoint, or returns if there are no scores, ``[N, 2]``."""
        return self.evaluations.values[-1]

    @property
    def best(self) -> Array:
        """Best scores (or returns) over all checkpoints, separately for each actor and mode,
        ``[N, 2]``.
        """
        return self.evaluations.values.max(0)

    @property
    def status(self) -> str:
        """``done``, or the progress: ``5000 of 20000``, or ``failed at 5000 of 20000``."""
        if self.done:
            return "done"
        progress = f"{self.steps_made} of {self.total_steps}"
        return f"failed at {progress}" if self.error else progress


def weights_label(weights: tuple[float, ...], variant: str = "") -> str:
    """Format weights, and the variant of the run, if any, as text.

    Example:
        >>> weights_label((0.2, 1.0))
        '0.2, 1'
        >>> weights_label((0.2, 1.0), "lr_0.001")
        '0.2, 1 (lr_0.001)'
        >>> weights_label((), "lr_0.001")
        'lr_0.001'
    """
    text = ", ".join(f"{w:g}" for w in weights)
    return f"{text} ({variant})" if text and variant else text or variant


def method_name(algorithm: str, weights: tuple[float, ...]) -> str:
    """``pogo``, or another algorithm and the number of actors added to it: ``iql + 2``."""
    added = count_actors(algorithm, weights) - 1 if algorithm != POGO else 0
    return f"{algorithm} + {added}" if added else algorithm


def setting_label(algorithm: str, weights: tuple[float, ...], variant: str = "") -> str:
    """The weights and the variant, if any, of POGO; those of others with their method.

    Example:
        >>> setting_label("pogo", (0.2, 0.1))
        '0.2, 0.1'
        >>> setting_label("iql", (0.2, 0.1)), setting_label("iql", (), "lr_0.001")
        ('iql + 2 (0.2, 0.1)', 'iql (lr_0.001)')
    """
    label = weights_label(weights, variant)
    if algorithm == POGO:
        return label
    method = method_name(algorithm, weights)
    return f"{method} ({label})" if label else method


def count_actors(algorithm: str, weights: Sequence[float]) -> int:
    """Number of actors: POGO and the paper's have a weight for each, others for those on top.

    Example:
        >>> count_actors("pogo", (0.2, 0.2)), count_actors("iql", (0.2, 0.2))
        (2, 3)
    """
    return len(weights) + (algorithm not in _WEIGHTED)


def task_order(task: str) -> tuple[int, str]:
    """Sort key for tasks: the order used by the papers, unknown tasks last."""
    return (TASKS.index(task) if task in TASKS else len(TASKS), task)


def read_runs(log_dir: str | Path) -> tuple[list[RunRecord], dict[str, str]]:
    """Read every run folder ``log_dir/{task}/w2_{...}/seed_{s}``, or ``.../{algorithm}_chain_...``.

    Args:
        log_dir: the folder that the runs were written to.

    Returns:
        The runs, sorted by task, algorithm, weights and seed; and the folders that could not be
        read, by name, each with the reason.

    Raises:
        FileNotFoundError: if there is no run folder.
        PermissionError: if the folder must not be read.
    """
    log_dir = Path(log_dir)
    found = (log_dir.glob(f"*/{name}/seed_*") for name in ("w2_*", "*_chain_*"))
    folders = sorted({p for paths in found for p in paths if p.is_dir()})
    if not folders:
        if log_dir.is_dir():
            next(log_dir.iterdir(), None)  # raises for a folder that must not be read
        raise FileNotFoundError(
            f"log_dir={log_dir} contains no runs (TASK/w2_WEIGHTS/seed_SEED); give the folder that "
            "the runs were written to."
        )
    runs, left_out = [], {}
    for folder in folders:
        name = folder.relative_to(log_dir).as_posix()
        try:
            runs.append(read_run(folder, name))
        except ValueError as error:
            failure = _read_json(folder / "failed.json").get("error")
            left_out[name] = f"failed: {_one_line(failure)}" if failure else str(error)
    runs.sort(key=_order)
    return runs, left_out


def _order(run: RunRecord) -> tuple[Any, ...]:
    """Sort key for runs: POGO before other algorithms, and those with shorter chains first."""
    other = run.algorithm != POGO
    length = len(run.weights) if other else 0
    return (task_order(run.task), other, run.algorithm, length, run.weights, run.variant, run.seed)


def read_run(folder: Path, name: str) -> RunRecord:
    """Read one run folder.

    Args:
        folder: the run folder.
        name: name of the run in the report.

    Returns:
        The content of the folder.

    Raises:
        ValueError: if its ``config.yaml`` is missing or damaged.
    """
    training = folder / "training"
    cfg = _read_config(training / "config.yaml")
    actors = count_actors(cfg["algorithm"], cfg["w2_weights"])
    evaluations = read_evaluations(training / "evaluations.csv", actors)
    steps = [*evaluations.steps.tolist(), *_read_steps(training / "metrics.csv")]
    done_steps = _read_json(folder / "done.json").get("total_steps", -1)
    done = isinstance(done_steps, int) and done_steps >= cfg["total_steps"]
    return RunRecord(
        name=name,
        task=cfg["task"],
        weights=tuple(cfg["w2_weights"]),
        seed=cfg["seed"],
        total_steps=cfg["total_steps"],
        data_source=cfg["data_source"],
        evaluations=evaluations,
        steps_made=max(steps, default=0),
        done=done,
        averaged=cfg["averaged"],
        trains_only=cfg["trains_only"],
        data_score=_read_data_score(training / "train.log"),
        # A failed run may have been completed since.
        error="" if done else _one_line(_read_json(folder / "failed.json").get("error", "")),
        ranking=read_ranking(training / "ranking.csv", actors),
        variant=cfg["variant"],
        algorithm=cfg["algorithm"],
    )


def read_rows(path: Path) -> Iterator[tuple[int, int, str, float, float] | None]:
    """Iterate over the rows ``(step, actor, mode, score, return)`` of an ``evaluations.csv``.

    The score is NaN for a task without reference returns, whose column is empty. Yields ``None``
    for a damaged row: truncated, garbled, or with a value that is not finite.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: if the file does not exist.
    """
    # A last line without a newline was truncated, possibly in the middle of a number.
    complete, _, rest = path.read_text("utf-8", "replace").rpartition("\n")
    reader = csv.DictReader(complete.replace("\0", "\ufffd").splitlines())
    while True:
        try:
            row = next(reader, None)
            if row is None:
                break
            if None in row.values() or None in row:
                raise ValueError
            mean = float(row.get("return_mean", "nan"))
            # A task without reference returns has no scores.
            score = float(row["score"]) if row["score"] else math.nan
            if not math.isfinite(score if row["score"] else mean) or row["mode"] not in MODES:
                raise ValueError
            yield int(row["step"]), int(row["actor"]), row["mode"], score, mean
        except (ValueError, KeyError, csv.Error):
            yield None
    if rest:
        yield None


def read_evaluations(path: Path, actors: int) -> Evaluations:
    r"""Read a run's ``evaluations.csv``, skipping damaged rows and incomplete evaluations.

    Args:
        path: the file; if it does not exist, there are no evaluations.
        actors: number of actors N in the chain.

    Returns:
        The complete evaluations, and a description of what was skipped.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "evaluations.csv")
        ...     _ = path.write_text("step,actor,mode,return_mean,score\n"
        ...                         "1,0,deterministic,10,40\n1,0,stochastic,9,38\n"
        ...                         "2,0,deterministic,11,4")
        ...     read_evaluations(path, 1)._asdict()  # doctest: +NORMALIZE_WHITESPACE
        {'steps': array([1]), 'scores': array([[[40., 38.]]]), 'returns': array([[[10., 9.]]]),
         'damage': 'evaluations.csv: 1 damaged row skipped'}
    """
    found: dict[int, dict[tuple[int, str], tuple[float, float]]] = {}
    damaged = 0
    try:
        for row in read_rows(path):
            if row is None or not 0 <= row[1] < actors:
                damaged += 1
            else:
                step, actor, mode, score, mean_return = row
                found.setdefault(step, {})[actor, mode] = (score, mean_return)
    except FileNotFoundError:
        pass
    except OSError as error:
        return Evaluations(*_to_arrays({}, actors), f"evaluations.csv cannot be read: {error}")
    complete = {step: found[step] for step in sorted(found) if len(found[step]) == 2 * actors}
    damage = []
    if damaged:
        damage.append(f"{damaged} damaged row{'s' * (damaged > 1)} skipped")
    if incomplete := len(found) - len(complete):
        damage.append(f"{incomplete} incomplete evaluation{'s' * (incomplete > 1)} skipped")
    return Evaluations(
        *_to_arrays(complete, actors), f"evaluations.csv: {', '.join(damage)}" if damage else ""
    )


def read_ranking(path: Path, actors: int) -> Ranking | None:
    """Read the last complete ranking of a run's ``ranking.csv``.

    Args:
        path: the file.
        actors: number of actors N in the chain.

    Returns:
        The ranking; ``None`` if there is no file, or no complete ranking in it.
    """
    found: dict[int, dict[int, Estimate]] = {}
    for row in csv.DictReader(_read_text(path).replace("\0", "\ufffd").splitlines()):
        try:
            values = Estimate(*(float(row[name]) for name in ("value", "low", "high")))
            if math.isfinite(values.value):
                found.setdefault(int(row["step"]), {})[int(row["actor"])] = values
        except (ValueError, KeyError, TypeError):  # a damaged row
            continue
    complete = [step for step in found if found[step].keys() == set(range(actors))]
    if not complete:
        return None
    step = max(complete)
    return Ranking(step, [found[step][actor] for actor in range(actors)])


def _to_arrays(
    evaluations: Mapping[int, Mapping[tuple[int, str], tuple[float, float]]], actors: int
) -> tuple[NDArray[np.integer], Array, Array]:
    table = [
        [[rows[actor, mode] for mode in MODES] for actor in range(actors)]
        for rows in evaluations.values()
    ]
    values = np.array(table, dtype=float).reshape(-1, actors, len(MODES), 2)
    return np.array(list(evaluations), dtype=int), values[..., 0], values[..., 1]


def _read_config(path: Path) -> dict[str, Any]:
    """Read the settings that identify a run."""
    try:
        cfg = yaml.safe_load(path.read_text("utf-8"))
        data = cfg.get("data") or {}
        found: dict[str, Any] = {
            "task": str(cfg["task"]),
            "seed": int(cfg["seed"]),
            "w2_weights": [float(w) for w in cfg["w2_weights"]],
            "total_steps": int(cfg["total_steps"]),
            "data_source": str(data.get("source", "unknown")),
            "averaged": cfg.get("average_actors") is not None,
            "variant": str(cfg.get("variant") or ""),
            "algorithm": str(cfg.get("algorithm", POGO)),
            "trains_only": cfg.get("eval_interval") == 0
            or ("env" in cfg and cfg["env"].get("id", "") is None),
        }
    except FileNotFoundError:
        raise ValueError("not started: training/config.yaml does not exist") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        raise ValueError("training/config.yaml cannot be read: it is damaged") from None
    if not count_actors(found["algorithm"], found["w2_weights"]):
        raise ValueError("training/config.yaml cannot be read: w2_weights is empty")
    return found


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty if the file is missing or damaged."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""


def _read_steps(path: Path) -> list[int]:
    """Read the first column of a CSV file, ``step``."""
    complete = _read_text(path).rpartition("\n")[0]
    cells = (line.partition(",")[0] for line in complete.split("\n"))
    return [int(cell) for cell in cells if cell.isdecimal()]


def _read_data_score(path: Path) -> float:
    """Read the mean score or return of the dataset's episodes, which only the log contains."""
    line = r"Data: .* mean (?:D4RL score|score|return) (-?[\d.]+)$"
    found = re.findall(line, _read_text(path), re.MULTILINE)
    return float(found[-1]) if found else math.nan
