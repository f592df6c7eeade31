"""Compare the speed of the update in this checkout and in another one, alternating.

    git worktree add ../before COMMIT && python benchmarks/against.py ../before [--row ROW ...]

Each checkout runs its own benchmarks/training.py in a separate process; the rows are those of its
table. Prints medians over the rounds of the times, and of the ratios within a round.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import chain
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
ROWS = ("POGO", "POGO, compiled", "POGO, compiled, bfloat16")


def serve(checkout: str, row: str, threads: int) -> None:
    """Read update counts from stdin, run that many updates, and print milliseconds per update."""
    sys.path[:0] = [checkout, f"{checkout}/benchmarks"]
    import torch
    import training
    from common import peak_memory

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # empty: the first update really compiles
        data = training.write_rows(Path(folder, "data.hdf5"), training.ROWS)
        update = training.make(row, data, torch.device("cpu"), 3)
        for line in chain(["1"], sys.stdin):  # as they come, so no unpacking
            begun = time.perf_counter()
            update(int(line))
            print(1e3 * (time.perf_counter() - begun) / int(line), peak_memory(), flush=True)


class Checkout:
    """A process that runs the updates of one checkout."""

    def __init__(self, path: Path, row: str, threads: int) -> None:
        command = [sys.executable, "-W", "ignore", __file__, str(path), "--serve", row]
        self.process = subprocess.Popen(
            [*command, "--threads", str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip
        self.times: list[float] = []
        self.first = self.read() / 1e3

    def read(self) -> float:
        assert self.process.stdout is not None
        time, self.peak = map(float, self.process.stdout.readline().split())
        return time

    def update(self, count: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{count}\n")
        self.times.append(self.read())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("checkout", type=Path, help="checkout to compare with")
    parser.add_argument("--row", nargs="+", default=ROWS, help="rows of the table of training.py")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--updates", type=int, default=20, help="updates per round")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return serve(str(arguments.checkout), arguments.serve, arguments.threads)
    from common import machine, table

    print(f"{machine()}; {arguments.threads} threads; {arguments.rounds} rounds\n")
    rows = []
    for row in arguments.row:
        paths = {"before": arguments.checkout.resolve(), "now": HERE}
        both = {name: Checkout(path, row, arguments.threads) for name, path in paths.items()}
        for _ in range(arguments.rounds):
            for one in both.values():
                one.update(arguments.updates)
        before, now = both["before"].times, both["now"].times
        ratio = statistics.median(b / n for b, n in zip(before, now))
        for name, one in both.items():
            one.process.communicate()
            cells = [f"{statistics.median(one.times):.1f}", f"{one.first:.1f}", f"{one.peak:.0f}"]
            rows.append([row, name, *cells, f"{ratio:.2f}" if name == "now" else ""])
    print(table(["", "", "milliseconds", "first update, s", "peak, MB", "times as fast"], rows))


if __name__ == "__main__":
    main()
