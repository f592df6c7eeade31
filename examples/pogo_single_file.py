"""POGO in a single file of plain PyTorch: from a dataset to the scores of all actors.

python examples/pogo_single_file.py                                  # hopper, local data
python examples/pogo_single_file.py --source hdf5 --path FILE --total_steps 20000

A direct implementation of the equations, meant to be read and modified: no compilation, no
checkpoints, no logging. It uses only the dataset readers and environments of pogo_torchrl, whose
loss and trainer are tested against this file.
"""

import argparse
import copy
from dataclasses import dataclass, fields

import gymnasium
import numpy as np
import torch
from geomloss import SamplesLoss
from torch import Tensor, nn

from pogo_torchrl.data import make_replay_buffer
from pogo_torchrl.envs import make_env, score


@dataclass
class Args:
    task: str = "hopper-medium-v2"
    source: str = "local"  # or d4rl, minari, hdf5
    path: str | None = None  # path of the file, for source=hdf5
    seed: int = 0
    total_steps: int = 2000
    eval_episodes: int = 10
    device: str = "cpu"
    batch_size: int = 256
    hidden: int = 256
    w2_weights: tuple[float, ...] = (0.1, 0.5, 0.5)  # w_i, one per actor of the chain
    alpha: float = 1.0  # weight of the Q term
    q_normalization: str | None = "mean_abs"  # divide the Q term by mean |Q|; None: do not
    num_samples: int = 4  # K, actions per state and policy in the divergence
    blur: float = 0.05
    policy_noise: float = 0.2  # sigma of the target noise, in units of half the action range
    noise_clip: float = 0.5
    policy_freq: int = 1  # critic steps per chain of actor steps
    delay_actor: bool = False  # use the target copy of actor 0 in the TD target
    gamma: float = 0.99
    tau: float = 0.005
    lr: float = 3e-4


def mlp(n_in: int, n_out: int, hidden: int) -> nn.Sequential:
    layers = [nn.Linear(n_in, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden, n_out))


class POGO:
    """The chain of actors, the critics, and their updates.

    Batches are tuples (s, a, r, s', terminated). All noise is standard normal. It may be passed in:
    ``noise["critic"] = (z', n)`` for the TD target, and ``noise[i] = (z, z_own, z_reference)`` for
    actor i, where the last two have shape ``[B, K, d]``.
    """

    def __init__(self, observation_dim: int, low: Tensor, high: Tensor, args: Args) -> None:
        self.args, self.low, self.high = args, low, high
        dim = len(low)

        def net(n_out: int) -> nn.Sequential:
            return mlp(observation_dim + dim, n_out, args.hidden).to(low)

        self.actors = [net(dim) for _ in args.w2_weights]
        self.critics = [net(1), net(1)]
        self.target_actors, self.target_critics = map(copy.deepcopy, (self.actors, self.critics))
        self.divergence = SamplesLoss("sinkhorn", p=2, blur=args.blur, backend="tensorized")
        parameters = [p for critic in self.critics for p in critic.parameters()]
        self.critic_optimizer = torch.optim.Adam(parameters, lr=args.lr)
        self.actor_optimizers = [torch.optim.Adam(a.parameters(), lr=args.lr) for a in self.actors]
        self.steps = 0

    def act(self, actor: nn.Module, s: Tensor, z: Tensor) -> Tensor:
        """Compute the action T(s, z)."""
        middle, half = (self.high + self.low) / 2, (self.high - self.low) / 2
        return middle + half * torch.tanh(actor(torch.cat([s, z], -1)))

    def value(self, critic: nn.Module, s: Tensor, a: Tensor) -> Tensor:
        """Compute Q(s, a)."""
        return critic(torch.cat([s, a], -1)).squeeze(-1)

    def unit(self, a: Tensor) -> Tensor:
        """Map actions linearly to [-1, 1]."""
        return (2 * a - (self.high + self.low)) / (self.high - self.low)

    def draw(self, size: int, samples: int | None = None) -> Tensor:
        shape = (size, *([samples] if samples else []), len(self.low))
        return torch.randn(shape, dtype=self.low.dtype, device=self.low.device)

    def qvalue_loss(self, batch, noise=None) -> Tensor:
        """sum_j mean (Q_j(s, a) - y)^2,  y = r + gamma (1 - terminated) min_j Q'_j(s', a')."""
        s, a, r, s2, terminated = batch
        z, n = noise or (self.draw(len(s)), self.draw(len(s)))
        with torch.no_grad():
            actor = self.target_actors[0] if self.args.delay_actor else self.actors[0]
            n = (self.args.policy_noise * n).clamp(-self.args.noise_clip, self.args.noise_clip)
            a2 = self.act(actor, s2, z) + n * (self.high - self.low) / 2
            a2 = torch.clamp(a2, self.low, self.high)
            q2 = torch.minimum(*(self.value(critic, s2, a2) for critic in self.target_critics))
            y = r + self.args.gamma * (1 - terminated) * q2
        return sum(((self.value(critic, s, a) - y) ** 2).mean() for critic in self.critics)

    def actor_loss(self, batch, i: int, noise=None) -> Tensor:
        """L_i = -lambda mean Q_1(s, pi_i(s, z)) + w_i D_i."""
        s, a, *_ = batch
        k, b = self.args.num_samples, len(s)
        z, z_own, z_reference = noise or (self.draw(b), self.draw(b, k), self.draw(b, k))
        action = self.act(self.actors[i], s, z)
        q = self.value(self.critics[0], s, action)
        scale = self.args.alpha
        if self.args.q_normalization == "mean_abs":
            scale = scale / q.abs().mean().detach()
        if i == 0:  # distance to the data: W2 to a point mass is the L2 distance
            distance = ((self.unit(action) - self.unit(a)) ** 2).mean()
        else:  # distance to the previous actor, which is fixed
            states = s[:, None].expand(-1, k, -1)
            own = self.unit(self.act(self.actors[i], states, z_own))
            with torch.no_grad():
                reference = self.unit(self.act(self.actors[i - 1], states, z_reference))
            distance = self.divergence(own.contiguous(), reference.contiguous()).mean()
        return -scale * q.mean() + self.args.w2_weights[i] * distance

    def update(self, batch, noise=None) -> dict[str, float]:
        """Update the critics, then actors 0, 1, ... in order, then the targets."""
        noise = noise or {}
        losses = {"qvalue": self.qvalue_loss(batch, noise.get("critic"))}
        self._step(self.critic_optimizer, losses["qvalue"])
        if self.steps % self.args.policy_freq == 0:
            for i, optimizer in enumerate(self.actor_optimizers):
                # The gradient that this adds to the critics is zeroed before their next step.
                losses[f"actor_{i}"] = self.actor_loss(batch, i, noise.get(i))
                self._step(optimizer, losses[f"actor_{i}"])
        self.steps += 1
        self._move_targets()
        return {name: loss.item() for name, loss in losses.items()}

    @staticmethod
    def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    @torch.no_grad()
    def _move_targets(self) -> None:
        targets = [*self.target_critics, *self.target_actors]
        for net, target in zip([*self.critics, *self.actors], targets):
            for p, q in zip(net.parameters(), target.parameters()):
                q.copy_(self.args.tau * p + (1 - self.args.tau) * q)


def evaluate(pogo: POGO, i: int, normalization, env: gymnasium.Env, args: Args) -> float:
    """Return the mean D4RL score of actor i with z = 0."""
    (mean, std), returns = normalization, []
    for episode in range(args.eval_episodes):
        observation, _ = env.reset(seed=args.seed * 1000 + episode)
        total, over = 0.0, False
        while not over:
            s = (torch.as_tensor(observation, dtype=mean.dtype, device=mean.device) - mean) / std
            with torch.no_grad():
                action = pogo.act(pogo.actors[i], s, torch.zeros_like(pogo.low))
            observation, reward, terminated, truncated, _ = env.step(action.cpu().numpy())
            total, over = total + float(reward), terminated or truncated
        returns.append(total)
    return float(score(args.task, float(np.mean(returns))))


def main(args: Args) -> list[float]:
    torch.manual_seed(args.seed)
    data = make_replay_buffer(args.task, source=args.source, path=args.path, device=args.device)
    rows, env = data[:], make_env(args.task)  # the observations in data are normalised
    s, a, s2 = rows["observation"], rows["action"], rows["next", "observation"]
    columns = [s, a, rows["next", "reward"][:, 0], s2, rows["next", "terminated"][:, 0].float()]
    space = env.action_space
    low, high = (torch.as_tensor(x, device=args.device) for x in (space.low, space.high))
    pogo = POGO(columns[0].shape[-1], low, high, args)
    for step in range(1, args.total_steps + 1):
        index = torch.randint(len(columns[0]), (args.batch_size,), device=args.device)
        losses = pogo.update([column[index] for column in columns])
        if step % 500 == 0 or step == args.total_steps:
            print(step, {name: round(loss, 3) for name, loss in losses.items()}, flush=True)
    normalization = data.normalization.mean.to(low), data.normalization.std.to(low)
    scores = [evaluate(pogo, i, normalization, env, args) for i in range(len(pogo.actors))]
    print("D4RL scores of the actors:", [round(s, 1) for s in scores])
    return scores


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    for field in fields(Args):
        kind = type(field.default)
        many = {"nargs": "+", "type": float} if kind is tuple else {}
        parse = {bool: lambda text: text.lower() == "true", type(None): str}.get(kind, kind)
        parser.add_argument(f"--{field.name}", default=field.default, **(many or {"type": parse}))
    main(Args(**vars(parser.parse_args())))
