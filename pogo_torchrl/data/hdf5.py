"""Read transitions from HDF5 files in D4RL's layout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import torch
from gymnasium.spaces import Dict
from tensordict import TensorDict

from pogo_torchrl.data.groups import GroupedArray
from pogo_torchrl.data.layout import (
    CHUNK_ROWS,
    ends_of_episodes,
    episode_returns,
    find_arrays,
    goes_on,
    key_of,
    read_ends,
    trajectory_ends,
)
from pogo_torchrl.files import cannot_read
from pogo_torchrl.hdf5_files import UnsupportedFileError, check_real, open_hdf5, size_in_memory
from pogo_torchrl.machine import physical_memory

_CONVERTIBLE = (".npz", ".csv", ".json", ".safetensors")
_PICKLED = (".pkl", ".pickle", ".p", ".pt", ".pth", ".joblib", ".npy")
Arrays = dict[str, h5py.Dataset | GroupedArray]
_FLAGS = ("terminals", "timeouts", "dones")


class Dataset(NamedTuple):
    """Transitions and episode returns of a dataset."""

    transitions: TensorDict
    """Rows under TorchRL's keys, float32, batch size ``[rows]``."""

    episode_returns: np.ndarray
    """Undiscounted return of each complete episode, ``[episodes]``, float64; empty if the rows are
    single transitions, whose episodes are unknown."""


def read_hdf5(
    path: str | Path,
    *,
    max_episode_steps: int | None = 1000,
    next_observations: bool = True,
    dict_space: Dict | None = None,
) -> Dataset:
    """Read the transitions of an HDF5 file in D4RL's layout.

    The rows of a file of episodes, in order and with all their ends, are exactly those of
    ``d4rl.qlearning_dataset``, in the same order. The next observation of a row is the observation
    of the following row in the file. Rows that end an episode by a time-out are dropped, because
    their true next observation is not the following row, and so is the last row of the file.

    A file that stores ``next_observations`` which are not those of the following rows, or that does
    not tell all ends, is read as single transitions: all rows, in their order, with their stored
    next observations; ``truncated`` where the file says so.

    A time-out therefore never appears as a terminal state, and every non-terminal row bootstraps
    from its true next observation.

    Args:
        path: an HDF5 file with ``observations [n, obs]``, ``actions [n, d]``, ``rewards [n]``,
            ``terminals [n]`` (any dtype; nonzero is terminal) and, optionally, ``timeouts [n]`` and
            ``next_observations [n, obs]``, under these or other common names
            (:data:`~pogo_torchrl.hdf5_files.NAMES`). Observations may also be groups of arrays,
            which become vectors.
        max_episode_steps: horizon of the task, in steps, used only for files that store neither
            time-outs nor next observations; ``None``: unknown. Defaults to ``1000``.
        next_observations: whether to use stored next observations. Defaults to ``True``;
            ``d4rl.qlearning_dataset`` does not.
        dict_space: observation space of the environment, whose entries are read from groups of
            observations, in its order. Defaults to all entries, sorted by name.

    Returns:
        The transitions and the episode returns. An episode ends with its first terminal row, even
        if the file marks further rows of the same trajectory, as D4RL's antmaze does.

    Raises:
        FileNotFoundError: when the file does not exist.
        OSError: when the system refuses to read the file.
        ValueError: an :class:`UnsupportedFileError` naming the file and the key, when the file is
            not valid HDF5, lacks keys, has keys of unknown meaning that may tell the ends of
            episodes, has shapes that do not match or values that are not finite, links to other
            files, or does not fit into memory.

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
    with _opened(path) as file:
        return read_open_file(
            file, Path(file.filename), max_episode_steps, next_observations, dict_space
        )


def read_action_dim(path: str | Path) -> int:
    """Number of action dimensions of an HDF5 file.

    Args:
        path: a file that :func:`read_hdf5` reads, which says what is raised for others.
    """
    with _opened(path) as file:
        return _check_layout(file, Path(file.filename))["actions"].shape[1]


def refuse_pickle(path: Path, *, always: bool = False) -> None:
    """Refuse a file whose name says that it is a pickle, or may contain one.

    Args:
        path: the file.

    Keyword Args:
        always: refuse it whatever its name. Defaults to ``False``.

    Raises:
        ValueError: an :class:`UnsupportedFileError` that says what to do instead.
    """
    if always or path.suffix.lower() in _PICKLED:
        raise UnsupportedFileError(
            f"{path} is or may be pickled, and loading a pickle can run any code that its author "
            "put in: load it in a program of your own if you trust it, save its arrays with "
            "numpy.savez, and convert that file with pogo convert."
        )


@contextmanager
def _opened(path: str | Path) -> Iterator[h5py.File]:
    """Open a file for reading, or raise for one that is missing or of another type."""
    path = Path(path).expanduser()
    try:
        is_file = path.is_file()
    except OSError as error:  # its folder must not be searched
        raise cannot_read(path, error) from error
    if not is_file:
        raise FileNotFoundError(
            f"data.path={str(path)!r} is not a file; give the path of an HDF5 file in D4RL's "
            "layout."
        )
    suffix = path.suffix.lower()
    if suffix in (*_CONVERTIBLE, *_PICKLED) and not h5py.is_hdf5(path):
        refuse_pickle(path)
        raise UnsupportedFileError(
            f"{path} is not an HDF5 file: convert it first, with pogo convert {path} "
            f"{path.with_suffix('.hdf5')}."
        )
    with open_hdf5(path) as file:
        yield file


def read_open_file(
    file: h5py.File,
    path: Path,
    max_episode_steps: int | None = 1000,
    use_next: bool = True,
    dict_space: Dict | None = None,
) -> Dataset:
    """Read an open file; see :func:`read_hdf5`."""
    arrays = _check_layout(file, path, dict_space)
    if not use_next:
        arrays.pop("next_observations", None)
    stores_next = "next_observations" in arrays
    rewards = _column(arrays, "rewards", path)
    flags = {key: _column(arrays, key, path) != 0 for key in _FLAGS if key in arrays}
    is_rlds = not stores_next and [arrays[k].name for k in flags] == ["/is_terminal", "/is_last"]
    if is_rlds:
        flags = _from_rlds(rewards, flags, path)
    follows = _follows(arrays) if stores_next else np.ones(len(rewards), dtype=bool)
    if flags.keys() == {"terminals"}:
        flags = _with_episodes(arrays, flags, follows, path)
    in_order = _in_order(follows, flags)
    ends = read_ends(
        flags,
        in_order=in_order,
        stores_next=stores_next,
        max_episode_steps=max_episode_steps,
        path=path,
    )
    # Time-outs are only told by the file if both arrays are stored, as in D4RL's own files.
    is_plain = stores_next and not (in_order and ends.stated and (~ends.timeouts[:-1]).any())
    if is_plain:
        # A row marked as both may be either, depending on who wrote the file.
        rows = np.flatnonzero(~(ends.terminals & ends.timeouts))
        (observation,) = _gather(arrays, "observations", path, rows)
        (next_observation,) = _gather(arrays, "next_observations", path, rows)
    else:
        rows = np.flatnonzero(~ends.timeouts[:-1])
        observation, next_observation = _gather(arrays, "observations", path, rows, rows + 1)
    if rows.size == 0:
        raise UnsupportedFileError(
            f"{path} contains no transition to learn from: all but the last of its "
            f"{len(rewards)} rows are timeouts, whose next observation is unknown; use another "
            "file."
        )
    (action,) = _gather(arrays, "actions", path, rows)
    terminated = torch.from_numpy(ends.terminals[rows]).unsqueeze(-1)
    truncated = torch.from_numpy(ends.timeouts[rows]).unsqueeze(-1)
    transitions = TensorDict(
        {
            "observation": observation,
            "action": action,
            "next": TensorDict(
                {
                    "observation": next_observation,
                    "reward": torch.from_numpy(rewards[rows].astype(np.float32)).unsqueeze(-1),
                    "done": terminated | truncated,
                    "terminated": terminated,
                    "truncated": truncated,
                },
                [len(rows)],
            ),
        },
        [len(rows)],
    )
    if not in_order:
        return Dataset(transitions, np.empty(0))
    moved = goes_on(observation, next_observation, terminated.squeeze(-1))
    going_on = None
    if moved is not None or not follows[ends.terminals].any():
        going_on = np.zeros_like(follows)
        going_on[rows] = False if moved is None else moved.numpy()
        going_on &= follows
    last = ends.timeouts if is_rlds else trajectory_ends(ends, going_on)
    return Dataset(transitions, episode_returns(rewards, ends.terminals, last))


def _in_order(follows: np.ndarray, flags: dict[str, np.ndarray]) -> bool:
    """Whether every row is followed by the next one of its episode, or marked as an end."""
    return bool(np.logical_or.reduce([follows, *flags.values()])[:-1].all())


def _with_episodes(
    arrays: Arrays, flags: dict[str, np.ndarray], follows: np.ndarray, path: Path
) -> dict[str, np.ndarray]:
    """Add the ends that first rows or numbers of episodes tell, unless the rows are shuffled."""
    keys = [key for key in ("starts", "episodes") if key in arrays]
    try:
        last = ends_of_episodes({key: _column(arrays, key, path) for key in keys}, path)
    except UnsupportedFileError:
        if "next_observations" not in arrays:
            raise
        return flags
    found = flags if last is None else {**flags, "dones": last}
    return found if _in_order(follows, found) else flags


def _from_rlds(
    rewards: np.ndarray, flags: dict[str, np.ndarray], path: Path
) -> dict[str, np.ndarray]:
    """Convert flags from RLDS, where the last row of an episode holds its last observation only."""
    last = flags["dones"]
    if rewards[last].any():
        raise UnsupportedFileError(
            f"{path}: is_last and is_terminal mark rows after the last action of an episode "
            "(RLDS), but rewards has values there; store the ends as terminals and timeouts, in "
            "the row of the last action."
        )
    terminals = np.append((flags["terminals"] & last)[1:], False)
    return {"terminals": terminals, "timeouts": last}


def _check_layout(file: h5py.File, path: Path, dict_space: Dict | None = None) -> Arrays:
    """Validate keys, dtypes, shapes and sizes without reading any values; returns the arrays."""
    arrays = find_arrays(file, path, dict_space)
    shapes: dict[str, tuple[int, ...]] = {key: array.shape or () for key, array in arrays.items()}
    rows = shapes["observations"][0] if shapes["observations"] else 0
    for name, array in arrays.items():
        shape, key = shapes[name], key_of(array)
        for part in _parts(array):
            check_real(part, key_of(part))
        is_matrix = name in ("observations", "actions", "next_observations")
        fits = len(shape) == 2 and shape[1] > 0 if is_matrix else shape in ((rows,), (rows, 1))
        if not fits or shape[0] != rows:
            expected = f"({rows}, dim)" if is_matrix else f"({rows},)"
            raise UnsupportedFileError(
                f"{path}: {key} has shape {shape}, which does not match {rows} observations; "
                f"store it with shape {expected}."
            )
    if shapes.get("next_observations", shapes["observations"]) != shapes["observations"]:
        raise UnsupportedFileError(
            f"{path}: {key_of(arrays['next_observations'])} has shape "
            f"{shapes['next_observations']}, but {key_of(arrays['observations'])} has "
            f"{shapes['observations']}; store both with the same shape."
        )
    if rows < 2:
        raise UnsupportedFileError(
            f"{path} has {rows} rows; at least 2 are needed, so use another file."
        )
    needed = sum(
        sum(size_in_memory(part, key_of(part)) for part in _parts(array)) + 4.0 * array.size
        for array in arrays.values()
    )
    if "next_observations" not in arrays:  # copied twice, as current and as next observations
        needed += 4.0 * arrays["observations"].size
    if needed > physical_memory():
        raise UnsupportedFileError(
            f"{path} needs {needed / 1e9:.3g} GB of memory, but this machine has "
            f"{physical_memory() / 1e9:.3g} GB; use a smaller file or a larger machine."
        )
    return arrays


def _parts(array: h5py.Dataset | GroupedArray) -> list[h5py.Dataset]:
    return array.parts if isinstance(array, GroupedArray) else [array]


def _column(arrays: Arrays, key: str, path: Path) -> np.ndarray:
    column = arrays[key][:].reshape(-1)
    with np.errstate(over="ignore"):  # overflows to infinity, which the check rejects
        _check_finite(column.astype(np.float32, copy=False), key_of(arrays[key]), path, 0)
    return column


def _follows(arrays: Arrays) -> np.ndarray:
    """Rows whose stored next observation is, up to rounding, the observation of the next row."""
    observations, following = arrays["observations"], arrays["next_observations"]
    follows = np.zeros(len(observations), dtype=bool)
    for start in range(0, len(follows) - 1, CHUNK_ROWS):
        stop = min(start + CHUNK_ROWS, len(follows) - 1)
        with np.errstate(over="ignore", invalid="ignore"):
            stored = following[start:stop].astype(np.float32, copy=False)
            next_row = observations[start + 1 : stop + 1].astype(np.float32, copy=False)
            follows[start:stop] = np.isclose(stored, next_row, rtol=1e-5, atol=1e-6).all(axis=1)
    return follows


def _check_finite(array: np.ndarray, key: str, path: Path, first_row: int) -> None:
    if np.isfinite(array).all():
        return
    bad = np.argwhere(~np.isfinite(array))[0]
    bad[0] += first_row
    raise UnsupportedFileError(
        f"{path}: {key}{bad.tolist()} is not finite in float32; repair or drop that row."
    )


def _gather(
    arrays: Arrays, key: str, path: Path, *selections: np.ndarray
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
        _check_finite(chunk, key_of(array), path, start)
        for rows, tensor in zip(selections, out):
            first, last = np.searchsorted(rows, (start, start + len(chunk)))
            tensor[first:last] = torch.from_numpy(chunk[rows[first:last] - start])
    return out
