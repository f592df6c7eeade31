"""Files in D4RL's HDF5 layout -> the transitions that offline RL learns from."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import torch
from tensordict import TensorDict

REQUIRED_KEYS = ("observations", "actions", "rewards", "terminals")
PIECE = 65_536
"""Rows read at a time."""


class Dataset(NamedTuple):
    """A dataset as read from disk."""

    transitions: TensorDict
    """Rows of ``d4rl.qlearning_dataset`` under TorchRL's keys, float32, batch size ``[rows]``."""

    episode_returns: np.ndarray
    """Undiscounted return of each complete episode in the file, float64."""


def read_hdf5(path: str | Path, *, max_episode_steps: int = 1000) -> Dataset:
    """Read a file in D4RL's layout.

    The rows are exactly those of ``d4rl.qlearning_dataset``, in its order: the next observation
    is the file's next row; rows that end an episode by a time-out are dropped (their true next
    observation is not the next row), and so is the last row of the file. A time-out therefore
    never appears as a terminal state, and every kept row that is not terminal bootstraps from its
    true next observation.

    Source: Fu et al. (2020), D4RL; ``d4rl.qlearning_dataset``.

    Args:
        path: an HDF5 file with ``observations [n, obs]``, ``actions [n, d]``, ``rewards [n]``,
            ``terminals [n]`` (any dtype; nonzero is terminal) and, where it is there,
            ``timeouts [n]``.
        max_episode_steps: horizon of the task, in steps, used only for files without
            ``timeouts``. Defaults to ``1000``.

    Returns:
        The transitions and the returns of the episodes.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is no HDF5 file, lacks keys, or holds rows that do not fit or are not
            finite; the message names the file and the key.

    Example:
        >>> import h5py, numpy as np, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with h5py.File(f"{folder}/data.hdf5", "w") as file:
        ...         file["observations"] = np.arange(8.0).reshape(4, 2)
        ...         file["actions"] = np.zeros((4, 1))
        ...         file["rewards"] = np.ones(4)
        ...         file["terminals"] = np.array([0, 1, 0, 0])
        ...         file["timeouts"] = np.array([0, 0, 1, 0])
        ...     data = read_hdf5(f"{folder}/data.hdf5")
        >>> data.transitions["next", "observation"].tolist()
        [[2.0, 3.0], [4.0, 5.0]]
        >>> data.transitions["next", "terminated"].flatten().tolist()
        [False, True]
        >>> data.episode_returns.tolist()
        [2.0, 1.0]
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"data.path={str(path)!r} is not a file.")
    try:
        with h5py.File(path) as file:
            return _read(file, path, max_episode_steps)
    except OSError as error:
        raise ValueError(f"{path} is not a readable HDF5 file: {error}.") from error


def _read(file: h5py.File, path: Path, max_episode_steps: int) -> Dataset:
    _check_layout(file, path)
    rewards, terminals = (_column(file, key, path) for key in ("rewards", "terminals"))
    terminals = terminals != 0
    if "timeouts" in file:
        timeouts = _column(file, "timeouts", path) != 0
    else:
        timeouts = _horizon_timeouts(terminals, max_episode_steps)
    rows = np.flatnonzero(~timeouts[:-1])
    if rows.size == 0:
        raise ValueError(f"{path} holds no transition to learn from ({len(timeouts)} rows).")
    observation, next_observation = _gather(file, "observations", path, rows, rows + 1)
    (action,) = _gather(file, "actions", path, rows)
    terminated = torch.from_numpy(terminals[rows]).unsqueeze(-1)
    transitions = TensorDict(
        {
            "observation": observation,
            "action": action,
            "next": TensorDict(
                {
                    "observation": next_observation,
                    "reward": torch.from_numpy(rewards[rows].astype(np.float32)).unsqueeze(-1),
                    "done": terminated.clone(),
                    "terminated": terminated,
                    "truncated": torch.zeros_like(terminated),
                },
                [len(rows)],
            ),
        },
        [len(rows)],
    )
    return Dataset(transitions, _episode_returns(rewards, terminals | timeouts))


def _check_layout(file: h5py.File, path: Path) -> None:
    missing = [key for key in REQUIRED_KEYS if not isinstance(file.get(key), h5py.Dataset)]
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}: a file in D4RL's layout holds "
            f"{', '.join(REQUIRED_KEYS)} (and timeouts)."
        )
    rows = len(file["observations"]) if file["observations"].shape else 0
    for key in (*REQUIRED_KEYS, "timeouts"):
        if key not in file:
            continue
        shape, dtype = file[key].shape, file[key].dtype
        if dtype.kind not in "biuf":
            raise ValueError(f"{path}: {key} holds {dtype}; numbers are needed.")
        matrix = key in ("observations", "actions")
        fits = len(shape) == 2 if matrix else shape in ((rows,), (rows, 1))
        if not fits or shape[0] != rows:
            raise ValueError(
                f"{path}: {key} has shape {shape}, which does not fit {rows} observations."
            )
    if rows < 2:
        raise ValueError(f"{path} holds {rows} rows; at least 2 are needed.")


def _column(file: h5py.File, key: str, path: Path) -> np.ndarray:
    column = file[key][()].reshape(-1)
    _check_finite(column, key, path, 0)
    return column


def _check_finite(array: np.ndarray, key: str, path: Path, first_row: int) -> None:
    if np.isfinite(array).all():
        return
    bad = np.argwhere(~np.isfinite(array))[0]
    bad[0] += first_row
    raise ValueError(f"{path}: {key}{bad.tolist()} is not finite; repair or drop that row.")


def _gather(
    file: h5py.File, key: str, path: Path, *selections: np.ndarray
) -> tuple[torch.Tensor, ...]:
    """The given rows of an array, as float32 tensors.

    The array is read piece by piece: D4RL's largest files hold two million transitions, and
    whole copies on the way would double the memory.
    """
    array = file[key]
    out = tuple(torch.empty(len(rows), array.shape[1]) for rows in selections)
    for start in range(0, len(array), PIECE):
        piece = array[start : start + PIECE].astype(np.float32, copy=False)
        _check_finite(piece, key, path, start)
        for rows, tensor in zip(selections, out):
            first, last = np.searchsorted(rows, (start, start + len(piece)))
            tensor[first:last] = torch.from_numpy(piece[rows[first:last] - start])
    return out


def _horizon_timeouts(terminals: np.ndarray, max_episode_steps: int) -> np.ndarray:
    """Steps that end an episode by reaching the horizon, counted as d4rl does."""
    timeouts = np.zeros_like(terminals)
    step = 0
    for i, terminal in enumerate(terminals):
        timeouts[i] = step == max_episode_steps - 1
        # d4rl resets its count at a terminal and then adds that very row to it
        step = 0 if timeouts[i] else (0 if terminal else step) + 1
    return timeouts


def _episode_returns(rewards: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Returns of the complete episodes; of the one unfinished episode where none is complete."""
    cumulative = np.cumsum(rewards, dtype=np.float64)
    last = np.flatnonzero(ends) if ends.any() else np.array([len(rewards) - 1])
    return np.diff(cumulative[last], prepend=0.0)
