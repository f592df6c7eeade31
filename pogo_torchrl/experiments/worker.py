"""What a sweep starts: one run, or a stack of them; it stops when that sweep is gone."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading

from pogo_torchrl.experiments.jobs import STACK
from pogo_torchrl.experiments.overrides import compose
from pogo_torchrl.experiments.run import run_stack
from pogo_torchrl.experiments.signals import Stopped
from pogo_torchrl.experiments.sweep_file import Run
from pogo_torchrl.experiments.train import main


def stop_with_parent() -> None:
    """Stop as on SIGTERM, with a checkpoint, once nobody holds the other end of stdin.

    The system closes it however the parent ends, ``kill -9`` included.
    """

    def wait() -> None:
        # Not through sys.stdin, whose lock would be held when the interpreter shuts down.
        while os.read(0, 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def stack(arguments: str) -> int:
    """Train a stack of runs.

    Args:
        arguments: a JSON list of each run's options of ``pogo_offline.py``.

    Returns:
        The exit code: 0 when all have come to their end, else that of the first that has not.
    """
    runs = [Run(tuple(own), compose(own)) for own in json.loads(arguments)]
    errors = run_stack([run.cfg for run in runs])
    for run, error in zip(runs, errors):
        if error is not None:
            print(f"pogo: {run.name}: {' '.join(str(error).split())}", file=sys.stderr)
    first = next((error for error in errors if error is not None), None)
    if first is None:
        return 0
    return first.exit_code if isinstance(first, Stopped) else 1


if __name__ == "__main__":
    stop_with_parent()
    if sys.argv[1:2] == [STACK]:
        sys.exit(stack(sys.argv[2]))
    main(sys.argv[1:])
