"""Training, evaluation and data, each beside what it is compared with, in one run.

    python benchmarks/training.py [--quick] [--threads N] [--device cuda]

Prints Markdown tables of medians and ratios. The baseline of the update is a plain PyTorch
rendering of the original code's step: sampling on the host, GeomLoss, one optimizer step and one
read number after another.
"""

from __future__ import annotations

import argparse
import copy
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

warnings.filterwarnings("ignore")
logging.disable(logging.INFO)

import h5py  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from common import machine, seconds, table  # noqa: E402
from geomloss import SamplesLoss  # noqa: E402
from tensordict import TensorDict  # noqa: E402
from tensordict.nn import TensorDictModule  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torchrl.data import Bounded  # noqa: E402
from torchrl.modules import MLP, ValueOperator  # noqa: E402
from torchrl.objectives import SoftUpdate, TD3BCLoss  # noqa: E402

from pogo_torchrl import POGOLoss, POGOTrainer, make_actor, make_qvalue  # noqa: E402
from pogo_torchrl.data import make_replay_buffer  # noqa: E402
from pogo_torchrl.envs import make_env  # noqa: E402
from pogo_torchrl.evaluation import Evaluator  # noqa: E402

OBS, ACT, HIDDEN, BATCH, K, ROWS = 17, 6, 256, 256, 4, 100_000
WEIGHT = 0.2


class Plain:
    """The original training step in plain PyTorch."""

    def __init__(self, actors: int, device: torch.device) -> None:
        rng = np.random.default_rng(0)
        self.rng, self.device = rng, device
        self.data = [rng.standard_normal((ROWS, n)) for n in (OBS, ACT, OBS, 1, 1)]

        def mlp(n_in: int, n_out: int) -> nn.Sequential:
            layers = [nn.Linear(n_in, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU()]
            return nn.Sequential(*layers, nn.Linear(HIDDEN, n_out)).to(device)

        self.actors = [mlp(OBS + ACT, ACT) for _ in range(actors)]
        self.critics = nn.ModuleList([mlp(OBS + ACT, 1), mlp(OBS + ACT, 1)])
        self.target_actors, self.target_critics = map(copy.deepcopy, (self.actors, self.critics))
        self.actor_optimizers = [torch.optim.Adam(a.parameters(), 3e-4) for a in self.actors]
        self.critic_optimizer = torch.optim.Adam(self.critics.parameters(), 3e-4)
        self.divergence = SamplesLoss("sinkhorn", p=2, blur=0.05, backend="tensorized")

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, ACT, device=self.device)

    def __call__(self) -> None:
        def act(actor, s, z):
            return torch.tanh(actor(torch.cat([s, z], -1)))

        def value(critic, s, a):
            return critic(torch.cat([s, a], -1))

        index = self.rng.integers(0, ROWS, BATCH)
        s, a, s2, r, d = (
            torch.as_tensor(x[index], dtype=torch.float32, device=self.device) for x in self.data
        )
        with torch.no_grad():
            noise = (0.2 * self.randn(BATCH)).clamp(-0.5, 0.5)
            a2 = (act(self.target_actors[0], s2, self.randn(BATCH)) + noise).clamp(-1, 1)
            q2 = torch.min(*(value(critic, s2, a2) for critic in self.target_critics))
            y = r + 0.99 * (1 - d.clamp(0, 1)) * q2
        loss = sum(F.mse_loss(value(critic, s, a), y) for critic in self.critics)
        self.critic_optimizer.zero_grad()
        loss.backward()
        self.critic_optimizer.step()
        loss.item()
        for i, (actor, optimizer) in enumerate(zip(self.actors, self.actor_optimizers)):
            action = act(actor, s, self.randn(BATCH))
            q = value(self.critics[0], s, action)
            if i == 0:
                distance = ((action - a) ** 2).mean()
            else:
                states = s[:, None].expand(BATCH, K, OBS)
                with torch.no_grad():
                    reference = act(self.actors[i - 1], states, self.randn(BATCH, K))
                own = act(actor, states, self.randn(BATCH, K))
                distance = self.divergence(own.contiguous(), reference.contiguous()).mean()
            loss = -q.mean() / q.abs().mean().detach() + WEIGHT * distance
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item(), distance.item(), q.mean().item()
        pairs = [(self.critics, self.target_critics), *zip(self.actors, self.target_actors)]
        with torch.no_grad():
            for module, target in pairs:
                for p, t in zip(module.parameters(), target.parameters()):
                    t.copy_(0.005 * p + 0.995 * t)


def action_spec() -> Bounded:
    return Bounded(low=-torch.ones(ACT), high=torch.ones(ACT))


def write_rows(path: Path, rows: int) -> Path:
    """Random transitions in D4RL's layout."""
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


def td3_bc(path: Path, device: torch.device) -> Callable[[], None]:
    """TorchRL's TD3+BC (one deterministic actor, no transport) in its recommended loop."""
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

    def update() -> None:
        batch = rb.sample()
        for objective, optimizer in ((loss.qvalue_loss, critic_adam),
                                     (loss.actor_loss, actor_adam)):  # fmt: skip
            value, _ = objective(batch)
            value.backward()
            optimizer.step()
            loss.zero_grad()
        updater.step()

    return update


def ours(path: Path, device: torch.device, actors: int, **settings) -> Callable[[], None]:
    rb = replay_buffer(path, device)
    compile = settings.pop("compile", False)
    bf16 = settings.pop("bf16", False)
    loss = POGOLoss(
        make_actor(OBS, action_spec()),
        make_qvalue(OBS, ACT),
        w2_weights=[WEIGHT] * actors,
        num_samples=K,
        **settings,
    ).to(device)
    loss.make_value_estimator(gamma=0.99)
    trainer = POGOTrainer(loss, rb, 10**9, compile=compile, bf16=bf16, progress_bar=False)
    one = TensorDict({}, [1])
    return lambda: trainer.optim_steps(one)


def flops(actors: int) -> float:
    """Multiplications and additions of one of our updates in matrix products."""

    def net(n_in: int, n_out: int, rows: int, backward: float = 0.0) -> float:
        return 2 * rows * (n_in * HIDDEN + HIDDEN**2 + HIDDEN * n_out) * (1 + backward)

    actor = lambda rows, backward=0.0: net(OBS + ACT, ACT, rows, backward)  # noqa: E731
    critic = lambda rows, backward=0.0: net(OBS + ACT, 1, rows, backward)  # noqa: E731
    total = actor(BATCH) + 2 * critic(BATCH) + 2 * critic(BATCH, 2)
    for i in range(actors):
        rows = BATCH if i == 0 else K * BATCH
        total += actor(rows, 2) + critic(BATCH, 1) + (actor(rows) if i else 0.0)
    return total


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Measured FLOP/s of the update's largest matrix product."""
    a = torch.randn(K * BATCH, HIDDEN, device=device, dtype=dtype)
    b = torch.randn(HIDDEN, HIDDEN, device=device, dtype=dtype)

    def products() -> None:
        for _ in range(20):
            a @ b

    return 20 * 2 * K * BATCH * HIDDEN**2 / seconds(products, repeats=15)


def updates(path: Path, device: torch.device, repeats: int, quick: bool) -> None:
    peak = matmul_peak(device, torch.float32)
    print(f"\n## Update\n\nfloat32 matrix products: {peak / 1e9:.0f} GFLOP/s "
          f"(bfloat16: {matmul_peak(device, torch.bfloat16) / 1e9:.0f})\n")  # fmt: skip
    rows = []
    for actors in (3,) if quick else (1, 2, 3):
        candidates: dict[str, Callable[[], None]] = {
            "plain PyTorch, as the original": Plain(actors, device),
            "POGO, GeomLoss": ours(path, device, actors),
            "POGO, fast": ours(path, device, actors, w2_backend="fast"),
            "POGO, fast, compiled": ours(path, device, actors, w2_backend="fast", compile=True),
            "POGO, fast, compiled, bfloat16": ours(
                path, device, actors, w2_backend="fast", compile=True, bf16=True
            ),
        }
        if actors == 1:
            candidates = {"TorchRL's TD3+BC": td3_bc(path, device), **candidates}
        # In turns, so that what else the machine does meets all alike.
        times = {name: [] for name in candidates}
        for function in candidates.values():
            function()
        for _ in range(3 if quick else 5):
            for name, function in candidates.items():
                times[name].append(seconds(function, repeats=repeats))
        medians = {name: float(np.median(values)) for name, values in times.items()}
        base = medians["plain PyTorch, as the original"]
        for name, time in medians.items():
            used = f"{flops(actors) / time / peak:.0%}" if name.startswith("POGO") else ""
            rows.append([actors, name, f"{1 / time:.1f}", f"{base / time:.2f}", used])
    print(table(["actors", "", "updates/s", "ratio", "of the peak"], rows))


def evaluation(quick: bool) -> None:
    episodes = 2 if quick else 10
    evaluator = Evaluator("halfcheetah-medium-v2", episodes=episodes)
    chain = [make_actor(OBS, evaluator.action_spec) for _ in range(3)]

    def serial() -> None:
        env = make_env("halfcheetah-medium-v2")
        for actor in chain:
            for _mode in range(2):
                for episode in range(episodes):
                    observation, _ = env.reset(seed=episode)
                    done = False
                    while not done:
                        with torch.no_grad():
                            state = torch.as_tensor(observation, dtype=torch.float32)[None]
                            action = actor(state, torch.randn(1, ACT))[0].numpy()
                        observation, _, terminated, truncated, _ = env.step(action)
                        done = terminated or truncated

    one, other = (seconds(f, repeats=1, warmup=0) for f in (serial, lambda: evaluator(chain)))
    print(f"\n## Evaluation, 3 actors x 2 modes x {episodes} episodes of 1,000 steps\n")
    rows = [["serial loop", f"{one:.1f}", 1], ["Evaluator", f"{other:.1f}", f"{one / other:.1f}"]]
    print(table(["", "seconds", "ratio"], rows))


def data(quick: bool, device: torch.device) -> None:
    rows = 100_000 if quick else 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        path = write_rows(Path(folder, "data.hdf5"), rows)
        start = seconds(lambda: replay_buffer(path, device), repeats=3, warmup=1)
        rb = replay_buffer(path, device)
    sample = seconds(rb.sample, repeats=200)
    print(f"\n## Data, {rows:,} transitions\n")
    print(table(["", ""], [["start-up, seconds", f"{start:.2f}"],
                           ["sampling 256, microseconds", f"{sample * 1e6:.0f}"]]))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="under two minutes, fewer repetitions")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    print(f"{machine()}; {arguments.threads} threads")
    with tempfile.TemporaryDirectory() as folder:
        path = write_rows(Path(folder, "data.hdf5"), ROWS)
        updates(path, device, repeats=5 if arguments.quick else 15, quick=arguments.quick)
    evaluation(arguments.quick)
    data(arguments.quick, device)


if __name__ == "__main__":
    main()
