"""Worker process of a sweep: trains one run or a stack, and stops if the sweep dies."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading

from pogo_torchrl.experiments.jobs import STACK
from pogo_torchrl.experiments.overrides import compose
from pogo_torchrl.experiments.run_stack import run_stack
from pogo_torchrl.experiments.signals import Interrupted, Stopped, interruptible
from pogo_torchrl.experiments.sweep_file import Run
from pogo_torchrl.experiments.train import main
from pogo_torchrl.screen import protect_screen


def stop_with_parent() -> None:
    """Save and stop, as on SIGTERM, when the parent process dies.

    The parent holds the other end of stdin, which the operating system closes however the parent
    ends, including ``kill -9``.
    """

    def wait() -> None:
        # Not through sys.stdin, whose lock would then be held at interpreter shutdown.
        while os.read(0, 1024):
            pass
        if sys.platform == "win32":
            signal.raise_signal(signal.SIGTERM)  # os.kill would end the process at once
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def stack(arguments: str) -> int:
    """Train a stack of runs.

    Args:
        arguments: JSON list with the options of ``pogo train`` for each run.

    Returns:
        The exit code: 0 if all runs are complete, otherwise that of the first incomplete run.
    """
    runs = [Run(tuple(own), compose(own)) for own in json.loads(arguments)]
    try:
        errors = run_stack([run.cfg for run in runs])
    except Interrupted as stop:
        print(f"pogo: {stop}", file=sys.stderr)
        return stop.exit_code
    for run, error in zip(runs, errors):
        if error is not None:
            print(f"pogo: {run.name}: {' '.join(str(error).split())}", file=sys.stderr)
    first = next((error for error in errors if error is not None), None)
    if first is None:
        return 0
    return first.exit_code if isinstance(first, Stopped) else 1


if __name__ == "__main__":
    protect_screen()
    stop_with_parent()
    with interruptible():
        if sys.argv[1:2] == [STACK]:
            sys.exit(stack(sys.argv[2]))
        main(sys.argv[1:])
