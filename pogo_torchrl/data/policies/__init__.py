"""Small policies of several levels, bundled so that there is data without a download.

`{environment}.npz` holds the weights and `manifest.json` how each level was found and what it
scores; `python -m pogo_torchrl.data.train_policies` writes both.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pogo_torchrl.envs.locomotion import clip

FOLDER = Path(__file__).parent
MANIFEST = "manifest.json"

# Level names, with the share of the best return at which a policy is taken from the search.
LEVELS: dict[str, float] = {
    "novice": 0.1,
    "beginner": 0.25,
    "medium": 0.5,
    "advanced": 0.75,
    "expert": 1.0,
}


@dataclass(frozen=True)
class LinearPolicy:
    """A deterministic policy `action = clip(gain (observation - mean), -1, 1)`.

    Args:
        gain: weights divided by the observations' standard deviation, [action, observation].
        mean: mean of the observations, [observation].

    Example:
        >>> policy = LinearPolicy(np.array([[2.0, 0.0]]), np.array([1.0, 5.0]))
        >>> policy(np.array([1.25, 0.0]))
        array([0.5])
    """

    gain: NDArray[np.float64]
    mean: NDArray[np.float64]

    def __call__(self, observation: NDArray[np.floating]) -> NDArray[np.float64]:
        return clip(self.gain @ (observation - self.mean), -1.0, 1.0)


def load_policies(environment: str, folder: Path = FOLDER) -> dict[str, LinearPolicy]:
    """The policies of one environment, from the lowest to the highest level.

    Args:
        environment: `"halfcheetah"`, `"hopper"` or `"walker2d"`.
        folder: where the policies lie; default: those of this package.

    Returns:
        A policy for each name in `LEVELS`.

    Raises:
        FileNotFoundError: if the folder holds no policies of this environment.

    Example:
        >>> list(load_policies("hopper"))
        ['novice', 'beginner', 'medium', 'advanced', 'expert']
    """
    with np.load(folder / f"{environment}.npz") as arrays:
        gains, means = arrays["gain"].astype(np.float64), arrays["mean"].astype(np.float64)
    return {
        name: LinearPolicy(gain, mean)
        for name, gain, mean in zip(LEVELS, gains, means, strict=True)
    }


def load_manifest(folder: Path = FOLDER) -> dict[str, dict]:
    """How the policies were found and what they score, by environment.

    Args:
        folder: where the policies lie; default: those of this package.

    Returns:
        Per environment the search's seed, MuJoCo's version and, per level, the environment steps
        after which it was met, and mean returns and D4RL scores without and with noise.

    Example:
        >>> load_manifest()["hopper"]["levels"]["expert"]["score"] > 90
        True
    """
    path = folder / MANIFEST
    return json.loads(path.read_text()) if path.exists() else {}
