"""Train the bundled policies with augmented random search (Mania et al., 2018).

    python -m pogo_torchrl.data.train_policies hopper --seed 0 1 2 --minutes 10

runs one search per seed, selects the seed with the best policy and writes its levels to
``policies/``. The result of a search depends only on its seed and number of environment steps.

Source: Mania, Guy & Recht, *Simple random search provides a competitive approach to reinforcement
learning*, 2018, arXiv:1803.07055.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import gymnasium
import mujoco
import numpy as np
from numpy.typing import NDArray

from pogo_torchrl.data.policies import FOLDER, LEVELS, MANIFEST, LinearPolicy, load_manifest
from pogo_torchrl.data.rollouts import MAX_NOISE, rollout
from pogo_torchrl.envs import make_env, score


@dataclass(frozen=True)
class Search:
    """Hyperparameters of one environment.

    As in Mania et al. (2018), but with fewer directions, which need fewer steps. Returns of
    Walker2d vary so much that ranking its snapshots takes more episodes.

    Args:
        directions: number of random directions per iteration.
        best_directions: number of directions with the best returns used for the update.
        step_size: step size of the update.
        noise: standard deviation of the perturbation of the weights.
        survival_bonus: reward per step for staying upright, subtracted during the search.
        steps: number of environment steps.
        snapshot_episodes: number of episodes used to evaluate a snapshot.
    """

    directions: int
    best_directions: int
    step_size: float
    noise: float
    survival_bonus: float
    steps: int
    snapshot_episodes: int


SEARCHES: dict[str, Search] = {
    "halfcheetah": Search(8, 4, 0.02, 0.03, 0.0, 1_000_000, 3),
    "hopper": Search(8, 4, 0.01, 0.025, 1.0, 800_000, 3),
    "walker2d": Search(8, 4, 0.01, 0.025, 1.0, 1_000_000, 10),
}
SNAPSHOTS = 60
EVALUATION_EPISODES = 20


@dataclass(frozen=True)
class Snapshot:
    """A policy recorded during a search.

    Args:
        steps: environment steps at which it was recorded.
        policy: the policy.
        mean_return: its mean return without noise.
    """

    steps: int
    policy: LinearPolicy
    mean_return: float


class RunningMoments:
    """Running mean and standard deviation of observations.

    Args:
        size: dimension of the observations.

    Source: Chan, Golub & LeVeque, *Updating Formulae and a Pairwise Algorithm for Computing Sample
    Variances*, 1979.
    """

    def __init__(self, size: int) -> None:
        self.count = 0
        self.mean = np.zeros(size)
        self.squares = np.zeros(size)

    def update(self, observations: NDArray[np.floating]) -> None:
        """Add observations ``[steps, size]``."""
        batch = observations.astype(np.float64)
        count = len(batch)
        shift = batch.mean(axis=0) - self.mean
        total = self.count + count
        self.squares += batch.var(axis=0) * count + shift**2 * self.count * count / total
        self.mean += shift * count / total
        self.count = total

    @property
    def std(self) -> NDArray[np.float64]:
        """Standard deviation ``[size]``, or 1 for dimensions without any variation so far."""
        variance = self.squares / max(self.count, 1)
        return np.where(variance > 1e-8, np.sqrt(np.maximum(variance, 1e-8)), 1.0)


def mean_return(
    env: gymnasium.Env, policy: LinearPolicy, *, episodes: int, max_noise: float = 0.0
) -> float:
    """Mean return of a policy, with the same start states for every policy.

    Args:
        env: the environment.
        policy: the policy.
        episodes: number of episodes.
        max_noise: maximum scale of the exploration noise, see
            :func:`~pogo_torchrl.data.rollouts.rollout`. Defaults to ``0``.

    Returns:
        The mean undiscounted return.
    """
    rngs = [np.random.default_rng(child) for child in np.random.SeedSequence(0).spawn(episodes)]
    return float(np.mean([rollout(env, policy, max_noise, rng)["rewards"].sum() for rng in rngs]))


def search(environment: str, seed: int, steps: int, minutes: float) -> list[Snapshot]:
    """Run augmented random search, variant V2-t.

    Args:
        environment: ``"halfcheetah"``, ``"hopper"`` or ``"walker2d"``.
        seed: seed of the search.
        steps: number of environment steps, not counting evaluations.
        minutes: time limit in minutes.

    Returns:
        The snapshots in chronological order, starting with the untrained policy.

    Source: Mania, Guy & Recht, *Simple random search provides a competitive approach to
    reinforcement learning*, 2018, arXiv:1803.07055, algorithm 2.
    """
    settings = SEARCHES[environment]
    env = make_env(f"{environment}-medium-v2")
    shape = (*env.action_space.shape, *env.observation_space.shape)  # type: ignore[misc]
    rng = np.random.default_rng(seed)
    weights = np.zeros(shape)
    moments = RunningMoments(shape[1])
    deadline = time.monotonic() + 60 * minutes
    snapshots: list[Snapshot] = []
    done = 0
    while done <= steps and time.monotonic() < deadline:
        # A policy keeps the moments it was evaluated with, not those updated by its rollouts.
        mean, std = moments.mean.copy(), moments.std
        if done >= len(snapshots) * steps / SNAPSHOTS:
            policy = LinearPolicy(weights / std, mean)
            value = mean_return(env, policy, episodes=settings.snapshot_episodes)
            snapshots.append(Snapshot(done, policy, value))
            print(f"{environment} seed {seed}: {done:>9,} steps, return {value:7.1f}", flush=True)
        directions = rng.standard_normal((settings.directions, *shape))
        returns = np.zeros((settings.directions, 2))
        for i, direction in enumerate(directions):
            for j, sign in enumerate((1, -1)):
                gain = (weights + sign * settings.noise * direction) / std
                episode = rollout(env, LinearPolicy(gain, mean), 0.0, rng)
                # Exclude the bonus for staying upright, which rewards standing still.
                returns[i, j] = (episode["rewards"] - settings.survival_bonus).sum()
                moments.update(episode["observations"])
                done += len(episode["rewards"])
        best = np.argsort(returns.max(axis=1))[-settings.best_directions :]
        differences = returns[best, 0] - returns[best, 1]
        slope = np.tensordot(differences, directions[best], axes=1) / len(best)
        weights += settings.step_size / returns[best].std() * slope
    return snapshots


def pick_levels(snapshots: list[Snapshot]) -> dict[str, Snapshot]:
    """Select a snapshot for each level.

    Args:
        snapshots: the snapshots of a search, in chronological order.

    Returns:
        For each level, of the snapshots up to the best one, the one whose return is closest to the
        level's fraction of the best return.
    """
    best = max(range(len(snapshots)), key=lambda i: snapshots[i].mean_return)
    candidates = snapshots[: best + 1]
    top = candidates[best].mean_return
    return {
        name: min(candidates, key=lambda snapshot: abs(snapshot.mean_return - share * top))
        for name, share in LEVELS.items()
    }


def describe(environment: str, level: Snapshot) -> dict[str, float]:
    """Evaluate a level and return its entry in the manifest.

    Args:
        environment: ``"halfcheetah"``, ``"hopper"`` or ``"walker2d"``.
        level: the snapshot selected for the level.
    """
    env = make_env(f"{environment}-medium-v2")
    entry: dict[str, float] = {"steps": level.steps}
    for prefix, noise in (("", 0.0), ("noisy_", MAX_NOISE[environment])):
        value = mean_return(env, level.policy, episodes=EVALUATION_EPISODES, max_noise=noise)
        entry[f"{prefix}return"] = round(value, 1)
        entry[f"{prefix}score"] = round(score(f"{environment}-medium-v2", value), 1)
    return entry


def save(environment: str, levels: dict[str, Snapshot], entry: dict, folder: Path) -> None:
    """Save the policies of an environment and update the manifest.

    Args:
        environment: ``"halfcheetah"``, ``"hopper"`` or ``"walker2d"``.
        levels: the snapshot of each level.
        entry: the environment's entry in the manifest.
        folder: destination folder, created if it does not exist.
    """
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        folder / f"{environment}.npz",
        gain=np.stack([level.policy.gain for level in levels.values()]).astype(np.float32),
        mean=np.stack([level.policy.mean for level in levels.values()]).astype(np.float32),
    )
    manifest = dict(sorted({**load_manifest(folder), environment: entry}.items()))
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def main() -> None:
    """Run the command-line interface."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("environment", choices=sorted(SEARCHES))
    parser.add_argument(
        "--seed", type=int, nargs="+", default=[0], help="seeds to try; the best is kept"
    )
    parser.add_argument("--steps", type=int, help="environment steps per seed")
    parser.add_argument("--minutes", type=float, default=np.inf, help="time limit per seed")
    parser.add_argument(
        "--output", type=Path, default=FOLDER, help="destination folder of the policies"
    )
    args = parser.parse_args()
    steps = args.steps or SEARCHES[args.environment].steps
    found = {
        seed: pick_levels(search(args.environment, seed, steps, args.minutes)) for seed in args.seed
    }
    seed = max(found, key=lambda seed: found[seed]["expert"].mean_return)
    entry = {
        "seed": seed,
        "mujoco": mujoco.__version__,
        "episodes": EVALUATION_EPISODES,
        "max_noise": MAX_NOISE[args.environment],
        "levels": {name: describe(args.environment, level) for name, level in found[seed].items()},
    }
    save(args.environment, found[seed], entry, args.output)
    print(json.dumps(entry, indent=2))


if __name__ == "__main__":
    main()
