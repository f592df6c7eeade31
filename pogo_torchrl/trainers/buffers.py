"""What POGOTrainer needs of a replay buffer: samples, priorities, and rows for hooks."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torchrl.data import OfflineToOnlineReplayBuffer, ReplayBuffer, TensorDictReplayBuffer
from torchrl.data.replay_buffers.samplers import PrioritizedSampler

from pogo_torchrl.torchrl_private import ensemble_members


def check_buffer(replay_buffer: Any) -> None:
    """Check that an object can be sampled from.

    Raises:
        ValueError: if it is no replay buffer, or is empty.
    """
    if not hasattr(replay_buffer, "sample"):
        raise ValueError(
            f"replay_buffer must have a sample() method, which {type(replay_buffer).__name__} has "
            "not: create TensorDictReplayBuffer(storage=LazyTensorStorage(len(data)), "
            "batch_size=256), and fill it with extend(data)."
        )
    if len(replay_buffer) == 0:
        raise ValueError("The replay buffer is empty: fill it before training.")


def prioritized_sampler(replay_buffer: Any, key: NestedKey) -> PrioritizedSampler | None:
    """Return the sampler of a prioritised replay buffer, and ``None`` for other buffers.

    Args:
        replay_buffer: the replay buffer.
        key: key of the priorities that the loss writes.

    Raises:
        ValueError: if the buffer could not learn its priorities from sampled batches.
    """
    sampler = getattr(replay_buffer, "sampler", None)
    if not isinstance(sampler, PrioritizedSampler):
        kind = type(replay_buffer).__name__
        for member in members(replay_buffer):
            if isinstance(getattr(member, "sampler", None), PrioritizedSampler):
                raise ValueError(
                    f"a replay buffer in the {kind} is prioritised, but its samples would not tell "
                    "it their priorities: use members without priorities, or a single "
                    f"TensorDictPrioritizedReplayBuffer(..., priority_key={key!r})."
                )
        return None
    if not isinstance(replay_buffer, TensorDictReplayBuffer):
        raise ValueError(
            f"{type(replay_buffer).__name__} does not learn priorities from tensordicts: use "
            f"TensorDictPrioritizedReplayBuffer(..., priority_key={key!r})."
        )
    theirs = replay_buffer.priority_key
    if theirs != key:
        raise ValueError(
            f"the prioritised replay buffer reads priorities from {theirs!r}, but the loss "
            f"writes them to {key!r}: use a TensorDictReplayBuffer with priority_key={key!r}, "
            f"or loss.set_keys(priority=...)."
        )
    return sampler


def members(replay_buffer: Any) -> list[ReplayBuffer]:
    """Return the replay buffers that another one samples from; without any, itself alone."""
    if isinstance(replay_buffer, OfflineToOnlineReplayBuffer):
        both = replay_buffer.offline_buffer, replay_buffer.online_buffer
        return [member for member in both if len(member)]
    return ensemble_members(replay_buffer) or [replay_buffer]


def rows_for_hooks(replay_buffer: Any, count: int, seed: int) -> TensorDictBase:
    """Draw rows for hooks that look at the batch, which is collected data in TorchRL's trainers.

    Neither the global random state nor the sampler is used, so that such hooks do not affect the
    training.

    Args:
        replay_buffer: the data.
        count: number of rows.
        seed: seed of the draw.

    Returns:
        ``[count]`` rows, without the entries that describe how they were collected. Of several
        buffers, those entries that all of them have.

    Raises:
        ValueError: if the rows of the data cannot be read.
    """
    tables = [_rows(member) for member in members(replay_buffer)]
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(sum(map(len, tables)), (count,), generator=generator)
    parts, first = [], 0
    for rows in tables:
        own = index[(index >= first) & (index < first + len(rows))] - first
        parts.append(rows[own].exclude("collector"))
        first += len(rows)
    if len(parts) == 1:
        return parts[0]
    common = set.intersection(*(set(part.keys(True, True)) for part in parts))
    return torch.cat([part.select(*common) for part in parts])


def _rows(replay_buffer: ReplayBuffer) -> Any:
    storage = getattr(replay_buffer, "storage", None)
    if storage is None:
        raise ValueError(
            f"a hook looks at rows of the data, which {type(replay_buffer).__name__} does not "
            "give: use one of TorchRL's replay buffers, or leave the hook out."
        )
    # An index of a storage with several dimensions selects whole trajectories.
    return replay_buffer if storage.ndim == 1 else replay_buffer[:].reshape(-1)
