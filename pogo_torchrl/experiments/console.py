"""What a run prints, on the screen and in ``train.log``."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

LOGGER = logging.getLogger("pogo_torchrl")


def exit_with_error(error: Exception, exit_code: int = 2) -> NoReturn:
    """End the process after one line on stderr."""
    sentence = " ".join(line.strip() for line in str(error).splitlines())
    print(f"pogo: {sentence}", file=sys.stderr)
    sys.exit(exit_code)


class ConsoleHandler(logging.StreamHandler):
    """Prints to stdout without tearing the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


class TrainLogHandler(logging.FileHandler):
    """What the screen shows, with the time; no run is lost for it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, delay=True)
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s"))

    def handleError(self, record: logging.LogRecord) -> None:
        """A full disk is reported by the files that count."""


@contextmanager
def log_to(handler: logging.Handler) -> Iterator[None]:
    LOGGER.setLevel(logging.INFO)
    LOGGER.addHandler(handler)
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        handler.close()
