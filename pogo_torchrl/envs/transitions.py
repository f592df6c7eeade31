"""Replay recorded transitions and compare the results with the recorded ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

Rows = Mapping[str, NDArray[Any]]


def replay(env: gymnasium.Env, rows: Rows) -> dict[str, NDArray[Any]]:
    """Step an environment once from each of n recorded states.

    Args:
        env: an environment created by :func:`~pogo_torchrl.envs.make_env`. Its random state is not
            modified.
        rows: ``qpos [n, nq]``, ``qvel [n, nv]``, ``action [n, d]`` and, for antmaze, optionally
            ``goal [n, 2]``; without it, the environment keeps its goal.

    Returns:
        ``qpos [n, nq]``, ``qvel [n, nv]`` and ``observation [n, k]`` after the step, ``reward [n]``
        and ``terminated [n]`` (bool).

    Example:
        >>> from pogo_torchrl.envs import make_env
        >>> env = make_env("hopper-medium-v2")
        >>> rows = {"qpos": np.tile([0, 1.25, 0, 0, 0, 0], (2, 1)), "qvel": np.zeros((2, 6)),
        ...         "action": np.zeros((2, 3), dtype=np.float32)}
        >>> replay(env, rows)["terminated"]
        array([False, False])
    """
    core: Any = env.unwrapped
    results: dict[str, list] = {
        key: [] for key in ("qpos", "qvel", "observation", "reward", "terminated")
    }
    for i in range(len(rows["action"])):
        core.set_state(rows["qpos"][i], rows["qvel"][i])
        if "goal" in rows:
            core.goal = rows["goal"][i]
        observation, reward, terminated, _, _ = core.step(rows["action"][i])
        after = (core.data.qpos.copy(), core.data.qvel.copy(), observation, reward, terminated)
        for values, value in zip(results.values(), after, strict=True):
            values.append(value)
    return {key: np.array(values) for key, values in results.items()}


def replay_errors(env: gymnasium.Env, rows: Rows) -> dict[str, NDArray[np.float64]]:
    """Compute the errors of an environment's steps with respect to n recorded transitions.

    Args:
        env: an environment created by :func:`~pogo_torchrl.envs.make_env`.
        rows: as for :func:`~pogo_torchrl.envs.transitions.replay`, and any of the recorded results
            ``next_qpos [n, nq]``, ``next_qvel [n, nv]``, ``next_observation [n, k]``,
            ``reward [n]`` and ``terminated [n]``. NaN marks unknown values.

    Returns:
        For each recorded result, under ``qpos``, ``qvel``, ``observation``, ``reward`` or
        ``terminated``, the largest absolute difference in each row, ``[n]``: NaN where the recorded
        value is unknown, infinite where the simulated value is not finite.

    Example:
        >>> from pogo_torchrl.envs import make_env
        >>> env = make_env("hopper-medium-v2")
        >>> rows = {"qpos": np.array([[0, 1.25, 0, 0, 0, 0]]), "qvel": np.zeros((1, 6)),
        ...         "action": np.zeros((1, 3), dtype=np.float32)}
        >>> after = replay(env, rows)
        >>> replay_errors(env, {**rows, "next_qpos": after["qpos"] + 0.5})
        {'qpos': array([0.5])}
    """
    recorded = {
        "qpos": "next_qpos",
        "qvel": "next_qvel",
        "observation": "next_observation",
        "reward": "reward",
        "terminated": "terminated",
    }
    after = replay(env, rows)
    return {
        key: row_errors(after[key], rows[name]) for key, name in recorded.items() if name in rows
    }


def row_errors(values: NDArray[Any], reference: NDArray[Any]) -> NDArray[np.float64]:
    """Largest absolute difference in each row.

    Args:
        values: simulated values, ``[n, ...]``.
        reference: recorded values, ``[n, ...]``; NaN where unknown.

    Returns:
        The errors ``[n]``: NaN for rows with unknown values, infinite where ``values`` are not
        finite.
    """
    reference = np.asarray(reference, dtype=np.float64)
    errors = np.abs(np.asarray(values, dtype=np.float64) - reference)
    errors[~np.isfinite(errors) & ~np.isnan(reference)] = np.inf
    return errors.reshape(len(errors), -1).max(axis=1)
