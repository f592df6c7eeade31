"""Observations that are stored as a group of arrays, as of an environment with ``Dict``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import h5py
import numpy as np
from gymnasium.spaces import Box, Dict, Space, flatdim
from numpy.typing import NDArray

from pogo_torchrl.envs.flattening import check_entries, flatten_rows
from pogo_torchrl.hdf5_files import (
    NAMES,
    UnsupportedFileError,
    check_real,
    get_local_array,
    is_group,
)


class _Leaf(NamedTuple):
    """An array in a group, with its space."""

    space: Space[Any]
    array: h5py.Dataset

    def read(self, rows: slice) -> NDArray[Any]:
        values = self.array[rows]
        try:
            return flatten_rows(self.space, values.reshape(len(values), *(self.space.shape or ())))
        except ValueError as error:  # values of a Discrete space
            where = f"{self.array.file.filename}: {self.array.name[1:]}"
            raise UnsupportedFileError(f"{where}: {error}") from error


class GroupedArray:
    """The arrays of a group as the columns of one matrix ``[rows, k]``, which is read in slices.

    Args:
        file: an open HDF5 file.
        key: the group in it.
        space: observation space, whose entries are read in its order. Defaults to all entries,
            sorted by name, as :class:`gymnasium.spaces.Dict` sorts those of a dictionary.

    Raises:
        ValueError: an :class:`UnsupportedFileError`, if an entry is missing, is not in the space,
            is an image, or has another number of rows.

    Example:
        >>> with h5py.File("memory", "w", driver="core", backing_store=False) as file:
        ...     file["obs/velocity"] = np.array([[1.0, 2.0], [3.0, 4.0]])
        ...     file["obs/angle"] = np.array([5.0, 6.0])
        ...     GroupedArray(file, "obs")[:].tolist()
        [[5.0, 1.0, 2.0], [6.0, 3.0, 4.0]]
    """

    def __init__(self, file: h5py.File, key: str, space: Dict | None = None) -> None:
        self.file, self.name = file, f"/{key}"
        self._leaves = list(_leaves(file, key, space, set()))
        if not self._leaves:
            raise UnsupportedFileError(f"{file.filename}: the group {key} is empty; fill it.")
        first = self.parts[0]
        for part in self.parts:
            if len(part) != len(first):
                raise UnsupportedFileError(
                    f"{file.filename}: {first.name[1:]} has {len(first)} rows, but "
                    f"{part.name[1:]} has {len(part)}; store one row per step in each."
                )
        width = sum(flatdim(leaf.space) for leaf in self._leaves)
        self.shape, self.size = (len(first), width), len(first) * width

    @property
    def parts(self) -> list[h5py.Dataset]:
        """The arrays of the group."""
        return [leaf.array for leaf in self._leaves]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        return np.concatenate([leaf.read(rows) for leaf in self._leaves], axis=1)


def find_group(file: h5py.File, name: str, space: Dict | None = None) -> GroupedArray | None:
    """Find a group under any of the common names of an array.

    Args:
        file: an open HDF5 file.
        name: ``"observations"`` or ``"next_observations"``.
        space: see :class:`GroupedArray`, as for what is raised.

    Returns:
        The arrays of the group; ``None`` if there is no such group.
    """
    keys = [key for key in NAMES[name] if is_group(file, key)]
    return GroupedArray(file, keys[0], space) if keys else None


def _leaves(file: h5py.File, key: str, space: Space[Any] | None, seen: set[Any]) -> Iterator[_Leaf]:
    """The arrays below a key, in the order of the space."""
    where = f"{file.filename}: {key}"
    if is_group(file, key):
        address = h5py.h5o.get_info(file[key].id).addr
        if address in seen:
            raise UnsupportedFileError(f"{where} is a group that is stored twice; copy its arrays.")
        seen.add(address)
        if not isinstance(space, Dict | None):
            raise UnsupportedFileError(
                f"{where} is a group, but the environment has {space} there; store an array."
            )
        entries = dict.fromkeys(sorted(file[key])) if space is None else space.spaces
        for name, part in entries.items():
            yield from _leaves(file, f"{key}/{name}", part, seen)
        return
    array = get_local_array(file, key)
    if array is None:
        raise UnsupportedFileError(
            f"{file.filename} lacks {key}, which is part of the environment's observations; add it."
        )
    check_real(array, key)
    shape = array.shape or ()
    if not shape:
        raise UnsupportedFileError(f"{where} is a single value; store one row per step.")
    if space is None:
        is_image = array.dtype == np.uint8 and len(shape) > 2
        space = Box(0, 255, shape[1:], np.uint8 if is_image else np.float64)  # bounds are not used
    try:
        check_entries(space)
    except ValueError as error:
        raise UnsupportedFileError(f"{where}: {error}") from error
    expected = getattr(space, "shape", None)
    if expected is None or math.prod(shape[1:]) != math.prod(expected):
        raise UnsupportedFileError(
            f"{where} has shape {shape}, which does not match {space} of the environment; store "
            "one row per step."
        )
    yield _Leaf(space, array)
