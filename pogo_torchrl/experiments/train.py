"""The command ``pogo train``: one run."""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Sequence

import hydra
import torch
from omegaconf import DictConfig

from pogo_torchrl.experiments.console import exit_with_error
from pogo_torchrl.experiments.overrides import check_overrides, from_flags
from pogo_torchrl.experiments.run import run
from pogo_torchrl.experiments.signals import Stopped
from pogo_torchrl.trainers.hooks import DivergenceError, EvaluationError


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def _hydra_main(cfg: DictConfig) -> None:
    try:
        run(cfg)
    except Stopped as stop:
        print(stop, file=sys.stderr)
        sys.exit(stop.exit_code)
    except DivergenceError as error:
        exit_with_error(error, exit_code=3)
    except EvaluationError as error:
        traceback.print_exception(error.__cause__)  # the environment may be the user's own
        exit_with_error(error, exit_code=1)
    except (ValueError, OSError, ImportError) as error:
        exit_with_error(error)
    except (MemoryError, torch.OutOfMemoryError) as error:
        exit_with_error(
            MemoryError(
                f"out of memory ({error}): lower batch_size, num_samples, hidden_sizes or the "
                "number of w2_weights, or use less data."
            )
        )
    except KeyboardInterrupt:
        print("pogo: stopped at once", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def main(arguments: Sequence[str]) -> None:
    """The command ``pogo train``.

    Args:
        arguments: options of :class:`~pogo_torchrl.experiments.config.RunConfig` as
            ``option=value`` or ``--option value``, and Hydra's own flags.

    Exit codes: 1 where an evaluation has failed, 2 for bad input and files that cannot be read or
    written, 3 where training has diverged, each after one sentence; 128 + signal when stopped.
    """
    try:
        arguments = from_flags(arguments)
        check_overrides(arguments)
    except ValueError as error:
        exit_with_error(error)
    sys.argv = ["pogo train", *arguments]  # where Hydra reads them
    _hydra_main()
