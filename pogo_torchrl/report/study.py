"""Runs aggregated over seeds and over tasks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np

from pogo_torchrl.report.intervals import Estimate, Spread, bootstrap, iqm, mean, spread
from pogo_torchrl.report.run_logs import (
    MODES,
    POGO,
    Array,
    RunRecord,
    count_actors,
    method_name,
    setting_label,
)

_LOCOMOTION = ("halfcheetah", "hopper", "walker2d")
_D4RL_TASK = re.compile(r"(halfcheetah|hopper|walker2d|antmaze)-.+-v2")


class Setting(NamedTuple):
    """The evaluated runs of one task, algorithm, weights and variant, one per seed."""

    task: str
    weights: tuple[float, ...]
    runs: list[RunRecord]
    variant: str = ""
    algorithm: str = POGO
    scored: bool = True
    """Whether the task's returns have scores; if not, all values are plain returns."""

    @property
    def family(self) -> str:
        """Environment of the task, such as ``hopper``; a task of one's own is its own."""
        found = _D4RL_TASK.fullmatch(self.task)
        return found[1] if found else self.task

    @property
    def measure(self) -> str:
        """What the values are: ``D4RL score``, ``score`` or ``return``."""
        if not self.scored:
            return "return"
        return "D4RL score" if _D4RL_TASK.fullmatch(self.task) else "score"

    def values(self, run: RunRecord) -> Array:
        """Scores or returns of a run of the setting, ``[T, N, 2]``: evaluation, actor, mode.

        Args:
            run: the run.
        """
        return run.evaluations.scores if self.scored else run.evaluations.returns

    @property
    def num_actors(self) -> int:
        """Number of actors N."""
        return count_actors(self.algorithm, self.weights)

    @property
    def method(self) -> str:
        """``pogo``, or another algorithm and the number of actors added to it: ``iql + 2``."""
        return method_name(self.algorithm, self.weights)

    @property
    def label(self) -> str:
        """The weights and the variant, if any: ``0.2, 0.1``; others as ``iql + 2 (0.2, 0.1)``."""
        return setting_label(self.algorithm, self.weights, self.variant)

    @property
    def averaged(self) -> bool:
        """Whether scores of any run are of averaged actors."""
        return any(run.averaged for run in self.runs)

    @property
    def last(self) -> Array:
        """Values of each run at its last checkpoint, ``[S, N, 2]``: seed, actor, mode."""
        return np.stack([self.values(run)[-1] for run in self.runs])

    @property
    def best(self) -> Array:
        """Best value of each run over its checkpoints, ``[S, N, 2]``: seed, actor, mode."""
        return np.stack([self.values(run).max(0) for run in self.runs])

    @property
    def headline(self) -> Spread:
        """Value of the last actor at the last checkpoint over seeds, with deterministic actions."""
        return spread(self.last[:, -1, 0])

    @property
    def last_steps(self) -> str:
        """Updates at the last evaluation: ``20000``, or the range over seeds, ``5000-20000``."""
        steps = [int(run.evaluations.steps[-1]) for run in self.runs]
        return str(max(steps)) if min(steps) == max(steps) else f"{min(steps)}-{max(steps)}"

    @property
    def data_score(self) -> float:
        """Mean score (or return) of the episodes in the dataset; NaN if unknown."""
        runs = [run for run in self.runs if run.evaluations.scored == self.scored]
        known = [run.data_score for run in runs if np.isfinite(run.data_score)]
        return float(np.mean(known)) if known else np.nan


class GroupScore(NamedTuple):
    """Aggregate scores of one actor in one action mode over a group of tasks."""

    group: str
    tasks: int
    runs: int
    actor: str
    mode: str
    last_mean: Estimate
    last_iqm: Estimate
    best_mean: Estimate
    best_iqm: Estimate


def settings(runs: Iterable[RunRecord]) -> list[Setting]:
    """Group the evaluated runs by task, algorithm, weights and variant, keeping their order.

    Args:
        runs: the runs, sorted as by :func:`~pogo_torchrl.report.read_runs`.

    Returns:
        One setting for each combination that has been evaluated.
    """
    evaluated = [run for run in runs if run.evaluated]
    plain = {run.task for run in evaluated if not run.evaluations.scored}
    return [
        Setting(task, weights, list(group), variant, algorithm, task not in plain)
        for (task, algorithm, weights, variant), group in groupby(
            evaluated, key=lambda run: (run.task, run.algorithm, run.weights, run.variant)
        )
    ]


def by_task(found: Iterable[Setting]) -> dict[str, list[Setting]]:
    """Group settings by task, keeping their order."""
    return _group_by(found, lambda setting: setting.task)


def by_method(found: Iterable[Setting]) -> dict[str, list[Setting]]:
    """Group settings by algorithm and number of added actors, keeping their order."""
    return _group_by(found, lambda setting: setting.method)


def by_family(found: Iterable[Setting]) -> dict[str, list[Setting]]:
    """Group settings by environment, keeping their order."""
    return _group_by(found, lambda setting: setting.family)


def _group_by(found: Iterable[Setting], key: Callable[[Setting], str]) -> dict[str, list[Setting]]:
    parts: dict[str, list[Setting]] = {}
    for setting in found:
        parts.setdefault(key(setting), []).append(setting)
    return parts


def best_settings(found: Iterable[Setting]) -> list[Setting]:
    """Select the setting with the highest headline score for each task and method.

    Ties go to the first.
    """
    return [
        max(members, key=lambda setting: setting.headline.mean)
        for of_task in by_task(found).values()
        for members in by_method(of_task).values()
    ]


def groups(selected: Sequence[Setting]) -> dict[str, list[Setting]]:
    """Group settings into all tasks, locomotion and each environment.

    A group with the same tasks as an earlier one is dropped.

    Args:
        selected: one setting per task.

    Returns:
        The settings of each group, by its name.
    """
    families = by_family(selected)
    wanted = {
        "all tasks": set(families),
        "locomotion": set(_LOCOMOTION),
        **{name: {name} for name in families},
    }
    found: dict[str, list[Setting]] = {}
    for name, parts in wanted.items():
        members = [setting for setting in selected if setting.family in parts]
        if members and members not in found.values():
            found[name] = members
    return found


def group_scores(selected: Sequence[Setting]) -> list[GroupScore]:
    """Means and interquartile means over tasks and seeds, for every actor and mode.

    The last actors of all chains are compared as ``last``. The other actors are compared by index,
    up to the length of the shortest chain.

    Args:
        selected: one setting per task and method.

    Returns:
        One entry for each method, group of :func:`groups`, actor and action mode.
    """
    rows = []
    for name, members in _groups_of_methods(selected):
        shortest = min(setting.num_actors for setting in members)
        actors = [(str(i), i) for i in range(shortest - 1)] + [("last", -1)]
        for label, actor in actors:
            for m, mode in enumerate(MODES):
                last = [setting.last[:, actor, m] for setting in members]
                best = [setting.best[:, actor, m] for setting in members]
                estimates = [bootstrap(x, f) for x in (last, best) for f in (mean, iqm)]
                runs = sum(len(setting.runs) for setting in members)
                rows.append(GroupScore(name, len(members), runs, label, mode, *estimates))
    return rows


def _groups_of_methods(selected: Sequence[Setting]) -> Iterator[tuple[str, list[Setting]]]:
    """Name and settings of each group; the names of POGO's are those of the tasks alone."""
    for method, of_method in by_method(selected).items():
        for name, members in groups(of_method).items():
            yield name if method == POGO else f"{method}, {name}", members
