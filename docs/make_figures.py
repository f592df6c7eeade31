"""Draw docs/figures/chain.png: the JKO chain on a toy problem with one state.

python docs/make_figures.py

The figure is computed with the package: data around an action away from the peak of a fixed Q,
three transport maps trained with the chain's objective, and the mean and spread of their actions.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.data import Bounded
from torchrl.modules import ValueOperator

from pogo_torchrl import POGOLoss, make_actor
from pogo_torchrl.report import COLOURS

matplotlib.use("Agg")
from matplotlib import pyplot as plt

WEIGHTS = (8.0, 2.0, 2.0)
FIGURES = Path(__file__).parent / "figures"


class ToyQ(nn.Module):
    """A fixed Q(a) that rises from the data at a = -0.5 to its peak at a = 0.6."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = nn.Parameter(torch.tensor(0.6))

    def reset_parameters(self) -> None:
        """Keep the peak; there is nothing to reset."""

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        """Return Q of shape ``[*B, 1]``."""
        return 1.0 - (action - self.peak).square()


def train(steps: int = 1500, batch: int = 256) -> tuple[POGOLoss, Tensor]:
    """Train the chain; return its loss and the actions of the data."""
    torch.manual_seed(0)
    spec = Bounded(low=-torch.ones(1), high=torch.ones(1))
    qvalue = ValueOperator(ToyQ(), in_keys=["observation", "action"])
    loss = POGOLoss(
        make_actor(1, spec, (64, 64)),
        qvalue,
        w2_weights=WEIGHTS,
        num_samples=16,
        delay_qvalue=False,
    )
    optimizer = torch.optim.Adam(loss.actor_network_params.parameters(), lr=1e-3)
    data = -0.5 + 0.15 * torch.randn(4096, 1)
    for _ in range(steps):
        actions = data[torch.randint(len(data), (batch,))]
        td = TensorDict({"observation": torch.zeros(batch, 1), "action": actions}, [batch])
        optimizer.zero_grad()
        loss.actor_loss(td)[0].backward()
        optimizer.step()
    return loss, data


def main() -> None:
    """Train the chain and draw the figure."""
    loss, data = train()
    grid = np.linspace(-1, 1, 200)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9, 3.4), layout="constrained", width_ratios=[2, 1]
    )
    with torch.no_grad():
        q = loss.qvalue_network.module(None, torch.tensor(grid, dtype=torch.float32)[:, None])
        z = torch.randn(4096, 1)
        actions = [loss.actor(i)(torch.zeros(4096, 1), z) for i in range(loss.num_actors)]
    left.plot(grid, q, color="0.3", label="Q(s, a)")
    left.set(xlabel="action", ylabel="Q", title="One state: each actor moves on from the last")
    marks = [("data", data, "0.5")]
    marks += [(rf"$\pi_{i}$", a, COLOURS[i]) for i, a in enumerate(actions)]
    for row, (name, values, colour) in enumerate(marks):
        mean, std = values.mean().item(), max(values.std().item(), 0.01)
        height = -1.6 - 0.25 * row
        left.plot([mean - std, mean + std], [height] * 2, color=colour, linewidth=6, alpha=0.5)
        left.plot(mean, height, "o", color=colour)
        left.annotate(name, (mean + std + 0.04, height), va="center", color=colour)
        left.axvline(mean, color=colour, linewidth=0.8, linestyle=":")
    left.set_ylim(-2.6, 1.2)
    names = ["data", *(rf"$\pi_{i}$" for i in range(loss.num_actors))]
    values = [1 - (v - 0.6).square().mean().item() for _, v, _ in marks]
    right.bar(names, values, color=[colour for *_, colour in marks])
    right.set(title="mean Q along the chain", ylabel="E[Q]")
    FIGURES.mkdir(exist_ok=True)
    figure.savefig(FIGURES / "chain.png", dpi=150)


if __name__ == "__main__":
    main()
