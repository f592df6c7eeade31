"""Minari's datasets -> the transitions that offline RL learns from, through Minari's own API."""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from filelock import FileLock
from tensordict import TensorDict

from pogo_torchrl.data.hdf5 import Dataset

_LOGGER = logging.getLogger(__name__)
_ID = re.compile(r"([-\w]+/)*[-\w]+-v\d+", re.ASCII)
# D4RL's antmaze observation is [x, y, rest]; Gymnasium-Robotics splits it in these two.
_GOAL_KEYS = ("achieved_goal", "observation")
_DAMAGED = "delete {folder} and read it again, or restore it where it is yours"


def read_minari(dataset_id: str) -> Dataset:
    """Read a Minari dataset, downloaded on first use.

    The rows are those that ``d4rl.qlearning_dataset`` keeps, in its order: every step of every
    episode but the truncated ones and the very last one. Minari stores the observation that
    follows each step, so that ``next.observation`` is always the true one, also where an episode
    ends, and no row crosses into the next episode. A truncation is never a terminal state, not
    even where a step is marked as both.

    Observations and actions are vectors (``Box`` spaces of one dimension). A ``Dict`` space with
    ``observation`` and ``achieved_goal`` is read as ``[achieved_goal, observation]``: D4RL's 29
    antmaze observations, which Gymnasium-Robotics' AntMaze splits in these two. ``desired_goal``
    is left out, as D4RL does.

    Episodes are read one by one into float32 tensors allocated once. No global random state is
    touched.

    Source: https://minari.farama.org; Fu et al. (2020), D4RL; ``d4rl.qlearning_dataset``.

    Args:
        dataset_id: the id of a dataset, e.g. ``"D4RL/antmaze/umaze-v1"``, in the folder
            ``MINARI_DATASETS_PATH`` (default ``~/.minari/datasets``) or else at ``MINARI_REMOTE``
            (default ``hf://farama-minari``), both environment variables of Minari's. Processes
            that ask for the same dataset at once download it once.

    Returns:
        The transitions and the returns of the complete episodes, those that end by a termination
        or truncation (of all episodes where none does).

    Raises:
        ImportError: when Minari, or what it needs for this dataset, is not installed.
        FileNotFoundError: when there is no such dataset, here or at the remote.
        OSError: when the download fails.
        ValueError: for a malformed id, spaces that are not vectors, or a dataset that is damaged
            or empty, whose shapes or number of steps do not fit, that holds values that are not
            finite, or whose observations are all zero; the message names the id.

    Example:
        >>> import tempfile, unittest.mock
        >>> import minari, numpy as np
        >>> from gymnasium.spaces import Box
        >>> from minari.data_collector import EpisodeBuffer
        >>> episode = EpisodeBuffer(
        ...     observations=np.arange(8.0).reshape(4, 2),
        ...     actions=np.zeros((3, 1)),
        ...     rewards=np.ones(3),
        ...     terminations=np.array([False, False, True]),
        ...     truncations=np.array([False, False, False]),
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with unittest.mock.patch.dict("os.environ", MINARI_DATASETS_PATH=folder):
        ...         _ = minari.create_dataset_from_buffers(
        ...             "small/steps-v0",
        ...             [episode],
        ...             observation_space=Box(0, 9, (2,)),
        ...             action_space=Box(-1, 1, (1,)),
        ...         )
        ...         data = read_minari("small/steps-v0")
        >>> data.transitions["next", "observation"].tolist()
        [[2.0, 3.0], [4.0, 5.0]]
        >>> data.episode_returns.tolist()
        [3.0]
    """
    if not _ID.fullmatch(dataset_id):
        raise ValueError(
            f"data.path={dataset_id!r} is not the id of a Minari dataset; write "
            "namespace/name-vN, e.g. D4RL/antmaze/umaze-v1 (another remote is set by the "
            "environment variable MINARI_REMOTE)."
        )
    with _quiet():
        minari = _import_minari()
        return _read(_load(minari, dataset_id), dataset_id)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what Minari prints and what it and Gymnasium warn of."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _import_minari() -> Any:
    try:
        import minari
        import minari.storage
    except ImportError as error:
        raise ImportError(
            f'data.source=minari needs Minari ({error}): pip install "pogo_torchrl[minari]".'
        ) from error
    return minari


def _load(minari: Any, dataset_id: str) -> Any:
    """The dataset, on this machine afterwards."""
    root: Path = minari.storage.get_dataset_path()
    folder = root / dataset_id
    lock = root / f".{dataset_id.replace('/', '.')}.lock"
    # the lock file is there for as long as some process downloads
    if lock.exists() or not (folder / "data").exists():
        try:
            with FileLock(lock):
                if not (folder / "data").exists():
                    _download(minari, dataset_id, folder)
        finally:
            with contextlib.suppress(OSError):
                lock.unlink()
    try:
        return minari.load_dataset(dataset_id)
    except ImportError as error:
        raise ImportError(f"data.path={dataset_id!r} cannot be read: {_first(error)}") from error
    except Exception as error:
        raise _damaged(dataset_id, folder, error) from error


def _download(minari: Any, dataset_id: str, folder: Path) -> None:
    remote = os.environ.get("MINARI_REMOTE", "Minari's default remote")
    _LOGGER.info("downloading %s from %s to %s", dataset_id, remote, folder)
    missing = f"data.path={dataset_id!r} is not at {folder} and "
    is_new = not folder.exists()
    try:
        with _no_progress_bars():
            minari.download_dataset(dataset_id)
    except BaseException as error:
        if is_new:  # what has arrived so far would pass for the whole dataset
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, ImportError):
            raise ImportError(f"{missing}cannot be downloaded: {_first(error)}") from error
        if isinstance(error, ValueError):  # Minari's word for an id that it does not find
            near = difflib.get_close_matches(dataset_id, _local_ids(minari), n=3, cutoff=0.5)
            raise FileNotFoundError(
                f"{missing}not to be had from {remote} ({_first(error)}); "
                f"{f'near it here: {near}' if near else 'no id here resembles it'}; "
                "`minari list remote` lists what can be downloaded, `minari list local` the rest."
            ) from error
        if isinstance(error, Exception):
            raise OSError(
                f"{missing}could not be downloaded from {remote} ({type(error).__name__}: "
                f"{_first(error)}); check the network and MINARI_REMOTE, or copy the dataset there "
                "from a machine that has it."
            ) from error
        raise


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Hugging Face shows one per file, hundreds of them for a namespace."""
    try:
        from huggingface_hub import utils
    except ImportError:
        yield
        return
    shown = not utils.are_progress_bars_disabled()
    if shown:
        utils.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            utils.enable_progress_bars()


def _local_ids(minari: Any) -> list[str]:
    try:
        return list(minari.list_local_datasets())
    except Exception:  # a stray folder is enough
        return []


def _first(error: BaseException) -> str:
    """The first line of what it says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _damaged(dataset_id: str, folder: Path, error: Exception) -> ValueError:
    return ValueError(
        f"data.path={dataset_id!r} is damaged, or not for this version of Minari "
        f"({type(error).__name__}: {_first(error)}); {_DAMAGED.format(folder=folder)}."
    )


def _read(dataset: Any, dataset_id: str) -> Dataset:
    goal, observation_dim = _observation_layout(dataset.observation_space, dataset_id)
    action_dim = _vector_dim(dataset.action_space)
    if action_dim is None:
        raise ValueError(
            f"data.path={dataset_id!r} has actions in {dataset.action_space}; a Box of one "
            "dimension is read, so choose a dataset with continuous actions."
        )
    folder = Path(dataset.storage.data_path).parent
    steps, episodes = dataset.total_steps, dataset.total_episodes
    if steps < 2:
        raise ValueError(
            f"data.path={dataset_id!r} holds {steps} steps; at least 2 are needed, so choose "
            "another dataset."
        )
    columns = {
        "observations": torch.empty(steps, observation_dim),
        "actions": torch.empty(steps, action_dim),
        "next_observations": torch.empty(steps, observation_dim),
        "rewards": torch.empty(steps),
        "terminations": torch.empty(steps, dtype=torch.bool),
    }
    returns, complete = np.empty(episodes), np.empty(episodes, dtype=bool)
    found = rows = 0
    for number, episode in enumerate(_episodes(dataset, dataset_id, folder)):
        arrays = _arrays(episode, goal)
        length = len(episode)
        _check(arrays, length, observation_dim, action_dim, f"{dataset_id!r}, episode {number}")
        found += length
        if found > steps:
            break
        keep = ~arrays.pop("truncations")
        returns[number] = arrays["rewards"].sum(dtype=np.float64)
        complete[number] = arrays["terminations"][-1:].any() or not keep[-1:].all()
        if number == episodes - 1:
            keep[-1:] = False
        into = slice(rows, rows + int(keep.sum()))
        arrays["next_observations"] = arrays["observations"][1:]
        arrays["observations"] = arrays["observations"][:-1]
        for key, array in arrays.items():
            columns[key][into] = torch.from_numpy(array[keep])
        rows = into.stop
    if found != steps:
        raise ValueError(
            f"data.path={dataset_id!r} holds {'more than' if found > steps else 'only'} "
            f"{min(found, steps)} steps where its metadata says {steps}: it is damaged; "
            f"{_DAMAGED.format(folder=folder)}."
        )
    if rows == 0:
        raise ValueError(
            f"data.path={dataset_id!r} holds no transition to learn from: all its {steps} steps "
            "are truncated or the last; choose another dataset."
        )
    columns = {key: column[:rows] for key, column in columns.items()}
    if not columns["observations"].any():
        raise ValueError(
            f"data.path={dataset_id!r} has nothing but zeros as observations: it is damaged or "
            f"was never written; {_DAMAGED.format(folder=folder)}."
        )
    return Dataset(_to_tensordict(columns), returns[complete] if complete.any() else returns)


def _vector_dim(space: Any) -> int | None:
    is_vector = isinstance(space, gymnasium.spaces.Box) and len(space.shape) == 1
    return space.shape[0] if is_vector else None


def _observation_layout(space: Any, dataset_id: str) -> tuple[bool, int]:
    """Whether observations are split in ``_GOAL_KEYS``, and their dimension."""
    goal = isinstance(space, gymnasium.spaces.Dict)
    parts = [space.spaces.get(key) for key in _GOAL_KEYS] if goal else [space]
    dims = [_vector_dim(part) for part in parts]
    if None in dims:
        raise ValueError(
            f"data.path={dataset_id!r} has observations in {space}; a Box of one dimension is "
            "read, or a Dict whose observation and achieved_goal are such, so choose another "
            "dataset."
        )
    return goal, sum(dim for dim in dims if dim is not None)


def _episodes(dataset: Any, dataset_id: str, folder: Path) -> Iterator[Any]:
    try:
        yield from dataset.iterate_episodes()
    except Exception as error:  # whatever Minari meets in a file that is not whole
        raise _damaged(dataset_id, folder, error) from error


def _arrays(episode: Any, goal: bool) -> dict[str, np.ndarray]:
    """One episode: n+1 observations and n of each other, float32 and bool."""
    observations = episode.observations
    parts = [observations[key] for key in _GOAL_KEYS] if goal else [observations]
    # what leaves the range of float32 becomes infinite, which is refused afterwards
    with np.errstate(over="ignore"):
        parts = [np.asarray(part, dtype=np.float32) for part in parts]
        fits = len({len(part) for part in parts}) == 1
        return {
            # parts that do not fit each other are told by their first
            "observations": np.concatenate(parts, axis=-1) if fits else parts[0],
            "actions": np.asarray(episode.actions, dtype=np.float32),
            "rewards": np.asarray(episode.rewards, dtype=np.float32),
            "terminations": np.asarray(episode.terminations) != 0,
            "truncations": np.asarray(episode.truncations) != 0,
        }


def _check(
    arrays: dict[str, np.ndarray], length: int, observation_dim: int, action_dim: int, where: str
) -> None:
    shapes: dict[str, tuple[int, ...]] = {
        "observations": (length + 1, observation_dim),
        "actions": (length, action_dim),
    }
    for key, array in arrays.items():
        expected = shapes.get(key, (length,))
        if array.shape != expected:
            raise ValueError(
                f"data.path={where}: {key} has shape {array.shape} where {expected} is needed "
                f"for {length} steps; repair the dataset or choose another."
            )
        if not np.isfinite(array).all():
            bad = np.argwhere(~np.isfinite(array))[0].tolist()
            raise ValueError(
                f"data.path={where}: {key}{bad} is not finite in float32; repair the dataset or "
                "choose another."
            )


def _to_tensordict(columns: dict[str, torch.Tensor]) -> TensorDict:
    rows = len(columns["rewards"])
    terminated = columns["terminations"].unsqueeze(-1)
    following = TensorDict(
        {
            "observation": columns["next_observations"],
            "reward": columns["rewards"].unsqueeze(-1),
            "done": terminated.clone(),
            "terminated": terminated,
            "truncated": torch.zeros_like(terminated),
        },
        [rows],
    )
    return TensorDict(
        {
            "observation": columns["observations"],
            "action": columns["actions"],
            "next": following,
        },
        [rows],
    )
