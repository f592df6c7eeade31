"""Read transitions from HDF5 files in D4RL's layout.

The files are untrusted: only arrays stored in the file itself are read, and their declared sizes
are checked before any memory is allocated.
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
CHUNK_ROWS = 65_536
"""Number of rows processed at a time."""

# HDF5's deflate compresses by a factor of about a thousand at most. Small arrays are not checked.
_MAX_COMPRESSION, _SMALL = 1100, 64 << 20


class UnsupportedFileError(ValueError):
    """Raised when an HDF5 file is damaged, unsafe or not in D4RL's layout."""


class Dataset(NamedTuple):
    """Transitions and episode returns of a dataset."""

    transitions: TensorDict
    """Rows of ``d4rl.qlearning_dataset`` under TorchRL's keys, float32, batch size ``[rows]``."""

    episode_returns: np.ndarray
    """Undiscounted return of each complete episode in the file, ``[episodes]``, float64."""


def read_hdf5(path: str | Path, *, max_episode_steps: int = 1000) -> Dataset:
    """Read the transitions of an HDF5 file in D4RL's layout.

    The rows are exactly those of ``d4rl.qlearning_dataset``, in the same order. The next
    observation of a row is the observation of the following row in the file. Rows that end an
    episode by a time-out are dropped, because their true next observation is not the following
    row, and so is the last row of the file. A time-out therefore never appears as a terminal state,
    and every remaining non-terminal row bootstraps from its true next observation.

    Args:
        path: an HDF5 file with ``observations [n, obs]``, ``actions [n, d]``, ``rewards [n]``,
            ``terminals [n]`` (any dtype; nonzero is terminal) and, optionally, ``timeouts [n]``.
        max_episode_steps: horizon of the task, in steps, used only for files without
            ``timeouts``. Defaults to ``1000``.

    Returns:
        The transitions and the episode returns.

    Raises:
        FileNotFoundError: when the file does not exist.
        ValueError: an :class:`UnsupportedFileError` naming the file and the key, when the file is
            not valid HDF5, lacks keys, has shapes that do not match or values that are not finite,
            links to other files, or does not fit into memory.

    Source: Fu et al., *D4RL: Datasets for Deep Data-Driven Reinforcement Learning*, 2020,
    arXiv:2004.07219; ``d4rl.qlearning_dataset``.

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
            f"data.path={str(path)!r} is not a file; give the path of an HDF5 file in D4RL's "
            "layout."
        )
    try:
        with h5py.File(path) as file:
            return _read(file, path, max_episode_steps)
    except UnsupportedFileError:
        raise
    # The exceptions that h5py raises for a damaged file.
    except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UnsupportedFileError(
            f"{path} is not a readable HDF5 file ({reason}): recreate it or download it again."
        ) from error


def get_local_array(file: h5py.File, key: str) -> h5py.Dataset | None:
    """Look up an array that is stored in the file itself, without following any links.

    Args:
        file: an open HDF5 file.
        key: path of the array inside the file, e.g. ``"infos/qpos"``.

    Returns:
        The array, or ``None`` if the key does not exist.

    Raises:
        ValueError: when the key is a link, its data are stored in another file, or it is not an
            array.
    """
    name, location, item = str(file.filename), "", file
    for part in key.split("/"):
        location = f"{location}/{part}".lstrip("/")
        if not isinstance(item, h5py.Group):
            return None
        link = item.get(part, getlink=True)
        if link is None:
            return None
        if not isinstance(link, h5py.HardLink):
            raise _link_error(name, key, f"{location} is a link ({type(link).__name__})")
        item = item[part]
    if not isinstance(item, h5py.Dataset):
        raise UnsupportedFileError(
            f"{name}: {key} is not an array; store an array under this key or remove the key."
        )
    if item.is_virtual or item.external:
        raise _link_error(name, key, f"{key} stores its values in other files")
    return item


def _link_error(name: str, key: str, reason: str) -> ValueError:
    return UnsupportedFileError(
        f"{name}: {reason}, and links are not followed; copy the array {key} into the file."
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
            f"{path} contains no transition to learn from: all but the last of its "
            f"{len(timeouts)} rows are timeouts, whose next observation is unknown; use another "
            "file."
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
    """Validate keys, dtypes, shapes and sizes without reading any values; returns the arrays."""
    found = {key: get_local_array(file, key) for key in (*REQUIRED_KEYS, "timeouts")}
    arrays = {key: array for key, array in found.items() if array is not None}
    missing = [key for key in REQUIRED_KEYS if key not in arrays]
    if missing:
        raise UnsupportedFileError(
            f"{path} lacks {', '.join(missing)}: a file in D4RL's layout has "
            f"{', '.join(REQUIRED_KEYS)} and, optionally, timeouts."
        )
    shapes: dict[str, tuple[int, ...]] = {key: array.shape or () for key, array in arrays.items()}
    rows = shapes["observations"][0] if shapes["observations"] else 0
    for key, array in arrays.items():
        shape, dtype = shapes[key], array.dtype
        if dtype.kind not in "biuf":
            raise UnsupportedFileError(
                f"{path}: {key} has dtype {dtype}; store real numbers or booleans."
            )
        is_matrix = key in ("observations", "actions")
        fits = len(shape) == 2 and shape[1] > 0 if is_matrix else shape in ((rows,), (rows, 1))
        if not fits or shape[0] != rows:
            expected = f"({rows}, dim)" if is_matrix else f"({rows},)"
            raise UnsupportedFileError(
                f"{path}: {key} has shape {shape}, which does not match {rows} observations; "
                f"store it with shape {expected}."
            )
    if rows < 2:
        raise UnsupportedFileError(
            f"{path} has {rows} rows; at least 2 are needed, so use another file."
        )
    _check_sizes(arrays, path)
    return arrays


def _check_sizes(arrays: dict[str, h5py.Dataset], path: Path) -> None:
    """Check memory use: a small file can declare huge arrays, as HDF5 fills unwritten values."""
    needed = 0.0
    for key, array in arrays.items():
        # HDF5 reads entire chunks, which may be larger than the array.
        size = array.dtype.itemsize * max(array.size, math.prod(array.chunks or (0,)))
        stored = array.id.get_storage_size()
        if size > max(_SMALL, _MAX_COMPRESSION * stored):
            raise UnsupportedFileError(
                f"{path}: {key} declares {size / 1e9:.3g} GB (shape {array.shape}) but stores only "
                f"{stored} bytes; the file is incomplete or damaged: recreate it or download it "
                "again."
            )
        # Observations are copied twice, as current and as next observations.
        needed += size + 4.0 * array.size * (2 if key == "observations" else 1)
    if needed > physical_memory():
        raise UnsupportedFileError(
            f"{path} needs {needed / 1e9:.3g} GB of memory, but this machine has "
            f"{physical_memory() / 1e9:.3g} GB; use a smaller file or a larger machine."
        )


def _column(arrays: dict[str, h5py.Dataset], key: str, path: Path) -> np.ndarray:
    column = arrays[key][()].reshape(-1)
    with np.errstate(over="ignore"):  # overflows to infinity, which the check rejects
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
    """Select rows of an array as float32 tensors, one tensor per selection.

    The array is read in chunks: D4RL's largest files have two million transitions, and temporary
    copies of entire arrays would double the memory use.
    """
    array = arrays[key]
    out = tuple(torch.empty(len(rows), array.shape[1]) for rows in selections)
    for start in range(0, len(array), CHUNK_ROWS):
        with np.errstate(over="ignore"):
            chunk = array[start : start + CHUNK_ROWS].astype(np.float32, copy=False)
        _check_finite(chunk, key, path, start)
        for rows, tensor in zip(selections, out):
            first, last = np.searchsorted(rows, (start, start + len(chunk)))
            tensor[first:last] = torch.from_numpy(chunk[rows[first:last] - start])
    return out


def _horizon_timeouts(terminals: np.ndarray, max_episode_steps: int) -> np.ndarray:
    """Mark steps that end an episode by reaching the horizon, counting as d4rl does."""
    timeouts = np.zeros_like(terminals)
    step = 0
    for i, terminal in enumerate(terminals):
        timeouts[i] = step == max_episode_steps - 1
        # d4rl resets its counter at a terminal row and then still counts that row.
        step = 0 if timeouts[i] else (0 if terminal else step) + 1
    return timeouts


def _episode_returns(rewards: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Returns of the complete episodes, or of the only, unfinished episode if there are none."""
    cumulative = np.cumsum(rewards, dtype=np.float64)
    last = np.flatnonzero(ends) if ends.any() else np.array([len(rewards) - 1])
    return np.diff(cumulative[last], prepend=0.0)
