"""Speed and memory of training and data, compared with baselines in a single run.

    python benchmarks/training.py [--quick] [--options] [--threads N] [--device cuda]

Prints Markdown tables. The baseline of the update is the original code's step reimplemented in
plain PyTorch: host sampling, GeomLoss, separate optimizer steps, and every loss read on the host.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
logging.disable(logging.INFO)

import h5py  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from common import machine, peak_memory, seconds, table  # noqa: E402
from tensordict import TensorDict  # noqa: E402
from tensordict.nn import TensorDictModule  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from torchrl.data import Bounded  # noqa: E402
from torchrl.modules import MLP, ValueOperator  # noqa: E402
from torchrl.objectives import SoftUpdate, TD3BCLoss  # noqa: E402

from pogo_torchrl import POGOLoss, POGOTrainer, make_actor, make_qvalue  # noqa: E402
from pogo_torchrl.data import make_replay_buffer  # noqa: E402

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import pogo_single_file as single_file  # noqa: E402

OBS, ACT, HIDDEN, BATCH, K, ROWS = 17, 6, 256, 256, 4, 100_000
WEIGHT = 0.2
STRETCH = 25  # updates per call, as between two checks of a trainer's hooks

PLAIN, TD3_BC = "plain PyTorch, as the original", "TorchRL's TD3+BC"
OURS: dict[str, dict[str, Any]] = {
    "POGO, GeomLoss": {},
    "POGO": {"w2_backend": "fast"},
    "POGO, compiled": {"w2_backend": "fast", "compile": True},
    "POGO, compiled, w2_fraction=0.25": {
        "w2_backend": "fast",
        "compile": True,
        "w2_fraction": 0.25,
    },
    "POGO, compiled, bfloat16": {"w2_backend": "fast", "compile": True, "bf16": True},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "average_actors=0.002": {"average_actors": 0.002},
    "actor_q=mean": {"actor_q": "mean"},
    "advantage_temperature=0.1": {"advantage_temperature": 0.1},
    "target_action=min_clean_noisy": {"target_action": "min_clean_noisy"},
    "data_weight=0.5": {"data_weight": 0.5},
}
Updates = Callable[[int], None]  # runs the given number of updates


class Plain:
    """The method in plain PyTorch, like the original code: examples/pogo_single_file.py.

    Samples on the host, steps the optimizers one by one and reads every loss.
    """

    def __init__(self, actors: int, device: torch.device) -> None:
        args = single_file.Args(
            batch_size=BATCH, hidden=HIDDEN, w2_weights=(WEIGHT,) * actors, num_samples=K
        )
        self.rng, self.device = np.random.default_rng(0), device
        sizes = ((OBS,), (ACT,), (), (OBS,), ())
        self.data = [self.rng.standard_normal((ROWS, *size)) for size in sizes]
        low, high = -torch.ones(ACT, device=device), torch.ones(ACT, device=device)
        self.pogo = single_file.POGO(OBS, low, high, args)

    def sample(self) -> list[torch.Tensor]:
        index = self.rng.integers(0, ROWS, BATCH)
        rows = [
            torch.as_tensor(x[index], dtype=torch.float32, device=self.device) for x in self.data
        ]
        return [*rows[:4], rows[4].clamp(0, 1)]

    def __call__(self, updates: int) -> None:
        for _ in range(updates):
            self.pogo.update(self.sample())


def action_spec() -> Bounded:
    return Bounded(low=-torch.ones(ACT), high=torch.ones(ACT))


def write_rows(path: Path, rows: int) -> Path:
    """Write random transitions in D4RL's layout."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file["observations"] = rng.standard_normal((rows, OBS), dtype=np.float32)
        file["actions"] = rng.uniform(-1, 1, (rows, ACT)).astype(np.float32)
        file["rewards"] = rng.standard_normal(rows, dtype=np.float32)
        file["terminals"] = np.zeros(rows, dtype=bool)
        file["timeouts"] = np.arange(rows) % 1000 == 999
    return path


def replay_buffer(path: Path, device: torch.device):
    return make_replay_buffer("halfcheetah-medium-v2", source="hdf5", path=path, device=device)


def td3_bc(path: Path, device: torch.device) -> Updates:
    """TorchRL's TD3+BC (a single deterministic actor, no transport) in its recommended loop."""
    rb = replay_buffer(path, device)
    spec = action_spec().to(device)
    net = MLP(in_features=OBS, out_features=ACT, num_cells=[HIDDEN] * 2, activation_class=nn.ReLU)
    actor = nn.Sequential(net, nn.Tanh()).to(device)
    policy = TensorDictModule(actor, in_keys=["observation"], out_keys=["action"])
    critic = MLP(in_features=OBS + ACT, out_features=1, num_cells=[HIDDEN] * 2,
                 activation_class=nn.ReLU)  # fmt: skip
    qvalue = ValueOperator(critic.to(device), in_keys=["observation", "action"])
    loss = TD3BCLoss(policy, qvalue, action_spec=spec, num_qvalue_nets=2)
    loss.make_value_estimator(gamma=0.99)
    updater = SoftUpdate(loss, tau=0.005)
    critic_adam = torch.optim.Adam(loss.qvalue_network_params.parameters(), 3e-4)
    actor_adam = torch.optim.Adam(loss.actor_network_params.parameters(), 3e-4)

    def run(updates: int) -> None:
        for _ in range(updates):
            batch = rb.sample()
            for objective, optimizer in (
                (loss.qvalue_loss, critic_adam),
                (loss.actor_loss, actor_adam),
            ):
                value, _ = objective(batch)
                value.backward()
                optimizer.step()
                loss.zero_grad()
            updater.step()

    return run


def pogo_loss(actors: int, device: torch.device, **settings: Any) -> POGOLoss:
    loss = POGOLoss(
        make_actor(OBS, action_spec()),
        make_qvalue(OBS, ACT),
        w2_weights=[WEIGHT] * actors,
        num_samples=K,
        **settings,
    ).to(device)
    return loss.make_value_estimator(gamma=0.99)


def ours(
    path: Path,
    device: torch.device,
    actors: int,
    compile: bool = False,
    bf16: bool = False,
    **settings: Any,
) -> Updates:
    loss = pogo_loss(actors, device, **settings)
    trainer = POGOTrainer(
        loss, replay_buffer(path, device), 10**9, compile=compile, bf16=bf16, progress_bar=False
    )
    return lambda updates: trainer.optim_steps(TensorDict({}, [updates]))


def make(name: str, path: Path, device: torch.device, actors: int) -> Updates:
    if name == PLAIN:
        return Plain(actors, device)
    return td3_bc(path, device) if name == TD3_BC else ours(path, device, actors, **OURS[name])


def flops(name: str, path: Path, actors: int) -> float:
    """Floating-point operations of an update's matrix products, computed from their shapes."""
    settings = {**OURS.get(name, {}), "compile": False}
    cpu = torch.device("cpu")
    one = ours(path, cpu, actors, **settings) if name in OURS else make(name, path, cpu, actors)
    with FlopCounterMode(display=False) as counter:
        one(1)
    return counter.get_total_flops()


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the update's largest matrix product, alone."""
    a = torch.randn(K * BATCH, HIDDEN, device=device, dtype=dtype)
    b = torch.randn(HIDDEN, HIDDEN, device=device, dtype=dtype)

    def products() -> None:
        for _ in range(100):
            a @ b

    return 100 * 2 * K * BATCH * HIDDEN**2 / seconds(products, repeats=1, warmup=0)


def time_alternately(
    candidates: dict[str, Updates], device: torch.device, rounds: int
) -> tuple[dict[str, list[float]], float]:
    """Measure seconds per update in each round, and the rate of float32 matrix products.

    The candidates alternate, so that other load on the machine affects all alike.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    rates = []
    for _ in range(rounds):
        rates.append(matmul_rate(device, torch.float32))
        for name, function in candidates.items():
            times[name].append(seconds(partial(function, STRETCH), repeats=1, warmup=0) / STRETCH)
    return times, statistics.median(rates)


def print_updates(path: Path, device: torch.device, quick: bool) -> None:
    """Print medians over the rounds of the times, and of the ratios within a round."""
    rows, rates = [], []
    for actors in (3,) if quick else (1, 2, 3):
        names = names_of(quick, actors)
        candidates = {name: make(name, path, device, actors) for name in names}
        for function in candidates.values():
            function(STRETCH)
        times, rate = time_alternately(candidates, device, rounds=3 if quick else 15)
        rates.append(rate)
        for name, series in times.items():
            time, work = statistics.median(series), flops(name, path, actors)
            ratio = statistics.median(p / t for p, t in zip(times[PLAIN], series))
            cells = f"{1 / time:.1f}", f"{ratio:.2f}", f"{work / 1e9:.2f}"
            rows.append([actors, name, *cells, f"{work / time / rate:.0%}"])
    bf16 = statistics.median(matmul_rate(device, torch.bfloat16) for _ in range(5))
    print(
        f"\n## Update\n\nMatrix products of {K * BATCH} x {HIDDEN} by {HIDDEN} x {HIDDEN}, alone: "
        f"{statistics.median(rates) / 1e9:.0f} GFLOP/s (in bfloat16: {bf16 / 1e9:.0f})\n"
    )
    print(table(["actors", "", "updates/s", "ratio", "GFLOP", "of the float32 rate"], rows))


def print_options(path: Path, device: torch.device, rounds: int = 25) -> None:
    """Print what options add to a compiled update of 3 actors."""
    compiled = OURS["POGO, compiled"]
    candidates = {
        name: ours(path, device, 3, **compiled, **options) for name, options in OPTIONS.items()
    }
    for function in candidates.values():
        function(STRETCH)
    times, _ = time_alternately(candidates, device, rounds)
    rows = []
    for name, series in times.items():
        ratio = statistics.median(t / b for t, b in zip(series, times["none"]))
        rows.append(
            [name, f"{1000 * statistics.median(series):.1f}", f"{100 * (ratio - 1):+.0f} %"]
        )
    print("## Options, 3 actors, compiled\n")
    print(table(["option", "ms per update", "difference"], rows))


def names_of(quick: bool, actors: int) -> list[str]:
    if quick:  # compilation takes most of the time
        return [PLAIN, "POGO", "POGO, compiled"]
    return [PLAIN, *OURS] if actors > 1 else [TD3_BC, PLAIN, *OURS]


def print_processes(path: Path, device: torch.device, quick: bool) -> None:
    """Print first-call time and memory for 3 actors, each measured in a separate process."""

    def alone(name: str) -> dict[str, float]:
        command = [sys.executable, __file__, "--alone", name, str(path), "--device", str(device),
                   "--threads", str(torch.get_num_threads())]  # fmt: skip
        return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)

    rows = []
    for name in names_of(quick, 3):
        first = alone(name)
        again = "compiled" in name and not quick
        cached = f"{alone(name)['first']:.1f}" if again else ""
        memory = f"{first['imports']:.0f}", f"{first['peak']:.0f}"
        rows.append([name, f"{first['first']:.1f}", cached, *memory])
    print("## Separate processes, 3 actors\n")
    header = ["", "first update, s", "with the compile cache, s", "imports, MB", "peak, MB"]
    print(table(header, rows))


def measure_alone(name: str, path: Path, device: torch.device) -> None:
    """Print the measurements that :func:`print_processes` reads."""
    imports = peak_memory()
    function = make(name, path, device, 3)
    first = seconds(partial(function, 1), repeats=1, warmup=0)
    function(STRETCH)
    print(json.dumps({"first": first, "imports": imports, "peak": peak_memory()}))


def print_data(device: torch.device, quick: bool) -> None:
    rows = 100_000 if quick else 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        path = write_rows(Path(folder, "data.hdf5"), rows)
        start = seconds(lambda: replay_buffer(path, device), repeats=3, warmup=1)
        rb = replay_buffer(path, device)
    sample = seconds(rb.sample, repeats=200)
    size = rb[:].bytes() / 1e6
    print(f"\n## Data, {rows:,} transitions\n")
    print(table(["start-up, s", "in memory, MB", f"sampling {BATCH}, microseconds"],
                [[f"{start:.2f}", f"{size:.0f}", f"{sample * 1e6:.0f}"]]))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="3 actors, fewer rows and repetitions")
    parser.add_argument("--options", action="store_true", help="only what the options cost")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--alone", nargs=2, metavar=("ROW", "DATA"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    if arguments.alone:
        name, path = arguments.alone
        return measure_alone(name, Path(path), device)
    print(f"{machine()}; {arguments.threads} threads\n")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # empty: the first update really compiles
        path = write_rows(Path(folder, "data.hdf5"), ROWS)
        if arguments.options:
            return print_options(path, device)
        print_processes(path, device, arguments.quick)
        print_updates(path, device, arguments.quick)
    print_data(device, arguments.quick)


if __name__ == "__main__":
    main()
