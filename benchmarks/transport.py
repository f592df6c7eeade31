"""Compare the backends of the Sinkhorn divergence: time, bias, worst clouds. Prints Markdown.

    python benchmarks/transport.py             # time; about ten minutes
    python benchmarks/transport.py --quick     # time of the default sizes; seconds
    python benchmarks/transport.py --bias      # the table of docs/transport.md
    python benchmarks/transport.py --search    # clouds that bring `fast` closest to underflow

Times are for forward and backward of the mean: medians of repetitions, alternating with GeomLoss,
without compilation.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable

import torch
from common import machine
from geomloss import SamplesLoss
from torch import Tensor

from pogo_torchrl import sinkhorn_divergence
from pogo_torchrl.ot import MAX_POINTS

BLUR = 0.05


def backends(d: int, k: int) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Functions for the mean distance of two batches, by GeomLoss and by each backend."""
    diameter = 2 * d**0.5
    geomloss = SamplesLoss("sinkhorn", p=2, blur=BLUR, backend="tensorized")

    def fast(x: Tensor, y: Tensor) -> Tensor:
        return sinkhorn_divergence(x, y, blur=BLUR, backend="fast", diameter=diameter).mean()

    def exact(x: Tensor, y: Tensor) -> Tensor:
        return sinkhorn_divergence(x, y, backend="exact").mean()

    found = {
        "GeomLoss": lambda x, y: geomloss(x, y).mean(),
        "fast": fast,
        "fast, compiled": torch.compile(fast, fullgraph=True, dynamic=False),
    }
    if k <= MAX_POINTS:
        found["exact, compiled"] = torch.compile(exact, fullgraph=True, dynamic=False)
    return found


def times(k: int, batch: int, d: int, repetitions: int, device: str) -> dict[str, float]:
    """Median milliseconds of each backend, measured alternately."""
    torch._dynamo.reset()
    x = (2 * torch.rand(batch, k, d, device=device) - 1).requires_grad_()
    y = 2 * torch.rand(batch, k, d, device=device) - 1
    taken: dict[str, list[float]] = {}
    # The first two rounds compile and warm up.
    candidates = backends(d, k)
    for repetition, (name, function) in itertools.product(
        range(repetitions + 2), candidates.items()
    ):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        torch.autograd.grad(function(x, y), x)
        if device == "cuda":
            torch.cuda.synchronize()
        if repetition >= 2:
            taken.setdefault(name, []).append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(series) for name, series in taken.items()}


def print_times(sizes: list, threads: list[int], repetitions: int, device: str) -> None:
    """Print one row per size: milliseconds, and in brackets the speed relative to GeomLoss."""
    names = ["GeomLoss", "fast", "fast, compiled", "exact, compiled"]
    print(f"{machine()}, {device}. Milliseconds (times GeomLoss's speed).\n")
    print(f"| threads | B | K | d | {' | '.join(names)} |")
    print("|" + " ---: |" * (4 + len(names)))
    for count, (batch, k, d) in itertools.product(threads, sizes):
        torch.set_num_threads(count)
        found = times(k, batch, d, repetitions, device)
        cells = [
            f"{found[name]:.2f} ({found['GeomLoss'] / found[name]:.1f})" if name in found else ""
            for name in names
        ]
        print(f"| {count} | {batch} | {k} | {d} | {' | '.join(cells)} |", flush=True)


def stationary_std(k: int, estimator: str, d: int = 6, steps: int = 240) -> float:
    """Find the s / sigma that minimises the estimated distance of N(0, s^2 I) to N(0, sigma^2 I).

    Adam on log s with 128 states per step and sigma = 0.3, averaged over the second half of the
    steps.
    """
    sigma = 0.3
    log_s = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.Adam([log_s], lr=0.05)
    seen = []
    for step in range(steps):
        if step == steps // 2:
            optimizer.param_groups[0]["lr"] = 0.01
        optimizer.zero_grad()
        distance(sigma * log_s.exp(), sigma, k, estimator, d, 128).mean().backward()
        optimizer.step()
        seen.append(log_s.exp().item())
    return statistics.mean(seen[steps // 2 :])


def distance(
    s: Tensor | float, sigma: float, k: int, estimator: str, d: int, states: int
) -> Tensor:
    """Distances between K actions of N(0, s^2 I) and K of N(0, sigma^2 I), one per state."""
    z = torch.randn(states, k, d)
    other = z if "shared" in estimator else torch.randn(states, k, d)
    backend = "exact" if "exact" in estimator else "fast"
    return sinkhorn_divergence(
        s * z, sigma * other, blur=BLUR, backend=backend, diameter=2 * d**0.5
    )


def print_bias() -> None:
    """Print the estimated distance of equal policies, and the spread at the minimum."""
    print("| K | estimator | D of equal policies | its std over states | spread at the minimum |")
    print("| ---: | --- | ---: | ---: | ---: |")
    for k in (4, 8, 16, 64):
        for estimator in ("fast", "exact", "fast, shared noise", "exact, shared noise"):
            if "exact" in estimator and k > MAX_POINTS:
                continue
            torch.manual_seed(0)
            values = distance(0.3, 0.3, k, estimator, 6, 1000)
            spread = stationary_std(k, estimator)
            mean, std = values.mean().abs(), values.std()
            print(f"| {k} | {estimator} | {mean:.3f} | {std:.3f} | {spread:.2f} |", flush=True)


def depth(x: Tensor, y: Tensor, ratio: float, diameter: float) -> Tensor:
    """Depth of the smallest log row mean of exp((f + g - c) / eps), in units of ``ratio``, [B]."""
    cost = (x[:, :, None] - y[:, None]).square().sum(-1) / 2
    ladder = [4.0**-i for i in range(math.ceil(math.log2(ratio)))]
    schedule = [diameter**2 * e for e in (1.0, *ladder, ratio**-2, ratio**-2)]

    def log_means(t: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns = t.logsumexp(2), t.logsumexp(1)
        return rows - math.log(t.shape[2]), columns - math.log(t.shape[1])

    f, g = (-schedule[0] * m for m in log_means(-cost / schedule[0]))
    deepest = torch.zeros(len(x), dtype=x.dtype)
    for eps in schedule:
        rows, columns = log_means((f[:, :, None] + g[:, None] - cost) / eps)
        deepest = torch.minimum(deepest, torch.minimum(rows.amin(1), columns.amin(1)))
        f, g = f - eps / 2 * rows, g - eps / 2 * columns
    return -deepest / ratio


def mutate(x: Tensor) -> Tensor:
    """Move one or two coordinates of each cloud, many of them to a face of the box."""
    chosen = torch.rand_like(x) < 1.5 / (x.shape[1] * x.shape[2])
    face = torch.where(torch.rand_like(x) < 0.5, -1.0, 1.0).to(x)
    moved = (x + 0.3 * torch.randn_like(x)).clamp(-1, 1)
    return torch.where(chosen, torch.where(torch.rand_like(x) < 0.6, face, moved), x)


def print_search(ratio: float = 100, rounds: int = 200) -> None:
    """Hill climbing from several types of random clouds; ot/fast.py relies on the result."""
    print("| K | K' | d | deepest row / (D / blur) |\n| ---: | ---: | ---: | ---: |")
    torch.manual_seed(0)
    pairs = [(4, 4), (8, 8), (16, 16), (64, 64), (3, 5), (4, 64), (8, 64)]
    for (k, m), d in itertools.product(pairs, (1, 2, 6)):
        count = 40_000 // (k * m) + 50
        clouds = []
        for n in (k, m):
            width = 4 * torch.rand(count, 1, 1, dtype=torch.float64)
            centre = 2 * torch.randn(count, 1, d, dtype=torch.float64)
            normal = torch.randn(count, n, d, dtype=torch.float64)
            clouds.append(torch.cat([(width * normal + centre).clamp(-1, 1), normal.sign()]))
        x, y = clouds
        best = depth(x, y, ratio, 2 * d**0.5)
        chosen = best.argsort(descending=True)[: max(20, count // 10)]
        x, y, best = x[chosen], y[chosen], best[chosen]
        for _ in range(rounds):
            x_new, y_new = mutate(x), mutate(y)
            reached = depth(x_new, y_new, ratio, 2 * d**0.5)
            better = reached > best
            x = torch.where(better[:, None, None], x_new, x)
            y = torch.where(better[:, None, None], y_new, y)
            best = torch.where(better, reached, best)
        print(f"| {k} | {m} | {d} | {best.max():.2f} |", flush=True)


def main() -> None:
    """Print the requested table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="B=256, d=6, K=4 on one thread")
    parser.add_argument("--bias", action="store_true", help="bias and variance of the estimators")
    parser.add_argument("--search", action="store_true", help="clouds closest to underflow")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--points", type=int, nargs="+", default=[4, 8, 16, 64], help="K")
    parser.add_argument("--dims", type=int, nargs="+", default=[3, 6, 17])
    args = parser.parse_args()
    if args.bias:
        print_bias()
    elif args.search:
        print_search()
    elif args.quick:
        print_times([(256, 4, 6)], [1], args.repetitions, args.device)
    else:
        sizes = list(itertools.product(args.batch, args.points, args.dims))
        print_times(sizes, args.threads, args.repetitions, args.device)


if __name__ == "__main__":
    main()
