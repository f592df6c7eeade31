"""Runs put together: over seeds, and over tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np

from pogo_torchrl.report.intervals import Estimate, Spread, bootstrap, iqm, mean, spread
from pogo_torchrl.report.run_logs import MODES, Array, RunRecord, weights_label

_LOCOMOTION = ("halfcheetah", "hopper", "walker2d")


class Setting(NamedTuple):
    """The runs of one task and one choice of weights that have an evaluation; one a seed."""

    task: str
    weights: tuple[float, ...]
    runs: list[RunRecord]

    @property
    def family(self) -> str:
        """The task's environment, such as ``hopper``."""
        return self.task.split("-")[0]

    @property
    def label(self) -> str:
        """The weights as people write them."""
        return weights_label(self.weights)

    @property
    def last(self) -> Array:
        """Scores of each run's last checkpoint, ``[S, N, 2]``."""
        return np.stack([run.last for run in self.runs])

    @property
    def best(self) -> Array:
        """Best scores of each run's checkpoints, ``[S, N, 2]``."""
        return np.stack([run.best for run in self.runs])

    @property
    def headline(self) -> Spread:
        """Last actor, deterministic, last checkpoint; over seeds."""
        return spread(self.last[:, -1, 0])

    @property
    def last_steps(self) -> str:
        """Updates at the last checkpoint, such as ``20000`` or ``5000-20000`` over seeds."""
        steps = [int(run.evaluations.steps[-1]) for run in self.runs]
        return str(max(steps)) if min(steps) == max(steps) else f"{min(steps)}-{max(steps)}"

    @property
    def data_score(self) -> float:
        """Mean score of the episodes in the data; NaN if unknown."""
        known = [run.data_score for run in self.runs if np.isfinite(run.data_score)]
        return float(np.mean(known)) if known else np.nan


class GroupScore(NamedTuple):
    """Scores of one actor in one mode over a group of tasks."""

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
    """Evaluated runs by task and weights, in their order.

    Args:
        runs: sorted, as :func:`~pogo_torchrl.report.read_runs` gives them.
    """
    evaluated = (run for run in runs if run.evaluated)
    return [
        Setting(task, weights, list(group))
        for (task, weights), group in groupby(evaluated, key=lambda run: (run.task, run.weights))
    ]


def by_task(found: Iterable[Setting]) -> dict[str, list[Setting]]:
    """The settings of each task, in their order."""
    return _by(found, lambda setting: setting.task)


def by_family(found: Iterable[Setting]) -> dict[str, list[Setting]]:
    """The settings of each environment, in their order."""
    return _by(found, lambda setting: setting.family)


def _by(found: Iterable[Setting], key: Callable[[Setting], str]) -> dict[str, list[Setting]]:
    parts: dict[str, list[Setting]] = {}
    for setting in found:
        parts.setdefault(key(setting), []).append(setting)
    return parts


def best_settings(found: Iterable[Setting]) -> list[Setting]:
    """Of each task the setting with the highest headline score; the first of equals."""
    return [
        max(members, key=lambda setting: setting.headline.mean)
        for members in by_task(found).values()
    ]


def groups(selected: Sequence[Setting]) -> dict[str, list[Setting]]:
    """All tasks, locomotion, antmaze, and each environment; each set of tasks once."""
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
    """Means and interquartile means over tasks and seeds, of every actor and mode.

    Args:
        selected: one setting a task. The last actors of their chains are compared as ``last``, the
            others by their index, as far as all chains have it.
    """
    rows = []
    for name, members in groups(selected).items():
        shortest = min(len(setting.weights) for setting in members)
        actors = [(str(i), i) for i in range(shortest - 1)] + [("last", -1)]
        for label, actor in actors:
            for m, mode in enumerate(MODES):
                last = [setting.last[:, actor, m] for setting in members]
                best = [setting.best[:, actor, m] for setting in members]
                estimates = [bootstrap(x, f) for x in (last, best) for f in (mean, iqm)]
                runs = sum(len(setting.runs) for setting in members)
                rows.append(GroupScore(name, len(members), runs, label, mode, *estimates))
    return rows
