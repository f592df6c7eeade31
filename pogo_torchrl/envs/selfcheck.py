"""Check at start-up that the installed MuJoCo reproduces transitions recorded with D4RL's."""

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
"""Largest one-step error at which the physics count as equal to D4RL's."""
TESTED_MUJOCO = ">=3.3,<=4.0.0"
"""MuJoCo releases verified to match D4RL's environments."""

_LOGGER = logging.getLogger("pogo_torchrl.envs")
ENVIRONMENTS: dict[str, Any] = {**LOCOMOTION, "antmaze": D4RLAntMaze}
"""Environment class by name."""


def check_physics(environment: str) -> float:
    """Compare the installed MuJoCo with transitions recorded in D4RL's own environment.

    The package includes a few transitions per environment, recorded under random actions with d4rl
    1.1 and MuJoCo 2.1.0. Each is replayed from its recorded state. The check takes a few
    milliseconds; no random state is read or modified.

    Args:
        environment: ``"halfcheetah"``, ``"hopper"``, ``"walker2d"`` or ``"antmaze"`` (its smallest
            maze).

    Returns:
        The largest absolute error of a position, velocity or reward after one step: about 1e-13
        if the physics match D4RL's, more than ``ALLOWED_ERROR`` (1e-5) if they do not. Infinite if
        the simulation fails or the terminations differ.

    Raises:
        ValueError: for an unknown environment.

    Example:
        >>> check_physics("hopper") <= ALLOWED_ERROR
        True
    """
    if environment not in ENVIRONMENTS:
        raise ValueError(
            f"environment={environment!r} is unknown; use one of {', '.join(ENVIRONMENTS)}."
        )
    env: gymnasium.Env = ENVIRONMENTS[environment]()
    errors = replay_errors(env, recorded_transitions(environment))
    env.close()
    if errors.pop("terminated").any():
        return float("inf")
    return float(max(values.max() for values in errors.values()))


def recorded_transitions(environment: str) -> dict[str, NDArray[Any]]:
    """Load the bundled transitions of an environment.

    Args:
        environment: see :func:`check_physics`.

    Returns:
        Rows for :func:`~pogo_torchrl.envs.replay_errors`.
    """
    with (files("pogo_torchrl.envs") / "recorded.npz").open("rb") as file, np.load(file) as all_:
        prefix = f"{environment}/"
        return {key.removeprefix(prefix): all_[key] for key in all_ if key.startswith(prefix)}


@functools.cache  # once per environment and process
def warn_if_physics_differ(environment: str) -> None:
    """Log one warning if the physics of an environment deviate from D4RL's.

    Args:
        environment: see :func:`check_physics`.
    """
    error = check_physics(environment)
    if error > ALLOWED_ERROR:
        _LOGGER.warning(
            "%s on MuJoCo %s deviates from D4RL's environment: one-step error %.1e, allowed %.0e. "
            "Scores may not be comparable with D4RL's. Install a version known to match: "
            "pip install 'mujoco%s'",
            environment,
            mujoco.__version__,
            error,
            ALLOWED_ERROR,
            TESTED_MUJOCO,
        )
