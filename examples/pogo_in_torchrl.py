"""POGOLoss in a plain TorchRL training loop: any replay buffer, torch.optim.Adam, SoftUpdate.

python examples/pogo_in_torchrl.py

The dataset consists of random rollouts of Gymnasium's Pendulum, collected with TorchRL. The loop
does not use the trainer, datasets or environments of pogo_torchrl. Each update steps the critics
and then actors 0, 1, ... in order, each with its own optimizer.
"""

import torch
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import GymEnv, StepCounter, TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives import SoftUpdate

from pogo_torchrl import POGOLoss, make_actor, make_qvalue


def make_env() -> TransformedEnv:
    """Pendulum with episodes of 200 steps and actions in [-2, 2]."""
    return TransformedEnv(GymEnv("Pendulum-v1"), StepCounter(max_steps=200))


def collect(frames: int, batch_size: int) -> TensorDictReplayBuffer:
    """Collect an offline dataset of transitions with random actions."""
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(frames), batch_size=batch_size)
    for batch in Collector(make_env, None, frames_per_batch=1000, total_frames=frames):
        buffer.extend(batch.reshape(-1))
    return buffer


def evaluate(actor: torch.nn.Module, episodes: int = 5) -> float:
    """Return the mean return of the deterministic policy (z = 0)."""
    env = make_env()
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        rollouts = [env.rollout(200, actor) for _ in range(episodes)]
    return sum(rollout["next", "reward"].sum().item() for rollout in rollouts) / episodes


def main(steps: int = 1000, frames: int = 20_000, batch_size: int = 256) -> list[float]:
    """Train a chain of two actors and return the mean return of each."""
    torch.manual_seed(0)
    buffer = collect(frames, batch_size)
    env = make_env()
    observation_dim = env.observation_spec["observation"].shape[-1]

    actor = make_actor(observation_dim, env.action_spec)
    qvalue = make_qvalue(observation_dim, env.action_spec.shape[-1])
    loss = POGOLoss(actor, qvalue, w2_weights=(0.1, 0.5))
    loss.make_value_estimator(gamma=0.99)
    qvalue_optimizer = torch.optim.Adam(loss.qvalue_params(), lr=1e-3)
    actor_optimizers = [torch.optim.Adam(loss.actor_params(i), lr=1e-3) for i in range(2)]
    targets = SoftUpdate(loss, tau=0.005)

    for step in range(1, steps + 1):
        batch = buffer.sample()
        loss_qvalue, _ = loss.qvalue_loss(batch)
        loss_qvalue.backward()
        qvalue_optimizer.step()
        qvalue_optimizer.zero_grad()
        for i, optimizer in enumerate(actor_optimizers):
            loss_actor, scalars = loss.actor_loss(batch, i)
            loss_actor.backward()
            optimizer.step()
            optimizer.zero_grad()
        targets.step()
        if step % 250 == 0:
            print(step, round(loss_qvalue.item(), 3), round(scalars["w2_1"].item(), 3))

    returns = [evaluate(loss.actor(i)) for i in range(2)]
    print("mean return of each actor:", [round(r, 1) for r in returns])
    return returns


if __name__ == "__main__":
    main()
