"""Command ``pogo train``: a single run."""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import hydra
import torch
from omegaconf import DictConfig

from pogo_torchrl.experiments.console import exit_with_error
from pogo_torchrl.experiments.multirun import FailedJobs, with_variant, without_files
from pogo_torchrl.experiments.overrides import check_overrides, from_flags
from pogo_torchrl.experiments.own_task import resolve_task
from pogo_torchrl.experiments.run import run
from pogo_torchrl.experiments.signals import Interrupted, Stopped
from pogo_torchrl.experiments.typed_text import keep_text
from pogo_torchrl.trainers.hooks import DivergenceError, EvaluationError

_FAILED = FailedJobs()


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn the errors of a training run into one-line messages and exit codes."""
    try:
        yield
    except Stopped as stop:
        print(stop, file=sys.stderr)
        sys.exit(stop.exit_code)
    except DivergenceError as error:
        exit_with_error(error, exit_code=3)
    except EvaluationError as error:
        traceback.print_exception(error.__cause__)  # it may come from a user's environment
        exit_with_error(error, exit_code=1)
    except (ValueError, OSError, ImportError) as error:
        exit_with_error(error)
    except (MemoryError, torch.OutOfMemoryError) as error:
        exit_with_error(
            MemoryError(
                f"out of memory ({error}): reduce batch_size, num_samples, hidden_sizes or the "
                "number of w2_weights, or use less data."
            )
        )
    except KeyboardInterrupt:
        exit_with_error(KeyboardInterrupt("stopped immediately"), 128 + signal.SIGINT)
    except Interrupted as stop:
        again = ValueError(f"{stop} before the first update; the same command starts again.")
        exit_with_error(again, stop.exit_code)


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def _hydra_main(cfg: DictConfig) -> None:
    with _FAILED.collected(), exit_codes():
        run(cfg)


def main(arguments: Sequence[str]) -> None:
    """Run ``pogo train``.

    Exit codes: 1 if an evaluation failed, 2 for invalid input or files that cannot be read or
    written, 3 if training diverged, each with a one-line message; 128 + signal number if stopped by
    a signal. With ``--multirun``, a run that fails does not keep the others from
    running, and the exit code is 1 if any has failed.

    Args:
        arguments: options of :class:`~pogo_torchrl.experiments.config.RunConfig` as
            ``option=value`` or ``--option value``, and Hydra's own flags.
    """
    try:
        arguments = resolve_task(from_flags(arguments), check_overrides)
        check_overrides(arguments)
        arguments = with_variant(keep_text(arguments))
    except ValueError as error:
        exit_with_error(error)
    with without_files(arguments) as arguments:
        sys.argv = ["pogo train", *arguments]  # Hydra reads them from here
        _hydra_main()
    _FAILED.report()
