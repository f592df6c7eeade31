"""Datasets as TorchRL replay buffers, normalised once and kept in memory."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tensordict import TensorDict
from torchrl.data import RandomSampler, TensorDictReplayBuffer, TensorStorage
from torchrl.data.replay_buffers.writers import ImmutableDatasetWriter

from pogo_torchrl.data.d4rl import read_d4rl
from pogo_torchrl.data.hdf5 import PIECE, read_hdf5
from pogo_torchrl.data.minari import read_minari
from pogo_torchrl.data.rollouts import behaviour_dataset
from pogo_torchrl.envs import max_episode_steps

SOURCES = ("local", "d4rl", "minari", "hdf5")
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
        # Piece by piece: a whole copy in float64 would be the largest array of all.
        pieces, rows = observation.split(PIECE), len(observation)
        mean = torch.stack([piece.double().sum(dim=0) for piece in pieces]).sum(dim=0) / rows
        squares = torch.stack([((piece - mean) ** 2).sum(dim=0) for piece in pieces])
        std = (squares.sum(dim=0) / rows).sqrt() + STD_EPSILON
        return cls(mean.to(observation.dtype), std.to(observation.dtype))

    @classmethod
    def identity(cls, observation: torch.Tensor) -> Normalization:
        """No normalisation: mean 0 and std 1."""
        return cls(torch.zeros_like(observation[0]), torch.ones_like(observation[0]))


class OfflineReplayBuffer(TensorDictReplayBuffer):
    """An immutable TorchRL replay buffer over a whole dataset, sampled uniformly.

    Args:
        transitions: the rows as they are sampled, batch size ``[rows]``.
        normalization: how their observations were normalised.
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
        super().__init__(
            # Indices are drawn where the rows are: drawn on the host, each sample would wait.
            storage=TensorStorage(
                transitions, device=next(iter(transitions.values(True, True))).device
            ),
            sampler=RandomSampler(),
            writer=ImmutableDatasetWriter(),
            batch_size=batch_size,
        )
        self.normalization = normalization
        self.episode_returns = episode_returns
        self._has_own_rng = False

    def set_rng(self, generator: torch.Generator | None) -> None:
        """Draw from a generator of one's own instead of torch's global one."""
        super().set_rng(generator)
        self._has_own_rng = generator is not None

    def samples_on(self, device: torch.device) -> bool:
        """Whether a sample takes the same work of this device each time, and nothing else's.

        Then a CUDA graph can hold it.
        """
        plain = type(self.sampler) is RandomSampler and not self._has_own_rng
        return plain and len(self.transform) == 0 and self.storage.device == device

    def fingerprint(self) -> str:
        """SHA-256 of the rows: equal for equal data, wherever they came from."""
        return self._digest

    @cached_property  # the runs of a stack share the data
    def _digest(self) -> str:
        digest = hashlib.sha256()
        for key, values in sorted(self[:].flatten_keys(".").items()):
            digest.update(f"{key} {tuple(values.shape)} ".encode())
            digest.update(values.cpu().numpy().data)
        return digest.hexdigest()


def make_replay_buffer(
    task: str,
    *,
    source: str = "local",
    path: str | Path | None = None,
    mirror: str | Path | None = None,
    batch_size: int = 256,
    normalize: bool = True,
    reward_shift: float = 0.0,
    size: int = 100_000,
    seed: int = 0,
    cache_dir: str | Path | None = None,
    device: torch.device | str = "cpu",
) -> OfflineReplayBuffer:
    """The offline data of a task as a TorchRL replay buffer.

    Args:
        task: a D4RL task name, e.g. ``"hopper-medium-v2"``.
        source: ``"local"``: rolled out once from the behaviour policies in the package and kept
            in a cache folder (no download); ``"d4rl"``: D4RL's own dataset of the task,
            downloaded once, see :class:`~pogo_torchrl.data.d4rl.D4RLReplay`; ``"minari"``: the
            Minari dataset ``path``, downloaded unless it is there, see
            :func:`~pogo_torchrl.data.minari.read_minari`; ``"hdf5"``: the file ``path`` in D4RL's
            layout.
        path: the file, with ``source="hdf5"``; the dataset's id, with ``source="minari"``.
        mirror: with ``source="d4rl"``, the address or the folder of a copy of D4RL's files.
            Defaults to D4RL's own server.
        batch_size: rows of a sample. Defaults to ``256``.
        normalize: see the observations as ``(observation - mean) / (std + 1e-3)``, statistics of
            this dataset. Defaults to ``True``.
        reward_shift: added to every reward; ``-1`` is usual for antmaze. ``rb.episode_returns``
            are those of the rewards without it. Defaults to ``0``.
        size: transitions to roll out, with ``source="local"``. Defaults to ``100_000``.
        seed: seed of these rollouts. Defaults to ``0``: the data do not change with the seed of
            the training.
        cache_dir: folder of these rollouts and of D4RL's files. Defaults to
            ``$XDG_CACHE_HOME/pogo_torchrl`` or ``~/.cache/pogo_torchrl``.
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
    _check_arguments(source, path, mirror, batch_size)
    if source == "d4rl":
        data = read_d4rl(task, mirror=mirror, cache_dir=cache_dir)
    elif source == "minari":
        data = read_minari(str(path))
    else:
        if source == "local":
            path = behaviour_dataset(task, size=size, seed=seed, cache_dir=cache_dir)
        try:
            data = read_hdf5(str(path), max_episode_steps=max_episode_steps(task))
        except ValueError as error:
            raise ValueError(f"data.path: {error}" if source == "hdf5" else str(error)) from error
    if batch_size > len(data.transitions):
        raise ValueError(
            f"batch_size={batch_size} is more than the data's {len(data.transitions)} transitions: "
            "lower it, or use more data."
        )
    raw, episode_returns = data.transitions.clone(recurse=False), data.episode_returns
    del data
    statistics = Normalization.of if normalize else Normalization.identity
    normalization = statistics(raw["observation"])
    return OfflineReplayBuffer(
        _prepare(raw, normalization, reward_shift, device),
        normalization=Normalization(*(values.to(device) for values in normalization)),
        episode_returns=episode_returns,
        batch_size=batch_size,
    )


def _prepare(
    raw: TensorDict, normalization: Normalization, reward_shift: float, device: torch.device | str
) -> TensorDict:
    """The rows as they are sampled, in memory; ``raw`` is emptied, tensor by tensor.

    Datasets are large, and two whole copies may not fit.
    """
    rows = TensorDict({}, raw.batch_size)
    for key in list(raw.keys(include_nested=True, leaves_only=True)):
        values = raw.pop(key)
        if key in ("observation", ("next", "observation")):
            values = (values - normalization.mean).div_(normalization.std)
        elif key == ("next", "reward"):
            values = values + reward_shift
        else:
            values = values.clone()  # it may be memory-mapped
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
            f"data.path={str(path)!r} is read with data.source=hdf5 or minari only, got {source!r}."
        )
    if source != "d4rl" and mirror is not None:
        raise ValueError(
            f"data.mirror={str(mirror)!r} is used with data.source=d4rl only, got {source!r}."
        )
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be an integer >= 1, e.g. 256.")
