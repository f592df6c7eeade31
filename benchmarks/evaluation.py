"""Evaluation of a chain, compared with serial loops over episodes.

    python benchmarks/evaluation.py [--quick] [--threads N] [--task TASK ...]

Prints a Markdown table of microseconds per environment step, medians. The Evaluator plays 3 actors
x 2 modes x 10 episodes, all to their time limit: a fall of the robot does not end an episode. The
serial loops play one episode per actor and mode, one observation at a time, and call the actor
as a TorchRL module or only its network. Actors are freshly initialised.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial

warnings.filterwarnings("ignore")
logging.disable(logging.INFO)

import gymnasium  # noqa: E402
import torch  # noqa: E402
from common import machine, table  # noqa: E402

from pogo_torchrl import TransportActor, make_actor  # noqa: E402
from pogo_torchrl.envs import max_episode_steps  # noqa: E402
from pogo_torchrl.evaluation import Evaluator  # noqa: E402

TASKS = ("halfcheetah-medium-v2", "hopper-medium-v2", "walker2d-medium-v2", "antmaze-umaze-v2")
ACTORS, MODES, EPISODES = 3, 2, 10
Policy = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def bare(actor: TransportActor, state: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return actor.action_loc + actor.action_scale * actor.module(state, z).tanh()


@torch.no_grad()
def serial(env: gymnasium.Env, policies: list[Policy], action_dim: int) -> int:
    """Play an episode of each policy in each mode; return the number of steps."""
    steps = 0
    for policy in policies:
        for mode in range(MODES):
            observation, _ = env.reset(seed=0)
            over = False
            while not over:
                state = torch.as_tensor(observation, dtype=torch.float32)[None]
                action = policy(state, mode * torch.randn(1, action_dim))[0].numpy()
                observation, _, terminated, truncated, _ = env.step(action)
                over = terminated or truncated
                steps += 1
    return steps


def microseconds(play: Callable[[], int]) -> float:
    started = time.perf_counter()
    steps = play()
    return (time.perf_counter() - started) / steps * 1e6


def compare(task: str, quick: bool) -> list[object]:
    """Measure one task: a row of the table."""
    falls = task.startswith(("hopper", "walker2d"))
    lasting = {"terminate_when_unhealthy": False} if falls else {}
    horizon = 100 if quick else max_episode_steps(task)
    make = partial(gymnasium.make, f"pogo_torchrl/{task}", max_episode_steps=horizon, **lasting)
    evaluator = Evaluator(task, episodes=EPISODES, env_fn=make)
    dim = evaluator.action_dim
    torch.manual_seed(0)
    chain = [make_actor(evaluator.observation_dim, evaluator.action_spec) for _ in range(ACTORS)]
    plays: list[Callable[[], int]] = [
        partial(serial, make(), chain, dim),
        partial(serial, make(), [partial(bare, actor) for actor in chain], dim),
        lambda: sum(int(e.lengths.sum()) for e in evaluator(chain)),
    ]
    # Alternating, so that other load on the machine affects all alike.
    rounds = [[microseconds(play) for play in plays] for _ in range(3)]
    module, network, ours = (statistics.median(times) for times in zip(*rounds))
    return [task, *(f"{t:.0f}" for t in (module, network, ours)),
            f"{module / ours:.1f}", f"{network / ours:.1f}"]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="episodes of 100 steps")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--task", nargs="+", default=TASKS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{machine()}; {arguments.threads} threads\n\n## Evaluation\n")
    header = ["task", "serial, module", "serial, network", "Evaluator", "ratio", "ratio, network"]
    print(table(header, [compare(task, arguments.quick) for task in arguments.task]))


if __name__ == "__main__":
    main()
