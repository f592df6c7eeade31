"""Figures of a report. Each colour is paired with a marker and a line style."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pogo_torchrl.report.drawing import Axes, Figure, matplotlib
from pogo_torchrl.report.intervals import spread
from pogo_torchrl.report.published import ALGORITHMS, PER_TASK
from pogo_torchrl.report.run_logs import MODES, POGO
from pogo_torchrl.report.study import GroupScore, Setting, by_task

# Okabe and Ito's palette, safe for colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)), (0, (3, 1)), (0, (8, 2)))

SCORE = "D4RL score"
_SPREAD = "mean ± std over seeds"
_DATA = "mean of the data's episodes"


def curves_figure(settings: Sequence[Setting]) -> Figure:
    """Learning curves of one task: one row of panels per setting, one panel per action mode.

    Each line is an actor's mean over the seeds evaluated at that step. With two or more seeds, the
    band around it is plus and minus one sample standard deviation.

    Args:
        settings: all settings of one task.
    """
    figure, grid = _panels(len(settings), 2, height=2.1, sharex=True, sharey=True)
    for row, setting in zip(grid, settings):
        for m, axes in enumerate(row):
            for actor in range(setting.num_actors):
                _curve(axes, setting, actor, m)
            _data_line(axes.axhline, setting)
            seeds = f"{len(setting.runs)} seed{'s' * (len(setting.runs) > 1)}"
            axes.set_title(f"{MODES[m]}, {_row_label(setting)}, {seeds}", fontsize="small")
        row[0].set_ylabel(setting.measure)
    if any(len(setting.runs) > 1 for setting in settings):
        grid[0, 0].fill_between([], [], color="0.5", alpha=0.3, label=f"band: {_SPREAD}")
    for axes in grid[-1]:
        axes.set_xlabel("updates")
        axes.ticklabel_format(axis="x", style="sci", scilimits=(-3, 4), useMathText=True)
    figure.suptitle(settings[0].task)
    _legend(figure, grid.flat)
    return figure


def chain_figure(settings: Sequence[Setting]) -> Figure:
    """Improvement along the chain: one panel per task and mode, one row per setting.

    Args:
        settings: settings of one environment; chains of a single actor are skipped.
    """
    settings = [setting for setting in settings if setting.num_actors > 1]
    tasks = by_task(settings)
    figure, grid = _dot_panels(tasks, columns=2)
    for row, members in zip(grid, tasks.values()):
        for m, axes in enumerate(row):
            axes.axvline(0, color="0.35", linewidth=1)
            for y, setting in enumerate(members):
                gains = np.diff(setting.last[:, :, m], axis=1)
                total = setting.last[:, -1, m] - setting.last[:, 0, m]
                steps = [(f"π{i + 1} − π{i}", gain) for i, gain in enumerate(gains.T)]
                offsets = np.linspace(-0.25, 0.25, len(steps) + 1)
                for i, (label, gain) in enumerate(steps):
                    _dot(axes, gain, y + offsets[i], i, label)
                _dot(axes, total, y + offsets[-1], -1, "last actor − π0")
            axes.set_title(f"{members[0].task}, {MODES[m]}", fontsize="small")
    for axes in grid[-1]:
        shown = "scores" if settings[0].scored else "returns"
        axes.set_xlabel(f"difference of {shown}, mean ± std")
    _legend(figure, grid.flat)
    return figure


def weights_figure(settings: Sequence[Setting]) -> Figure:
    """Sensitivity to the weights: one panel per task, one row per setting.

    Shows the last actor's scores with deterministic actions.

    Args:
        settings: settings of one environment.
    """
    tasks = by_task(settings)
    figure, grid = _dot_panels(tasks, columns=1)
    for (axes,), members in zip(grid, tasks.values()):
        for y, setting in enumerate(members):
            _dot(axes, setting.last[:, -1, 0], y - 0.12, 0, "last checkpoint")
            _dot(axes, setting.best[:, -1, 0], y + 0.12, 1, "best checkpoint (by test return)")
        _data_line(axes.axvline, members[0])
        axes.set_title(members[0].task, fontsize="small")
    shown = settings[0].measure
    grid[-1, 0].set_xlabel(f"{shown} of the last actor, deterministic, {_SPREAD}")
    _legend(figure, grid.flat)
    return figure


def published_figure(selected: Sequence[Setting]) -> Figure:
    """The study next to published scores: one row per task.

    Args:
        selected: one setting per task and method; only those of POGO are shown, and tasks without
            published scores are skipped.
    """
    known = [s for s in selected if s.task in PER_TASK and s.method == POGO]
    figure, grid = _panels(1, 1, height=0.8 + 0.55 * len(known))
    axes = grid[0, 0]
    offsets = np.linspace(-0.27, 0.27, len(ALGORITHMS) + 1)
    data = ", ".join(sorted({run.data_source for setting in known for run in setting.runs}))
    for y, setting in enumerate(known):
        _dot(axes, setting.last[:, -1, 0], y + offsets[0], 0, f"POGO, these runs (data: {data})")
        for i, name in enumerate(ALGORITHMS, 1):
            published = PER_TASK[setting.task][name]
            axes.errorbar(
                published.mean, y + offsets[i], xerr=published.std, label=name, **_style(i)
            )
    _rows(axes, [setting.task for setting in known])
    axes.set_xlabel(f"{SCORE}, last checkpoint, {_SPREAD}")
    _legend(figure, [axes])
    return figure


def intervals_figure(scores: Sequence[GroupScore]) -> Figure:
    """Interquartile means with intervals: one row of panels per group of tasks.

    Args:
        scores: the result of :func:`~pogo_torchrl.report.study.group_scores`.
    """
    names = list(dict.fromkeys(score.group for score in scores))
    # One row for each index that any group compares, then one for the last actors.
    actors = [*sorted({score.actor for score in scores} - {"last"}, key=int), "last"]
    figure, grid = _panels(len(names), 2, height=0.6 + 0.3 * len(actors), sharex=True)
    for row, name in zip(grid, names):
        for axes, which in zip(row, ("last", "best")):
            for score in (score for score in scores if score.group == name):
                m = MODES.index(score.mode)
                value, low, high = getattr(score, f"{which}_iqm")
                axes.errorbar(
                    value,
                    actors.index(score.actor) + 0.24 * m - 0.12,
                    xerr=[[value - low], [high - value]],
                    label=score.mode,
                    **_style(m),
                )
            tasks = f"{score.tasks} task{'s' * (score.tasks > 1)}, {score.runs} runs"
            axes.set_title(f"{name} ({tasks}), {which} checkpoint", fontsize="small")
            _rows(axes, [f"actor {actor}" if actor != "last" else "last actor" for actor in actors])
            axes.label_outer()
    for axes in grid[-1]:
        axes.set_xlabel(f"IQM of {SCORE}s, 95 % interval")
    _legend(figure, grid.flat)
    return figure


def encode(figure: Figure, kind: str) -> bytes:
    """Encode a figure as the content of a file; equal figures give equal bytes.

    Args:
        figure: the figure.
        kind: the file format, ``"png"`` or ``"pdf"``.

    Returns:
        The content of the file.
    """
    file = io.BytesIO()
    metadata = {"CreationDate": None} if kind == "pdf" else {}
    # TrueType fonts: text stays searchable and editable, as journals require.
    with matplotlib.rc_context({"pdf.fonttype": 42}):
        figure.savefig(file, format=kind, dpi=150, metadata=metadata)
    return file.getvalue()


def _curve(axes: Axes, setting: Setting, actor: int, mode: int) -> None:
    steps = np.unique(np.concatenate([run.evaluations.steps for run in setting.runs]))
    at = {step: i for i, step in enumerate(steps.tolist())}
    scores = np.full((len(setting.runs), len(steps)), np.nan)
    for row, run in zip(scores, setting.runs):
        row[[at[step] for step in run.evaluations.steps.tolist()]] = setting.values(run)[
            :, actor, mode
        ]
    spreads = np.array([spread(column[~np.isnan(column)]) for column in scores.T])
    style: dict[str, Any] = {"color": _cycle(COLOURS, actor), "linestyle": _cycle(LINES, actor)}
    marks = _cycle(MARKERS, actor) if len(steps) < 20 else None
    axes.plot(steps, spreads[:, 0], marker=marks, markersize=4, label=f"actor {actor}", **style)
    if len(setting.runs) > 1:
        low, high = spreads[:, 0] - spreads[:, 1], spreads[:, 0] + spreads[:, 1]
        axes.fill_between(steps, low, high, color=style["color"], alpha=0.2, linewidth=0)


def _data_line(line: Callable[..., Any], setting: Setting) -> None:
    """Mark the score of the data, if their episodes are known."""
    if np.isfinite(setting.data_score):
        line(setting.data_score, color="0.35", linestyle=":", label=_DATA)


def _dot(axes: Axes, values: np.ndarray, y: float, style: int, label: str) -> None:
    """Draw mean and standard deviation, and a faint dot for each seed."""
    found = spread(values)
    if len(values) > 1:
        axes.plot(
            values, np.full(len(values), y), linestyle="none", marker="o", markersize=3,
            markerfacecolor="none", markeredgecolor="0.45", markeredgewidth=0.7, zorder=3,
            label="one seed",
        )  # fmt: skip
    error = None if np.isnan(found.std) else found.std
    axes.errorbar(found.mean, y, xerr=error, label=label, **_style(style))


def _style(index: int) -> dict[str, Any]:
    return {
        "color": _cycle(COLOURS, index), "marker": _cycle(MARKERS, index), "markersize": 5,
        "linestyle": "none", "capsize": 2, "elinewidth": 1.2,
    }  # fmt: skip


def _cycle(values: Sequence[Any], index: int) -> Any:
    return values[index % len(values)]


def _panels(rows: int, columns: int, height: float, **options: Any) -> tuple[Figure, np.ndarray]:
    """Make a grid of axes as wide as a page; ``height`` is the height of one row in inches."""
    figure = Figure(figsize=(7.2, 0.9 + height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, **options)
    for axes in grid.flat:
        axes.grid(alpha=0.3)
    return figure, grid


def _dot_panels(tasks: dict[str, list[Setting]], columns: int) -> tuple[Figure, np.ndarray]:
    """Make one row of panels per task, its height proportional to the number of settings."""
    lines = [len(members) for members in tasks.values()]
    figure = Figure(
        figsize=(7.2, 1.2 + 0.45 * len(lines) + 0.38 * sum(lines)), layout="constrained"
    )
    grid = figure.subplots(
        len(lines), columns, squeeze=False, sharex=True, height_ratios=[n + 0.4 for n in lines]
    )
    for row, members in zip(grid, tasks.values()):
        for axes in row:
            axes.grid(alpha=0.3)
            _rows(axes, [_row_label(setting) for setting in members])
            axes.label_outer()
    return figure, grid


def _row_label(setting: Setting) -> str:
    return f"w = {setting.label}" if setting.algorithm == POGO else setting.label


def _rows(axes: Axes, labels: Sequence[str]) -> None:
    """Label the rows of a dot plot, from top to bottom."""
    axes.set_yticks(range(len(labels)), labels, fontsize="small")
    axes.set_ylim(len(labels) - 0.5, -0.5)


def _legend(figure: Figure, panels: Any) -> None:
    """Draw one legend for all panels, below them, where it hides no data."""
    found: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            found.setdefault(label, handle)
    figure.legend(
        list(found.values()), list(found), loc="outside lower center", fontsize="small", ncols=3
    )
