"""Files in D4RL's HDF5 layout -> the transitions that offline RL learns from."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import torch
from tensordict import TensorDict

REQUIRED_KEYS = ("observations", "actions", "rewards", "terminals")


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
    arrays = _read_arrays(path)
    terminals = arrays["terminals"] != 0
    if "timeouts" in arrays:
        timeouts = arrays["timeouts"] != 0
    else:
        timeouts = _horizon_timeouts(terminals, max_episode_steps)
    rows = np.flatnonzero(~timeouts[:-1])
    if rows.size == 0:
        raise ValueError(f"{path} holds no transition to learn from ({len(timeouts)} rows).")
    return Dataset(
        transitions=_to_tensordict(arrays, terminals, rows),
        episode_returns=_episode_returns(arrays["rewards"], terminals | timeouts),
    )


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise FileNotFoundError(f"data.path={str(path)!r} is not a file.")
    try:
        with h5py.File(path) as file:
            missing = [key for key in REQUIRED_KEYS if key not in file]
            if missing:
                raise ValueError(
                    f"{path} lacks {', '.join(missing)}: a file in D4RL's layout holds "
                    f"{', '.join(REQUIRED_KEYS)} (and timeouts)."
                )
            keys = [*REQUIRED_KEYS, *(["timeouts"] if "timeouts" in file else [])]
            arrays = {key: file[key][()] for key in keys}
    except OSError as error:
        raise ValueError(f"{path} is not a readable HDF5 file: {error}.") from error
    rows = len(arrays["observations"])
    for key, array in arrays.items():
        if key in ("observations", "actions"):
            fits = array.ndim == 2 and len(array) == rows
        else:
            arrays[key] = array = array.reshape(-1) if array.size == len(array) else array
            fits = array.shape == (rows,)
        if not fits:
            raise ValueError(
                f"{path}: {key} has shape {array.shape}, which does not fit {rows} observations."
            )
        if not np.isfinite(array).all():
            bad = np.argwhere(~np.isfinite(array))[0]
            raise ValueError(f"{path}: {key}{bad.tolist()} is not finite; repair or drop that row.")
    if rows < 2:
        raise ValueError(f"{path} holds {rows} rows; at least 2 are needed.")
    return arrays


def _horizon_timeouts(terminals: np.ndarray, max_episode_steps: int) -> np.ndarray:
    """Steps that end an episode by reaching the horizon, counted as d4rl does."""
    timeouts = np.zeros_like(terminals)
    step = 0
    for i, terminal in enumerate(terminals):
        timeouts[i] = step == max_episode_steps - 1
        # d4rl resets its count at a terminal and then adds that very row to it
        step = 0 if timeouts[i] else (0 if terminal else step) + 1
    return timeouts


def _to_tensordict(
    arrays: dict[str, np.ndarray], terminals: np.ndarray, rows: np.ndarray
) -> TensorDict:
    def tensor(key: str, index: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(arrays[key][index].astype(np.float32))

    terminated = torch.from_numpy(terminals[rows]).unsqueeze(-1)
    return TensorDict(
        {
            "observation": tensor("observations", rows),
            "action": tensor("actions", rows),
            "next": TensorDict(
                {
                    "observation": tensor("observations", rows + 1),
                    "reward": tensor("rewards", rows).unsqueeze(-1),
                    "done": terminated.clone(),
                    "terminated": terminated,
                    "truncated": torch.zeros_like(terminated),
                },
                [len(rows)],
            ),
        },
        [len(rows)],
    )


def _episode_returns(rewards: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Returns of the complete episodes; of the one unfinished episode where none is complete."""
    cumulative = np.cumsum(rewards, dtype=np.float64)
    last = np.flatnonzero(ends) if ends.any() else np.array([len(rewards) - 1])
    return np.diff(cumulative[last], prepend=0.0)
