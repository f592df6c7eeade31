"""Output of a run on the screen and in ``train.log``."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

LOGGER = logging.getLogger("pogo_torchrl")


def exit_with_error(error: BaseException, exit_code: int = 2) -> NoReturn:
    """Print an error as one line on stderr and exit.

    Args:
        error: the error; line breaks in its message become spaces.
        exit_code: exit code of the process. Defaults to ``2``.
    """
    message = " ".join(line.strip() for line in str(error).splitlines())
    if isinstance(error, PermissionError) and error.filename is not None:  # not one of our own
        message = (
            f"no access to {error.filename} ({error.strerror}): ask its owner for permission, or "
            "choose another file or folder."
        )
    print(f"pogo: {message}", file=sys.stderr)
    sys.exit(exit_code)


class ConsoleHandler(logging.StreamHandler):
    """Logging handler that prints to stdout without breaking the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record above the progress bar."""
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


class TrainLogHandler(logging.FileHandler):
    """Logging handler that writes the screen output to a file, with timestamps.

    Errors while writing are ignored, so that they cannot stop a run.

    Args:
        path: the log file; lines are appended.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, delay=True, encoding="utf-8", errors="backslashreplace")
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, if that is possible."""
        with suppress(OSError):  # the file cannot be opened
            super().emit(record)

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):  # lines are left that could not be written
            super().close()

    def handleError(self, record: logging.LogRecord) -> None:
        """Ignore errors: a full disk is reported when checkpoints and CSV files are written."""


@contextmanager
def log_to(handler: logging.Handler) -> Iterator[None]:
    """Attach a handler to the package's logger within a ``with`` block, then close it."""
    LOGGER.setLevel(logging.INFO)
    LOGGER.addHandler(handler)
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        handler.close()
