"""Check a dataset against the environments: the command `pogo check-dataset`.

Sets the states of a file in D4RL's layout, steps the recorded actions and compares with the rows
that follow.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

from pogo_torchrl.envs import make_env, split_task
from pogo_torchrl.envs.antmaze import is_free
from pogo_torchrl.envs.transitions import replay, replay_errors, row_errors

__all__ = ["Report", "check", "find_task", "read_rows", "replay_errors"]

TOLERANCE = 1e-5
"""Error that median and 95 % of the rows may not exceed, beyond what rounded states explain."""
DEFAULT_LIMIT = 2000
_PROBE_ROWS = 50
# One task per environment that `make_env` knows.
_CANDIDATES = (
    "halfcheetah-medium-v2",
    "hopper-medium-v2",
    "walker2d-medium-v2",
    "antmaze-umaze-v2",
    "antmaze-medium-play-v2",
    "antmaze-large-play-v2",
)
_FIELDS = {
    "qpos": "infos/qpos",
    "qvel": "infos/qvel",
    "action": "actions",
    "reward": "rewards",
    "terminated": "terminals",
}

Rows = dict[str, NDArray[Any]]


class Report(NamedTuple):
    """What `check` found."""

    task: str
    errors: dict[str, NDArray[np.float64]]
    """Per row, as from `replay_errors`."""
    rounding: dict[str, NDArray[np.float64]]
    """Per row, how far states rounded to float32 lead astray; empty for float64 states."""
    matches: bool


def read_rows(path: str | Path, limit: int = DEFAULT_LIMIT) -> Rows:
    """Read transitions, spread evenly over a file in D4RL's layout.

    Args:
        path: an HDF5 file with `actions`, `rewards`, `terminals`, `infos/qpos`, `infos/qvel` and,
            where they are there, `timeouts` and `infos/goal`.
        limit: rows to read at most. Defaults to ``2000``.

    Returns:
        Rows for `replay_errors`, n of them, in the file's types: `qpos`, `qvel`, `action`, `goal`,
        `reward`, `terminated`, `next_qpos`, `next_qvel`. What follows a row that ends an episode,
        or the file, is NaN.

    Raises:
        ValueError: if the file is missing, is not HDF5, or lacks a field; the message says what.

    Example:
        >>> read_rows("missing.hdf5")
        Traceback (most recent call last):
        ...
        ValueError: missing.hdf5 does not exist; give the path of an HDF5 file in D4RL's layout
    """
    if not Path(path).is_file():
        problem = "is not a file" if Path(path).exists() else "does not exist"
        raise ValueError(f"{path} {problem}; give the path of an HDF5 file in D4RL's layout")
    if limit < 1:
        raise ValueError(f"limit={limit} must be an integer >= 1")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{path} is not a readable HDF5 file ({error})") from error
    with file:
        missing = [name for name in _FIELDS.values() if name not in file]
        if missing:
            raise ValueError(
                f"{path} lacks {', '.join(missing)}; use a file in D4RL's layout that was recorded "
                "with the simulator's states"
            )
        sizes = {name: len(file[name]) for name in _FIELDS.values()}
        n = sizes["actions"]
        if n == 0 or len(set(sizes.values())) > 1:
            raise ValueError(
                f"{path} has {sizes} rows; all fields must have the same number, at least 1"
            )
        ends = file["terminals"][:].reshape(n).astype(bool)
        if "timeouts" in file:
            ends = ends | file["timeouts"][:].reshape(n).astype(bool)
        ends[-1] = True
        chosen = np.unique(np.linspace(0, n - 1, min(limit, n)).round().astype(int))
        rows = {key: file[name][:][chosen] for key, name in _FIELDS.items()}
        for key in ("qpos", "qvel"):
            following = file[_FIELDS[key]][:][np.minimum(chosen + 1, n - 1)]
            rows[f"next_{key}"] = np.where(ends[chosen, None], np.nan, following)
        if "infos/goal" in file:
            rows["goal"] = file["infos/goal"][:][chosen]
    rows["reward"] = rows["reward"].reshape(-1)
    rows["terminated"] = rows["terminated"].reshape(-1).astype(bool)
    return rows


def find_task(rows: Rows) -> str:
    """Find a task whose environment the rows come from.

    Environments are told apart by the sizes of positions, velocities and actions and, where these
    agree, by the maze in which the ant would stand in walls least often, then by the environment
    whose steps lead closest to the rows that follow.

    Args:
        rows: as from `read_rows`.

    Returns:
        A task of that environment, such as `"hopper-medium-v2"`.

    Raises:
        ValueError: if no environment has these sizes.

    Example:
        >>> rows = {"qpos": np.zeros((1, 6)), "qvel": np.zeros((1, 6)), "action": np.zeros((1, 3))}
        >>> find_task(rows)
        'hopper-medium-v2'
    """
    sizes = tuple(rows[key].shape[1:] for key in ("qpos", "qvel", "action"))
    known = {task: _sizes(task) for task in _CANDIDATES}
    candidates = [task for task, size in known.items() if size == sizes]
    if not candidates:
        flat = ["x".join(map(str, size)) for size in sizes]
        raise ValueError(
            f"no environment has {flat[0]} positions, {flat[1]} velocities and {flat[2]} actions; "
            "known are files of halfcheetah, hopper, walker2d and antmaze"
        )
    if len(candidates) == 1:
        return candidates[0]
    probe = np.unique(np.linspace(0, len(rows["qpos"]) - 1, _PROBE_ROWS).round().astype(int))
    sample = {key: values[probe] for key, values in rows.items()}
    return min(candidates, key=lambda task: (_rows_in_walls(task, rows), _error(task, sample)))


def _sizes(task: str) -> tuple[tuple[int, ...], ...]:
    env: Any = make_env(task).unwrapped
    return (env.model.nq,), (env.model.nv,), (env.model.nu,)


def _rows_in_walls(task: str, rows: Rows) -> int:
    environment, level = split_task(task)
    if environment != "antmaze":
        return 0
    return int((~is_free(level.split("-")[0], rows["qpos"][:, :2])).sum())


def _error(task: str, rows: Rows) -> float:
    errors = replay_errors(make_env(task), rows)
    return float(sum(np.nansum(np.minimum(values, 1e6)) for values in errors.values()))


def check(rows: Rows, task: str | None = None) -> Report:
    """Compare an environment with recorded rows.

    The rows match if median and 95 % of the errors of positions, velocities and rewards stay within
    1e-5 and at most 1 % of the terminations differ. Where the states were rounded to float32, the
    same rounding, applied once more, measures what it explains, and ten times that is allowed too.

    Args:
        rows: as from `read_rows`.
        task: a D4RL task name. Defaults to `find_task`.

    Raises:
        ValueError: for an unknown task, or one whose environment has other sizes than the rows.

    Example:
        >>> from pogo_torchrl.envs.selfcheck import recorded_transitions
        >>> report = check(recorded_transitions("hopper"))
        >>> report.task, report.matches
        ('hopper-medium-v2', True)
    """
    if task is None:
        task = find_task(rows)
    else:
        sizes = tuple(rows[key].shape[1:] for key in ("qpos", "qvel", "action"))
        if sizes != _sizes(task):
            raise ValueError(
                f"task={task!r} has positions, velocities and actions of sizes {_sizes(task)}, but "
                f"the rows have {sizes}; leave the task out to have it found"
            )
    env = make_env(task)
    if split_task(task)[0] == "antmaze" and "goal" not in rows:
        # Rewards and terminations depend on a goal that is not known.
        rows = {key: v for key, v in rows.items() if key not in ("reward", "terminated")}
    errors = replay_errors(env, rows)
    rounding: dict[str, NDArray[np.float64]] = {}
    if _is_float32(rows["qpos"]) and _is_float32(rows["qvel"]):
        exact, moved = replay(env, rows), replay(env, _nudge(rows))
        rounding = {
            key: np.maximum(row_errors(moved[key], exact[key]), _spacing(exact[key]))
            for key in errors
            if key != "terminated"
        }
    return Report(task, errors, rounding, _matches(errors, rounding))


def _matches(errors: dict[str, NDArray[Any]], rounding: dict[str, NDArray[Any]]) -> bool:
    for key, values in errors.items():
        known = values[~np.isnan(values)]
        if key == "terminated":
            if known.mean() > 0.01:
                return False
        elif len(known):
            allowed = TOLERANCE + 10 * np.percentile(rounding.get(key, np.zeros(1)), [50, 95])
            if (np.percentile(known, [50, 95]) > allowed).any():
                return False
    return True


def _is_float32(values: NDArray[Any]) -> bool:
    return values.dtype == np.float32 or bool((values.astype(np.float32) == values).all())


def _spacing(values: NDArray[Any]) -> NDArray[np.float64]:
    spacing = np.spacing(np.abs(values).astype(np.float32)).astype(np.float64)
    return spacing.reshape(len(values), -1).max(axis=1)


def _nudge(rows: Rows) -> Rows:
    """Move every number of the states by up to half of float32's spacing, as rounding does."""
    rng = np.random.default_rng(0)
    nudged = dict(rows)
    for key in ("qpos", "qvel"):
        single = rows[key].astype(np.float32)
        offset = rng.uniform(-0.5, 0.5, single.shape) * np.spacing(np.abs(single))
        nudged[key] = single.astype(np.float64) + offset
    return nudged


def format_report(report: Report) -> str:
    """The report as it stands on the screen."""
    rows = len(report.errors["qpos"])
    lines = [
        f"{rows} rows in the environment of {report.task}; one-step errors:",
        f"{'':12}{'median':>10}{'95 %':>10}{'largest':>10}",
    ]
    for key, values in report.errors.items():
        known = values[~np.isnan(values)]
        if key == "terminated":
            lines.append(f"terminations agree on {100 * (1 - known.mean()):.2f} % of the rows")
        elif len(known):
            lines.append(_line(key, known))
            if key in report.rounding:
                lines.append(_line("  rounding", report.rounding[key]))
    if report.rounding:
        lines.append("The states are float32; 'rounding' is the error which that alone brings.")
    if "reward" not in report.errors:
        lines.append("Rewards and terminations are not compared: the file has no infos/goal.")
    lines.append(
        "The file matches the environment's physics."
        if report.matches
        else "The file does not match: another environment or another MuJoCo recorded it."
    )
    return "\n".join(lines)


def _line(name: str, values: NDArray[np.float64]) -> str:
    return f"{name:12}" + "".join(f"{v:10.1e}" for v in np.percentile(values, [50, 95, 100]))
