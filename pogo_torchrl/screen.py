"""The screen, which is expendable: losing it never ends the work whose progress it shows."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

# What a stream raises if it is closed, full or missing, or if a signal handler writes to it while
# the program does.
_ERRORS = (OSError, ValueError, RuntimeError, AttributeError)


class ExpendableStream:
    r"""Text stream whose errors are ignored, from a closed pipe to a full disk.

    Characters that the encoding of the stream lacks are written as escapes.

    Args:
        stream: the stream to write to, e.g. ``sys.stdout``; ``None``: there is none.

    Example:
        >>> import io
        >>> file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        >>> print("20 °C", file=ExpendableStream(file), flush=True)
        >>> file.buffer.getvalue()
        b'20 \\xb0C\n'
        >>> file.close()
        >>> print("lost", file=ExpendableStream(file), flush=True)
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    @classmethod
    def of(cls, stream: Any) -> ExpendableStream:
        """Return the stream itself if it is expendable, or one that writes to it."""
        return stream if isinstance(stream, cls) else cls(stream)

    def write(self, text: str) -> int:
        """Write text, if that is possible."""
        with suppress(*_ERRORS):
            try:
                self.stream.write(text)
            except UnicodeEncodeError as error:
                encoded = text.encode(error.encoding, "backslashreplace")
                self.stream.write(encoded.decode(error.encoding))
        return len(text)

    def flush(self) -> None:
        """Flush the stream, if that is possible."""
        with suppress(*_ERRORS):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def expendable_screen() -> Iterator[None]:
    """Make ``sys.stdout`` and ``sys.stderr`` expendable within a ``with`` block."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(ExpendableStream.of, before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def protect_screen() -> None:
    """Make ``sys.stdout`` and ``sys.stderr`` expendable until the process ends."""
    sys.stdout, sys.stderr = map(ExpendableStream.of, (sys.stdout, sys.stderr))


def prepare_streams() -> None:
    """Make stdin, stdout and stderr usable at the start of a program.

    Where they have been closed, the null device takes their place; otherwise the next file that is
    opened would, and would receive what libraries print. Characters that the encoding of the screen
    lacks are written as escapes.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest that is free
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
