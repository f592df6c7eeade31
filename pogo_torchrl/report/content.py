"""The tables of a report."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pogo_torchrl.report.intervals import RESAMPLES, spread
from pogo_torchrl.report.published import ALGORITHMS, GROUP_MEANS, PER_TASK, PER_TASK_SOURCE
from pogo_torchrl.report.run_logs import MODES
from pogo_torchrl.report.study import GroupScore, Setting, by_task
from pogo_torchrl.report.tables import Cell, Table

SCORE = "D4RL's normalised score (0: random policy, 100: expert)"
OVER_SEEDS = "mean ± sample standard deviation over seeds"
LAST_BEST = (
    "Last: the last evaluation of each run. Best: the highest of its evaluations, chosen by test "
    "return, of each actor and action mode by itself."
)
SELECTION = (
    "Choosing w2_weights by their scores is selection on test returns: the best of several scores "
    "higher than it would in new runs, on average."
)
BOOTSTRAP = (
    f"Intervals: 95 %, stratified bootstrap, {RESAMPLES} resamples; too short where a task has "
    "few seeds. IQM: interquartile mean."
)


def headline_table(settings: Sequence[Setting]) -> Table:
    """The last actor, deterministic: one row a task and choice of weights."""
    return Table(
        "headline",
        f"Last actor, deterministic actions: {SCORE}, {OVER_SEEDS}; data score: mean of the "
        "dataset's episodes.",
        (
            "task",
            "w2_weights",
            "seeds",
            "runs done",
            "last step",
            "data score",
            "last checkpoint",
            "best checkpoint",
        ),
        [
            (
                setting.task,
                setting.label,
                len(setting.runs),
                sum(run.done for run in setting.runs),
                setting.last_steps,
                setting.data_score,
                setting.headline,
                spread(setting.best[:, -1, 0]),
            )
            for setting in settings
        ],
        (LAST_BEST,),
    )


def scores_table(settings: Sequence[Setting]) -> Table:
    """Every actor in both modes, last and best checkpoint."""
    rows: list[tuple[Cell, ...]] = [
        (
            setting.task,
            setting.label,
            actor,
            len(setting.runs),
            setting.last_steps,
            *(
                spread(scores[:, actor, mode])
                for scores in (setting.last, setting.best)
                for mode in range(len(MODES))
            ),
        )
        for setting in settings
        for actor in range(len(setting.weights))
    ]
    return Table(
        "scores",
        f"Every actor of the chain: {SCORE}, {OVER_SEEDS}.",
        (
            "task",
            "w2_weights",
            "actor",
            "seeds",
            "last step",
            *(f"{which} checkpoint, {mode}" for which in ("last", "best") for mode in MODES),
        ),
        rows,
        (LAST_BEST,),
    )


def groups_table(scores: Sequence[GroupScore]) -> Table:
    """Means and interquartile means over tasks, with intervals."""
    return Table(
        "groups",
        f"Over tasks and seeds, at the best w2_weights of each task: {SCORE}.",
        (
            "tasks",
            "number of tasks",
            "runs",
            "actor",
            "mode",
            "last checkpoint, mean",
            "last checkpoint, IQM",
            "best checkpoint, mean",
            "best checkpoint, IQM",
        ),
        list(scores),
        (BOOTSTRAP, LAST_BEST, SELECTION),
    )


def chain_table(settings: Sequence[Setting]) -> Table:
    """What each step of the chain adds to the score."""
    settings = [setting for setting in settings if len(setting.weights) > 1]
    steps = max((len(setting.weights) for setting in settings), default=1) - 1
    rows: list[tuple[Cell, ...]] = []
    for setting in settings:
        gains = np.diff(setting.last, axis=1)
        total = setting.last[:, -1] - setting.last[:, 0]
        for m, mode in enumerate(MODES):
            cells: list[Cell] = [spread(gains[:, i, m]) for i in range(gains.shape[1])]
            cells += [None] * (steps - len(cells))
            rows.append(
                (setting.task, setting.label, len(setting.runs), mode, *cells, spread(total[:, m]))
            )
    return Table(
        "chain",
        "Improvement along the chain at the last checkpoint: differences of scores of one run's "
        f"actors, {OVER_SEEDS}.",
        (
            "task",
            "w2_weights",
            "seeds",
            "mode",
            *(f"π{i + 1} − π{i}" for i in range(steps)),
            "last actor − π0",
        ),
        rows,
    )


def weights_table(settings: Sequence[Setting]) -> Table:
    """Choices of weights of each task, best first."""
    rows: list[tuple[Cell, ...]] = []
    for task, members in by_task(settings).items():
        ranked = sorted(members, key=lambda setting: -setting.headline.mean)
        for rank, setting in enumerate(ranked, 1):
            behind = ranked[0].headline.mean - setting.headline.mean
            rows.append((task, rank, setting.label, len(setting.runs), setting.headline, behind))
    return Table(
        "weights",
        f"w2_weights of each task by the last actor's score (deterministic, last checkpoint), "
        f"{OVER_SEEDS}.",
        ("task", "rank", "w2_weights", "seeds", "last checkpoint", "behind the best"),
        rows,
        (SELECTION,),
    )


def published_table(selected: Sequence[Setting]) -> Table:
    """The study beside published scores, task by task."""
    return Table(
        "published",
        f"Beside published scores: {SCORE}. POGO here: last actor, deterministic, last checkpoint, "
        f"{OVER_SEEDS}, at the best w2_weights of the task. Others: {PER_TASK_SOURCE}.",
        ("task", "data of POGO here", "last step", "seeds", "POGO here", *ALGORITHMS),
        [
            (
                setting.task,
                ", ".join(sorted({run.data_source for run in setting.runs})),
                setting.last_steps,
                len(setting.runs),
                setting.headline,
                *(PER_TASK[setting.task][name] for name in ALGORITHMS),
            )
            for setting in selected
            if setting.task in PER_TASK
        ],
        (SELECTION,),
    )


def published_groups_table() -> Table:
    """Group means that others have published."""
    return Table(
        "published_groups",
        f"Published means over D4RL's nine locomotion and six antmaze tasks: {SCORE}.",
        ("algorithm", "locomotion", "antmaze", "source"),
        list(GROUP_MEANS),
    )
