"""Profile an update by part: the plain step, POGO, and POGO compiled, with torch's profiler.

    python benchmarks/breakdown.py [--threads N] [--figure FILE.svg]

Prints a Markdown table of the rounds of median duration and draws docs/figures/update.svg. The time
of a part is the sum of the profiler's times of all operations within it, forward and backward,
scaled to the time without the profiler, which slows everything down. The remainder of an update
without annotations, which slow launching down, is attributed to Python and launching operations.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

import matplotlib
import torch
import training  # first, because it silences warnings
from common import machine, seconds, table
from torch._inductor import config as inductor
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

import pogo_torchrl.objectives.distances
from pogo_torchrl import POGOLoss
from pogo_torchrl.data import OfflineReplayBuffer
from pogo_torchrl.trainers.fused.adam import FusedAdam

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Patch

FIGURE = Path(__file__).parent.parent / "docs/figures/update.svg"

PRODUCTS, TRANSPORT, ADAM = "matrix products", "optimal transport", "Adam and targets"
SAMPLING, ELEMENTWISE = "sampling and noise", "activations and other elementwise"
REST = "Python and launching"
# Okabe and Ito's palette, alternating light and dark.
COLOURS = {
    PRODUCTS: "#0072B2",
    TRANSPORT: "#F0E442",
    ADAM: "#D55E00",
    SAMPLING: "#56B4E9",
    ELEMENTWISE: "#009E73",
    REST: "#BBBBBB",
}
_PRODUCTS = {"aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aoti_torch_cpu_bmm_out"}
# Operations that move no data, or only allocate memory or read a scalar.
_LAUNCHING = (
    "as_strided detach empty empty_like empty_strided expand linear matmul new_empty select slice "
    "split split_with_sizes squeeze t to transpose unbind unsqueeze view _unsafe_view reshape "
    "item _local_scalar_dense is_nonzero result_type resolve_conj resolve_neg lift_fresh alias"
)
_NO_WORK = {f"aten::{name}" for name in _LAUNCHING.split()}


def part_of(event: FunctionEvent, transport: set[int]) -> str:
    """The part that the self time of an event belongs to."""
    around: FunctionEvent | None = event
    while around is not None:
        if around.name in COLOURS:
            return around.name
        if around.name.startswith("Optimizer.step"):
            return ADAM
        if around.name.startswith("autograd::engine") and around.sequence_nr in transport:
            return TRANSPORT
        around = around.cpu_parent
    name = event.name
    if name in _PRODUCTS:
        return PRODUCTS
    if "_cpp_fused" in name:  # a compiled kernel, named after the operations it fuses
        if "_exp_" in name:  # dominates the kernel, whatever else is fused into it
            return TRANSPORT
        return ADAM if "foreach_addcmul" in name else ELEMENTWISE
    if name in ("aten::normal_", "aten::random_", "aten::index"):
        return SAMPLING
    return ELEMENTWISE if name.startswith("aten::") and name not in _NO_WORK else REST


def within(events: list[FunctionEvent], name: str) -> Iterator[FunctionEvent]:
    for event in events:
        around = event.cpu_parent
        while around is not None and around.name != name:
            around = around.cpu_parent
        if around is not None:
            yield event


def measure(function: training.Updates, named: training.Updates, updates: int) -> dict[str, float]:
    """Measure milliseconds per update and part.

    Args:
        function: runs updates without annotations.
        named: runs the same updates with annotated parts.
        updates: number of updates.
    """
    time = seconds(lambda: function(updates), repeats=1, warmup=0)
    with named_parts():
        scale = seconds(lambda: named(updates), repeats=1, warmup=0)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            scale /= seconds(lambda: named(updates), repeats=1, warmup=0)
    events = profiler.events()
    # An operation and its backward share a sequence number.
    transport = {e.sequence_nr for e in within(events, TRANSPORT) if e.sequence_nr >= 0}
    parts = dict.fromkeys(COLOURS, 0.0)
    for event in events:
        parts[part_of(event, transport)] += scale * event.self_cpu_time_total / 1e6
    parts[REST] += time - sum(parts.values())
    return {part: 1e3 * own / updates for part, own in parts.items()}


@contextmanager
def named_parts() -> Iterator[None]:
    """Annotate the parts in the profile, in POGO and in the plain step."""

    def named(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with record_function(part):
                return function(*args, **kwargs)

        return call

    targets = [
        (training.Plain, "sample", SAMPLING),
        (training.single_file.POGO, "draw", SAMPLING),
        (training.single_file.POGO, "_move_targets", ADAM),
        (training.single_file.SamplesLoss, "forward", TRANSPORT),
        (OfflineReplayBuffer, "sample", SAMPLING),
        (POGOLoss, "draw_noise", SAMPLING),
        (pogo_torchrl.objectives.distances, "sinkhorn_divergence", TRANSPORT),
        (FusedAdam, "step", ADAM),
    ]
    patches = [
        mock.patch.object(o, name, named(part, getattr(o, name))) for o, name, part in targets
    ]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def median(rounds: list[dict[str, float]]) -> dict[str, float]:
    """The round of median duration."""
    return sorted(rounds, key=lambda parts: sum(parts.values()))[len(rounds) // 2]


def draw(found: dict[str, dict[str, float]], path: Path) -> None:
    plt.rcParams.update({"svg.hashsalt": "pogo_torchrl", "svg.fonttype": "none", "font.size": 10})
    figure, axes = plt.subplots(figsize=(8, 2.6), layout="constrained")
    longest = max(sum(parts.values()) for parts in found.values())
    for row, parts in enumerate(found.values()):
        left = 0.0
        for part, time in parts.items():
            bar = axes.barh(row, time, 0.7, left, color=COLOURS[part], edgecolor="white")
            if time > 0.035 * longest:  # wide enough for a label
                ink = "white" if part in (PRODUCTS, ADAM, ELEMENTWISE) else "black"
                axes.bar_label(bar, [f"{time:.1f}"], label_type="center", color=ink, fontsize=8)
            left += time
        axes.text(left, row, f" {left:.1f}", va="center", weight="bold")
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds of an update, three actors")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    handles = [Patch(color=colour, label=part) for part, colour in COLOURS.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--updates", type=int, default=25, help="updates per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--figure", type=Path, default=FIGURE)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{machine()}; {arguments.threads} threads\n")
    cpu = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        path = training.write_rows(Path(folder, "data.hdf5"), training.ROWS)
        names = (training.PLAIN, "POGO", "POGO, compiled")
        candidates = {name: training.make(name, path, cpu, 3) for name in names}
        with named_parts():
            named = {name: training.make(name, path, cpu, 3) for name in names}
        for function in candidates.values():
            function(training.STRETCH)
        with inductor.patch({"cpp.enable_kernel_profile": True}):  # names the kernels
            for function in named.values():
                function(training.STRETCH)
        rounds = [  # alternating, so that other load on the machine affects all alike
            {name: measure(candidates[name], named[name], arguments.updates) for name in names}
            for _ in range(arguments.rounds)
        ]
    found = {name: median([one[name] for one in rounds]) for name in names}
    rows = [[part, *(f"{parts[part]:.2f}" for parts in found.values())] for part in COLOURS]
    rows.append(["all", *(f"{sum(parts.values()):.2f}" for parts in found.values())])
    print(table(["milliseconds of an update", *found], rows))
    draw(found, arguments.figure)


if __name__ == "__main__":
    main()
