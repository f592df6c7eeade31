"""Locks between processes, which also work on file systems without locks."""

from __future__ import annotations

import errno
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

_LOGGER = logging.getLogger(__name__)

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
"""What ``flock`` answers on a file system without locks, e.g. NFS without ``lockd``."""


class Held(Exception):
    """Raised if another process holds a lock; the message says which one, if that is known."""


@contextmanager
def hold(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a lock within a ``with`` block.

    The lock belongs to the operating system, which releases it however the process ends. On a file
    system without locks, a file ``path.held`` with the process ID and the name of the machine takes
    its place; a file that a killed process has left is removed on the same machine only.

    Args:
        path: file of the lock, which is removed at the end; its folder must exist.

    Keyword Args:
        wait: wait for the lock. Defaults to ``False``.

    Raises:
        Held: if another process holds the lock and ``wait`` is ``False``.
        OSError: if the file cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, ".lock")
        ...     with hold(path):
        ...         inside = is_held(path)
        ...     inside, is_held(path), list(Path(folder).iterdir())
        (True, False, [])
    """
    lock = _acquire(path, -1 if wait else 0)
    try:
        yield
    finally:
        with suppress(OSError):  # before another process can acquire it
            path.unlink(missing_ok=True)
        lock.release()


def is_held(path: Path) -> bool:
    """Whether a process holds a lock; a killed process may leave the file of a lock behind.

    Args:
        path: file of the lock.
    """
    if not path.exists() and not _marker(path).exists():
        return False
    try:
        with hold(path):
            return False
    except Held:
        return True


def _acquire(path: Path, timeout: float) -> BaseFileLock:
    marker = _marker(path)
    lock: BaseFileLock = FileLock(path, timeout=timeout)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # recent versions replace locks for ENOSYS themselves
            lock.acquire()
        return lock
    except Timeout:
        raise Held(_holder(path)) from None
    except NotImplementedError as error:  # earlier versions of filelock, for ENOSYS
        reason = str(error)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        reason = str(error.strerror)
    _LOGGER.info("%s cannot be locked (%s): using the file %s instead.", path, reason, marker.name)
    lock = SoftFileLock(marker, timeout=timeout)
    try:
        lock.acquire()
    except Timeout:
        raise Held(_holder(marker)) from None
    return lock


def _marker(path: Path) -> Path:
    """File that takes the place of a lock; not the same one, which ``flock`` may have created."""
    return path.with_name(f"{path.name}.held")


def _holder(file: Path) -> str:
    """The process that a file of :class:`~filelock.SoftFileLock` names, if it does."""
    try:
        process, machine = file.read_text(errors="replace").split("\n")[:2]
    except (OSError, ValueError):
        return ""
    return f" (process {process} on {machine}; if it has ended, delete {file})"
