"""Tables, figures and a summary page from run folders. Reads files only and needs no PyTorch."""

from __future__ import annotations

from pogo_torchrl.report.figures import COLOURS
from pogo_torchrl.report.intervals import Estimate, Spread, bootstrap, iqm, rank_correlation, spread
from pogo_torchrl.report.one_run import Curve, plot_curves, read_scores, score_table
from pogo_torchrl.report.run_logs import MODES, RunRecord, read_runs
from pogo_torchrl.report.write import write_report

__all__ = [
    "COLOURS",
    "MODES",
    "Curve",
    "Estimate",
    "RunRecord",
    "Spread",
    "bootstrap",
    "iqm",
    "plot_curves",
    "rank_correlation",
    "read_runs",
    "read_scores",
    "score_table",
    "spread",
    "write_report",
]
