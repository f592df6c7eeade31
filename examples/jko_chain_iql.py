"""A chain on top of TorchRL's IQLLoss, in a plain TorchRL loop.

python examples/jko_chain_iql.py

IQL's actor and critics are trained as without the chain. Then two more actors, copies of it, move
in small steps along the critics, and the mean return of each actor is printed.
"""

import torch
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.envs import GymWrapper, TransformedEnv
from torchrl.envs.transforms import DoubleToFloat, ObservationNorm
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import MLP, IndependentNormal, ProbabilisticActor, ValueOperator
from torchrl.objectives import IQLLoss, SoftUpdate

from pogo_torchrl import JKOChain, make_qvalue
from pogo_torchrl.data import make_replay_buffer
from pogo_torchrl.envs import make_env, score

TASK = "hopper-medium-v2"


def evaluate(actor: nn.Module, env: TransformedEnv, episodes: int = 3) -> float:
    """Return the mean D4RL score of an actor without noise."""
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        returns = [env.rollout(1000, actor)["next", "reward"].sum() for _ in range(episodes)]
    return float(score(TASK, torch.stack(returns).mean().item()))


def main(base_steps: int = 3000, chain_steps: int = 500, **data) -> list[float]:
    """Train IQL, then the chain, and return the score of each actor."""
    torch.manual_seed(0)
    buffer = make_replay_buffer(TASK, batch_size=256, **data)
    env = TransformedEnv(GymWrapper(make_env(TASK)), DoubleToFloat())
    mean, std = buffer.normalization
    env.append_transform(ObservationNorm(mean, std, ["observation"], standard_normal=True))
    observation_dim, dim = mean.numel(), env.action_spec.shape[-1]

    mlp = MLP(in_features=observation_dim, out_features=2 * dim, num_cells=[256, 256])
    actor = ProbabilisticActor(
        TensorDictModule(
            nn.Sequential(mlp, NormalParamExtractor()), ["observation"], ["loc", "scale"]
        ),
        in_keys=["loc", "scale"],
        spec=env.action_spec,
        distribution_class=IndependentNormal,
        distribution_kwargs={"tanh_loc": True},
    )
    value = ValueOperator(MLP(in_features=observation_dim, out_features=1, num_cells=[256, 256]))
    base = IQLLoss(actor, make_qvalue(observation_dim, dim), value, expectile=0.7, temperature=3.0)
    chain = JKOChain(base, step_sizes=[0.1, 0.1], action_spec=env.action_spec)
    chain.make_value_estimator(gamma=0.99)
    targets = SoftUpdate(chain, tau=0.005)

    optimizer = torch.optim.Adam(base.parameters(), lr=3e-4)
    for _ in range(base_steps):
        losses = base(buffer.sample())
        sum(loss for name, loss in losses.items() if name.startswith("loss_")).backward()
        optimizer.step()
        optimizer.zero_grad()
        targets.step()

    chain.restart()  # copies of the trained actor
    optimizer = torch.optim.Adam(chain.chain_params(), lr=3e-4)
    for _ in range(chain_steps):
        chain.actor_loss(buffer.sample())[0].backward()
        optimizer.step()
        optimizer.zero_grad()

    scores = [evaluate(chain.actor(i), env) for i in range(chain.num_actors)]
    print("D4RL score of each actor:", [round(s, 1) for s in scores])
    return scores


if __name__ == "__main__":
    main()
