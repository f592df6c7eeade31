"""``pogo_offline.py`` as a sweep starts it: it stops when the sweep that started it is gone."""

from __future__ import annotations

import os
import signal
import threading

from pogo_torchrl.main import main


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


if __name__ == "__main__":
    stop_with_parent()
    main()
