"""Signal handling: runs save a checkpoint before they stop."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from pogo_torchrl.experiments.console import LOGGER


class Stoppable(Protocol):
    """Interface of a run that a signal can stop."""

    def has_updates(self) -> bool:
        """Whether the run has made updates since it was started or resumed."""

    def stop(self, name: str) -> None:
        """Save a checkpoint and stop as soon as possible; ``name`` is the name of the signal."""


class Interrupted(BaseException):
    """Raised when a signal ends work that has nothing to save, such as a download, or a sweep.

    Args:
        number: the signal number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.exit_code - 128).name}"


class Stopped(Exception):
    """Raised when a signal ended the training before the last update.

    Args:
        step: number of completed updates.
        reason: name of the signal; ``None``: SIGINT.
    """

    def __init__(self, step: int, reason: str | None) -> None:
        super().__init__(f"Stopped at update {step}; continue with resume=true.")
        self.exit_code = 128 + signal.Signals[reason or "SIGINT"]


SIGNALS = tuple(
    int(getattr(signal, name))
    for name in ("SIGHUP", "SIGINT", "SIGTERM", "SIGUSR1")
    if hasattr(signal, name)  # Windows has no SIGHUP and no SIGUSR1
)
"""Signals that stop a run or a sweep."""


class _Handler:
    """Handler of a signal, which remembers the one before it."""

    def __init__(self, handler: Callable[[int], None], before: Any) -> None:
        self.handler, self.before = handler, before

    def __call__(self, number: int, frame: Any) -> None:
        self.handler(number)

    @property
    def outermost(self) -> Any:
        """The handler of the program, or the system's action, before any handler of this class."""
        return self.before.outermost if isinstance(self.before, _Handler) else self.before


@contextmanager
def on_signals(handler: Callable[[int], None]) -> Iterator[dict[int, Any]]:
    """Handle :data:`SIGNALS` within a ``with`` block.

    SIGHUP stays ignored if it is, as under ``nohup``. Outside the main thread, where Python cannot
    handle signals, all are left alone.

    Args:
        handler: called with the signal number.

    Returns:
        Context manager that yields the handlers of the program by signal number, and restores the
        previous ones.
    """
    installed: dict[int, _Handler] = {}
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            before = signal.getsignal(number)
            if before == signal.SIG_IGN and signal.Signals(number).name == "SIGHUP":
                continue
            installed[number] = _Handler(handler, before)
            signal.signal(number, installed[number])
    try:
        yield {number: own.outermost for number, own in installed.items()}
    finally:
        for number, own in installed.items():
            signal.signal(number, own.before)


@contextmanager
def interruptible() -> Iterator[None]:
    """Stop at once on a signal, within a ``with`` block in which there is nothing to save.

    Repetitions of the signal within a second do not disturb the removal of partial files.

    Raises:
        Interrupted: on a signal.
    """
    received: dict[int, float] = {}

    def handler(number: int) -> None:
        now = time.monotonic()
        if now - received.get(number, -math.inf) >= 1:
            received[number] = now
            raise Interrupted(number)

    with on_signals(handler):
        yield


@contextmanager
def stop_on_signals(runs: Sequence[Stoppable]) -> Iterator[None]:
    """Save and stop the runs on the first signal, and stop immediately on a second one.

    Before the first update, e.g. while it is compiled, there is nothing to save, and the first
    signal stops immediately.

    Slurm sends SIGUSR1 before the time limit of a job (``--signal=USR1@60``). It signals every
    process of the job, and parent processes may forward the signal as well. Therefore signals with
    the same number within one second count as one.

    Args:
        runs: the runs to stop.

    Raises:
        Interrupted: on a signal before the first update.
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
        worth_saving = any(one.has_updates() for one in runs)
        if worth_saving:
            LOGGER.warning(
                "%s: saving a checkpoint, then stopping (send the signal again to stop "
                "immediately).",
                name,
            )
        for one in runs:
            one.stop(name)
        if not worth_saving:
            raise Interrupted(number)

    with on_signals(handler) as previous:
        try:
            yield
        finally:
            for moment in received.values():  # absorb repetitions of the same signal
                time.sleep(max(moment + 1 - time.monotonic(), 0))
