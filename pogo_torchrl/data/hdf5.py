"""Files in D4RL's HDF5 layout -> the transitions that offline RL learns from.

Such files may come from anywhere: only arrays that lie in the file itself are read, and what they
say about their size is checked before memory is taken.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import torch
from tensordict import TensorDict

from pogo_torchrl.files import physical_memory

REQUIRED_KEYS = ("observations", "actions", "rewards", "terminals")
PIECE = 65_536
"""Rows read at a time."""

# A kilobyte is the most that a byte of HDF5's deflate grows to; below this size it does not matter.
_MAX_COMPRESSION, _SMALL = 1100, 64 << 20


class UnsupportedFileError(ValueError):
    """A file that is read as far as it can be, and does not hold what it should."""


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
        ValueError: when it is no HDF5 file, lacks keys, holds rows that do not fit or are not
            finite, links to other files, or would not fit into memory; the message names the file
            and the key.

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
        raise FileNotFoundError(
            f"data.path={str(path)!r} is not a file; give one in D4RL's HDF5 layout."
        )
    try:
        with h5py.File(path) as file:
            return _read(file, path, max_episode_steps)
    except UnsupportedFileError:
        raise
    # all that h5py raises for a file that is damaged
    except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UnsupportedFileError(
            f"{path} is not a readable HDF5 file ({reason}): make or download it again."
        ) from error


def own_array(file: h5py.File, key: str) -> h5py.Dataset | None:
    """An array that lies in the file itself, in its root or in groups; None where there is none.

    Raises:
        ValueError: when the key leads anywhere else, to another file or another place, or is no
            array. Nothing is followed.
    """
    name, place, item = str(file.filename), "", file
    for part in key.split("/"):
        place = f"{place}/{part}".lstrip("/")
        if not isinstance(item, h5py.Group):
            return None
        link = item.get(part, getlink=True)
        if link is None:
            return None
        if not isinstance(link, h5py.HardLink):
            raise _foreign(name, key, f"{place} is a link ({type(link).__name__})")
        item = item[part]
    if not isinstance(item, h5py.Dataset):
        raise UnsupportedFileError(
            f"{name}: {key} is no array; store one under this key, or drop the key."
        )
    if item.is_virtual or item.external:
        raise _foreign(name, key, f"{key} has its numbers in other files")
    return item


def _foreign(name: str, key: str, why: str) -> ValueError:
    return UnsupportedFileError(
        f"{name}: {why}, and links are not followed; copy the array {key} into the file."
    )


def _read(file: h5py.File, path: Path, max_episode_steps: int) -> Dataset:
    arrays = _check_layout(file, path)
    rewards, terminals = (_column(arrays, key, path) for key in ("rewards", "terminals"))
    terminals = terminals != 0
    if "timeouts" in arrays:
        timeouts = _column(arrays, "timeouts", path) != 0
    else:
        timeouts = _horizon_timeouts(terminals, max_episode_steps)
    rows = np.flatnonzero(~timeouts[:-1])
    if rows.size == 0:
        raise UnsupportedFileError(
            f"{path} holds no transition to learn from: all but the last of its {len(timeouts)} "
            "rows are timeouts, whose next observation is not known; use another file."
        )
    observation, next_observation = _gather(arrays, "observations", path, rows, rows + 1)
    (action,) = _gather(arrays, "actions", path, rows)
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


def _check_layout(file: h5py.File, path: Path) -> dict[str, h5py.Dataset]:
    """The file's arrays, as far as D4RL's layout has them; no number has been read."""
    found = {key: own_array(file, key) for key in (*REQUIRED_KEYS, "timeouts")}
    arrays = {key: array for key, array in found.items() if array is not None}
    missing = [key for key in REQUIRED_KEYS if key not in arrays]
    if missing:
        raise UnsupportedFileError(
            f"{path} lacks {', '.join(missing)}: a file in D4RL's layout holds "
            f"{', '.join(REQUIRED_KEYS)} (and timeouts)."
        )
    shapes: dict[str, tuple[int, ...]] = {key: array.shape or () for key, array in arrays.items()}
    rows = shapes["observations"][0] if shapes["observations"] else 0
    for key, array in arrays.items():
        shape, dtype = shapes[key], array.dtype
        if dtype.kind not in "biuf":
            raise UnsupportedFileError(
                f"{path}: {key} holds {dtype}; store real numbers or booleans there."
            )
        matrix = key in ("observations", "actions")
        fits = len(shape) == 2 and shape[1] > 0 if matrix else shape in ((rows,), (rows, 1))
        if not fits or shape[0] != rows:
            needed = f"({rows}, its size)" if matrix else f"({rows},)"
            raise UnsupportedFileError(
                f"{path}: {key} has shape {shape}, which does not fit {rows} observations; store "
                f"it as {needed}."
            )
    if rows < 2:
        raise UnsupportedFileError(
            f"{path} holds {rows} rows; at least 2 are needed, so use another file."
        )
    _check_sizes(arrays, path)
    return arrays


def _check_sizes(arrays: dict[str, h5py.Dataset], path: Path) -> None:
    """A small file can declare arrays of any size: HDF5 fills what was never written."""
    needed = 0.0
    for key, array in arrays.items():
        # HDF5 reads chunks, whole, and they may be larger than the array.
        size = array.dtype.itemsize * max(array.size, math.prod(array.chunks or (0,)))
        stored = array.id.get_storage_size()
        if size > max(_SMALL, _MAX_COMPRESSION * stored):
            raise UnsupportedFileError(
                f"{path}: {key} declares {size / 1e9:.3g} GB (shape {array.shape}) but only "
                f"{stored} bytes of it are stored; the file is unfinished or damaged, so make or "
                "download it again."
            )
        # observations are taken twice, as float32
        needed += size + 4.0 * array.size * (2 if key == "observations" else 1)
    if needed > physical_memory():
        raise UnsupportedFileError(
            f"{path} needs {needed / 1e9:.3g} GB of memory, this machine has "
            f"{physical_memory() / 1e9:.3g} GB: use a smaller file or a larger machine."
        )


def _column(arrays: dict[str, h5py.Dataset], key: str, path: Path) -> np.ndarray:
    column = arrays[key][()].reshape(-1)
    with np.errstate(over="ignore"):  # what leaves float32 is refused as not finite
        _check_finite(column.astype(np.float32, copy=False), key, path, 0)
    return column


def _check_finite(array: np.ndarray, key: str, path: Path, first_row: int) -> None:
    if np.isfinite(array).all():
        return
    bad = np.argwhere(~np.isfinite(array))[0]
    bad[0] += first_row
    raise UnsupportedFileError(
        f"{path}: {key}{bad.tolist()} is not finite in float32; repair or drop that row."
    )


def _gather(
    arrays: dict[str, h5py.Dataset], key: str, path: Path, *selections: np.ndarray
) -> tuple[torch.Tensor, ...]:
    """The given rows of an array, as float32 tensors.

    The array is read piece by piece: D4RL's largest files hold two million transitions, and
    whole copies on the way would double the memory.
    """
    array = arrays[key]
    out = tuple(torch.empty(len(rows), array.shape[1]) for rows in selections)
    for start in range(0, len(array), PIECE):
        with np.errstate(over="ignore"):
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
