"""``summary.csv``: one row per task, w2_weights, seed, actor and action mode."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable

from pogo_torchrl.report.run_logs import MODES, POGO, RunRecord

COLUMNS = (
    "task", "w2_weights", "seed", "actor", "mode", "last_step", "last_score", "last_return",
    "best_step", "best_score", "status", "data_score", "weights",
)  # fmt: skip


def summary_csv(runs: Iterable[RunRecord]) -> str:
    """Format the scores of every run as CSV; runs without an evaluation get empty cells.

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
                row = [run.task, weights, run.seed, actor, mode, *_scores(run, actor, m)]
                shown = "averaged" if run.averaged else "raw"
                own = [run.algorithm] if others else []
                writer.writerow([*row, run.status, data_score, shown, *own])
    return file.getvalue()


def _scores(run: RunRecord, actor: int, mode: int) -> list[object]:
    steps, scores, returns, _ = run.evaluations
    if not run.evaluated:
        return [""] * 5
    curve = scores[:, actor, mode]
    best = int(curve.argmax())  # the earliest of equal scores
    return [
        int(steps[-1]), f"{curve[-1]:.4f}", f"{returns[-1, actor, mode]:.4f}",
        int(steps[best]), f"{curve[best]:.4f}",
    ]  # fmt: skip
