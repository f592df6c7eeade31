"""Files that are whole or absent, and the folder that downloads and generated data are kept in."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def atomic_write(path: Path, mode: str = "xb", **options: Any) -> Iterator[IO[Any]]:
    """Open a file for writing that appears under its name only when all of it is on the disk.

    Args:
        path: the file, new or to be replaced; its folder must exist.
        mode: ``"xb"`` (bytes, the default) or ``"x"`` (text).
        options: passed on to :func:`open`.

    Raises:
        OSError: when it cannot be written; what stood under the name before still does.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "a.txt")
        ...     with atomic_write(path, "x") as file:
        ...         _ = file.write("whole")
        ...         path.exists()
        ...     path.read_text(), len(list(Path(folder).iterdir()))
        False
        ('whole', 1)
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "empty")
        ...     path.touch()
        ...     sha256(path)[:8]
        'e3b0c442'
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def digests(folder: Path, *, without: str | None = None) -> dict[str, str]:
    """SHA-256 of all files below a folder, by their relative paths.

    Args:
        folder: the folder.
        without: name of a file to leave out, e.g. of that which holds the digests.
    """
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != without)
    return {path.relative_to(folder).as_posix(): sha256(path) for path in files}


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The folder given, or ``$XDG_CACHE_HOME/pogo_torchrl``, or ``~/.cache/pogo_torchrl``.

    Example:
        >>> cache_folder("data").name
        'data'
    """
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    # As the XDG specification asks for, an empty variable counts as an unset one.
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "pogo_torchrl"


def physical_memory() -> float:
    """Bytes of memory that the machine has; infinite where the system does not tell.

    Example:
        >>> physical_memory() > 1e6
        True
    """
    try:
        return float(os.sysconf("SC_PHYS_PAGES")) * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return float("inf")


def make_writable(folder: Path, option: str) -> None:
    """Make a folder, so that what will be written there does not fail after the work.

    Args:
        folder: the folder.
        option: the option that chooses it, for the message.

    Raises:
        OSError: saying that ``folder`` cannot be written, and what to do.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError("no permission to write")
    except OSError as error:
        raise cannot_write(folder, option, error) from error


def cannot_write(folder: Path, option: str, error: OSError) -> OSError:
    """The error to raise when something cannot be kept in ``folder``."""
    return OSError(
        f"cannot write to {folder} ({error.strerror or error}); free some space there or choose "
        f"another folder with {option}."
    )
