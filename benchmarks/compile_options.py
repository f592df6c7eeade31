"""Gain of each option of the compiled update: the update without it, alternating with it.

    python benchmarks/compile_options.py [--threads N] [--bf16] [--rounds N]

Prints a Markdown table: time of a three-actor update without the option, relative to the update as
it is. Takes a few minutes, most of them to compile.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
logging.disable(logging.INFO)

import torch  # noqa: E402
from common import machine, table  # noqa: E402
from training import ROWS, pogo_loss, replay_buffer, write_rows  # noqa: E402

from pogo_torchrl.trainers import POGOOptimizationStepper  # noqa: E402

DEFAULTS = {"cpp_wrapper": False, "reorder_for_locality": True}
"""Options of the update, with the values that torch.compile would use."""


def update(data: Path, changes: dict[str, Any], *, bf16: bool) -> Callable[[], object]:
    """Make a function that runs 5 updates, compiled with changed options."""
    original = torch.compile

    def changed(function: Callable, *, options: dict[str, Any], **kwargs: Any) -> Callable:
        return original(function, options={**options, **changes}, **kwargs)

    device = torch.device("cpu")
    loss, rb = pogo_loss(3, device, w2_backend="fast"), replay_buffer(data, device)
    torch.compile = changed
    try:
        stepper = POGOOptimizationStepper(loss, tau=0.005, compile=True, bf16=bf16)
        stepper.run(2, rb)
    finally:
        torch.compile = original
    return lambda: stepper.run(5, rb)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--bf16", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{machine()}; {arguments.threads} threads\n")
    with tempfile.TemporaryDirectory() as folder:
        data = write_rows(Path(folder, "data.hdf5"), ROWS)
        variants = {"as it is": update(data, {}, bf16=arguments.bf16)}
        for name, value in DEFAULTS.items():
            variants[f"{name}={value}"] = update(data, {name: value}, bf16=arguments.bf16)
        times: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(arguments.rounds):
            for name, run in variants.items():
                started = time.perf_counter()
                run()
                times[name].append((time.perf_counter() - started) / 5 * 1e3)
    base = times["as it is"]
    rows = [
        (
            name,
            f"{statistics.median(own):.1f}",
            f"{statistics.median(a / b for a, b in zip(own, base)):.3f}",
        )
        for name, own in times.items()
    ]
    print(table(["options", "ms per update", "relative (median of rounds)"], rows))


if __name__ == "__main__":
    main()
