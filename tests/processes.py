"""Processes of the command ``pogo`` that start at once: an import of PyTorch takes seconds.

They are forked from a server that has imported what the command needs, and are processes like
others: with their own signals, exit codes, output and working folder. What a new interpreter does,
from its start to the imports, is tested with ``subprocess``.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["mujoco", "hydra.main", *(f"pogo_torchrl.experiments.{name}" for name in ("sweep", "train"))]
)


def _pogo(folder: str, arguments: tuple[str, ...], env: dict[str, str], files: list[str]) -> None:
    """The command in a forked process: output, environment and folder are those of a new one."""
    os.setsid()
    for stream, file in zip((sys.stdout, sys.stderr), files):
        with open(file, "w") as opened:
            os.dup2(opened.fileno(), stream.fileno())
    os.chdir(folder)
    sys.path += [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    os.environ.clear()
    os.environ.update(env)

    from pogo_torchrl.cli import main

    main(arguments)


class Pogo:
    """A running command ``pogo``, with what ``subprocess.Popen`` offers.

    Args:
        folder: where it runs, in a session of its own.
        arguments: of the command line.
        env: environment variables. Defaults to those of this process.
    """

    def __init__(self, folder: Path, *arguments: str, env: dict[str, str] | None = None) -> None:
        self.args = arguments
        files = [tempfile.NamedTemporaryFile() for _ in range(2)]  # noqa: SIM115
        self.stdout, self.stderr = files
        names = [file.name for file in files]
        environment = dict(os.environ if env is None else env)
        self.process = FORKS.Process(
            target=_pogo, args=(str(folder), arguments, environment, names)
        )
        self.process.start()
        atexit.register(self.process.kill)  # otherwise this process would wait for it at its end
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """Wait for the end; returns all output and all errors."""
        self.process.join(timeout)
        if self.poll() is None:
            self.kill()
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.output(), Path(self.stderr.name).read_text()

    def output(self) -> str:
        """What it has printed so far."""
        return Path(self.stdout.name).read_text()


def pogo(folder: Path, *arguments: str, env: dict[str, str] | None = None):
    """Run the command to its end, like ``subprocess.run``."""
    process = Pogo(folder, *arguments, env=env)
    out, err = process.communicate()
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)
