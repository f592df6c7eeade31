"""Compare our environments with D4RL's own, live; `benchmarks/d4rl_oracle.sh` sets up both.

D4RL's environments are stepped with random actions, and every step is repeated in ours from the
same state. In antmaze the ant is also placed next to walls and goals. Prints Markdown.

    python benchmarks/d4rl_oracle.py --steps 2000 --resets 1000
    python benchmarks/d4rl_oracle.py --record FILE.npz      # also save the transitions
    python benchmarks/d4rl_oracle.py --compare FILE.npz     # step saved ones, without D4RL
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import gymnasium
import mujoco
import numpy as np
from numpy.typing import NDArray

from pogo_torchrl.data.policies import load_policies
from pogo_torchrl.envs import MAZES, make_env, max_episode_steps, replay_errors, score

TASKS = (
    "hopper-medium-v2",
    "halfcheetah-medium-v2",
    "walker2d-medium-v2",
    "antmaze-umaze-v2",
    "antmaze-umaze-diverse-v2",
    "antmaze-medium-play-v2",
    "antmaze-medium-diverse-v2",
    "antmaze-large-play-v2",
    "antmaze-large-diverse-v2",
)
SEGMENT = 50  # steps after which the ant is placed elsewhere


def record(task: str, steps: int, seed: int) -> dict[str, NDArray[Any]]:
    """Record transitions of D4RL's environment under random actions, some beyond the bounds."""
    env: Any = make_env(task, backend="d4rl")
    rng = np.random.default_rng(seed)
    rows: dict[str, list] = {}
    env.reset(seed=seed)
    for i in range(steps):
        if task.startswith("antmaze") and i % SEGMENT == 0:
            env.reset()
            if i > 0:
                place_ant(env, task, rng)
        action = rng.uniform(-1.2, 1.2, env.action_space.shape).astype(np.float32)
        row = {"qpos": env.data.qpos.copy(), "qvel": env.data.qvel.copy(), "action": action}
        if task.startswith("antmaze"):
            row["goal"] = env.goal
        observation, reward, terminated, truncated, _ = env.step(action)
        row |= {
            "next_qpos": env.data.qpos.copy(),
            "next_qvel": env.data.qvel.copy(),
            "next_observation": observation,
            "reward": reward,
            "terminated": terminated,
        }
        for key, value in row.items():
            rows.setdefault(key, []).append(value)
        if (terminated and not task.startswith("antmaze")) or truncated:
            env.reset()
    return {key: np.array(values) for key, values in rows.items()}


def place_ant(env: Any, task: str, rng: np.random.Generator) -> None:
    """Place the ant anywhere, also inside a wall, and with probability 1/2 the goal near it."""
    maze = MAZES[task.split("-")[1]]
    free = [(r, c) for r, line in enumerate(maze) for c, cell in enumerate(line) if cell != "#"]
    row, column = free[rng.integers(len(free))]
    qpos, qvel = env.data.qpos.copy(), env.data.qvel.copy()
    qpos[:2] = 4.0 * (column - 1) + rng.uniform(-1.6, 1.6), 4.0 * (row - 1) + rng.uniform(-1.6, 1.6)
    env.set_state(qpos, qvel)
    if rng.random() < 0.5:
        env.goal = qpos[:2] + rng.uniform(-0.6, 0.6, 2)


def starts_and_goals(env: gymnasium.Env, resets: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Observations and goals after `resets` resets, seeded once."""
    starts, goals = [], []
    for i in range(resets):
        observation, info = env.reset(seed=0 if i == 0 else None)
        starts.append(observation)
        goals.append(info.get("goal", np.zeros(0)))
    return np.array(starts), np.array(goals)


def largest_gap(first: NDArray[Any], second: NDArray[Any]) -> float:
    """The Kolmogorov-Smirnov statistic, maximum over columns."""
    gaps = [0.0]
    for a, b in zip(first.T, second.T):
        points = np.concatenate([a, b])
        below = [np.searchsorted(np.sort(x), points, side="right") / len(x) for x in (a, b)]
        gaps.append(np.abs(below[0] - below[1]).max())
    return max(gaps)


def complete_episodes(task: str, episodes: int) -> tuple[NDArray[Any], NDArray[Any], int]:
    """Play complete episodes of a bundled policy in both environments, with the same seeds.

    Returns:
        Returns ``[episodes, 2]`` (D4RL's and ours), the largest difference of observations per
        episode ``[episodes]``, and the number of steps.
    """
    envs = make_env(task, backend="d4rl"), make_env(task)
    policy = load_policies(task.split("-")[0])["expert"]
    returns, gaps, steps = np.zeros((episodes, 2)), np.zeros(episodes), 0
    for episode in range(episodes):
        observations = [env.reset(seed=episode)[0] for env in envs]
        over = False
        while not over:
            actions = [policy(observation).astype(np.float32) for observation in observations]
            results = [env.step(action) for env, action in zip(envs, actions)]
            observations = [result[0] for result in results]
            returns[episode] += [result[1] for result in results]
            gaps[episode] = max(gaps[episode], np.abs(observations[0] - observations[1]).max())
            over = any(result[2] or result[3] for result in results)
            steps += 1
    return returns, gaps, steps


def percentiles(errors: NDArray[np.float64]) -> str:
    return " / ".join(f"{value:.0e}" for value in np.percentile(errors, [50, 95, 100]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000, help="steps per task")
    parser.add_argument("--resets", type=int, default=1000, help="resets per task")
    parser.add_argument("--episodes", type=int, default=3, help="complete episodes per task")
    parser.add_argument("--tasks", nargs="+", default=TASKS, metavar="TASK")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", metavar="FILE", help="also save the transitions, as .npz")
    parser.add_argument("--compare", metavar="FILE", help="only step saved transitions")
    arguments = parser.parse_args()
    if arguments.compare:
        with np.load(arguments.compare) as arrays:
            recorded: dict[str, dict[str, NDArray[Any]]] = {}
            for name in arrays:
                task, key = name.split("/")
                recorded.setdefault(task, {})[key] = arrays[name]
        print_steps(recorded)
        return
    recorded = {task: record(task, arguments.steps, arguments.seed) for task in arguments.tasks}
    if arguments.record:
        flat = {f"{task}/{key}": v for task, rows in recorded.items() for key, v in rows.items()}
        np.savez_compressed(arguments.record, **flat)
    print_steps(recorded)
    print_resets(arguments.tasks, arguments.resets)
    print_episodes([t for t in arguments.tasks if not t.startswith("antmaze")], arguments.episodes)


def print_steps(recorded: dict[str, dict[str, NDArray[Any]]]) -> None:
    steps = len(next(iter(recorded.values()))["reward"])
    print(f"MuJoCo {mujoco.__version__} against D4RL's own, {steps} steps per task.\n")
    print("One-step error, median / 95 % / largest, and steps on which terminations agree:\n")
    print("| task | qpos | qvel | observation | reward | terminations | of them terminal |")
    print("|---|---|---|---|---|---|---|")
    for task, rows in recorded.items():
        errors = replay_errors(make_env(task), rows)
        agree = 100 * (errors.pop("terminated") == 0).mean()
        cells = [percentiles(values) for values in errors.values()]
        print(f"| {task} | {' | '.join(cells)} | {agree:g} % | {rows['terminated'].sum()} |")


def print_resets(tasks: Sequence[str], n: int) -> None:
    print(f"\nDistributions over {n} resets: largest gap between the cumulative distributions over")
    print(f"all coordinates ({1.95 * np.sqrt(2 / n):.3f} is exceeded for one coordinate in 1,000),")
    print("steps to truncation, and the score of a return of 1000:\n")
    print(
        "| task | same seed, same start | starts | goals | goal x, D4RL / ours | goal y | steps |"
        " score |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for task in tasks:
        theirs, ours = make_env(task, backend="d4rl"), make_env(task)
        (start, goal), (start_, goal_) = starts_and_goals(theirs, n), starts_and_goals(ours, n)
        ranges = [
            "–"
            if goal.size == 0
            else " / ".join(f"{g[:, i].min():.2f}..{g[:, i].max():.2f}" for g in (goal, goal_))
            for i in range(2)
        ]
        same = np.abs(start[0] - start_[0]).max()
        gaps = [
            f"{largest_gap(start, start_):.3f}",
            f"{largest_gap(goal, goal_):.3f}" if goal.size else "–",
        ]
        steps = f"{theirs.max_episode_steps} / {max_episode_steps(task)}"
        scores = f"{100 * theirs.normalized_score(1000.0):.6g} / {score(task, 1000.0):.6g}"
        print(f"| {task} | {same:.0e} | {' | '.join(gaps + ranges)} | {steps} | {scores} |")


def print_episodes(tasks: Sequence[str], episodes: int) -> None:
    print(f"\nComplete episodes of a bundled policy, {episodes} per task, from the same seeds:\n")
    print(
        "| task | steps | mean return, D4RL / ours | largest gap of an observation, per episode |"
    )
    print("|---|---|---|---|")
    for task in tasks:
        returns, gaps, steps = complete_episodes(task, episodes)
        means = " / ".join(f"{value:.6f}" for value in returns.mean(axis=0))
        print(f"| {task} | {steps} | {means} | {', '.join(f'{gap:.0e}' for gap in gaps)} |")


if __name__ == "__main__":
    main()
