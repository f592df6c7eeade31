"""Command ``pogo`` (or ``python -m pogo_torchrl``): training, sweeps, evaluation and reports."""

from __future__ import annotations

import difflib
import importlib.metadata
import os
import platform
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pogo_torchrl.screen import prepare_streams, protect_screen

# Commands import their dependencies when called, so that e.g. --version does not load Hydra.

_HELP = """\
POGO: policy optimization as a gradient flow in offline RL.

  pogo train                              train a chain on hopper-medium, in minutes on a laptop
  pogo train task=walker2d-medium-v2      train on another task; `pogo train --help` lists all
  pogo train data.source=hdf5 data.path=FILE
                                          train on your own data, in D4RL's layout
  pogo evaluate POLICY.safetensors        score a trained chain; video=FILE.mp4 records a video
  pogo rank RUN_FOLDER                    which actor to deploy, from the data alone
  pogo finetune RUN_FOLDER                continue the training in the environment
  pogo sweep sweep=FILE                   many tasks, weights and seeds, locally or on Slurm
  pogo report                             tables and figures over all runs in logs/
  pogo convert FILE.npz FILE.hdf5         convert your data: .npz, .csv, .json or .safetensors
  pogo check-dataset FILE.hdf5            check a dataset against the physics of the environment

Write options as option=value or --option value. `pogo COMMAND --help` lists the options of a
command, `pogo --version` prints versions and devices.
"""


def _train(arguments: Sequence[str]) -> None:
    from pogo_torchrl.experiments.train import main

    main(arguments)


def _sweep(arguments: Sequence[str]) -> None:
    from pogo_torchrl.experiments.sweep import main

    main(arguments)


def _evaluate(arguments: Sequence[str]) -> None:
    from pogo_torchrl.experiments.evaluate import main

    main(arguments)


def _rank(arguments: Sequence[str]) -> None:
    from pogo_torchrl.experiments.rank import main

    main(arguments)


def _finetune(arguments: Sequence[str]) -> None:
    from pogo_torchrl.experiments.finetune import main

    main(arguments)


def _report(arguments: Sequence[str]) -> None:
    from pogo_torchrl.experiments.config import option, option_lines, options
    from pogo_torchrl.experiments.overrides import parse_options, wants_help
    from pogo_torchrl.report import write_report

    @dataclass
    class ReportConfig:
        log_dir: str = option(
            "logs", "folder that contains the runs; `log_dir=` may be omitted", path=True
        )
        results_dir: str = option("results", "folder to write the report to", path=True)

    if wants_help(arguments):
        print("Write tables, figures and a summary of all runs, finished or not.\n")
        print("  pogo report [FOLDER] [option=value ...]\n\nOptions:")
        print("\n".join(option_lines(options(ReportConfig))))
        return
    cfg = parse_options(arguments, ReportConfig(), "log_dir")
    print(f"Report: {write_report(cfg.log_dir, cfg.results_dir)}")


def _check_dataset(arguments: Sequence[str]) -> None:
    from pogo_torchrl.envs.dataset_check import DEFAULT_LIMIT, check, format_report, read_rows
    from pogo_torchrl.experiments.config import option, option_lines, options
    from pogo_torchrl.experiments.overrides import parse_options, wants_help

    @dataclass
    class CheckConfig:
        file: str | None = option(
            None, "HDF5 file in D4RL's layout with infos/qpos; `file=` may be omitted", path=True
        )
        task: str | None = option(None, "D4RL task name; null: inferred from the file")
        limit: int = option(DEFAULT_LIMIT, "number of rows to check, evenly spaced over the file")

    if wants_help(arguments):
        print("Step the recorded actions from the recorded states and compare with the next rows.")
        print("Exit code: 0 if they match, 1 if not, 2 if the file cannot be checked.\n")
        print("  pogo check-dataset FILE [option=value ...]\n\nOptions:")
        print("\n".join(option_lines(options(CheckConfig))))
        return
    cfg = parse_options(arguments, CheckConfig(), "file")
    if cfg.file is None:
        raise ValueError("file is missing: write pogo check-dataset FILE.hdf5.")
    report = check(read_rows(cfg.file, cfg.limit), cfg.task)
    print(format_report(report))
    sys.exit(0 if report.matches else 1)


def _convert(arguments: Sequence[str]) -> None:
    from pogo_torchrl.data import convert
    from pogo_torchrl.experiments.config import option, option_lines, options
    from pogo_torchrl.experiments.overrides import parse_options, wants_help

    @dataclass
    class ConvertConfig:
        input: str | None = option(
            None,
            "file of arrays: .npz, .csv, .json or .safetensors; `input=` may be omitted",
            path=True,
        )
        output: str | None = option(None, "HDF5 file to write; `output=` may be omitted", path=True)
        max_episode_steps: int = option(
            1000, "horizon of the task, for data that tell neither time-outs nor next observations"
        )

    if wants_help(arguments):
        print("Convert a file of arrays to D4RL's HDF5 layout, for data.source=hdf5.\n")
        print("  pogo convert INPUT OUTPUT.hdf5 [option=value ...]\n\nOptions:")
        print("\n".join(option_lines(options(ConvertConfig))))
        return
    cfg = parse_options(arguments, ConvertConfig(), "input", "output")
    if cfg.input is None or cfg.output is None:
        raise ValueError("a file is missing: write pogo convert INPUT OUTPUT.hdf5.")
    path, data = convert(cfg.input, cfg.output, max_episode_steps=cfg.max_episode_steps)
    rows, episodes = data.transitions, len(data.episode_returns)
    print(
        f"{path}: {len(rows)} transitions{f', {episodes} episodes' if episodes else ''}; "
        f"observations of size {rows['observation'].shape[-1]}, actions of size "
        f"{rows['action'].shape[-1]}; use data.source=hdf5 data.path={path}"
    )


_COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": _train,
    "evaluate": _evaluate,
    "rank": _rank,
    "finetune": _finetune,
    "sweep": _sweep,
    "report": _report,
    "check-dataset": _check_dataset,
    "convert": _convert,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command of the command line.

    Exits with the command's exit code; with 2 and a one-line message if the command is unknown, or
    for invalid input and files that cannot be read or written; with 128 + signal number if stopped.

    Args:
        arguments: name of the command, followed by its arguments. Defaults to ``sys.argv[1:]``.
    """
    prepare_streams()
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("-h", "--help", "help"):
        print(_HELP, end="")
    elif command == "--version":
        print(versions())
    elif command in _COMMANDS:
        _run(_COMMANDS[command], rest)
    else:
        near = difflib.get_close_matches(command, _COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(_COMMANDS)}."
        if "=" in command:
            hint = f"did you mean pogo train {command}?"
        print(f"pogo: unknown command {command!r}; {hint} (pogo --help)", file=sys.stderr)
        sys.exit(2)


def _run(command: Callable[[Sequence[str]], None], arguments: Sequence[str]) -> None:
    """Run a command, and exit with one line where it fails for a reason that a user can fix."""
    from pogo_torchrl.experiments.console import exit_with_error
    from pogo_torchrl.experiments.signals import Interrupted, interruptible

    if {"-h", "--help"}.isdisjoint(
        arguments
    ):  # the exit code is that of the work, not of its output
        protect_screen()
    try:
        with interruptible():
            command(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has gone, as in `pogo train --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + getattr(signal, "SIGPIPE", 13))
    except KeyboardInterrupt:
        exit_with_error(KeyboardInterrupt("stopped immediately"), 128 + signal.SIGINT)
    except Interrupted as stop:
        exit_with_error(stop, stop.exit_code)
    except (ValueError, OSError, ImportError) as error:
        exit_with_error(error)


def versions() -> str:
    """Versions of the package and its dependencies, and the devices available to torch."""
    import torch

    names = ("pogo_torchrl", "torch", "torchrl", "tensordict", "geomloss", "gymnasium", "mujoco")
    found = {name: _version(name) for name in names}
    found["torch"] = str(torch.__version__)  # names the CUDA build, too
    lines = [f"{name} {version}" for name, version in found.items()]
    lines.append(f"Python {platform.python_version()} on {platform.platform()}")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    lines.append(
        f"Devices: cpu ({torch.get_num_threads()} threads)" + "".join(f", {g}" for g in gpus)
    )
    return "\n".join(lines)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # trained actors need torch and tensordict only
        return "is not installed"
