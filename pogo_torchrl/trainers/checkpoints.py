"""TorchRL checkpoints that are on the disk before they appear, and show whether they still are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torchrl.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointRotation,
    GlobalRNGState,
    StateDictCheckpointAdapter,
)
from torchrl.data.replay_buffers.samplers import PrioritizedSampler

from pogo_torchrl.files import atomic_write, digests, sync

FORMAT_VERSION = 3
"""Raised with every change after which older checkpoints cannot be read."""

_DIGESTS = "sha256.json"


class DurableCheckpoint(Checkpoint):
    """A TorchRL checkpoint with checksums, which are written once all data are on the disk.

    TorchRL writes a checkpoint under a temporary name and renames it, but a crash of the machine
    can still lose data of the renamed files. Here the file of checksums is written after all
    others are on the disk, so that :func:`is_intact` tells a whole checkpoint from a part of one.
    Files are written with plain writes, which fail with an error on a full disk where TorchRL's
    default, memory-mapped files, kills the process.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_adapter(object, StateDictCheckpointAdapter(payload_format="torch"))
        self.register("rng", GlobalRNGState())

    def save(self, path: str | Path, **kwargs: Any) -> Path:
        """Save as TorchRL does; checksums, which make the checkpoint a whole one, come last."""
        destination = super().save(path, **kwargs)
        for part in (*destination.rglob("*"), destination, destination.parent):
            sync(part)
        recorded = digests(destination)
        with atomic_write(destination / _DIGESTS, "x") as file:
            json.dump(recorded, file)
        sync(destination)
        return destination


class PriorityState:
    """The state of a prioritised sampler for a checkpoint, its trees as tensors.

    TorchRL's own state holds the trees as objects, which its checkpoints do not read back.

    Args:
        sampler: of the replay buffer.
    """

    trees = ("_sum_tree", "_min_tree")

    def __init__(self, sampler: PrioritizedSampler) -> None:
        self.sampler = sampler

    def state_dict(self) -> dict[str, Any]:
        """Settings, the largest priority, and the leaves of both trees."""
        state, leaves = dict(self.sampler.state_dict()), torch.arange(self.sampler.max_size)
        for name in self.trees:
            state[name] = torch.as_tensor(state[name][leaves])
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore them."""
        own, leaves = self.sampler.state_dict(), torch.arange(self.sampler.max_size)
        for name in self.trees:
            own[name][leaves] = state_dict[name]
        self.sampler.load_state_dict({**state_dict, **{name: own[name] for name in self.trees}})


def is_intact(path: Path) -> bool:
    """Whether a checkpoint holds what was written.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = DurableCheckpoint().save(f"{folder}/checkpoint")
        ...     before = is_intact(path)
        ...     next(path.rglob("state.pt")).write_bytes(b"")
        ...     before, is_intact(path)
        0
        (True, False)
    """
    if any(file.is_symlink() for file in path.rglob("*")):
        return False  # TorchRL writes none, and they may lead anywhere
    try:
        recorded = json.loads((path / _DIGESTS).read_text())
        return recorded == digests(path, without=_DIGESTS)
    except (OSError, ValueError):
        return False


def metadata(path: Path) -> dict[str, Any]:
    """What was recorded beside the states.

    Raises:
        ValueError: when the checkpoint is none of ours, or leads out of its folder.
    """
    try:
        found = Checkpoint.manifest(path)["metadata"]
        if isinstance(found["fingerprint"], dict):
            return found
        reason = "it has no fingerprint"
    except (CheckpointError, KeyError, TypeError) as error:
        reason = str(error)
    raise ValueError(
        f"{path} is no checkpoint of pogo_torchrl ({reason}): delete it, or choose another "
        "checkpoint_dir."
    )


def remove_unfinished(rotation: CheckpointRotation) -> None:
    """Delete what a killed process has left of a checkpoint it was writing or removing."""
    for path in rotation.directory.glob(f".{rotation.prefix}-*"):
        shutil.rmtree(path, ignore_errors=True)
