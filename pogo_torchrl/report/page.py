"""The summary page of a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from pogo_torchrl.report.published import PER_TASK
from pogo_torchrl.report.run_logs import POGO, RunRecord
from pogo_torchrl.report.tables import Table

TITLE = "# POGO: results"
"""First line of a report."""


def page(
    runs: Sequence[RunRecord],
    left_out: Mapping[str, str],
    tables: Mapping[str, Table],
    figures: Iterable[str],
) -> str:
    """Format the summary page as Markdown.

    Args:
        runs: all runs that could be read.
        left_out: the folders that could not, by name, each with the reason.
        tables: the tables that have rows, by name.
        figures: names of the figures that were drawn.

    Returns:
        The content of ``README.md``.
    """
    sections = [TITLE, _overview(runs, left_out)]
    shown: set[str] = set()

    def show(table: Table) -> str:
        """Format a table with its caption and the notes that are not on the page yet."""
        notes = [note for note in table.notes if note not in shown]
        shown.update(notes)
        return f"{' '.join([table.caption, *notes])}\n\n{table.markdown()}"

    if "headline" in tables:
        sections += ["## Scores", show(tables["headline"])]
        sections += ["Every actor in both modes: [tables/scores.md](tables/scores.md)."]
    if "algorithms" in tables:
        sections += ["## Algorithms, and chains on top", show(tables["algorithms"])]
    if "groups" in tables:
        groups = tables["groups"]
        last = groups._replace(rows=[row for row in groups.rows if row[3] == "last"])
        sections += [
            "## Aggregates over tasks",
            show(last),
            "Every actor: [tables/groups.md](tables/groups.md).",
        ]
    if "ranking" in tables:
        sections += ["## Which actor to deploy, from the data alone", show(tables["ranking"])]
    titles = {
        "intervals": "",
        "published": "## Comparison with published scores",
        "curves": "## Learning curves",
        "chain": "## Improvement along the chain",
        "weights": "## Sensitivity to w2_weights",
    }
    for figure in figures:
        section = figure.partition("_")[0]
        # Only the first figure of a section carries its title.
        title = titles.pop(section, "")
        sections.append(title)
        if section == "published":
            sections += [*_comparable(runs), show(tables["published"])]
            sections.append(show(tables["published_groups"]))
        if section == "weights" and title:
            sections.append(show(tables["weights"]))
        sections.append(f"![{figure}](figures/{figure}.png)")
    sections += ["## Unfinished, failed and damaged runs", _problems(runs, left_out)]
    sections += ["## Files", _FILES]
    return "\n\n".join(filter(None, sections)) + "\n"


_FILES = """\
* `summary.csv`: one row per task, w2_weights, seed, actor and action mode
* `tables/`: all tables as Markdown, CSV (four decimals) and LaTeX (booktabs)
* `figures/`: all figures as PNG and PDF"""


def _overview(runs: Sequence[RunRecord], left_out: Mapping[str, str]) -> str:
    done = sum(run.done for run in runs)
    failed = sum(bool(run.error) for run in runs)
    tasks = Counter(run.task for run in runs)
    settings = {(run.task, run.algorithm, run.label) for run in runs}
    pogo_only = all(run.algorithm == POGO for run in runs)
    sources = sorted({run.data_source for run in runs})
    steps = sorted({run.total_steps for run in runs})
    lines = [
        f"{len(runs)} runs ({_count(len(tasks), 'task')}, {len(settings)} combinations of task"
        f"{'' if pogo_only else ', algorithm'} and w2_weights): {done} done, "
        f"{len(runs) - done - failed} unfinished, {failed} failed"
        + (f"; {_count(len(left_out), 'folder')} could not be read." if left_out else "."),
        f"Updates per run: {', '.join(map(str, steps))}. Data: {', '.join(sources)}."
        if runs
        else "",
    ]
    return " ".join(filter(None, lines))


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _comparable(runs: Sequence[RunRecord]) -> list[str]:
    """A warning if any run was trained on data other than D4RL's datasets."""
    others = sorted({run.data_source for run in runs if run.task in PER_TASK} - {"d4rl"})
    if not others:
        return []
    return [
        "**Not directly comparable:** the published scores are for D4RL's own datasets, and these "
        f"runs were trained on other data (data.source: {', '.join(others)})."
    ]


def _problems(runs: Sequence[RunRecord], left_out: Mapping[str, str]) -> str:
    lines = [f"* `{name}`: {reason}" for name, reason in left_out.items()]
    for run in runs:
        found = [] if run.done else [run.status]
        if run.error:
            found.append(run.error)
        if not run.evaluated:
            found.append("not evaluated" if run.trains_only else "no evaluation yet")
        if run.evaluations.damage:
            found.append(run.evaluations.damage)
        if found:
            lines.append(f"* `{run.name}`: {'; '.join(found)}")
    return "\n".join(lines) or "None."
