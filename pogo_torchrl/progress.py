"""Progress bars, which become a line per minute where stderr is not a terminal."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

from pogo_torchrl.screen import ExpendableStream

_SECONDS_PER_LINE = 60.0


def progress_bar(**settings: Any) -> tqdm:
    """Return a progress bar on stderr.

    On a terminal or in a notebook, it is drawn in place. In a log file, where each state would stay
    and carriage returns would make one endless line, it is a line at the start, per minute and at
    the end.

    Args:
        **settings: passed to :class:`tqdm.tqdm`.
    """
    stream = sys.stderr
    if stream is None:  # no console at all, as with pythonw on Windows
        return tqdm(**{**settings, "disable": True})
    screen = ExpendableStream.of(stream)
    if _redraws(screen.stream):
        return tqdm(file=screen, **settings)
    times = {"mininterval": _SECONDS_PER_LINE, "maxinterval": _SECONDS_PER_LINE}
    return tqdm(file=_Lines(screen), **times, **settings)


def _redraws(stream: Any) -> bool:
    try:
        return stream.isatty() or type(stream).__module__.startswith("ipykernel")
    except (ValueError, AttributeError):  # it is closed, or there is none
        return False


class _Lines:
    """Stream that writes each state of a progress bar as a line."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        line = text.strip()
        if line:
            self.stream.write(f"{line}\n")

    def flush(self) -> None:
        self.stream.flush()
