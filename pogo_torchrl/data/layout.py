"""What the arrays of a file mean: names of keys, ends of episodes, and returns."""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import torch
from gymnasium.spaces import Dict

from pogo_torchrl.data.groups import GroupedArray, find_group
from pogo_torchrl.hdf5_files import (
    GROUPS,
    NAMES,
    UnsupportedFileError,
    get_named_arrays,
    is_group,
    size_in_memory,
)

REQUIRED_KEYS = ("observations", "actions", "rewards", "terminals")

# Names that tell of ends or next states, if they are not in NAMES.
_TELLING = re.compile(
    r"episode|traj|trunc|termin|time_?out|time_?limit|done|next|"
    r"(^|_)(end|ends|last|first|starts?|masks?|discounts?|resets?|new)(_|$)",
    re.IGNORECASE,
)
_SETS_OF_ENDS = ("dones", "starts", "episodes")
_HARMLESS = {"next_actions", "next_action", "next_rewards", "next_reward"}
_SAMPLED_STEPS = 10_000

CHUNK_ROWS = 65_536
"""Number of rows processed at a time."""

_LOGGER = logging.getLogger(__name__)


class Ends(NamedTuple):
    """Ends of the episodes in a file, ``[rows]``, bool."""

    terminals: np.ndarray
    """Rows that lead to a terminal state."""

    timeouts: np.ndarray
    """Rows after which an episode was cut."""

    stated: bool
    """Whether the file itself tells the time-outs."""


def find_arrays(
    file: h5py.File, path: Path, dict_space: Dict | None = None
) -> dict[str, h5py.Dataset | GroupedArray]:
    """Find the arrays of a file under any of their :data:`NAMES`.

    Args:
        file: an open HDF5 file.
        path: its path, for messages.
        dict_space: observation space, in whose order groups of observations are read. Defaults to
            ``None``: sorted by name.

    Returns:
        The arrays by their name in D4RL's layout.

    Raises:
        ValueError: when arrays are missing, when two arrays of the same meaning differ, or when
            only keys of unknown meaning tell where episodes end.
    """
    found: dict[str, h5py.Dataset | GroupedArray] = {}
    for name in NAMES:
        arrays = get_named_arrays(file, name)
        if not arrays:
            if name in GROUPS and (group := find_group(file, name, dict_space)):
                found[name] = group
            continue
        found[name] = arrays[0]
        # "states" beside "observations" are the simulator's.
        for other in arrays[1:] if name != "observations" else ():
            size_in_memory(other, key_of(other))
            if other.shape != arrays[0].shape or not np.array_equal(other[()], arrays[0][()]):
                raise UnsupportedFileError(
                    f"{path}: {key_of(arrays[0])} and {key_of(other)} have the same meaning but "
                    "different values; remove one of them."
                )
    missing = [key for key in REQUIRED_KEYS if key not in found]
    if missing == ["terminals"] and "dones" in found:
        missing = []
    known = {key_of(array) for array in found.values()}.union(*NAMES.values(), _HARMLESS)
    unclear = [key for key in file if key not in known and _TELLING.search(key)]
    if missing:
        raise UnsupportedFileError(
            f"{path} lacks {', '.join(missing)}: a file in D4RL's layout has "
            f"{', '.join(REQUIRED_KEYS)} and, optionally, timeouts{_hint(file, missing, unclear)}."
        )
    if "next_observations" not in found:
        tells_all = "timeouts" in found or not found.keys().isdisjoint(_SETS_OF_ENDS)
        unclear = [key for key in unclear if not tells_all or "next" in key.lower()]
        if unclear:
            raise UnsupportedFileError(
                f"{path}: {', '.join(unclear[:5])} may tell next states or ends of episodes, but "
                "the meaning is not known; store next states as next_observations and ends as "
                "timeouts (1 in the last row of an episode that was cut, else 0), or remove the "
                "key."
            )
    return found


def key_of(array: h5py.Dataset | GroupedArray) -> str:
    """Key of an array in its file."""
    return str(array.name).lstrip("/")


def _hint(file: h5py.File, missing: list[str], unclear: list[str]) -> str:
    """What else to say about a file that lacks arrays."""
    groups = [key for key in file if is_group(file, key)]
    if "observations" in missing and len(groups) == len(file) > 0:
        return (
            f"; this one holds groups ({', '.join(groups[:2])}{', ...' * (len(groups) > 2)}): join "
            "the arrays of all episodes, or use data.source=minari for a Minari dataset"
        )
    hint = f"; the meaning of {', '.join(unclear[:5])} is not known" if unclear else ""
    if missing == ["terminals"]:
        hint += "; if no state is terminal, store zeros"
    return hint


def ends_of_episodes(columns: dict[str, np.ndarray], path: Path) -> np.ndarray | None:
    """Mark the last rows of episodes from their first rows or their numbers.

    Args:
        columns: the arrays ``starts`` and ``episodes`` that the file has, ``[rows]``.
        path: the file, for messages.

    Returns:
        The last rows, ``[rows]``, bool; ``None`` if the file does not tell them.

    Raises:
        ValueError: if the rows of an episode are not successive.
    """
    if "starts" in columns:
        return np.append(columns["starts"][1:] != 0, True)
    if "episodes" not in columns:
        return None
    numbers = columns["episodes"]
    last = np.append(numbers[1:] != numbers[:-1], True)
    if last.sum() > len(np.unique(numbers)):
        raise UnsupportedFileError(
            f"{path}: the rows of an episode are not successive; sort them, or store "
            "next_observations."
        )
    return last


def read_ends(
    flags: dict[str, np.ndarray],
    *,
    in_order: bool,
    stores_next: bool,
    max_episode_steps: int | None,
    path: Path,
) -> Ends:
    """Work out which rows are terminal and which were cut by a time limit.

    Args:
        flags: the arrays ``terminals``, ``timeouts`` and ``dones`` that the file has, ``[rows]``,
            bool.
        in_order: whether every row is followed by the next one of its episode.
        stores_next: whether the file has next observations, so that rows need no successor.
        max_episode_steps: horizon of the task, in steps, for files that do not tell time-outs;
            ``None``: unknown.
        path: the file, for messages.

    Returns:
        The ends. ``dones`` alone count as terminal, except after ``max_episode_steps`` steps.

    Raises:
        ValueError: when ``dones`` alone look like a time limit other than ``max_episode_steps``, or
            when the horizon is needed, but unknown.
    """
    terminals, timeouts, dones = (flags.get(key) for key in ("terminals", "timeouts", "dones"))
    if timeouts is not None:
        if terminals is None:
            assert dones is not None
            terminals = dones & ~timeouts
        return Ends(terminals, timeouts, True)
    if terminals is not None:
        if dones is not None and (dones & ~terminals).any():
            return Ends(terminals, dones & ~terminals, True)
        if stores_next:
            return Ends(terminals, np.zeros_like(terminals), False)
        if max_episode_steps is None:
            raise UnsupportedFileError(
                f"{path} has no timeouts, and the horizon of the task is unknown: set "
                "env.max_episode_steps=N."
            )
        return Ends(terminals, _horizon_timeouts(terminals, max_episode_steps), False)
    assert dones is not None
    horizon = math.inf if max_episode_steps is None else max_episode_steps
    timeouts = np.zeros_like(dones)
    if in_order:
        last = np.flatnonzero(dones)
        lengths = np.diff(last, prepend=-1)
        longest = lengths.max(initial=1)
        share = (lengths == longest).mean() if lengths.size > 1 else 0.0
        if 1 < longest < horizon and share >= 0.1 and (lengths == longest).sum() > 1:
            raise UnsupportedFileError(
                f"{path}: {share:.0%} of the episodes are done after exactly {longest} steps, the "
                "longest of all, which looks like a time limit; store the ends as terminals and "
                "timeouts."
            )
        timeouts[last[lengths >= horizon]] = True
    _LOGGER.warning(
        "%s does not tell terminations from time limits: its dones count as terminations%s. Store "
        "terminals and timeouts to be exact.",
        path,
        f", except after {horizon} steps" if in_order and horizon < math.inf else "",
    )
    return Ends(dones & ~timeouts, timeouts, False)


def _horizon_timeouts(terminals: np.ndarray, max_episode_steps: int) -> np.ndarray:
    """Mark steps that end an episode by reaching the horizon, counting as d4rl does."""
    timeouts = np.zeros_like(terminals)
    step = 0
    for i, terminal in enumerate(terminals):
        timeouts[i] = step == max_episode_steps - 1
        # d4rl resets its counter at a terminal row and then still counts that row.
        step = 0 if timeouts[i] else (0 if terminal else step) + 1
    return timeouts


def goes_on(
    observation: torch.Tensor, next_observation: torch.Tensor, terminated: torch.Tensor
) -> torch.Tensor | None:
    """Tell after which terminal rows the trajectory goes on, by the motion of the observations.

    Some files, such as D4RL's antmaze, mark every row near the goal as terminal, although the
    trajectory goes on until a time-out. The observation then moves on as in any other step, while
    the first observation of a new episode jumps. This shows in dimensions such as positions, whose
    steps are small compared to their spread. It is a convention of the file: unless at least half
    of the terminal rows go on, none does.

    Args:
        observation: observations of successive rows, ``[rows, obs]``.
        next_observation: the observation of the following row in the file, ``[rows, obs]``.
        terminated: terminal rows, ``[rows]``, bool.

    Returns:
        Terminal rows after which the trajectory goes on, ``[rows]``, bool; ``None`` if no dimension
        moves by small steps, so that the observations do not tell.
    """
    moving = torch.nonzero(~terminated).squeeze(-1)
    ended = torch.nonzero(terminated).squeeze(-1)
    if len(moving) < 2 or len(ended) == 0:
        return None
    sampled = moving[torch.linspace(0, len(moving) - 1, min(len(moving), _SAMPLED_STEPS)).long()]
    steps = (next_observation[sampled] - observation[sampled]).abs()
    limit = torch.maximum(2 * steps.quantile(0.99, dim=0), steps.amax(dim=0))
    spread = observation[sampled].std(dim=0)
    smooth = (limit <= spread / 2) & (spread > 0)
    if not smooth.any():
        return None
    found = torch.zeros_like(terminated)
    for rows in ended.split(CHUNK_ROWS):
        jumps = (next_observation[rows] - observation[rows]).abs() > limit
        found[rows] = ~jumps[:, smooth].any(dim=-1)
    # A few episodes may well start near the end of the one before.
    return found if 2 * found.sum() >= len(ended) else torch.zeros_like(found)


def trajectory_ends(ends: Ends, going_on: np.ndarray | None) -> np.ndarray:
    """Mark the last row of every complete trajectory.

    Args:
        ends: the ends of episodes.
        going_on: the result of :func:`goes_on` for all rows, ``[rows]``.

    Returns:
        The last rows, ``[rows]``, bool. If the observations do not tell whether trajectories go on,
        they are taken to do so where most terminal rows come in runs: until the next time-out if
        the file marks any, or else until the end of the run.
    """
    terminals, timeouts, _ = ends
    if going_on is None:
        going_on = np.zeros_like(terminals)
        followed = np.append(terminals[:-1] & terminals[1:] & ~timeouts[:-1], False)
        if 2 * followed.sum() >= terminals.sum() and 2 * terminals.sum() < len(terminals):
            going_on = terminals if timeouts.any() else followed
    return timeouts | (terminals & ~going_on)


def episode_returns(rewards: np.ndarray, terminals: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Returns of the complete trajectories, or of the only, unfinished one if there are none.

    As in an evaluation, rewards count up to the first terminal row of a trajectory.

    Args:
        rewards: reward of each row, ``[rows]``.
        terminals: terminal rows, ``[rows]``, bool.
        last: last rows of the trajectories, ``[rows]``, bool.

    Returns:
        Undiscounted returns, ``[trajectories]``, float64.

    Example:
        >>> rewards, terminals = np.array([0, 1, 1, 0, 0, 1]), np.array([0, 1, 1, 0, 0, 1])
        >>> episode_returns(rewards, terminals != 0, np.array([0, 0, 0, 1, 0, 1]) != 0)
        array([1., 1.])
    """
    total = np.concatenate([[0.0], np.cumsum(rewards, dtype=np.float64)])
    stops = np.flatnonzero(last) if last.any() else np.array([len(rewards) - 1])
    starts = np.append(0, stops[:-1] + 1)
    terminal = np.append(np.flatnonzero(terminals), len(rewards))
    first = terminal[np.searchsorted(terminal, starts)]
    return total[np.minimum(stops, first) + 1] - total[starts]
