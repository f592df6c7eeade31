"""In-memory TorchRL replay buffers over normalised offline datasets."""

from __future__ import annotations

import hashlib
import math
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium
import numpy as np
import torch
from tensordict import TensorDict
from torchrl.data import RandomSampler, TensorDictReplayBuffer, TensorStorage
from torchrl.data.replay_buffers.writers import ImmutableDatasetWriter

from pogo_torchrl.data.d4rl import read_d4rl
from pogo_torchrl.data.hdf5 import read_hdf5
from pogo_torchrl.data.layout import CHUNK_ROWS
from pogo_torchrl.data.minari import read_minari
from pogo_torchrl.data.rollouts import behaviour_dataset
from pogo_torchrl.data.trajectories import next_actions, trajectory_returns, trajectory_weights
from pogo_torchrl.envs import is_d4rl_task
from pogo_torchrl.envs import max_episode_steps as d4rl_horizon

SOURCES = ("local", "d4rl", "minari", "hdf5")
"""Supported values of ``source``, see :func:`make_replay_buffer`."""

STD_EPSILON = 1e-3
"""Added to the standard deviation of each observation dimension, as in TD3+BC.

Source: Fujimoto & Gu, *A Minimalist Approach to Offline Reinforcement Learning*, 2021,
arXiv:2106.06860.
"""


class Normalization(NamedTuple):
    """Observation normalisation ``(observation - mean) / std``."""

    mean: torch.Tensor
    """Mean, ``[obs]``."""

    std: torch.Tensor
    """Standard deviation plus :data:`STD_EPSILON`, ``[obs]``."""

    @classmethod
    def of(cls, observation: torch.Tensor) -> Normalization:
        """Compute the statistics of a dataset.

        Args:
            observation: observations, ``[rows, obs]``.

        Returns:
            The normalisation, in the dtype of ``observation``.

        Example:
            >>> import torch
            >>> n = Normalization.of(torch.tensor([[0.0], [2.0]]))
            >>> n.mean.item(), round(n.std.item(), 6)
            (1.0, 1.001)
        """
        # In chunks: a float64 copy of all observations would be the largest array of all.
        chunks, rows = observation.split(CHUNK_ROWS), len(observation)
        mean = torch.stack([chunk.double().sum(dim=0) for chunk in chunks]).sum(dim=0) / rows
        squares = torch.stack([((chunk - mean) ** 2).sum(dim=0) for chunk in chunks])
        std = (squares.sum(dim=0) / rows).sqrt() + STD_EPSILON
        return cls(mean.to(observation.dtype), std.to(observation.dtype))

    @classmethod
    def identity(cls, observation: torch.Tensor) -> Normalization:
        """Identity normalisation with mean 0 and standard deviation 1.

        Args:
            observation: observations, ``[rows, obs]``, which determine shape, dtype and device.
        """
        return cls(torch.zeros_like(observation[0]), torch.ones_like(observation[0]))


def _shallow_copy(rows: TensorDict) -> TensorDict:
    return rows.clone(recurse=False)


class OfflineReplayBuffer(TensorDictReplayBuffer):
    """An immutable TorchRL replay buffer over an entire dataset, sampled uniformly.

    Args:
        transitions: the transitions, already normalised, batch size ``[rows]``.
        normalization: the normalisation applied to the observations.
        episode_returns: undiscounted return of each episode of the dataset, ``[episodes]``; empty
            if unknown.
        batch_size: number of rows per sample. Defaults to ``256``.
    """

    def __init__(
        self,
        transitions: TensorDict,
        *,
        normalization: Normalization,
        episode_returns: np.ndarray,
        batch_size: int = 256,
    ) -> None:
        super().__init__(
            # Indices are drawn on the device of the data, which avoids a host-to-device copy and
            # synchronisation per sample.
            storage=TensorStorage(
                transitions, device=next(iter(transitions.values(True, True))).device
            ),
            sampler=RandomSampler(),
            writer=ImmutableDatasetWriter(),
            # Transforms write into the rows they get, and a slice shares its keys with the storage.
            collate_fn=_shallow_copy,
            batch_size=batch_size,
        )
        self.normalization = normalization
        self.episode_returns = episode_returns
        self._has_own_rng = False

    def set_rng(self, generator: torch.Generator | None) -> None:
        """Set the random generator of the sampler.

        Args:
            generator: the generator, or ``None`` for torch's global generator.
        """
        super().set_rng(generator)
        self._has_own_rng = generator is not None

    def samples_on(self, device: torch.device) -> bool:
        """Whether every sample runs the same operations on ``device`` and on no other device.

        Only then can sampling be captured in a CUDA graph.

        Args:
            device: the device.
        """
        plain = type(self.sampler) is RandomSampler and not self._has_own_rng
        return plain and len(self.transform) == 0 and self.storage.device == device

    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of the transitions, which does not depend on their source."""
        return self._digest

    @cached_property  # shared by the runs of a stack, which share the buffer
    def _digest(self) -> str:
        digest = hashlib.sha256()
        for key, values in sorted(self[:].flatten_keys(".").items()):
            digest.update(f"{key} {tuple(values.shape)} ".encode())
            digest.update(values.cpu().numpy().data)
        return digest.hexdigest()


def make_replay_buffer(
    task: str,
    *,
    source: Literal["local", "d4rl", "minari", "hdf5"] = "local",
    path: str | Path | None = None,
    mirror: str | Path | None = None,
    batch_size: int = 256,
    normalize: bool = True,
    reward_shift: float = 0.0,
    size: int = 100_000,
    seed: int = 0,
    cache_dir: str | Path | None = None,
    next_action: bool = False,
    return_temperature: float | None = None,
    clip_actions: bool | tuple[torch.Tensor, torch.Tensor] = False,
    max_episode_steps: int | None = None,
    dict_space: gymnasium.spaces.Dict | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> OfflineReplayBuffer:
    """Load the offline dataset of a task into a TorchRL replay buffer.

    Args:
        task: a D4RL task name, e.g. ``"hopper-medium-v2"``; or the name of a task of one's own,
            whose data are ``"hdf5"`` or ``"minari"``, there with ``Dict`` observations flattened.
        source: where the data come from. Defaults to ``"local"``.

            - ``"local"``: generated by the bundled behaviour policies on first use and cached (no
              download), see :func:`~pogo_torchrl.data.rollouts.behaviour_dataset`;
            - ``"d4rl"``: D4RL's own dataset of the task, downloaded on first use, see
              :class:`~pogo_torchrl.data.d4rl.D4RLReplay`;
            - ``"minari"``: the Minari dataset ``path``, downloaded unless it is available locally,
              see :func:`~pogo_torchrl.data.minari.read_minari`;
            - ``"hdf5"``: the file ``path`` in D4RL's layout, see
              :func:`~pogo_torchrl.data.hdf5.read_hdf5`.
        path: file name for ``source="hdf5"`` or dataset ID for ``source="minari"``. Defaults to
            ``None``.
        mirror: for ``source="d4rl"``, the URL or folder of a copy of D4RL's files. Defaults to
            D4RL's own server.
        batch_size: number of rows per sample. Defaults to ``256``.
        normalize: whether to normalise the observations to ``(observation - mean) / (std + 1e-3)``
            with the statistics of this dataset. Defaults to ``True``.
        reward_shift: constant added to every reward, usually ``-1`` for antmaze.
            ``rb.episode_returns`` do not include it. Defaults to ``0``.
        size: for ``source="local"``, number of transitions to generate. Defaults to ``100_000``.
        seed: for ``source="local"``, seed of the generated data, independent of the training seed.
            Defaults to ``0``.
        cache_dir: cache folder for generated data and D4RL's files. Defaults to
            ``$XDG_CACHE_HOME/pogo_torchrl`` or ``~/.cache/pogo_torchrl``.
        next_action: add the dataset's action in the next state under ``next.action``, which
            ``POGOLoss(critic_bc_weight=...)`` needs. It is the action of the next row if that row
            continues the episode, and NaN otherwise: after a terminal state, and where an episode
            timed out or was cut. Defaults to ``False``.
        return_temperature: add the weight of each row under ``trajectory_weight``, with this
            temperature > 0 of :func:`~pogo_torchrl.data.trajectories.trajectory_weights`, which
            ``POGOLoss(trajectory_weights=True)`` needs. Defaults to ``None``: no weights.
        clip_actions: clip the dataset's actions to these bounds ``(low, high)``, each ``[d]``, or
            with ``True`` to [-1, 1], those of all D4RL tasks. Defaults to ``False``.
        max_episode_steps: steps after which episodes of a task of one's own are truncated, for
            files that do not say where this happened. Defaults to ``None``: D4RL's, or unknown.
        dict_space: observation space of the environment of a task of one's own, in whose order
            ``Dict`` observations of Minari, or groups of observations in a file, are flattened.
            Defaults to the dataset's own, or to the order of the names.
        device: device of the data. Defaults to ``"cpu"``.
        progress: show progress bars of rollouts and downloads. Defaults to ``True``.

    Returns:
        A replay buffer with the rows of ``d4rl.qlearning_dataset``, in the same order (or the
        single transitions of a file, see :func:`~pogo_torchrl.data.hdf5.read_hdf5`), under the keys
        ``observation``, ``action``, ``next.observation``, ``next.reward``, ``next.done``,
        ``next.terminated``, ``next.truncated`` and, on request, ``next.action`` and
        ``trajectory_weight``. Its attributes ``normalization`` and ``episode_returns`` hold the
        observation statistics and the episode returns, empty if the episodes are unknown.

    Raises:
        ValueError: for an unknown source, an incompatible combination of source and path or mirror,
            a batch size or temperature out of range, or data that cannot be read.
        FileNotFoundError: when ``path`` does not exist.
        OSError: when a download fails or the cache folder cannot be written.
        ImportError: when ``source="minari"`` and Minari is not installed.

    Example:
        >>> rb = make_replay_buffer("hopper-medium-v2", size=1000)  # doctest: +SKIP
        >>> rb.sample()["action"].shape  # doctest: +SKIP
        torch.Size([256, 3])
    """
    _check_arguments(source, path, mirror, batch_size)
    if not math.isfinite(reward_shift):
        raise ValueError(f"data.reward_shift={reward_shift} must be a finite number, e.g. -1.")
    own_task = not is_d4rl_task(task)
    if own_task and source not in ("hdf5", "minari"):
        raise ValueError(
            f"data.source={source} has no data of task={task}: set data.source=hdf5 and "
            "data.path=FILE, or data.source=minari and data.path=ID; D4RL's tasks have names like "
            "hopper-medium-v2."
        )
    if source == "d4rl":
        data = read_d4rl(task, mirror=mirror, cache_dir=cache_dir, progress=progress)
    elif source == "minari":
        data = read_minari(str(path), flatten=(dict_space or True) if own_task else False)
    else:
        if source == "local":
            path = behaviour_dataset(
                task, size=size, seed=seed, cache_dir=cache_dir, progress=progress
            )
        try:
            horizon = max_episode_steps if own_task else d4rl_horizon(task)
            space = dict_space if own_task else None
            data = read_hdf5(str(path), max_episode_steps=horizon, dict_space=space)
        except ValueError as error:
            raise ValueError(f"data.path: {error}" if source == "hdf5" else str(error)) from error
    if batch_size > len(data.transitions):
        raise ValueError(
            f"batch_size={batch_size} exceeds the {len(data.transitions)} transitions of the "
            "dataset; lower it or use more data."
        )
    raw, episode_returns = data.transitions.clone(recurse=False), data.episode_returns
    del data
    statistics = Normalization.of if normalize else Normalization.identity
    normalization = statistics(raw["observation"])
    if clip_actions is not False:
        low, high = (-1.0, 1.0) if clip_actions is True else clip_actions
        raw["action"] = raw["action"].clamp(low, high)
    if next_action:
        raw["next", "action"] = next_actions(raw)
    if return_temperature is not None:
        _check_temperature(return_temperature, episode_returns)
        weights = trajectory_weights(trajectory_returns(raw), return_temperature)
        raw["trajectory_weight"] = weights.to(raw["action"].dtype)
    return OfflineReplayBuffer(
        _prepare(raw, normalization, reward_shift, device),
        normalization=Normalization(*(values.to(device) for values in normalization)),
        episode_returns=episode_returns,
        batch_size=batch_size,
    )


def _check_temperature(temperature: float, episode_returns: np.ndarray) -> None:
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"return_temperature={temperature} must be a finite number > 0, e.g. 0.1.")
    if not len(episode_returns):
        raise ValueError(
            f"return_temperature={temperature} weighs episodes by their returns, but the rows of "
            "the dataset are single transitions: use data in episodes, or return_temperature=None "
            "(null as an option of a run)."
        )


def _prepare(
    raw: TensorDict, normalization: Normalization, reward_shift: float, device: torch.device | str
) -> TensorDict:
    """Normalise the transitions and move them to ``device``.

    Tensors are removed from ``raw`` one by one: two copies of a large dataset may not fit into
    memory.
    """
    rows = TensorDict({}, raw.batch_size)
    for key in list(raw.keys(include_nested=True, leaves_only=True)):
        values = raw.pop(key)
        if key in ("observation", ("next", "observation")):
            values = (values - normalization.mean).div_(normalization.std)
        elif key == ("next", "reward"):
            values = values + reward_shift
        else:
            values = values.clone()  # may be memory-mapped
        rows[key] = values.to(device)
    return rows


def _check_arguments(
    source: str, path: str | Path | None, mirror: str | Path | None, batch_size: int
) -> None:
    if source not in SOURCES:
        raise ValueError(f"data.source={source!r} is unknown; choose one of {', '.join(SOURCES)}.")
    needs = {"hdf5": "FILE, a file in D4RL's layout", "minari": "ID, a Minari dataset"}
    if source in needs and path is None:
        raise ValueError(f"data.source={source!r} needs data.path={needs[source]}.")
    if source not in needs and path is not None:
        raise ValueError(
            f"data.path={str(path)!r} is only used with data.source=hdf5 or minari, got {source!r}."
        )
    if source != "d4rl" and mirror is not None:
        raise ValueError(
            f"data.mirror={str(mirror)!r} is only used with data.source=d4rl, got {source!r}."
        )
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be an integer >= 1, e.g. 256.")
