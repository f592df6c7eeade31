"""Compare the slopes of trained critics with those of returns in the simulator.

    python benchmarks/study/slopes.py RUN [RUN ...] [--states 80] [--steps 150] [--delta 0.1]

RUN is the folder of a run of ``pogo train`` on hopper, halfcheetah or walker2d. In states s of its
data and for each action dimension k, two rollouts of actor 0 start with the actions
``pi_0(s) +- delta e_k``. The difference of their discounted returns, divided by ``2 delta``, is the
slope of ``Q^{pi_0}`` in dimension k. Printed is its correlation with the slope of the mean over the
critics, ``sum g g' / sqrt(sum g^2 sum g'^2)`` over states and dimensions, with a 95 % bootstrap
interval over states, for the discount of the run and for shorter ones. A value of 1 means that
a step along the critics is one along the returns, 0 that it has nothing to do with them. Beside it:
how far the data's actions are from those of actor 0, and how two critics agree with each other.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict

from pogo_torchrl.experiments.console import exit_with_error
from pogo_torchrl.experiments.run import RunInProgress
from pogo_torchrl.experiments.simulator import env_fn
from pogo_torchrl.experiments.trained_run import open_run

Array = NDArray[np.float64]
TASKS = ("hopper", "halfcheetah", "walker2d")
GAMMAS = (0.0, 0.9, 0.95)
RESAMPLES = 2000


def simulated_rewards(
    env: gymnasium.Env,
    policy: Callable[[Array], Array],
    observations: Array,
    delta: float,
    steps: int,
) -> Array:
    """Rewards after the first actions ``policy(s) + delta e_k`` and ``policy(s) - delta e_k``.

    Args:
        env: a locomotion environment, whose observation is its state without the x position.
        policy: function from an observation to an action.
        observations: states s, of shape ``[N, n]``.
        delta: change of the first action, in the environment's units.
        steps: length of the rollouts, which end earlier in terminal states.

    Returns:
        Rewards of shape ``[N, d, 2, steps]``, 0 after terminal states.
    """
    core, space = env.unwrapped, env.action_space
    (dim,) = space.shape
    rewards = np.zeros((len(observations), dim, 2, steps))
    positions = core.model.nq - 1
    env.reset(seed=0)
    for n, observation in enumerate(observations):
        base = policy(observation)
        for k in range(dim):
            for side, sign in enumerate((1, -1)):
                action = base + sign * delta * np.eye(dim)[k]
                core.set_state(np.r_[0.0, observation[:positions]], observation[positions:])
                for t in range(steps):
                    action = np.clip(action, space.low, space.high)
                    seen, rewards[n, k, side, t], terminated, _, _ = core.step(action)
                    if terminated:
                        break
                    action = policy(seen)
    return rewards


def simulated_slopes(rewards: Array, gamma: float, delta: float) -> Array:
    """Slopes ``[N, d]`` of discounted returns, from :func:`simulated_rewards`."""
    returns = rewards @ gamma ** np.arange(rewards.shape[-1])
    return (returns[..., 0] - returns[..., 1]) / (2 * delta)


def critic_slopes(run: RunInProgress, observations: Array, actions: Array) -> Array:
    """Slopes ``[C, N, d]`` of a run's critics at states and actions."""
    mean, std = (values.cpu() for values in run.replay_buffer.normalization)
    state = (torch.as_tensor(observations, dtype=torch.float32) - mean) / std
    action = torch.as_tensor(actions, dtype=torch.float32).requires_grad_()
    params, net = run.loss.qvalue_network_params, run.loss.qvalue_network
    slopes = []
    for i in range(params.numel()):
        with params.reshape(-1)[i].to_module(net):
            batch = TensorDict({"observation": state, "action": action}, [len(state)])
            slopes += torch.autograd.grad(net(batch)["state_action_value"].sum(), action)
    return torch.stack(slopes).double().numpy()


def correlation(x: Array, y: Array) -> float:
    """Correlation of slopes about zero: ``sum x y / sqrt(sum x^2 sum y^2)``."""
    return float((x * y).sum() / np.sqrt((x**2).sum() * (y**2).sum()))


def interval(x: Array, y: Array) -> tuple[float, float]:
    """95 % bootstrap interval over states of :func:`correlation`."""
    rng = np.random.default_rng(0)
    draws = (rng.integers(len(x), size=len(x)) for _ in range(RESAMPLES))
    low, high = np.quantile([correlation(x[rows], y[rows]) for rows in draws], (0.025, 0.975))
    return float(low), float(high)


def measure(folder: Path, states: int, steps: int, delta: float) -> list[str]:
    """Cells of the row of a run."""
    run = open_run(folder, device="cpu")
    if run.cfg.task.partition("-")[0] not in TASKS:
        raise ValueError(
            f"{folder} is a run on task={run.cfg.task}, whose states are not known from its "
            f"observations: choose a run on {', '.join(TASKS)}."
        )
    rows = run.replay_buffer[:]
    mean, std = (values.cpu() for values in run.replay_buffer.normalization)
    chosen = np.random.default_rng(1).choice(len(rows), states, replace=False)
    observations = (rows["observation"][chosen].cpu() * std + mean).double().numpy()
    actor = run.policy(0, averaged=run.averaged)
    zeros = torch.zeros(actor.noise_dim)

    @torch.no_grad()
    def policy(observation: Array) -> Array:
        state = torch.as_tensor(observation, dtype=torch.float32)
        return actor(observation=state, noise=zeros).double().numpy()

    with torch.no_grad():
        batch = rows["observation"].cpu()
        cloned = run.loss.actor(0, averaged=run.averaged)(
            observation=batch, noise=torch.zeros(len(batch), actor.noise_dim)
        )
    spread = float((cloned - rows["action"].cpu()).square().mean().sqrt())
    rewards = simulated_rewards(
        env_fn(run.cfg.task, run.cfg.env)(), policy, observations, delta, steps
    )
    critics = critic_slopes(run, observations, np.stack([policy(s) for s in observations]))
    learned = critics.mean(0)
    cells = [str(folder), f"{spread:.3f}", f"{correlation(critics[0], critics[-1]):.2f}"]
    for gamma in (*GAMMAS, run.cfg.gamma):
        true = simulated_slopes(rewards, gamma, delta)
        low, high = interval(learned, true)
        cells.append(f"{correlation(learned, true):.2f} [{low:.2f}, {high:.2f}]")
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("run", type=Path, nargs="+", help="folder of a run")
    parser.add_argument("--states", type=int, default=80, help="number of states of the data")
    parser.add_argument("--steps", type=int, default=150, help="length of a rollout")
    parser.add_argument("--delta", type=float, default=0.1, help="change of the first action")
    options = parser.parse_args()
    names = [f"gamma {gamma:g}" for gamma in GAMMAS]
    columns = ["run", "data - actor 0, rms", "two critics", *names, "gamma of the run"]
    print("|", " | ".join(columns), "|")
    print("|" + "---|" * len(columns))
    torch.set_num_threads(1)
    for folder in options.run:
        try:
            cells = measure(folder, options.states, options.steps, options.delta)
        except (ValueError, OSError) as error:
            exit_with_error(error)
        print("|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
