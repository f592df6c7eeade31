"""The tables of a report."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pogo_torchrl.report.intervals import RESAMPLES, spread
from pogo_torchrl.report.published import ALGORITHMS, GROUP_MEANS, PER_TASK, PER_TASK_SOURCE
from pogo_torchrl.report.run_logs import MODES, POGO, RunRecord, weights_label
from pogo_torchrl.report.study import GroupScore, Setting, by_method, by_task
from pogo_torchrl.report.tables import Cell, Table

SCORE = "D4RL's normalised score (0: random policy, 100: expert)"
OVER_SEEDS = "mean ± sample standard deviation over seeds"
LAST_BEST = (
    "Last: the last evaluation of each run. Best: its highest evaluation, chosen by test return, "
    "separately for each actor and action mode."
)
SELECTION = (
    "Choosing w2_weights by score is selection on test returns: on average, the chosen weights "
    "score higher here than they would in new runs."
)
BOOTSTRAP = (
    f"Intervals: 95 %, stratified bootstrap, {RESAMPLES} resamples; too narrow where a task has "
    "few seeds. IQM: interquartile mean."
)


def shown(settings: Sequence[Setting]) -> str:
    """What the values of a table are: scores, returns, or which task has which.

    Args:
        settings: the settings in the table.
    """
    plain = list(dict.fromkeys(s.task for s in settings if not s.scored))
    if plain and len(plain) == len(by_task(settings)):
        return "mean return of an episode"
    d4rl = any(s.measure == "D4RL score" for s in settings) or not settings
    text = SCORE if d4rl else "score (0, 100: the reference returns of the task)"
    return f"{text}; mean return for {', '.join(plain)}" if plain else text


def noun(settings: Sequence[Setting]) -> str:
    """``"score"``, or ``"return"`` if no task has scores.

    Args:
        settings: the settings in the table.
    """
    return "score" if not settings or any(s.scored for s in settings) else "return"


def weights_note(settings: Sequence[Setting]) -> tuple[str, ...]:
    """Note that names the settings whose scores are of averaged actors; empty if there are none.

    Args:
        settings: all settings of the study.
    """
    averaged = [f"{s.task} ({s.label})" for s in settings if s.averaged]
    if not averaged:
        return ()
    which = "all runs" if len(averaged) == len(settings) else ", ".join(averaged)
    return (f"Scores are of the averaged actors (average_actors) for {which}.",)


def headline_table(settings: Sequence[Setting]) -> Table:
    """Scores of the last actor with deterministic actions: one row per task and weights.

    Args:
        settings: all settings of the study.
    """
    return Table(
        "headline",
        f"Last actor, deterministic actions: {shown(settings)}, {OVER_SEEDS}. Data "
        f"{noun(settings)}: mean over the dataset's episodes.",
        (
            "task",
            "w2_weights",
            "seeds",
            "runs done",
            "last step",
            f"data {noun(settings)}",
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
        (LAST_BEST, *weights_note(settings)),
    )


def scores_table(settings: Sequence[Setting]) -> Table:
    """Scores of every actor in both action modes, at the last and the best checkpoint.

    Args:
        settings: all settings of the study.
    """
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
        for actor in range(setting.num_actors)
    ]
    return Table(
        "scores",
        f"Every actor of the chain: {shown(settings)}, {OVER_SEEDS}.",
        (
            "task",
            "w2_weights",
            "actor",
            "seeds",
            "last step",
            *(f"{which} checkpoint, {mode}" for which in ("last", "best") for mode in MODES),
        ),
        rows,
        (LAST_BEST, *weights_note(settings)),
    )


def groups_table(scores: Sequence[GroupScore], selected: Sequence[Setting]) -> Table:
    """Means and interquartile means over tasks, with bootstrap intervals.

    Args:
        scores: the result of :func:`~pogo_torchrl.report.study.group_scores`.
        selected: the settings that they are of, one per task and method.
    """
    return Table(
        "groups",
        f"Over tasks and seeds, with the best w2_weights of each task: {shown(selected)}.",
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


def algorithms_table(settings: Sequence[Setting], selected: Sequence[Setting]) -> Table:
    """Score of each algorithm alone and with actors on top; no rows if all runs are of POGO.

    Args:
        settings: all settings of the study.
        selected: one setting per task and method, whose scores are averaged over tasks; returns
            are not.
    """
    added = max((setting.num_actors for setting in settings), default=1) - 1
    rows: list[tuple[Cell, ...]] = []
    if any(setting.algorithm != POGO for setting in settings):
        for setting in settings:
            cells: list[Cell] = [spread(column) for column in setting.last[:, :, 0].T]
            weights = weights_label(setting.weights, setting.variant)
            first = (setting.task, setting.algorithm, weights, len(setting.runs))
            rows.append((*first, *_padded(cells, added + 1)))
        for members in by_method(s for s in selected if s.scored).values():
            shortest = min(setting.num_actors for setting in members)
            if len(members) > 1:
                last = [setting.last[:, :shortest, 0].mean(0) for setting in members]
                first = (f"mean of {len(members)} tasks", members[0].algorithm, "best of each task",
                         sum(len(setting.runs) for setting in members))  # fmt: skip
                means: list[Cell] = [float(mean) for mean in np.mean(last, axis=0)]
                rows.append((*first, *_padded(means, added + 1)))
    return Table(
        "algorithms",
        "Every algorithm alone (base, the first actor) and with one or more actors on top (+1, +2, "
        f"...), deterministic actions, last checkpoint: {shown(settings)}, {OVER_SEEDS}.",
        ("task", "algorithm", "w2_weights", "seeds", "base", *(f"+{i + 1}" for i in range(added))),
        rows,
        (LAST_BEST, *weights_note(settings)),
    )


def _padded(cells: list[Cell], length: int) -> list[Cell]:
    return [*cells, *[None] * (length - len(cells))]


def chain_table(settings: Sequence[Setting]) -> Table:
    """Score difference between each actor and its predecessor, paired within each run.

    Args:
        settings: all settings of the study; chains of a single actor are skipped.
    """
    settings = [setting for setting in settings if setting.num_actors > 1]
    steps = max((setting.num_actors for setting in settings), default=1) - 1
    rows: list[tuple[Cell, ...]] = []
    for setting in settings:
        gains = np.diff(setting.last, axis=1)
        total = setting.last[:, -1] - setting.last[:, 0]
        for m, mode in enumerate(MODES):
            cells: list[Cell] = [spread(gains[:, i, m]) for i in range(gains.shape[1])]
            first = (setting.task, setting.label, len(setting.runs), mode)
            rows.append((*first, *_padded(cells, steps), spread(total[:, m])))
    return Table(
        "chain",
        f"Improvement along the chain at the last checkpoint: {noun(settings)} differences between "
        f"actors of the same run, {OVER_SEEDS}.",
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
    """The weights tried for each task and method, best first.

    Args:
        settings: all settings of the study.
    """
    rows: list[tuple[Cell, ...]] = []
    groups = [group for m in by_task(settings).values() for group in by_method(m).values()]
    for members in groups:
        task = members[0].task
        ranked = sorted(members, key=lambda setting: -setting.headline.mean)
        for rank, setting in enumerate(ranked, 1):
            behind = ranked[0].headline.mean - setting.headline.mean
            rows.append((task, rank, setting.label, len(setting.runs), setting.headline, behind))
    return Table(
        "weights",
        f"w2_weights of each task, ranked by the last actor's {noun(settings)} (deterministic, "
        f"last checkpoint), {OVER_SEEDS}.",
        ("task", "rank", "w2_weights", "seeds", "last checkpoint", "behind the best"),
        rows,
        (SELECTION,),
    )


def ranking_table(runs: Sequence[RunRecord], settings: Sequence[Setting]) -> Table:
    """Values of fitted Q evaluation beside the true scores, for runs that have been ranked.

    Args:
        runs: all runs of the study.
        settings: the settings of those that have been evaluated.
    """
    rows: list[tuple[Cell, ...]] = []
    setting_of = {run.name: setting for setting in settings for run in setting.runs}
    ranked = [run for run in runs if run.ranking is not None]
    known = list({id(s): s for run in ranked if (s := setting_of.get(run.name))}.values())
    for run in ranked:
        assert run.ranking is not None
        values = [estimate.value for estimate in run.ranking.values]
        setting = setting_of.get(run.name)
        true_values = run.evaluations.scores if setting is None else setting.values(run)
        at_step = true_values[run.evaluations.steps == run.ranking.step, :, 0]
        true = at_step[0].tolist() if len(at_step) else [None] * len(values)
        for actor, estimate in enumerate(run.ranking.values):
            rank = 1 + sum(value > estimate.value for value in values)
            first = (run.task, run.label, run.seed, run.ranking.step, actor)
            rows.append((*first, estimate, rank, true[actor]))
    return Table(
        "ranking",
        "Actors ranked without an environment, by fitted Q evaluation on the run's data: mean "
        f"discounted return from the start states with its 95 % interval, beside "
        f"{shown(known)} of deterministic actions at the same step.",
        ("task", "w2_weights", "seed", "step", "actor", "FQE value", "FQE rank", noun(known)),
        rows,
    )


def published_table(selected: Sequence[Setting]) -> Table:
    """The study next to published scores, task by task.

    Args:
        selected: one setting per task and method; only those of POGO are shown, and tasks without
            published scores are skipped.
    """
    return Table(
        "published",
        f"Comparison with published scores: {SCORE}. POGO here: last actor, deterministic, last "
        f"checkpoint, {OVER_SEEDS}, with the best w2_weights of the task. Others: "
        f"{PER_TASK_SOURCE}.",
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
            if setting.task in PER_TASK and setting.method == POGO
        ],
        (SELECTION,),
    )


def published_groups_table() -> Table:
    """Published mean scores over groups of tasks."""
    return Table(
        "published_groups",
        f"Published means over D4RL's nine locomotion and six antmaze tasks: {SCORE}.",
        ("algorithm", "locomotion", "antmaze", "source"),
        list(GROUP_MEANS),
    )
