"""``summary.csv``: one row per task, w2_weights, seed, actor and action mode."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable

from pogo_torchrl.report.run_logs import MODES, POGO, RunRecord

COLUMNS = (
    "task", "w2_weights", "seed", "actor", "mode", "last_step", "last_score", "last_return",
    "best_step", "best_score", "status", "data_score", "weights", "best_return",
)  # fmt: skip


def summary_csv(runs: Iterable[RunRecord]) -> str:
    """Format the scores of every run as CSV; what is not known gets an empty cell.

    ``best_step`` has the best score or, for a task without scores, the best return.

    If any run is not of POGO, there is a last column with the algorithm.

    Args:
        runs: the runs, in the order of :func:`~pogo_torchrl.report.read_runs`.

    Returns:
        The content of ``summary.csv``.
    """
    file, runs = io.StringIO(), list(runs)
    writer = csv.writer(file, lineterminator="\n")
    others = any(run.algorithm != POGO for run in runs)
    writer.writerow([*COLUMNS, *(["algorithm"] if others else [])])
    for run in runs:
        # Spelled as in the names of the run folders.
        weights = "_".join(filter(None, [*(f"{w:g}" for w in run.weights), run.variant]))
        data_score = "" if math.isnan(run.data_score) else f"{run.data_score:.1f}"
        for actor in range(run.num_actors):
            for m, mode in enumerate(MODES):
                *values, best_return = _values(run, actor, m)
                row = [run.task, weights, run.seed, actor, mode, *values]
                shown = "averaged" if run.averaged else "raw"
                own = [run.algorithm] if others else []
                writer.writerow([*row, run.status, data_score, shown, best_return, *own])
    return file.getvalue()


def _values(run: RunRecord, actor: int, mode: int) -> list[object]:
    """Last step, score and return; best step and score, or return, if there are no scores."""
    if not run.evaluated:
        return [""] * 6
    steps, scores, returns = (
        run.evaluations.steps, run.evaluations.scores[:, actor, mode],
        run.evaluations.returns[:, actor, mode],
    )  # fmt: skip
    best = int((scores if run.evaluations.scored else returns).argmax())  # the earliest of equals
    last_score, best_score = ("" if math.isnan(s) else f"{s:.4f}" for s in scores[[-1, best]])
    return [
        int(steps[-1]), last_score, f"{returns[-1]:.4f}", int(steps[best]), best_score,
        f"{returns[best]:.4f}",
    ]  # fmt: skip
