"""Does the installed MuJoCo still move as D4RL's did? Recorded transitions tell, at start-up."""

from __future__ import annotations

import functools
import logging
from importlib.resources import files
from typing import Any

import gymnasium
import mujoco
import numpy as np
from numpy.typing import NDArray

from pogo_torchrl.envs.antmaze import D4RLAntMaze
from pogo_torchrl.envs.locomotion import LOCOMOTION
from pogo_torchrl.envs.transitions import replay_errors

ALLOWED_ERROR = 1e-5
"""Largest one-step error at which the physics count as D4RL's."""
TESTED_MUJOCO = ">=3.3,<=4.0.0"
"""The releases of MuJoCo that were compared with D4RL's environments, and match."""

_LOGGER = logging.getLogger("pogo_torchrl.envs")
ENVIRONMENTS: dict[str, Any] = {**LOCOMOTION, "antmaze": D4RLAntMaze}


def check_physics(environment: str) -> float:
    """Measure the installed MuJoCo against transitions recorded in D4RL's own environment.

    The package carries a few transitions per environment, recorded under random actions with d4rl
    1.1 and MuJoCo 2.1.0. Each is stepped again from its recorded state. Takes some milliseconds;
    no random state is read or written.

    Args:
        environment: `"halfcheetah"`, `"hopper"`, `"walker2d"` or `"antmaze"` (its smallest maze).

    Returns:
        The largest absolute error of a position, velocity or reward after one step: about 1e-13
        where the physics are D4RL's; more than `ALLOWED_ERROR` (1e-5) where they are not. Infinite
        if the simulation fails or an episode ends where D4RL's went on.

    Raises:
        ValueError: for an unknown environment.

    Example:
        >>> check_physics("hopper") <= ALLOWED_ERROR
        True
    """
    if environment not in ENVIRONMENTS:
        raise ValueError(
            f"environment={environment!r} is unknown; use one of {', '.join(ENVIRONMENTS)}"
        )
    env: gymnasium.Env = ENVIRONMENTS[environment]()
    errors = replay_errors(env, recorded_transitions(environment))
    env.close()
    if errors.pop("terminated").any():
        return float("inf")
    return float(max(values.max() for values in errors.values()))


def recorded_transitions(environment: str) -> dict[str, NDArray[Any]]:
    """The transitions that the package carries, as `replay_errors` takes them."""
    with (files("pogo_torchrl.envs") / "recorded.npz").open("rb") as file, np.load(file) as all_:
        prefix = f"{environment}/"
        return {key.removeprefix(prefix): all_[key] for key in all_ if key.startswith(prefix)}


@functools.cache  # once per environment and process
def warn_if_physics_differ(environment: str) -> None:
    """Log one warning if the installed physics of an environment are not D4RL's."""
    error = check_physics(environment)
    if error > ALLOWED_ERROR:
        _LOGGER.warning(
            "%s on MuJoCo %s deviates from D4RL's environment: one-step error %.1e, allowed %.0e. "
            "Scores may not be comparable with D4RL's; to make them so, install a version known to "
            "match: pip install 'mujoco%s'",
            environment,
            mujoco.__version__,
            error,
            ALLOWED_ERROR,
            TESTED_MUJOCO,
        )
