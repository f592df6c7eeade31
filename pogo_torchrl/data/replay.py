"""Datasets as TorchRL replay buffers, normalised once and kept in memory."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tensordict import TensorDict
from torchrl.data import RandomSampler, TensorDictReplayBuffer, TensorStorage
from torchrl.data.replay_buffers.writers import ImmutableDatasetWriter

from pogo_torchrl.data.behaviour import behaviour_dataset
from pogo_torchrl.data.hdf5 import read_hdf5

SOURCES = ("local", "hdf5")
"""Accepted values of ``source``, see :func:`make_replay_buffer`."""

STD_EPSILON = 1e-3
"""Added to each dimension's standard deviation, as in TD3+BC (Fujimoto and Gu, 2021)."""


class Normalization(NamedTuple):
    """Observations are seen as ``(observation - mean) / std``; ``std`` holds the epsilon."""

    mean: torch.Tensor
    std: torch.Tensor

    @classmethod
    def of(cls, observation: torch.Tensor) -> Normalization:
        """Statistics of a dataset's observations, shape ``[rows, obs]``.

        Example:
            >>> import torch
            >>> n = Normalization.of(torch.tensor([[0.0], [2.0]]))
            >>> n.mean.item(), round(n.std.item(), 6)
            (1.0, 1.001)
        """
        std, mean = torch.std_mean(observation.double(), dim=0, correction=0)
        return cls(mean.to(observation.dtype), (std + STD_EPSILON).to(observation.dtype))

    @classmethod
    def identity(cls, observation: torch.Tensor) -> Normalization:
        """No normalisation: mean 0 and std 1."""
        return cls(torch.zeros_like(observation[0]), torch.ones_like(observation[0]))


class OfflineReplayBuffer(TensorDictReplayBuffer):
    """An immutable TorchRL replay buffer over a whole dataset, sampled uniformly.

    Args:
        transitions: raw transitions, batch size ``[rows]``.
        normalization: applied here, once, to ``observation`` and ``next.observation``.
        episode_returns: undiscounted returns of the episodes in the data.
        batch_size: rows of a sample.
    """

    def __init__(
        self,
        transitions: TensorDict,
        *,
        normalization: Normalization,
        episode_returns: np.ndarray,
        batch_size: int = 256,
    ) -> None:
        transitions = transitions.clone(recurse=False)
        for key in ("observation", ("next", "observation")):
            normalized = (transitions[key] - normalization.mean) / normalization.std
            transitions.set(key, normalized)
        super().__init__(
            storage=TensorStorage(transitions),
            sampler=RandomSampler(),
            writer=ImmutableDatasetWriter(),
            batch_size=batch_size,
        )
        self.normalization = normalization
        self.episode_returns = episode_returns


def make_replay_buffer(
    task: str,
    *,
    source: str = "local",
    path: str | Path | None = None,
    batch_size: int = 256,
    normalize: bool = True,
    size: int = 100_000,
    seed: int = 0,
    cache_dir: str | Path | None = None,
    device: torch.device | str = "cpu",
) -> OfflineReplayBuffer:
    """The offline data of a task as a TorchRL replay buffer.

    Args:
        task: a D4RL task name, e.g. ``"hopper-medium-v2"``.
        source: ``"local"``: rolled out once from the behaviour policies in the package and kept
            in a cache folder (no download); ``"hdf5"``: the file ``path`` in D4RL's layout.
        path: the file, with ``source="hdf5"`` only.
        batch_size: rows of a sample. Defaults to ``256``.
        normalize: see the observations as ``(observation - mean) / (std + 1e-3)``, statistics of
            this dataset. Defaults to ``True``.
        size: transitions to roll out, with ``source="local"``. Defaults to ``100_000``.
        seed: seed of these rollouts. Defaults to ``0``: the data do not change with the seed of
            the training.
        cache_dir: folder of these rollouts, see
            :func:`~pogo_torchrl.data.behaviour.behaviour_dataset`.
        device: where the data live. Defaults to ``"cpu"``.

    Returns:
        A replay buffer of the rows of ``d4rl.qlearning_dataset``, in its order: ``observation``,
        ``action``, ``next.observation``, ``next.reward``, ``next.done``, ``next.terminated``,
        ``next.truncated``; ``rb.normalization.mean`` and ``.std``; ``rb.episode_returns``.

    Raises:
        ValueError: for an unknown source, a source and path that do not go together, a batch size
            below 1, or data that cannot be read.
        FileNotFoundError: when ``path`` is not there.

    Example:
        >>> rb = make_replay_buffer("hopper-medium-v2", size=1000)  # doctest: +SKIP
        >>> rb.sample()["action"].shape  # doctest: +SKIP
        torch.Size([256, 3])
    """
    if source not in SOURCES:
        raise ValueError(f"data.source={source!r} is unknown; choose one of {list(SOURCES)}.")
    if source == "hdf5" and path is None:
        raise ValueError("data.source='hdf5' needs data.path=FILE, a file in D4RL's layout.")
    if source != "hdf5" and path is not None:
        raise ValueError(
            f"data.path={str(path)!r} is read with data.source=hdf5 only, got {source!r}."
        )
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be an integer >= 1.")
    if source == "local":
        path = behaviour_dataset(task, size=size, seed=seed, cache_dir=cache_dir)
    data = read_hdf5(path)  # type: ignore[arg-type]
    transitions = data.transitions.to(device)
    statistics = Normalization.of if normalize else Normalization.identity
    return OfflineReplayBuffer(
        transitions,
        normalization=statistics(transitions["observation"]),
        episode_returns=data.episode_returns,
        batch_size=batch_size,
    )
