"""Atomic writes, checksums, and the cache folder of downloads and generated data."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal

# Errors of file systems, such as those of networks, that cannot flush folders.
_CANNOT_FLUSH = {errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.ENOSYS}


@contextmanager
def atomic_write(path: Path, mode: Literal["xb", "x"] = "xb", **options: Any) -> Iterator[IO[Any]]:
    """Open a file for writing; it replaces ``path`` once it is complete and flushed to disk.

    Args:
        path: the file, which may already exist; its folder must exist.
        mode: ``"xb"`` (bytes) or ``"x"`` (text, UTF-8). Defaults to ``"xb"``.
        **options: passed to :func:`open`.

    Raises:
        OSError: if the file cannot be written; an existing file is then unchanged.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "a.txt")
        ...     with atomic_write(path, "x") as file:
        ...         _ = file.write("complete")
        ...         path.exists()
        ...     path.read_text(), len(list(Path(folder).iterdir()))
        False
        ('complete', 1)
    """
    temporary = path.with_name(f".{path.name}.{_writer()}.{uuid.uuid4().hex[:8]}.tmp")
    if mode == "x":
        options = {"encoding": "utf-8", **options}  # not that of the user's settings
    try:
        with open(temporary, mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _writer(process: int | None = None) -> str:
    """Part of the names of partial files: the machine and the process that writes them."""
    machine = socket.gethostname()
    with suppress(OSError):  # containers of one machine may count their processes separately
        machine += os.readlink("/proc/self/ns/pid")
    machine = hashlib.sha256(machine.encode()).hexdigest()[:8]
    return f"{machine}-{os.getpid() if process is None else process}"


def remove_partial(folder: Path) -> None:
    """Remove files of :func:`atomic_write` that processes on this machine left when killed.

    Args:
        folder: the folder of the files.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     own, other = (Path(folder, f".a.{_writer(i)}.0.tmp") for i in (None, 2**30))
        ...     own.touch(), other.touch()
        ...     remove_partial(Path(folder))
        ...     own.exists(), other.exists()
        (None, None)
        (True, False)
    """
    for file in folder.glob(".*.tmp"):
        found = re.search(r"\.([0-9a-f]{8}-(\d+))\.[0-9a-f]+\.tmp$", file.name)
        if found and found[1] == _writer(int(found[2])) and not _is_alive(int(found[2])):
            with suppress(OSError):
                file.unlink()


def _is_alive(process: int) -> bool:
    """Whether a process of this machine exists; on Windows, where no signal asks, it may."""
    if os.name == "nt":
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it belongs to another user
        return True
    return True


def sync(path: Path) -> None:
    """Flush a file to disk, or a folder, on systems that can."""
    try:
        # Windows flushes only files that are open for writing, and does not open folders.
        descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    except PermissionError:
        if path.is_dir():
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in _CANNOT_FLUSH:
            raise
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 checksum of a file.

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
    """Return the SHA-256 checksums of all files below a folder, by relative path.

    Args:
        folder: the folder.
        without: name of a file to leave out, e.g. the one that stores the checksums. Defaults to
            ``None``.
    """
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != without)
    return {path.relative_to(folder).as_posix(): sha256(path) for path in files}


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return the cache folder.

    Args:
        cache_dir: the folder. Defaults to ``$XDG_CACHE_HOME/pogo_torchrl`` or, if that variable is
            not set, ``~/.cache/pogo_torchrl``.

    Raises:
        OSError: if the user has no home folder, or no permission to search the cache folder.

    Example:
        >>> cache_folder("data").name
        'data'
    """
    folder = _cache_folder() if cache_dir is None else Path(cache_dir).expanduser()
    with suppress(FileNotFoundError, NotADirectoryError):  # it is made when it is needed
        try:
            os.stat(os.path.join(folder, "."))
        except PermissionError as error:
            raise PermissionError(
                f"the files in {folder} cannot be looked up ({error.strerror}): ask its owner for "
                "permission to search the folder (x), or choose another one with data.cache_dir."
            ) from error
    return folder


def _cache_folder() -> Path:
    # As the XDG specification requires, an empty variable counts as unset.
    try:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:  # e.g. a user of a container without a name
        raise OSError(
            "the folder for downloads and generated data is unknown, because this user has no home "
            "folder: choose one with data.cache_dir, or set HOME or XDG_CACHE_HOME."
        ) from error
    return Path(root) / "pogo_torchrl"


def make_writable(folder: Path, option: str) -> None:
    """Create a folder and check that it is writable, before a long computation writes to it.

    Partial files that killed processes have left there are removed.

    Args:
        folder: the folder.
        option: name of the option that sets the folder, for the message.

    Raises:
        OSError: if the folder cannot be created or is not writable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise cannot_write(folder, option, error) from error
    remove_partial(folder)


def cannot_write(folder: Path, option: str, error: OSError) -> OSError:
    """Return the error to raise if a file cannot be written to ``folder``.

    Args:
        folder: the folder.
        option: name of the option that sets the folder, for the message.
        error: the original error.

    Example:
        >>> print(cannot_write(Path("data"), "data.cache_dir", OSError(28, "No space left")))
        ... # doctest: +NORMALIZE_WHITESPACE
        cannot write to data (No space left): free disk space, or choose another folder with
        data.cache_dir.
    """
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = "free disk space, or choose" if full else "choose"
    return OSError(
        f"cannot write to {folder} ({error.strerror or error}): {remedy} another folder with "
        f"{option}."
    )


def cannot_read(path: Path, error: OSError) -> OSError:
    """Return the error to raise if the system refuses to read a file.

    Args:
        path: the file.
        error: the original error.

    Example:
        >>> print(cannot_read(Path("a.hdf5"), PermissionError(13, "Permission denied")))
        ... # doctest: +NORMALIZE_WHITESPACE
        a.hdf5 cannot be read (Permission denied): ask its owner for permission to read it, or use
        another file.
    """
    reason = os.strerror(error.errno) if error.errno else str(error)
    if isinstance(error, PermissionError):
        return PermissionError(
            f"{path} cannot be read ({reason}): ask its owner for permission to read it, or use "
            "another file."
        )
    return OSError(
        f"{path} cannot be read ({reason}): the file may well be intact, so check the disk or file "
        "system that holds it."
    )
