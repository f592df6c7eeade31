"""Open HDF5 files and look up their arrays.

The files are untrusted: only arrays stored in the file itself are read, and their declared sizes
are checked before any memory is allocated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py

from pogo_torchrl.files import cannot_read

NAMES: dict[str, tuple[str, ...]] = {
    "observations": ("observations", "observation", "obs", "states", "state"),
    "actions": ("actions", "action", "acts", "act"),
    "rewards": ("rewards", "reward", "rews", "rew"),
    "terminals": (
        "terminals",
        "terminal",
        "terminations",
        "termination",
        "terminateds",
        "terminated",
        "is_terminal",
    ),
    "timeouts": (
        "timeouts",
        "timeout",
        "truncations",
        "truncation",
        "truncateds",
        "truncated",
        "is_truncated",
        "TimeLimit.truncated",
        "infos/TimeLimit.truncated",
    ),
    "dones": ("dones", "done", "is_done", "is_last"),
    "starts": ("episode_starts", "episode_start", "is_first"),
    "episodes": (
        "episode_ids",
        "episode_id",
        "episodes",
        "episode",
        "trajectory_ids",
        "trajectory_id",
        "traj_ids",
        "traj_id",
    ),
    "next_observations": (
        "next_observations",
        "next_observation",
        "next_obs",
        "observations_next",
        "observation_next",
        "obs_next",
        "new_observations",
        "new_obs",
        "next_states",
        "next_state",
    ),
}
"""Names under which arrays are found, for each name in D4RL's layout; ``dones`` are ends of either
kind, ``starts`` first rows, and ``episodes`` numbers of episodes."""

GROUPS = ("observations", "next_observations")
"""Names whose arrays may be groups of arrays."""

_D4RL_KEYS = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")

# HDF5's deflate compresses by a factor of about a thousand at most. Small arrays are not checked.
_MAX_COMPRESSION, _SMALL = 1100, 64 << 20


class UnsupportedFileError(ValueError):
    """Raised when an HDF5 file is damaged, unsafe or not in D4RL's layout."""

    __module__ = "pogo_torchrl.data.hdf5"  # the address by which users know it


@contextmanager
def open_hdf5(path: Path) -> Iterator[h5py.File]:
    """Open an HDF5 file for reading, without a lock: some file systems have none.

    Args:
        path: the file.

    Raises:
        ValueError: an :class:`UnsupportedFileError`, when the file is damaged or not HDF5, also if
            that shows only within the ``with`` block.
        OSError: when the system refuses to read it, e.g. a ``PermissionError``. This says nothing
            about the content.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "a.hdf5")
        ...     _ = path.write_text("no HDF5")
        ...     try:
        ...         with open_hdf5(path):
        ...             pass
        ...     except ValueError as error:
        ...         print(str(error).partition("a.hdf5 ")[2].partition(" (")[0])
        is not a readable HDF5 file
    """
    try:
        with h5py.File(path, "r", locking=False) as file:
            yield file
    except UnsupportedFileError:
        raise
    # The exceptions that h5py raises for a damaged file, and OSErrors of the system.
    except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, OSError) and error.errno:
            raise cannot_read(path, error) from error
        reason = " ".join(str(error).split())
        raise UnsupportedFileError(
            f"{path} is not a readable HDF5 file ({reason}): recreate it or download it again."
        ) from error


def get_local_array(file: h5py.File, key: str) -> h5py.Dataset | None:
    """Look up an array that is stored in the file itself, without following any links.

    Args:
        file: an open HDF5 file.
        key: path of the array inside the file, e.g. ``"infos/qpos"``.

    Returns:
        The array, or ``None`` if the key does not exist.

    Raises:
        ValueError: when the key is a link, its data are stored in another file, or it is not an
            array.
    """
    name, location, item = str(file.filename), "", file
    for part in key.split("/"):
        location = f"{location}/{part}".lstrip("/")
        if not isinstance(item, h5py.Group):
            return None
        link = item.get(part, getlink=True)
        if link is None:
            return None
        if not isinstance(link, h5py.HardLink):
            raise _link_error(name, key, f"{location} is a link ({type(link).__name__})")
        item = item[part]
    if not isinstance(item, h5py.Dataset):
        raise UnsupportedFileError(
            f"{name}: {key} is not an array; store an array under this key or remove the key."
        )
    if item.is_virtual or item.external:
        raise _link_error(name, key, f"{key} stores its values in other files")
    return item


def get_named_arrays(file: h5py.File, name: str) -> list[h5py.Dataset]:
    """Look up an array under all its common names.

    Args:
        file: an open HDF5 file.
        name: one of :data:`NAMES`.

    Returns:
        The arrays that the file has under any of the names.

    Raises:
        ValueError: for the reasons of :func:`get_local_array`. Groups of observations or under
            names that are not D4RL's, and links that give an array a second name, are left out
            instead.
    """
    keys = [key for key in NAMES[name] if _may_be_array(file, key)]
    return [array for key in keys if (array := get_local_array(file, key)) is not None]


def is_group(file: h5py.File, key: str) -> bool:
    """Whether a key is a group that is stored in the file itself.

    Args:
        file: an open HDF5 file.
        key: path of the group inside the file.
    """
    try:
        hard = isinstance(file.get(key, getlink=True), h5py.HardLink)
    except KeyError:  # a part of the path is an array
        return False
    return hard and isinstance(file[key], h5py.Group)


def _may_be_array(file: h5py.File, key: str) -> bool:
    """Whether a key is D4RL's, or neither a group nor a link to an array under another name."""
    if "/" in key or (key in _D4RL_KEYS and not (key in GROUPS and is_group(file, key))):
        return True
    link = file.get(key, getlink=True)
    if isinstance(link, h5py.SoftLink):
        return link.path.strip("/") not in {name for names in NAMES.values() for name in names}
    return not is_group(file, key)


def _link_error(name: str, key: str, reason: str) -> ValueError:
    return UnsupportedFileError(
        f"{name}: {reason}, and links are not followed; copy the array {key} into the file."
    )


def check_real(array: h5py.Dataset, key: str) -> None:
    """Check that an array holds real numbers or booleans.

    Args:
        array: the array.
        key: its key, for the message.

    Raises:
        ValueError: when it holds anything else, e.g. text.
    """
    if array.dtype.kind not in "biuf":
        raise UnsupportedFileError(
            f"{array.file.filename}: {key} has dtype {array.dtype}; store real numbers or booleans."
        )


def size_in_memory(array: h5py.Dataset, key: str) -> int:
    """Bytes that HDF5 needs to read an array.

    Args:
        array: the array.
        key: its key, for the message.

    Raises:
        ValueError: when the file stores far too few bytes for it: a small file can declare huge
            arrays, as HDF5 fills unwritten values.
    """
    # HDF5 reads entire chunks, which may be larger than the array.
    size = array.dtype.itemsize * max(array.size or 0, math.prod(array.chunks or (0,)))
    stored = array.id.get_storage_size()
    if size > max(_SMALL, _MAX_COMPRESSION * stored):
        raise UnsupportedFileError(
            f"{array.file.filename}: {key} declares {size / 1e9:.3g} GB (shape {array.shape}) but "
            f"stores only {stored} bytes; the file is incomplete or damaged: recreate it or "
            "download it again."
        )
    return size
