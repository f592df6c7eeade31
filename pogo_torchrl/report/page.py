"""The page that one shows to a colleague."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from pogo_torchrl.report.run_logs import RunRecord
from pogo_torchrl.report.tables import Table


def page(
    runs: Sequence[RunRecord],
    left_out: Mapping[str, str],
    tables: Mapping[str, Table],
    figures: Iterable[str],
) -> str:
    """The one-page summary as Markdown.

    Args:
        runs: all runs.
        left_out: folders that are not in any table, each with the reason.
        tables: by name, those that have rows.
        figures: names of the figures that were drawn.
    """
    sections = ["# POGO: results", _what_ran(runs, left_out)]
    said: set[str] = set()

    def show(table: Table) -> str:
        """With its caption, and those of its notes that do not stand further up."""
        notes = [note for note in table.notes if note not in said]
        said.update(notes)
        return f"{' '.join([table.caption, *notes])}\n\n{table.markdown()}"

    if "headline" in tables:
        sections += ["## Scores", show(tables["headline"])]
        sections += ["Every actor in both modes: [tables/scores.md](tables/scores.md)."]
    if "groups" in tables:
        groups = tables["groups"]
        last = groups._replace(rows=[row for row in groups.rows if row[3] == "last"])
        sections += [
            "## Over tasks",
            show(last),
            "Every actor: [tables/groups.md](tables/groups.md).",
        ]
    titles = {
        "intervals": "",
        "published": "## Beside published scores",
        "curves": "## Learning curves",
        "chain": "## Improvement along the chain",
        "weights": "## Sensitivity to w2_weights",
    }
    for figure in figures:
        kind = figure.partition("_")[0]
        # One title for all figures of a kind.
        title = titles.pop(kind, "")
        sections.append(title)
        if kind == "published":
            sections += [*_comparable(runs), show(tables["published"])]
            sections.append(show(tables["published_groups"]))
        if kind == "weights" and title:
            sections.append(show(tables["weights"]))
        sections.append(f"![{figure}](figures/{figure}.png)")
    sections += ["## Missing, failed, damaged", _problems(runs, left_out)]
    sections += ["## Files", _FILES]
    return "\n\n".join(filter(None, sections)) + "\n"


_FILES = """\
* `summary.csv`: one row a task, w2_weights, seed, actor and action mode
* `tables/`: all tables as Markdown, CSV (four decimals) and LaTeX (booktabs)
* `figures/`: all figures as PNG and PDF"""


def _what_ran(runs: Sequence[RunRecord], left_out: Mapping[str, str]) -> str:
    done = sum(run.done for run in runs)
    failed = sum(bool(run.error) for run in runs)
    tasks = Counter(run.task for run in runs)
    settings = {(run.task, run.weights) for run in runs}
    sources = sorted({run.data_source for run in runs})
    steps = sorted({run.total_steps for run in runs})
    lines = [
        f"{len(runs)} runs ({_count(len(tasks), 'task')}, {len(settings)} choices of task and "
        f"w2_weights): {done} done, {len(runs) - done - failed} unfinished, {failed} failed"
        + (f"; {_count(len(left_out), 'folder')} could not be read." if left_out else "."),
        f"Updates of a run: {', '.join(map(str, steps))}. Data: {', '.join(sources)}."
        if runs
        else "",
    ]
    return " ".join(filter(None, lines))


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _comparable(runs: Sequence[RunRecord]) -> list[str]:
    """What must be said where runs did not learn from D4RL's datasets."""
    others = sorted({run.data_source for run in runs} - {"d4rl"})
    if not others:
        return []
    return [
        "**Not comparable as it stands:** the published scores are for D4RL's own datasets, and "
        f"these runs learned from other data (data.source: {', '.join(others)})."
    ]


def _problems(runs: Sequence[RunRecord], left_out: Mapping[str, str]) -> str:
    lines = [f"* `{name}`: {reason}" for name, reason in left_out.items()]
    for run in runs:
        found = [] if run.done else [run.status]
        if run.error:
            found.append(run.error)
        if not run.evaluated:
            found.append("no evaluation yet")
        if run.evaluations.damage:
            found.append(run.evaluations.damage)
        if found:
            lines.append(f"* `{run.name}`: {'; '.join(found)}")
    return "\n".join(lines) or "Nothing."
