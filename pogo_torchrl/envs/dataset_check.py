"""Check a dataset against the environments: the command ``pogo check-dataset``.

The check sets each recorded state of a file in D4RL's layout, steps the recorded action and
compares the result with the following row.
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
from pogo_torchrl.hdf5_files import (
    NAMES,
    UnsupportedFileError,
    check_real,
    get_local_array,
    get_named_arrays,
    open_hdf5,
    size_in_memory,
)

__all__ = ["Report", "check", "find_task", "read_rows", "replay_errors"]

TOLERANCE = 1e-5
"""Tolerance on the median and 95th percentile of the errors, in addition to rounding errors."""
DEFAULT_LIMIT = 2000
"""Number of rows checked by default."""
MAX_VALUE = 1e10
"""Largest magnitude that MuJoCo takes for a valid state (``mjMAXVAL``)."""
_PROBE_ROWS = 50
# One task per environment.
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

_OPTIONAL = ("timeouts", "dones", "infos/goal")

Rows = dict[str, NDArray[Any]]


class Report(NamedTuple):
    """Result of :func:`check`."""

    task: str
    """The task whose environment was compared with the rows."""
    errors: dict[str, NDArray[np.float64]]
    """Errors per row, see :func:`~pogo_torchrl.envs.replay_errors`."""
    rounding: dict[str, NDArray[np.float64]]
    """Errors per row due to rounding of the states to float32; empty for float64 states."""
    matches: bool
    """Whether the rows match the environment."""


def read_rows(path: str | Path, limit: int = DEFAULT_LIMIT) -> Rows:
    """Read evenly spaced transitions of a file in D4RL's layout.

    Args:
        path: an HDF5 file with ``actions``, ``rewards``, ``terminals``, ``infos/qpos``,
            ``infos/qvel`` and, optionally, ``timeouts`` and ``infos/goal``; other common names are
            understood, see :data:`~pogo_torchrl.hdf5_files.NAMES`.
        limit: maximum number of rows. Defaults to ``2000``.

    Returns:
        Rows for :func:`~pogo_torchrl.envs.replay_errors`, in the dtypes of the file: ``qpos``,
        ``qvel``, ``action``, ``goal``, ``reward``, ``terminated``, ``next_qpos`` and
        ``next_qvel``. The next state is NaN for the last row of each episode and of the file.

    Raises:
        ValueError: when the file does not exist, is not valid HDF5, lacks a field, or has fields of
            other shapes or with values that cannot be simulated.
        OSError: when the system refuses to read the file.

    Example:
        >>> read_rows("missing.hdf5")
        Traceback (most recent call last):
        ...
        ValueError: missing.hdf5 does not exist; give the path of an HDF5 file in D4RL's layout.
    """
    if not Path(path).is_file():
        problem = "is not a file" if Path(path).exists() else "does not exist"
        raise ValueError(f"{path} {problem}; give the path of an HDF5 file in D4RL's layout.")
    if limit < 1:
        raise ValueError(f"limit={limit} must be an integer >= 1.")
    with open_hdf5(Path(path)) as file:
        found = {
            name: array
            for name in (*_FIELDS.values(), *_OPTIONAL)
            if (array := _find(file, name)) is not None
        }
        missing = [name for name in _FIELDS.values() if name not in found]
        if missing:
            raise UnsupportedFileError(
                f"{path} lacks {', '.join(missing)}; use a file in D4RL's layout that includes the "
                "states of the simulator."
            )
        sizes = {name: (array.shape or (0,))[0] for name, array in found.items()}
        n = sizes["actions"]
        if n == 0 or len(set(sizes.values())) > 1:
            raise UnsupportedFileError(
                f"{path} has {sizes} rows; all fields must have the same number, at least 1."
            )
        columns = {name: _values(array, name, n) for name, array in found.items()}
    flags = [columns[name] != 0 for name in ("terminals", "timeouts", "dones") if name in columns]
    ends = np.logical_or.reduce(flags)
    ends[-1] = True
    chosen = np.unique(np.linspace(0, n - 1, min(limit, n)).round().astype(int))
    rows = {key: columns[name][chosen] for key, name in _FIELDS.items()}
    for key in ("qpos", "qvel"):
        following = columns[_FIELDS[key]][np.minimum(chosen + 1, n - 1)]
        rows[f"next_{key}"] = np.where(ends[chosen, None], np.nan, following)
    if "infos/goal" in columns:
        rows["goal"] = columns["infos/goal"][chosen]
    rows["terminated"] = rows["terminated"].astype(bool)
    return rows


def _find(file: h5py.File, name: str) -> h5py.Dataset | None:
    """Look up a field under any of its common names."""
    arrays = get_named_arrays(file, name) if name in NAMES else [get_local_array(file, name)]
    return arrays[0] if arrays else None


def _values(array: h5py.Dataset, name: str, rows: int) -> NDArray[Any]:
    """Read a field, after checking that it can be simulated."""
    check_real(array, name)
    is_matrix = name.startswith("infos/") or name == "actions"
    fits = array.ndim == 2 and array.shape[1] > 0 if is_matrix else array.size == rows
    if not fits or (name == "infos/goal" and array.shape[1] != 2):
        expected = (
            f"({rows}, {2 if name == 'infos/goal' else 'dim'})" if is_matrix else f"({rows},)"
        )
        raise UnsupportedFileError(
            f"{array.file.filename}: {name} has shape {array.shape}; store it with shape "
            f"{expected}."
        )
    size_in_memory(array, name)
    values: NDArray[Any] = array[()]
    # The simulator resets a state with larger values, as it does one with NaN.
    allowed = np.isfinite(values) & (np.abs(values.astype(np.float64)) < MAX_VALUE)
    if not allowed.all():
        bad = np.argwhere(~allowed)[0].tolist()
        raise UnsupportedFileError(
            f"{array.file.filename}: {name}{bad} is {values[tuple(bad)]}, which cannot be "
            f"simulated; repair or drop that row (values must be below {MAX_VALUE:g})."
        )
    return values if is_matrix else values.reshape(-1)


def find_task(rows: Rows) -> str:
    """Detect the environment in which rows were recorded.

    Environments are distinguished by the sizes of positions, velocities and actions. If several
    environments have these sizes, the maze with the fewest positions inside walls is selected and,
    in case of a tie, the environment with the smallest one-step errors.

    Args:
        rows: rows read by :func:`read_rows`.

    Returns:
        A task of that environment, e.g. ``"hopper-medium-v2"``.

    Raises:
        ValueError: when no environment has these sizes.

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
            "use a file of halfcheetah, hopper, walker2d or antmaze."
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

    The rows match if the median and the 95th percentile of the errors of positions, velocities and
    rewards are at most 1e-5 and at most 1 % of the terminations differ. If the states were rounded
    to float32, the effect of the rounding is measured with random perturbations of the same size,
    and ten times this effect is added to the tolerance.

    Args:
        rows: rows read by :func:`read_rows`.
        task: a D4RL task name. Defaults to the result of :func:`find_task`.

    Returns:
        The report.

    Raises:
        ValueError: for an unknown task, or a task whose environment does not have the sizes of the
            rows.

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
                f"the rows have {sizes}; omit the task to detect it automatically."
            )
    env = make_env(task)
    if split_task(task)[0] == "antmaze" and "goal" not in rows:
        # Rewards and terminations depend on the goal, which is unknown.
        rows = {key: v for key, v in rows.items() if key not in ("reward", "terminated")}
    errors = replay_errors(env, rows)
    rounding: dict[str, NDArray[np.float64]] = {}
    if _is_float32(rows["qpos"]) and _is_float32(rows["qvel"]):
        exact, perturbed = replay(env, rows), replay(env, _perturb_states(rows))
        rounding = {
            key: np.maximum(row_errors(perturbed[key], exact[key]), _float32_spacing(exact[key]))
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


def _float32_spacing(values: NDArray[Any]) -> NDArray[np.float64]:
    """Largest spacing of adjacent float32 numbers at the values of each row."""
    spacing = np.spacing(np.abs(values).astype(np.float32)).astype(np.float64)
    return spacing.reshape(len(values), -1).max(axis=1)


def _perturb_states(rows: Rows) -> Rows:
    """Perturb the states by at most half the spacing of float32, the size of a rounding error."""
    rng = np.random.default_rng(0)
    perturbed = dict(rows)
    for key in ("qpos", "qvel"):
        single = rows[key].astype(np.float32)
        offset = rng.uniform(-0.5, 0.5, single.shape) * np.spacing(np.abs(single))
        perturbed[key] = single.astype(np.float64) + offset
    return perturbed


def format_report(report: Report) -> str:
    """Format a report as text, as printed by ``pogo check-dataset``.

    Args:
        report: the report.

    Returns:
        The text, without a trailing newline.
    """
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
        lines.append("The states are float32; 'rounding' is the error due to this alone.")
    if "reward" not in report.errors:
        lines.append("Rewards and terminations are not compared: the file has no infos/goal.")
    lines.append(
        "The file matches the environment's physics."
        if report.matches
        else "The file does not match: it was recorded with another environment or MuJoCo version."
    )
    return "\n".join(lines)


def _line(name: str, values: NDArray[np.float64]) -> str:
    return f"{name:12}" + "".join(f"{v:10.1e}" for v in np.percentile(values, [50, 95, 100]))
