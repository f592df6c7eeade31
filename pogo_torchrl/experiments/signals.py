"""Signals that stop a run, so that it saves first."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from pogo_torchrl.experiments.console import LOGGER


class Stoppable(Protocol):
    """What a signal stops: a run."""

    def stop(self, name: str) -> None:
        """Save and stop as soon as possible; ``name`` is the signal's."""


class Stopped(Exception):
    """A signal ended the training before its last update."""

    def __init__(self, step: int, reason: str | None) -> None:
        super().__init__(f"Stopped at update {step}; resume=true continues from there.")
        self.exit_code = 128 + signal.Signals[reason or "SIGINT"]


@contextmanager
def on_signals(handler: Callable[[int], None]) -> Iterator[dict[int, Any]]:
    """Have SIGINT, SIGTERM and SIGUSR1 call ``handler`` with their number.

    The context gives what they called before, by number.
    """
    before = {
        int(number): signal.signal(number, lambda number, frame: handler(number))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    }
    try:
        yield before
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


@contextmanager
def stop_on_signals(runs: Sequence[Stoppable]) -> Iterator[None]:
    """First signal: save and stop after the current updates; the second acts at once.

    SIGUSR1 is what Slurm sends ahead of the end of a job's time (``--signal=USR1@60``). It signals
    every process of a job, and those that started this one may pass it on: within a second of the
    first, a signal is the same one.
    """
    asked: dict[int, float] = {}

    def handler(number: int) -> None:
        if number in asked:
            if time.monotonic() - asked[number] >= 1:
                signal.signal(number, before[number])
                signal.raise_signal(number)
            return
        asked[number] = time.monotonic()
        name = signal.Signals(number).name
        LOGGER.warning("%s: saving a checkpoint, then stopping (once more stops at once).", name)
        for one in runs:
            one.stop(name)

    with on_signals(handler) as before:
        try:
            yield
        finally:
            for moment in asked.values():  # the same signal may come once more
                time.sleep(max(moment + 1 - time.monotonic(), 0))
