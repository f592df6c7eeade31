"""Signal handling: runs save a checkpoint before they stop."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from pogo_torchrl.experiments.console import LOGGER


class Stoppable(Protocol):
    """Interface of a run that a signal can stop."""

    def stop(self, name: str) -> None:
        """Save a checkpoint and stop as soon as possible; ``name`` is the name of the signal."""


class Stopped(Exception):
    """Raised when a signal ended the training before the last update.

    Args:
        step: number of completed updates.
        reason: name of the signal; ``None``: SIGINT.
    """

    def __init__(self, step: int, reason: str | None) -> None:
        super().__init__(f"Stopped at update {step}; continue with resume=true.")
        self.exit_code = 128 + signal.Signals[reason or "SIGINT"]


@contextmanager
def on_signals(handler: Callable[[int], None]) -> Iterator[dict[int, Any]]:
    """Handle SIGINT, SIGTERM and SIGUSR1 within a ``with`` block.

    Outside the main thread, where Python cannot handle signals, they are left alone.

    Args:
        handler: called with the signal number.

    Returns:
        Context manager that yields the previous handlers by signal number, and restores them.
    """
    names = ("SIGINT", "SIGTERM", "SIGUSR1")  # Windows has no SIGUSR1
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    previous = {
        int(number): signal.signal(number, lambda number, frame: handler(number))
        for number in numbers
    }
    try:
        yield previous
    finally:
        for number, old_handler in previous.items():
            signal.signal(number, old_handler)


@contextmanager
def stop_on_signals(runs: Sequence[Stoppable]) -> Iterator[None]:
    """Save and stop the runs on the first signal, and stop immediately on a second one.

    Slurm sends SIGUSR1 before the time limit of a job (``--signal=USR1@60``). It signals every
    process of the job, and parent processes may forward the signal as well. Therefore signals with
    the same number within one second count as one.

    Args:
        runs: the runs to stop.
    """
    received: dict[int, float] = {}

    def handler(number: int) -> None:
        if number in received:
            if time.monotonic() - received[number] >= 1:
                signal.signal(number, previous[number])
                signal.raise_signal(number)
            return
        received[number] = time.monotonic()
        name = signal.Signals(number).name
        LOGGER.warning(
            "%s: saving a checkpoint, then stopping (send the signal again to stop immediately).",
            name,
        )
        for one in runs:
            one.stop(name)

    with on_signals(handler) as previous:
        try:
            yield
        finally:
            for moment in received.values():  # absorb repetitions of the same signal
                time.sleep(max(moment + 1 - time.monotonic(), 0))
