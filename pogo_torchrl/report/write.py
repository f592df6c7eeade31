"""Writing a report: ``summary.csv``, tables, figures and the summary page."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from pogo_torchrl.files import atomic_write, make_writable
from pogo_torchrl.report import content, figures
from pogo_torchrl.report.drawing import Figure, default_style
from pogo_torchrl.report.page import TITLE, page
from pogo_torchrl.report.published import PER_TASK
from pogo_torchrl.report.run_logs import POGO, RunRecord, read_runs
from pogo_torchrl.report.study import (
    GroupScore,
    Setting,
    best_settings,
    by_family,
    by_task,
    group_scores,
    settings,
)
from pogo_torchrl.report.summary import summary_csv
from pogo_torchrl.report.tables import Table

_LOGGER = logging.getLogger(__name__)


def write_report(log_dir: str | Path, results_dir: str | Path) -> Path:
    """Write tables, figures and a one-page summary of all runs below a folder.

    Only reads the files of the runs, so it can be called while a study is running. The same files
    give the same report, byte for byte.

    Args:
        log_dir: the folder that the runs were written to.
        results_dir: the folder to write to; files of an earlier report are replaced.

    Returns:
        The path of the one-page summary, ``results_dir/README.md``.

    Raises:
        FileNotFoundError: if there is no run below ``log_dir``.
        FileExistsError: if ``results_dir`` contains a README.md that is not an earlier report.
        OSError: if ``results_dir`` cannot be written.

    Example:
        >>> write_report("no_such_folder", "results")
        Traceback (most recent call last):
            ...
        FileNotFoundError: log_dir=no_such_folder contains no runs (TASK/w2_WEIGHTS/seed_SEED); \
give the folder that the runs were written to.
    """
    results_dir = Path(results_dir)
    path = results_dir / "README.md"
    if path.exists() and not path.read_text(errors="replace").startswith(TITLE):
        raise FileExistsError(
            f"{path} is not an earlier report, and is not replaced: choose another results_dir."
        )
    runs, left_out = read_runs(log_dir)
    for folder in (results_dir, results_dir / "tables", results_dir / "figures"):
        make_writable(folder, "results_dir")
    found = settings(runs)
    selected = best_settings(found)
    scores = group_scores([setting for setting in selected if setting.scored])
    tables = {table.name: table for table in _tables(runs, found, selected, scores) if table.rows}

    _write(results_dir / "summary.csv", summary_csv(runs))
    for table in tables.values():
        stem = results_dir / "tables" / table.name
        _write(stem.with_suffix(".md"), f"{table.full_caption}\n\n{table.markdown()}\n")
        _write(stem.with_suffix(".csv"), table.csv())
        _write(stem.with_suffix(".tex"), table.latex())
    drawn = []
    with default_style():
        for name, draw in _figures(found, selected, scores):
            try:
                figure = draw()
                files = {suffix: figures.encode(figure, suffix) for suffix in ("png", "pdf")}
            except Exception as error:  # Matplotlib's, of many kinds
                _LOGGER.warning("The figure %s is left out: it cannot be drawn (%s).", name, error)
                continue
            for suffix, content_of_file in files.items():
                _write(results_dir / "figures" / f"{name}.{suffix}", content_of_file)
            drawn.append(name)
    _write(path, page(runs, left_out, tables, drawn))
    return path


def _tables(
    runs: Sequence[RunRecord],
    found: Sequence[Setting],
    selected: Sequence[Setting],
    scores: Sequence[GroupScore],
) -> list[Table]:
    return [
        content.headline_table(found),
        content.scores_table(found),
        content.algorithms_table(found, selected),
        content.groups_table(scores, [s for s in selected if s.scored]),
        content.chain_table(found),
        content.weights_table(found),
        content.ranking_table(runs, found),
        content.published_table(selected),
        content.published_groups_table(),
    ]


def _figures(
    found: Sequence[Setting], selected: Sequence[Setting], scores: Sequence[GroupScore]
) -> Iterator[tuple[str, Callable[[], Figure]]]:
    """Iterate over the names of figures and how to draw them, skipping those that are empty."""
    if scores:
        yield "intervals", partial(figures.intervals_figure, scores)
    if any(s.task in PER_TASK and s.method == POGO for s in selected):
        yield "published", partial(figures.published_figure, selected)
    for task, members in by_task(found).items():
        yield f"curves_{_slug(task)}", partial(figures.curves_figure, members)
    # One figure per environment, so that each fits on a page.
    for family, members in by_family(found).items():
        if any(setting.num_actors > 1 for setting in members):
            yield f"chain_{_slug(family)}", partial(figures.chain_figure, members)
    for family, members in by_family(found).items():
        yield f"weights_{_slug(family)}", partial(figures.weights_figure, members)


def _slug(name: str) -> str:
    """Make a name safe for use in a file name."""
    return re.sub(r"[^\w.-]", "_", name)


def _write(path: Path, text: str | bytes) -> None:
    with atomic_write(path) as file:
        file.write(text.encode() if isinstance(text, str) else text)
