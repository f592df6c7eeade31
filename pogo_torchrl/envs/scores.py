"""D4RL's task names and reference scores, and what the returns of any task are shown as."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from pogo_torchrl.envs.families import other_family

_LOCOMOTION_LEVELS = (
    "random",
    "medium",
    "expert",
    "medium-replay",
    "full-replay",
    "medium-expert",
)
_LEVELS: dict[str, tuple[str, ...]] = {
    "halfcheetah": _LOCOMOTION_LEVELS,
    "hopper": _LOCOMOTION_LEVELS,
    "walker2d": _LOCOMOTION_LEVELS,
    "antmaze": (
        "umaze",
        "umaze-diverse",
        "medium-play",
        "medium-diverse",
        "large-play",
        "large-diverse",
    ),
}

# Returns of a random and of an expert policy: REF_MIN_SCORE and REF_MAX_SCORE in d4rl.infos
# (Fu et al., "D4RL: Datasets for Deep Data-Driven Reinforcement Learning", 2020, arXiv:2004.07219,
# appendix).
REFERENCE_RETURNS: dict[str, tuple[float, float]] = {
    "halfcheetah": (-280.178953, 12135.0),
    "hopper": (-20.272305, 3234.3),
    "walker2d": (1.629008, 4592.3),
    "antmaze": (0.0, 1.0),
}

TASKS: tuple[str, ...] = tuple(
    f"{environment}-{level}-v2" for environment, levels in _LEVELS.items() for level in levels
)

# Steps after which an episode is truncated: max_episode_steps in d4rl's registrations.
_MAX_EPISODE_STEPS = 1000
_MAX_EPISODE_STEPS_UMAZE = 700

Returns = TypeVar("Returns", float, NDArray[np.floating])


class Measure(NamedTuple):
    """What the returns of a task are shown as: D4RL's score, a score, or plain returns."""

    name: str
    """``"D4RL score"``, ``"score"`` (with reference returns of one's own) or ``"return"``."""

    reference: tuple[float, float] | None
    """Returns with the scores 0 and 100; ``None`` if there are no scores."""

    @classmethod
    def of(cls, task: str, reference_scores: Sequence[float] | None = None) -> Measure:
        """Choose the measure of a task.

        Args:
            task: a D4RL task name, or any other.
            reference_scores: returns with the scores 0 and 100. Defaults to D4RL's for its tasks
                and to none for others.

        Raises:
            ValueError: unless the references are two different finite numbers.

        Example:
            >>> Measure.of("hopper-medium-v2").name, Measure.of("reach").name
            ('D4RL score', 'return')
            >>> Measure.of("reach", [-60.0, -10.0]).scores(np.array([-35.0]))
            array([50.])
        """
        if reference_scores is not None:
            low, high = (*reference_scores, np.nan, np.nan)[:2]
            if len(reference_scores) != 2 or not 0 < abs(high - low) < np.inf:
                raise ValueError(
                    f"env.reference_scores={list(reference_scores)} must be the two different "
                    "returns that score 0 and 100, e.g. [-60,-10]."
                )
            return cls("score", (low, high))
        if not is_d4rl_task(task):
            return cls("return", None)
        return cls("D4RL score", REFERENCE_RETURNS[split_task(task)[0]])

    def scores(self, returns: Returns) -> Returns | None:
        """Scores of episode returns, ``100 (return - low) / (high - low)``; ``None`` if none.

        Args:
            returns: undiscounted episode returns, a float or an array of any shape.
        """
        if self.reference is None:
            return None
        low, high = self.reference
        return 100.0 * (returns - low) / (high - low)

    def values(self, returns: Returns) -> Returns:
        """Scores of episode returns, or the returns themselves, if there are no scores.

        Args:
            returns: undiscounted episode returns, a float or an array of any shape.
        """
        scores = self.scores(returns)
        return returns if scores is None else scores


def is_d4rl_task(task: str) -> bool:
    """Whether a name is one of ``TASKS``; the suffix ``-v2`` is optional.

    Args:
        task: the name.
    """
    return f"{task.removesuffix('-v2')}-v2" in TASKS


def split_task(task: str) -> tuple[str, str]:
    """Split a D4RL task name into its environment and its level.

    Args:
        task: one of ``TASKS``, e.g. ``"hopper-medium-v2"``; the suffix ``-v2`` is optional.

    Returns:
        The name of the environment and the level.

    Raises:
        ValueError: for a name that is not a D4RL version 2 task; the message lists similar names.

    Example:
        >>> split_task("hopper-medium-replay-v2")
        ('hopper', 'medium-replay')
        >>> split_task("antmaze-umaze")
        ('antmaze', 'umaze')
    """
    name = task if task.endswith("-v2") else f"{task}-v2"
    if name not in TASKS:
        if reason := other_family(task):
            raise ValueError(reason)
        nearest = difflib.get_close_matches(name, TASKS, n=3) or TASKS
        raise ValueError(
            f"task={task!r} is not a D4RL version 2 task; valid names include {', '.join(nearest)}."
        )
    environment, level = name.removesuffix("-v2").split("-", maxsplit=1)
    return environment, level


def max_episode_steps(task: str) -> int:
    """Number of steps after which D4RL truncates an episode.

    Args:
        task: a D4RL task name, see :func:`split_task`.

    Returns:
        700 in the smallest antmaze, 1000 in all other tasks.

    Raises:
        ValueError: for an unknown task.

    Source: the registrations of d4rl 1.1.

    Example:
        >>> max_episode_steps("hopper-medium-v2"), max_episode_steps("antmaze-umaze-diverse-v2")
        (1000, 700)
    """
    environment, level = split_task(task)
    if environment == "antmaze" and level.startswith("umaze"):
        return _MAX_EPISODE_STEPS_UMAZE
    return _MAX_EPISODE_STEPS


def score(task: str, returns: Returns) -> Returns:
    """Compute D4RL's normalised score: 0 for a random policy, 100 for an expert.

        score = 100 (return - min) / (max - min)

    Args:
        task: a D4RL task name, see :func:`split_task`.
        returns: undiscounted episode returns, a float or an array of any shape.

    Returns:
        The scores, in the shape of ``returns``.

    Raises:
        ValueError: for an unknown task.

    Source: Fu et al., *D4RL: Datasets for Deep Data-Driven Reinforcement Learning*, 2020,
    arXiv:2004.07219; reference returns from ``d4rl.infos``.

    Example:
        >>> round(score("hopper-medium-v2", 1000.0), 3)
        31.349
        >>> score("antmaze-umaze-v2", np.array([0.0, 1.0]))
        array([  0., 100.])
    """
    split_task(task)  # an error for an unknown task
    return Measure.of(task).values(returns)
