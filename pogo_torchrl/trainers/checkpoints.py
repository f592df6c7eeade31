"""TorchRL checkpoints that survive crashes and detect damage."""

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
"""Version of the checkpoint format, incremented with every incompatible change."""

_DIGESTS_FILE = "sha256.json"


class DurableCheckpoint(Checkpoint):
    """A TorchRL checkpoint with checksums, which are written once all data are on disk.

    TorchRL writes a checkpoint under a temporary name and renames it, but a machine crash can
    still lose data of the renamed files. Here the checksum file is written after all other files
    have been synced to disk, so that :func:`is_intact` can distinguish complete checkpoints from
    incomplete ones. Files are written with regular writes, which raise an error on a full disk;
    TorchRL's default, memory-mapped files, would kill the process.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_adapter(object, StateDictCheckpointAdapter(payload_format="torch"))
        self.register("rng", GlobalRNGState())

    def save(self, path: str | Path, **kwargs: Any) -> Path:
        """Save a checkpoint and write its checksums last, which marks it as complete.

        Args:
            path: folder of the checkpoint.
            **kwargs: passed on to TorchRL's ``Checkpoint.save``.

        Returns:
            The folder that was written.
        """
        destination = super().save(path, **kwargs)
        for part in (*destination.rglob("*"), destination, destination.parent):
            sync(part)
        recorded = digests(destination)
        with atomic_write(destination / _DIGESTS_FILE, "x") as file:
            json.dump(recorded, file)
        sync(destination)
        return destination


class PriorityState:
    """Checkpoint state of a prioritised sampler, with its trees as tensors.

    TorchRL's own state holds the trees as objects, which its checkpoints cannot read back.

    Args:
        sampler: prioritised sampler of the replay buffer.
    """

    trees = ("_sum_tree", "_min_tree")

    def __init__(self, sampler: PrioritizedSampler) -> None:
        self.sampler = sampler

    def state_dict(self) -> dict[str, Any]:
        """Return the settings, the largest priority and the leaves of both trees."""
        state, leaves = dict(self.sampler.state_dict()), torch.arange(self.sampler.max_size)
        for name in self.trees:
            state[name] = torch.as_tensor(state[name][leaves])
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the state returned by :meth:`state_dict`."""
        own, leaves = self.sampler.state_dict(), torch.arange(self.sampler.max_size)
        for name in self.trees:
            own[name][leaves] = state_dict[name]
        self.sampler.load_state_dict({**state_dict, **{name: own[name] for name in self.trees}})


def is_intact(path: Path) -> bool:
    """Check whether a checkpoint is complete and undamaged.

    Args:
        path: folder of the checkpoint.

    Returns:
        ``True`` if all files match the recorded checksums.

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
        return False  # TorchRL writes no symbolic links, and a link may point anywhere
    try:
        recorded = json.loads((path / _DIGESTS_FILE).read_text())
        return recorded == digests(path, without=_DIGESTS_FILE)
    except (OSError, ValueError):
        return False


def metadata(path: Path) -> dict[str, Any]:
    """Read the metadata of a checkpoint.

    Args:
        path: folder of the checkpoint.

    Returns:
        The metadata, including ``"format_version"`` and ``"fingerprint"``.

    Raises:
        ValueError: if the checkpoint was not written by this package, or if its files point
            outside its folder.
    """
    try:
        found = Checkpoint.manifest(path)["metadata"]
        if isinstance(found["fingerprint"], dict):
            return found
        reason = "it has no fingerprint"
    except (CheckpointError, KeyError, TypeError) as error:
        reason = str(error)
    raise ValueError(
        f"{path} was not written by pogo_torchrl ({reason}): delete it, or choose another "
        "checkpoint_dir."
    )


def check_fingerprint(path: Path, ours: Mapping[str, Any], *, complete: bool) -> None:
    """Check that a checkpoint was written by this release and with the same settings.

    Args:
        path: the checkpoint.
        ours: fingerprint of the run that continues from it.
        complete: whether settings that the checkpoint does not record count as different. Those of
            earlier versions do not record all settings of the loss and the trainer.

    Raises:
        ValueError: if not; the message names the settings that differ.
    """
    found = metadata(path)
    version, theirs = found.get("format_version"), found.get("fingerprint", {})
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version}, this release reads {FORMAT_VERSION}: "
            "resume the run with the release that wrote it."
        )
    keys = theirs.keys() | (ours.keys() if complete else set())
    different = {key for key in keys if theirs.get(key) != ours.get(key)}
    changed = [
        f"{key}: {theirs.get(key)} -> {ours.get(key)}"
        for key in sorted(different)
        # of another optimizer or base, the class says enough
        if key.rpartition(".")[0] not in different
    ]
    if changed:
        raise ValueError(
            f"{path} is a checkpoint of another run ({'; '.join(changed)}). Use the settings of "
            "that run, or another checkpoint_dir."
        )


def plain(value: Any) -> Any:
    """Return a setting as it is read back from a checkpoint.

    Args:
        value: number, text, ``None``, tensor, or a sequence of them.

    Returns:
        The value without tensors and tuples, its numbers with the 7 digits of float32.

    Example:
        >>> plain((0.2, torch.tensor(0.99), "l2"))
        [0.2, 0.99, 'l2']
    """
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


def check_unused(rotation: CheckpointRotation | None) -> None:
    """Check that a training that starts does not mix its checkpoints with those of another.

    A rotation keeps the checkpoints of the most updates, whichever training wrote them.

    Args:
        rotation: checkpoint rotation of the training; ``None``: it writes no checkpoints.

    Raises:
        FileExistsError: if its folder already contains checkpoints.
    """
    found = rotation and sorted(rotation.directory.glob(f"{rotation.prefix}-*"))
    if rotation and found:
        raise FileExistsError(
            f"{rotation.directory} already contains {found[-1].name} of another training: continue "
            "that one by calling resume() before train(), or choose another checkpoint_dir."
        )


def remove_unfinished(rotation: CheckpointRotation) -> None:
    """Delete leftovers of a process that was killed while writing or removing a checkpoint.

    Args:
        rotation: checkpoint rotation whose folder is cleaned up.
    """
    for path in rotation.directory.glob(f".{rotation.prefix}-*"):
        shutil.rmtree(path, ignore_errors=True)
