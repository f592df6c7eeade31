"""Score table and learning curves of a single run."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from pogo_torchrl.report.drawing import Figure, default_style
from pogo_torchrl.report.figures import COLOURS
from pogo_torchrl.report.run_logs import MODES, read_rows


class Curve(NamedTuple):
    """Scores, or returns where there are none, of one actor in one mode, by step."""

    steps: list[int]
    scores: list[float]


def read_scores(path: str | Path) -> dict[tuple[int, str], Curve]:
    """Read the score curves of a run, skipping damaged rows.

    Args:
        path: the run's ``evaluations.csv``.

    Returns:
        The curves by ``(actor, mode)``.

    Raises:
        FileNotFoundError: if the file does not exist.
    """
    curves: dict[tuple[int, str], Curve] = defaultdict(lambda: Curve([], []))
    for row in filter(None, read_rows(Path(path))):
        step, actor, mode, score, mean_return = row
        curves[actor, mode].steps.append(step)
        curves[actor, mode].scores.append(mean_return if math.isnan(score) else score)
    return dict(curves)


def shows_averages(path: str | Path) -> bool:
    """Return whether the last scores in an ``evaluations.csv`` are of averaged weights.

    Args:
        path: the run's ``evaluations.csv``.

    Raises:
        FileNotFoundError: if the file does not exist.
    """
    with Path(path).open(newline="", encoding="utf-8", errors="replace") as file:
        shown = [row.get("weights") for row in csv.DictReader(file)]
    return bool(shown) and shown[-1] == "averaged"


def score_table(path: str | Path, behaviour_score: float, *, measure: str = "D4RL score") -> str:
    r"""Format the last and best score of each actor, and the dataset's score for comparison.

    Args:
        path: the run's ``evaluations.csv``.
        behaviour_score: mean score of the episodes in the dataset, or their mean return.
        measure: what the values are: ``"D4RL score"``, ``"score"`` or ``"return"``. Defaults to
            ``"D4RL score"``.

    Returns:
        The table as text.

    Raises:
        FileNotFoundError: if the file does not exist.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "evaluations.csv")
        ...     _ = path.write_text("step,actor,mode,score\n"
        ...                         "1,0,deterministic,40\n1,0,stochastic,38\n"
        ...                         "2,0,deterministic,36\n2,0,stochastic,39\n")
        ...     print(score_table(path, 30.0))
        D4RL scores (0: random policy, 100: expert)
                      deterministic      stochastic
                        last    best    last    best
          actor 0       36.0    40.0    39.0    39.0
          dataset       30.0
    """
    curves = read_scores(path)
    rows = {
        f"actor {actor}": [
            f"{value:.1f}"
            for mode in MODES
            for value in (curves[actor, mode].scores[-1], max(curves[actor, mode].scores))
        ]
        for actor in sorted({actor for actor, _ in curves})
    }
    if not math.isnan(behaviour_score):
        rows["dataset"] = [f"{behaviour_score:.1f}"]
    width = max(8, *(len(cell) + 2 for cells in rows.values() for cell in cells))
    title = {
        "return": "Returns",
        "score": "Scores (0, 100: the reference returns of the task)",
        "D4RL score": "D4RL scores (0: random policy, 100: expert)",
    }[measure]
    lines = [
        title,
        f"{'':12}{'deterministic':>{2 * width - 1}}{'stochastic':>{2 * width}}",
        f"{'':12}{'last':>{width}}{'best':>{width}}{'last':>{width}}{'best':>{width}}",
    ]
    for name, cells in rows.items():
        lines.append(f"  {name:<10}" + "".join(f"{cell:>{width}}" for cell in cells))
    if shows_averages(path):
        lines.append("(averaged weights of the actors; evaluations.csv also has the raw ones)")
    return "\n".join(lines)


def plot_curves(
    path: str | Path,
    out: str | Path,
    *,
    title: str,
    behaviour_score: float,
    measure: str = "D4RL score",
) -> None:
    """Plot the learning curves of all actors, deterministic solid and stochastic dashed.

    Args:
        path: the run's ``evaluations.csv``.
        out: the figure to write; its suffix selects the format.
        title: title of the figure.
        behaviour_score: mean score of the episodes in the dataset, or their mean return, drawn as
            a horizontal line.
        measure: what the values are, see :func:`score_table`. Defaults to ``"D4RL score"``.

    Raises:
        FileNotFoundError: if ``path`` does not exist.
    """
    with default_style():
        _plot_curves(Path(path), Path(out), title, behaviour_score, measure)


def _plot_curves(path: Path, out: Path, title: str, behaviour_score: float, measure: str) -> None:
    # Not pyplot, which would choose a backend for the whole process.
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.subplots()
    for (actor, mode), curve in sorted(read_scores(path).items()):
        axes.plot(
            curve.steps,
            curve.scores,
            color=COLOURS[actor % len(COLOURS)],
            linestyle="-" if mode == "deterministic" else "--",
            marker="o" if len(curve.steps) < 20 else None,
            markersize=4,
            label=f"actor {actor}, {mode}",
        )
    if not math.isnan(behaviour_score):
        axes.axhline(behaviour_score, color="0.5", linestyle=":", label="dataset's behaviour")
    weights = " (averaged weights)" if shows_averages(path) else ""
    axes.set(xlabel="updates", ylabel=f"{measure}{weights}", title=title)
    axes.grid(alpha=0.3)
    # Below the axes, where it hides no curve.
    figure.legend(loc="outside lower center", fontsize="small", ncols=2)
    figure.savefig(out, dpi=150)
