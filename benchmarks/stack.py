"""Stacked runs, compared with single ones: total updates per second.

    python benchmarks/stack.py [--quick] [--threads N] [--device cuda]

Prints a Markdown table: the three-actor chain trained as stacks of R runs (``stack=true`` of a
sweep), and the throughput relative to a single run.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

warnings.filterwarnings("ignore")
logging.disable(logging.INFO)

import torch  # noqa: E402
from common import machine, seconds, table  # noqa: E402
from training import ROWS, pogo_loss, replay_buffer, write_rows  # noqa: E402

from pogo_torchrl import POGOTrainer  # noqa: E402
from pogo_torchrl.trainers import TrainerStack  # noqa: E402


def stack(runs: int, data: Path, device: torch.device, *, compile: bool) -> Callable[[], None]:
    """Make a function that runs one update of a stack of runs."""
    rb, trainers = replay_buffer(data, device), []
    for _ in range(runs):
        loss = pogo_loss(3, device, w2_backend="fast")
        trainers.append(POGOTrainer(loss, rb, 10**9, progress_bar=False))

    def one_stream(_: int) -> AbstractContextManager:
        return nullcontext()

    return TrainerStack(trainers, one_stream, compile=compile).update


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="up to 4 runs, not compiled")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    print(f"{machine()}; {arguments.threads} threads\n")
    sizes = (1, 2, 4) if arguments.quick else (1, 2, 4, 8, 16)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = write_rows(Path(folder, "data.hdf5"), ROWS)
        for compile in (False,) if arguments.quick else (False, True):
            updates = {runs: stack(runs, data, device, compile=compile) for runs in sizes}
            times = {runs: seconds(update, repeats=5) for runs, update in updates.items()}
            for _ in range(4):  # alternating, so that other load affects all alike
                for runs, update in updates.items():
                    times[runs] = min(times[runs], seconds(update, repeats=5, warmup=1))
            for runs in sizes:
                total, alone = runs / times[runs], 1 / times[1]
                mode = "compiled" if compile else "eager"
                rows.append([mode, runs, f"{total:.1f}", f"{total / alone:.2f}"])
    print(table(["", "runs", "updates/s of all", "ratio to one"], rows))


if __name__ == "__main__":
    main()
