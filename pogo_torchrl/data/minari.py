"""Read transitions from Minari datasets, using Minari's own API."""

from __future__ import annotations

import contextlib
import difflib
import errno
import io
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from tensordict import TensorDict

from pogo_torchrl.data.hdf5 import Dataset
from pogo_torchrl.envs.flattening import check_entries, flatten_rows
from pogo_torchrl.files import cannot_read, cannot_write
from pogo_torchrl.locks import hold

_LOGGER = logging.getLogger(__name__)
_ID = re.compile(r"([-\w]+/)*[-\w]+-v\d+", re.ASCII)
# D4RL's antmaze observation is [x, y, rest]; Gymnasium-Robotics splits it into these two keys.
_GOAL_KEYS = ("achieved_goal", "observation")
# Reasons of the system to refuse a file, which say nothing about its content.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EAGAIN}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EIO, *_NO_LOCKS}
# What prevents writing to the folder of another user, or to a read-only file system.
_READ_ONLY = {errno.EACCES, errno.EPERM, errno.EROFS}
_REPAIR_HINT = "delete {folder} to download it again, or restore it if it is your own"


class RecordedEnvironment(NamedTuple):
    """What a Minari dataset says of its environment."""

    env_id: str | None
    """``MODULE:ID`` for :func:`gymnasium.make`; ``None`` if no environment is recorded."""
    kwargs: dict[str, Any]
    max_episode_steps: int | None
    reference_scores: list[float] | None
    """Its ``ref_min_score`` and ``ref_max_score``: returns that score 0 and 100."""


def read_minari(dataset_id: str, *, flatten: bool | gymnasium.spaces.Dict = False) -> Dataset:
    """Read a Minari dataset, downloading it on first use.

    The rows are those that ``d4rl.qlearning_dataset`` keeps, in the same order: all steps of all
    episodes except truncated steps and the very last step. Minari stores the observation that
    follows each step, so ``next.observation`` is always the true next observation, even at the end
    of an episode, and no row crosses into the next episode. A truncation is never a terminal
    state, even if a step is marked as both.

    Observations and actions must be vectors (one-dimensional ``Box`` spaces). A ``Dict`` space with
    ``observation`` and ``achieved_goal`` is read as ``[achieved_goal, observation]``, which
    restores D4RL's 29-dimensional antmaze observation from the two parts of Gymnasium-Robotics'
    AntMaze. ``desired_goal`` is dropped, as in D4RL.

    Episodes are read one at a time into preallocated float32 tensors. Global random state is not
    modified.

    Args:
        dataset_id: ID of a dataset, e.g. ``"D4RL/antmaze/umaze-v1"``. It is read from the folder
            ``MINARI_DATASETS_PATH`` (default ``~/.minari/datasets``) or downloaded from
            ``MINARI_REMOTE`` (default ``hf://farama-minari``); both are Minari's environment
            variables. When several processes request the same dataset, only one downloads it.
        flatten: read any ``Dict`` as the vector that :func:`gymnasium.spaces.flatten` makes of it,
            with all entries (``desired_goal``, too), as tasks of one's own need it: in the order of
            this space, e.g. that of the environment, or with ``True`` in that of the dataset's own,
            which Minari sorts by key. Defaults to ``False``: only D4RL's antmaze layout.

    Returns:
        The transitions and the returns of the complete episodes, i.e. those that end with a
        termination or truncation (of all episodes if none is complete).

    Raises:
        ImportError: when Minari or one of its optional dependencies is not installed.
        FileNotFoundError: when the dataset exists neither locally nor at the remote.
        OSError: when the download fails.
        ValueError: naming the ID, when it is malformed, the spaces are not vectors, or the dataset
            is damaged or empty, has mismatched shapes or an unexpected number of steps, or has
            values that are not finite or observations that are all zero.

    Source: https://minari.farama.org; Fu et al., *D4RL: Datasets for Deep Data-Driven Reinforcement
    Learning*, 2020, arXiv:2004.07219; ``d4rl.qlearning_dataset``.

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
    with _quiet():
        return _read(_open(dataset_id), dataset_id, flatten)


def read_minari_environment(dataset_id: str) -> RecordedEnvironment:
    """Read what a Minari dataset says of its environment, downloading it on first use.

    Args:
        dataset_id: ID of a dataset, see :func:`read_minari`.

    Returns:
        The environment for evaluation, if the dataset names one, otherwise that of the data.

    Raises:
        ValueError: if the environment has wrappers, or for the reasons of :func:`read_minari`.
    """
    with _quiet():
        dataset = _open(dataset_id)
    metadata = dataset.storage.metadata
    scores = [metadata.get(key) for key in ("ref_min_score", "ref_max_score")]
    known = all(isinstance(score, int | float) and np.isfinite(score) for score in scores)
    references = [float(score) for score in scores] if known and scores[0] != scores[1] else None
    text = metadata.get("eval_env_spec") or metadata.get("env_spec")
    if not text:
        return RecordedEnvironment(None, {}, None, references)
    spec = json.loads(text)
    if wrappers := [wrapper["name"] for wrapper in spec.get("additional_wrappers") or ()]:
        raise ValueError(
            f"data.path={dataset_id!r} was recorded in {spec['id']} with the wrappers "
            f"{', '.join(wrappers)}: register an environment that has them, and set env.id."
        )
    # The module of the environment belongs to the package that registers it.
    module = str(spec["entry_point"]).partition(":")[0]
    env_id = spec["id"] if module.startswith("gymnasium.") else f"{module}:{spec['id']}"
    return RecordedEnvironment(env_id, spec["kwargs"], spec["max_episode_steps"], references)


def read_minari_action_dim(dataset_id: str) -> int:
    """Number of action dimensions of a Minari dataset; 1 if its actions are not vectors.

    Args:
        dataset_id: ID of a dataset, see :func:`read_minari`, which rejects other actions.
    """
    with _quiet():
        return _vector_dim(_open(dataset_id).action_space) or 1


def _open(dataset_id: str) -> Any:
    if not _ID.fullmatch(dataset_id):
        raise ValueError(
            f"data.path={dataset_id!r} is not a valid Minari dataset ID; expected "
            "namespace/name-vN, e.g. D4RL/antmaze/umaze-v1. To use another remote, set the "
            "environment variable MINARI_REMOTE."
        )
    return _load(_import_minari(), dataset_id)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress Minari's output and the warnings of Minari and Gymnasium."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _import_minari() -> Any:
    try:
        import minari
        import minari.storage
    except ImportError as error:
        raise ImportError(
            f'data.source=minari needs Minari ({error}): run pip install "pogo_torchrl[minari]".'
        ) from error
    return minari


def _load(minari: Any, dataset_id: str) -> Any:
    """Load a dataset, downloading it if it is not available locally."""
    root: Path = minari.storage.get_dataset_path()
    folder = root / dataset_id
    name = dataset_id.replace("/", ".")
    lock, partial = root / f".{name}.lock", root / f".{name}.partial"
    # Both files exist while a process is downloading; a killed process leaves the second one.
    if lock.exists() or partial.exists() or not (folder / "data").exists():
        try:
            with hold(lock, wait=True):
                if partial.exists():
                    shutil.rmtree(folder, ignore_errors=True)
                if not (folder / "data").exists():
                    partial.touch()
                    try:
                        _download(minari, dataset_id, folder)
                    finally:
                        partial.unlink(missing_ok=True)
        except OSError as error:  # perhaps another user's folder, with a lock left behind
            if error.errno not in _READ_ONLY:
                raise
            if partial.exists() or not (folder / "data").exists():
                raise cannot_write(root, "MINARI_DATASETS_PATH", error) from error
    try:
        return minari.load_dataset(dataset_id)
    except ImportError as error:
        raise ImportError(
            f"data.path={dataset_id!r} cannot be read: {_first_line(error)}"
        ) from error
    except Exception as error:
        raise _read_error(dataset_id, folder, error) from error


def _download(minari: Any, dataset_id: str, folder: Path) -> None:
    remote = os.environ.get("MINARI_REMOTE", "Minari's default remote")
    _LOGGER.info("Downloading %s from %s to %s.", dataset_id, remote, folder)
    missing = f"data.path={dataset_id!r} is not at {folder} and "
    is_new = not folder.exists()
    try:
        with _no_progress_bars():
            minari.download_dataset(dataset_id)
    except BaseException as error:
        if is_new:  # a partial download would be mistaken for the complete dataset
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, ImportError):
            raise ImportError(f"{missing}cannot be downloaded: {_first_line(error)}") from error
        if isinstance(error, ValueError):  # raised by Minari for an unknown ID
            near = difflib.get_close_matches(dataset_id, _local_ids(minari), n=3, cutoff=0.5)
            raise FileNotFoundError(
                f"{missing}was not found at {remote} ({_first_line(error)}); "
                f"{f'similar local IDs: {near}' if near else 'no local ID is similar'}. "
                "`minari list remote` and `minari list local` list the available datasets."
            ) from error
        if isinstance(error, Exception):
            raise OSError(
                f"{missing}could not be downloaded from {remote} ({type(error).__name__}: "
                f"{_first_line(error)}); check the network and MINARI_REMOTE, or copy the dataset "
                "there from another machine."
            ) from error
        raise


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Disable Hugging Face's progress bars: one per file, hundreds for a namespace."""
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
    except Exception:  # an unrelated folder is enough to make Minari fail
        return []


def _first_line(error: BaseException) -> str:
    """First line of the message of an exception, or its type if there is no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _read_error(dataset_id: str, folder: Path, error: Exception) -> Exception:
    if isinstance(error, OSError) and error.errno in _REFUSED:
        refused = cannot_read(folder, error)
        if error.errno in _NO_LOCKS:
            return OSError(
                f"{refused} Minari opens files with HDF5's locks: set the environment variable "
                "HDF5_USE_FILE_LOCKING=FALSE where the file system has none."
            )
        return refused
    return ValueError(
        f"data.path={dataset_id!r} is damaged or incompatible with this version of Minari "
        f"({type(error).__name__}: {_first_line(error)}); {_REPAIR_HINT.format(folder=folder)}."
    )


def _read(dataset: Any, dataset_id: str, flatten: bool | gymnasium.spaces.Dict) -> Dataset:
    layout, observation_dim = _observation_layout(dataset.observation_space, dataset_id, flatten)
    action_dim = _vector_dim(dataset.action_space)
    if action_dim is None:
        raise ValueError(
            f"data.path={dataset_id!r} has actions in {dataset.action_space}; only a "
            "one-dimensional Box is supported, so choose a dataset with continuous actions."
        )
    folder = Path(dataset.storage.data_path).parent
    steps, episodes = dataset.total_steps, dataset.total_episodes
    if steps < 2:
        raise ValueError(
            f"data.path={dataset_id!r} has {steps} steps; at least 2 are needed, so choose "
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
        arrays = _to_arrays(episode, layout)
        length = len(episode)
        _check_episode(
            arrays, length, observation_dim, action_dim, f"{dataset_id!r}, episode {number}"
        )
        found += length
        if found > steps:
            break
        keep = ~arrays.pop("truncations")
        # As in an evaluation, an episode ends with its first termination.
        stop = (*np.flatnonzero(arrays["terminations"]), length - 1)[0] + 1
        returns[number] = arrays["rewards"][:stop].sum(dtype=np.float64)
        complete[number] = arrays["terminations"].any() or not keep[-1:].all()
        if number == episodes - 1:
            keep[-1:] = False
        target = slice(rows, rows + int(keep.sum()))
        arrays["next_observations"] = arrays["observations"][1:]
        arrays["observations"] = arrays["observations"][:-1]
        for key, array in arrays.items():
            columns[key][target] = torch.from_numpy(array[keep])
        rows = target.stop
    if found != steps:
        raise ValueError(
            f"data.path={dataset_id!r} has {'more than' if found > steps else 'only'} "
            f"{min(found, steps)} steps, but its metadata says {steps}: it is damaged; "
            f"{_REPAIR_HINT.format(folder=folder)}."
        )
    if rows == 0:
        raise ValueError(
            f"data.path={dataset_id!r} contains no transition to learn from: each of its {steps} "
            "steps is truncated or the last one; choose another dataset."
        )
    columns = {key: column[:rows] for key, column in columns.items()}
    if not columns["observations"].any():
        raise ValueError(
            f"data.path={dataset_id!r} has only zeros as observations: it is damaged or was never "
            f"written; {_REPAIR_HINT.format(folder=folder)}."
        )
    return Dataset(_to_tensordict(columns), returns[complete] if complete.any() else returns)


def _vector_dim(space: Any) -> int | None:
    is_vector = isinstance(space, gymnasium.spaces.Box) and len(space.shape) == 1
    return space.shape[0] if is_vector else None


def _observation_layout(
    space: Any, dataset_id: str, flatten: bool | gymnasium.spaces.Dict
) -> tuple[Any, int]:
    """The space of what is read of an observation, or ``_GOAL_KEYS``, and its dimension."""
    if flatten and isinstance(space, gymnasium.spaces.Dict):
        if isinstance(flatten, gymnasium.spaces.Dict):
            if set(flatten.spaces) != set(space.spaces):
                raise ValueError(
                    f"data.path={dataset_id!r} has observations of {', '.join(space.spaces)}, but "
                    f"the environment of {', '.join(flatten.spaces)}: set env.id to the "
                    "environment of the data."
                )
            space = flatten
        try:
            check_entries(space)
        except ValueError as error:
            raise ValueError(
                f"data.path={dataset_id!r} has observations that are not vectors: {error}"
            ) from error
        return space, gymnasium.spaces.flatdim(space)
    has_goal = isinstance(space, gymnasium.spaces.Dict)
    parts = [space.spaces.get(key) for key in _GOAL_KEYS] if has_goal else [space]
    dims = [_vector_dim(part) for part in parts]
    if None in dims:
        raise ValueError(
            f"data.path={dataset_id!r} has observations in {space}; only a one-dimensional Box, or "
            "a Dict with such a Box for observation and achieved_goal, is supported, so choose "
            "another dataset."
        )
    return _GOAL_KEYS if has_goal else None, sum(dim for dim in dims if dim is not None)


def _episodes(dataset: Any, dataset_id: str, folder: Path) -> Iterator[Any]:
    try:
        yield from dataset.iterate_episodes()
    except Exception as error:  # a damaged file can make Minari raise anything
        raise _read_error(dataset_id, folder, error) from error


def _to_arrays(episode: Any, layout: Any) -> dict[str, np.ndarray]:
    """Arrays of one episode, float32 or bool: n+1 observations and n of everything else."""
    observations = episode.observations
    if layout == _GOAL_KEYS:
        parts = [observations[key] for key in _GOAL_KEYS]
    else:
        parts = [observations if layout is None else flatten_rows(layout, observations)]
    # Values outside the range of float32 become infinite, which _check_episode() rejects.
    with np.errstate(over="ignore"):
        parts = [np.asarray(part, dtype=np.float32) for part in parts]
        fits = len({len(part) for part in parts}) == 1
        return {
            # Parts of different lengths cannot be joined: _check_episode() rejects the first.
            "observations": np.concatenate(parts, axis=-1) if fits else parts[0],
            "actions": np.asarray(episode.actions, dtype=np.float32),
            "rewards": np.asarray(episode.rewards, dtype=np.float32),
            "terminations": np.asarray(episode.terminations) != 0,
            "truncations": np.asarray(episode.truncations) != 0,
        }


def _check_episode(
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
                f"data.path={where}: {key} has shape {array.shape}, expected {expected} for "
                f"{length} steps; repair the dataset or choose another."
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
