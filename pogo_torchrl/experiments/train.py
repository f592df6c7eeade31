"""The command line of one run."""

from __future__ import annotations

import signal
import sys
import traceback
from typing import NoReturn

import hydra
import torch
from omegaconf import DictConfig

from pogo_torchrl.experiments.overrides import check_overrides
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
        refuse(error, exit_code=3)
    except EvaluationError as error:
        traceback.print_exception(error.__cause__)  # the environment may be the user's own
        refuse(error, exit_code=1)
    except (ValueError, OSError, ImportError) as error:
        refuse(error)
    except (MemoryError, torch.OutOfMemoryError) as error:
        refuse(
            MemoryError(
                f"out of memory ({error}): lower batch_size, num_samples, hidden_sizes or the "
                "number of w2_weights, or use less data."
            )
        )
    except KeyboardInterrupt:
        print("pogo: stopped at once", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def refuse(error: Exception, exit_code: int = 2) -> NoReturn:
    """End the process with one line."""
    sentence = " ".join(line.strip() for line in str(error).splitlines())
    print(f"pogo: {sentence}", file=sys.stderr)
    sys.exit(exit_code)


def main() -> None:
    """Command line.

    Exit codes: 1 where an evaluation has failed, 2 for bad input and files that cannot be read or
    written, 3 where training has diverged, each after one sentence; 128 + signal when stopped.
    """
    try:
        check_overrides(sys.argv[1:])
    except ValueError as error:
        refuse(error)
    _hydra_main()
