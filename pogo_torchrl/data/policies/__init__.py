"""Small bundled policies of several levels, which generate data without a download.

``{environment}.npz`` contains the weights; ``manifest.json`` records how each level was found and
its scores. ``python -m pogo_torchrl.data.train_policies`` writes both.
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

# Level names, and the fraction of the best return at which the search's policy is selected.
LEVELS: dict[str, float] = {
    "novice": 0.1,
    "beginner": 0.25,
    "medium": 0.5,
    "advanced": 0.75,
    "expert": 1.0,
}


@dataclass(frozen=True)
class LinearPolicy:
    """A deterministic policy ``action = clip(gain (observation - mean), -1, 1)``.

    Args:
        gain: weights divided by the standard deviation of the observations, ``[d, obs]``.
        mean: mean of the observations, ``[obs]``.

    Example:
        >>> policy = LinearPolicy(np.array([[2.0, 0.0]]), np.array([1.0, 5.0]))
        >>> policy(np.array([1.25, 0.0]))
        array([0.5])
    """

    gain: NDArray[np.float64]
    mean: NDArray[np.float64]

    def __call__(self, observation: NDArray[np.floating]) -> NDArray[np.float64]:
        """Compute the action ``[d]`` for an observation ``[obs]``."""
        return clip(self.gain @ (observation - self.mean), -1.0, 1.0)


def load_policies(environment: str, folder: Path = FOLDER) -> dict[str, LinearPolicy]:
    """Load the policies of one environment, from the lowest to the highest level.

    Args:
        environment: ``"halfcheetah"``, ``"hopper"`` or ``"walker2d"``.
        folder: folder of the policies. Defaults to the bundled policies.

    Returns:
        The policy of each level, by its name in :data:`LEVELS`.

    Raises:
        FileNotFoundError: when the folder contains no policies of this environment.

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
    """Load the manifest, which records how the policies were found and their scores.

    Args:
        folder: folder of the policies. Defaults to the bundled policies.

    Returns:
        For each environment, the seed of the search, the MuJoCo version and, for each level, the
        environment steps at which it was found and its mean returns and D4RL scores without and
        with noise. Empty if there is no manifest.

    Example:
        >>> load_manifest()["hopper"]["levels"]["expert"]["score"] > 90
        True
    """
    path = folder / MANIFEST
    return json.loads(path.read_text()) if path.exists() else {}
