"""Convert dictionaries of arrays to D4RL's HDF5 layout: the command ``pogo convert``.

Nothing is unpickled: loading a pickle runs whatever code its author put in.
"""

from __future__ import annotations

import array
import csv
import io
import json
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from pogo_torchrl.data.hdf5 import Dataset, read_open_file, refuse_pickle
from pogo_torchrl.files import atomic_write, cannot_read, cannot_write
from pogo_torchrl.hdf5_files import NAMES, UnsupportedFileError
from pogo_torchrl.machine import physical_memory

Arrays = dict[str, np.ndarray]

_HDF5 = (".hdf5", ".h5")
_MATRICES = ("observations", "actions", "next_observations")
# A column of a matrix in a CSV file: obs_3, obs3, obs.3 or obs[3].
_NUMBERED = re.compile(r"(.*?[^\d_.\[])[_.\[]?(\d+)\]?")
_WORDS = {"true": 1.0, "false": 0.0}


class Converted(NamedTuple):
    """Result of :func:`convert`."""

    path: Path
    """The new file."""

    data: Dataset
    """What is read from it."""


def convert(
    source: str | Path | Mapping[str, Any], output: str | Path, *, max_episode_steps: int = 1000
) -> Converted:
    """Write a dictionary of arrays as a file in D4RL's HDF5 layout, and check that it can be read.

    Common names of arrays (:data:`~pogo_torchrl.hdf5_files.NAMES`) are replaced by D4RL's; other
    arrays are copied as they are, and dictionaries of arrays become groups.

    Args:
        source: arrays by name, or a file of them: ``.npz``, ``.safetensors``, ``.json`` (an object
            of lists) or ``.csv``. A CSV file has one row per transition and a first row of names:
            ``obs_0, obs_1, ..., action_0, ..., reward, terminated, truncated``, and, for
            transitions in any order, ``next_obs_0, ...``.
        output: file to write, ``.hdf5`` or ``.h5``, which must not exist.
        max_episode_steps: see :func:`~pogo_torchrl.data.hdf5.read_hdf5`. Defaults to ``1000``.

    Returns:
        The new file and what is read from it.

    Raises:
        FileNotFoundError: when the source does not exist.
        ValueError: when the source is pickled, of another type or damaged, or its arrays cannot be
            read as a dataset, for the reasons of :func:`~pogo_torchrl.data.hdf5.read_hdf5`.
        OSError: when the source cannot be read, or the output exists or cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     arrays = {"obs": np.arange(8.0).reshape(4, 2), "act": np.zeros((4, 1)),
        ...               "rew": np.ones(4), "terminated": np.array([0, 1, 0, 0]),
        ...               "truncated": np.array([0, 0, 0, 1])}
        ...     np.savez(f"{folder}/log.npz", **arrays)
        ...     path, data = convert(f"{folder}/log.npz", f"{folder}/log.hdf5")
        ...     with h5py.File(path) as file:
        ...         sorted(file)
        ['actions', 'observations', 'rewards', 'terminals', 'timeouts']
        >>> data.episode_returns.tolist()
        [2.0, 2.0]
    """
    output = Path(output).expanduser()
    if output.suffix not in _HDF5:
        raise ValueError(f"output={output} must end in .hdf5, e.g. {output.with_suffix('.hdf5')}.")
    if output.exists():
        raise FileExistsError(f"output={output} exists: delete it, or choose another name.")
    arrays: Mapping[str, Any]
    if isinstance(source, Mapping):
        name, arrays = "the dictionary", source
    else:
        path = Path(source).expanduser()
        name, arrays = str(path), _load(path)
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        for key, values in _rename(_to_arrays(arrays, name)).items():
            try:
                file[key] = values
            except (ValueError, TypeError, OSError, RuntimeError) as error:
                raise UnsupportedFileError(
                    f"{name}: {key!r} is not a name of an array in an HDF5 file; rename it."
                ) from error
    with h5py.File(buffer, "r") as file:
        data = read_open_file(file, Path(name), max_episode_steps)
    try:
        with atomic_write(output) as stream:
            stream.write(buffer.getbuffer())
    except OSError as error:
        raise cannot_write(output.absolute().parent, "output", error) from error
    return Converted(output, data)


def _to_arrays(content: Mapping[str, Any], name: str) -> Arrays:
    arrays: Arrays = {}
    for key, values in content.items():
        if isinstance(values, Mapping):  # a group of arrays
            parts = _to_arrays(values, f"{name}: {key}")
            arrays.update({f"{key}/{part}": array for part, array in parts.items()})
            continue
        try:
            arrays[str(key)] = found = np.asarray(values)
        except (ValueError, TypeError) as error:  # e.g. lists of different lengths
            raise UnsupportedFileError(
                f"{name}: {key} is not an array; store numbers, in rows of equal length."
            ) from error
        if found.dtype.kind not in "biuf":
            raise UnsupportedFileError(
                f"{name}: {key} has dtype {found.dtype}; store real numbers or booleans."
            )
    return arrays


def _rename(arrays: Arrays) -> Arrays:
    """Use D4RL's names; an array that has it already wins."""
    renamed = dict(arrays)
    for name, *aliases in NAMES.values():
        for alias in aliases:
            if name in renamed or alias not in renamed or alias in ("is_last", "is_terminal"):
                continue
            renamed[name] = renamed.pop(alias)
        if name in _MATRICES and name in renamed and renamed[name].ndim == 1:
            renamed[name] = renamed[name][:, None]
    return renamed


def _load(path: Path) -> Mapping[str, Any]:
    """Read a file of arrays without running any of its content."""
    if not path.is_file():
        raise FileNotFoundError(f"input={path} is not a file; give a file of arrays.")
    try:
        with path.open("rb") as file:
            start = file.read(2)
        suffix = path.suffix.lower()
        refuse_pickle(path, always=start[:1] == b"\x80")
        if suffix in _HDF5:
            raise UnsupportedFileError(
                f"{path} is an HDF5 file already: use data.source=hdf5 data.path={path}."
            )
        readers: dict[str, Callable[[Path], Mapping[str, Any]]] = {
            ".npz": _load_npz,
            ".safetensors": load_file,
            ".json": _load_json,
            ".csv": _load_csv,
        }
        if suffix not in readers:
            raise UnsupportedFileError(
                f"{path} is not of a supported type; convert one of {', '.join(readers)}."
            )
        if path.stat().st_size > physical_memory():
            raise MemoryError
        return readers[suffix](path)
    except UnsupportedFileError:
        raise
    except MemoryError as error:
        raise UnsupportedFileError(
            f"{path} needs more memory than this machine has ({physical_memory() / 1e9:.3g} GB); "
            "use a smaller file or a larger machine."
        ) from error
    except (
        ValueError, KeyError, TypeError, EOFError, RuntimeError, OverflowError,
        zipfile.BadZipFile, zlib.error, SafetensorError, csv.Error,
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split())
        raise UnsupportedFileError(
            f"{path} is not a readable {suffix} file of arrays ({reason}): recreate it."
        ) from error
    except OSError as error:
        raise cannot_read(path, error) from error


def _load_npz(path: Path) -> Arrays:
    with zipfile.ZipFile(path) as members:
        if sum(member.file_size for member in members.infolist()) > physical_memory():
            raise MemoryError
    arrays: Arrays = {}
    with np.load(path, allow_pickle=False) as file:
        for key in file.files:
            try:
                arrays[key] = file[key]
            except ValueError as error:
                if "allow_pickle" not in str(error):
                    raise
                raise UnsupportedFileError(
                    f"{path}: {key} is an array of Python objects, which is pickled, and loading "
                    "a pickle can run any code that its author put in: save arrays of numbers "
                    "only, e.g. of equal length."
                ) from error
    return arrays


def _load_json(path: Path) -> Mapping[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not an object of lists")
    return content


def _load_csv(path: Path) -> Arrays:
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.reader(file)
        names = [name.strip() for name in next(rows, [])]
        if not names or len(set(names)) < len(names) or not all(names):
            raise ValueError("the first row must give every column a name of its own")
        values = array.array("d")
        for number, row in enumerate(rows, start=2):
            values.extend(_numbers(row, names, number))
    table = np.frombuffer(values, dtype=np.float64).reshape(-1, len(names))
    groups: dict[str, list[tuple[int, int]]] = {}
    for column, name in enumerate(names):
        match = _NUMBERED.fullmatch(name)
        stem, index = (match[1], int(match[2])) if match else (name, 0)
        groups.setdefault(stem, []).append((index, column))
    arrays: Arrays = {}
    for stem, columns in groups.items():
        order = [index for index, _ in sorted(columns)]
        if order != list(range(order[0], order[0] + len(order))) or order[0] > 1:
            raise ValueError(f"the columns of {stem} are numbered {order}, not from 0 to n-1")
        chosen = table[:, [column for _, column in sorted(columns)]]
        arrays[stem] = chosen if len(columns) > 1 else chosen[:, 0]
    return arrays


def _numbers(row: list[str], names: list[str], number: int) -> Iterator[float]:
    if len(row) != len(names):
        raise ValueError(f"row {number} has {len(row)} values, but there are {len(names)} columns")
    for name, text in zip(names, row):
        word = text.strip().lower()
        try:
            yield _WORDS[word] if word in _WORDS else float(word)
        except ValueError:
            raise ValueError(
                f"row {number} has {name}={text!r}, which is not a number; remove the column if "
                "it is not needed"
            ) from None
