"""Study files: what a study runs. Starts nothing.

A study file is YAML::

    tasks: [hopper-medium, halfcheetah-medium]
    rows: [30000, null]         # transitions of each data file; null: all. Default: [null]
    seeds: [0, 1]
    total_steps: 20000
    eval_interval: 2500
    eval_episodes: 20
    common: {critic_layer_norm: true}   # options of pogo train for all settings
    settings:                           # options of pogo train, by name of the setting
      h0.7: {step_sizes: [0.7, 0.7, 0.7]}
      preset:
        by_task: {hopper-medium: {alpha: 0.03}}
    baselines: [bc, td3_bc, iql]

The runs of a setting are those of the sweep file ``STUDY/FILE/SETTING/sweep.yaml``, which the study
writes, where FILE is the task and, if given, the number of rows.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import yaml
from baselines import GAMMA, METHODS
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pogo_torchrl.data import OfflineReplayBuffer, make_replay_buffer
from pogo_torchrl.envs import score
from pogo_torchrl.envs.scores import split_task
from pogo_torchrl.experiments.sweep_file import Run, read_sweep
from pogo_torchrl.files import atomic_write

_NAME = re.compile(r"[\w.+-]+")


@dataclass
class Study:
    """Content of a study file."""

    tasks: list[str]
    seeds: list[int]
    total_steps: int
    eval_interval: int = 2500
    eval_episodes: int = 20
    rows: list[int | None] = field(default_factory=lambda: [None])
    common: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    baselines: list[str] = field(default_factory=list)


class DataFile(NamedTuple):
    """Data of one task, all of it or its first rows."""

    name: str
    task: str
    source: str
    path: Path | None

    @property
    def options(self) -> dict[str, Any]:
        """The options ``data.*`` of a run."""
        path = {"path": str(self.path)} if self.path is not None else {}
        return {"source": self.source, **path}


def read_study(path: Path) -> Study:
    """Read and check a study file.

    Args:
        path: the file.

    Raises:
        ValueError: for an invalid file; the message names the key and the allowed values.
        FileNotFoundError: if the file does not exist.
    """
    try:
        content = OmegaConf.to_container(OmegaConf.create(path.read_text("utf-8")), resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    known = Study.__dataclass_fields__
    for key in content:
        if key not in known:
            raise ValueError(f"{path}: {key} is unknown; choose from {', '.join(known)}.")
    for key in ("tasks", "seeds", "total_steps"):
        if not content.get(key):
            raise ValueError(f"{path}: {key} is missing.")
    study = Study(**content)
    study.tasks = ["-".join((*split_task(task), "v2")) for task in study.tasks]
    for name, options in study.settings.items():
        if not _NAME.fullmatch(name) or name in METHODS:
            raise ValueError(
                f"{path}: settings.{name}: choose another name, of letters, digits and . + - _, "
                "it names a folder."
            )
        if not isinstance(options or {}, Mapping):
            raise ValueError(f"{path}: settings.{name}={options} must be a mapping, option: value.")
    for method in study.baselines:
        if method not in METHODS:
            raise ValueError(f"{path}: baselines: {method} is unknown; choose from {[*METHODS]}.")
    return study


def data_files(study: Study, source: str, folder: Path | None, root: Path) -> list[DataFile]:
    """Locate the data of a study, and write the files that hold the first rows of others.

    Args:
        study: the study.
        source: ``"hdf5"`` (files ``folder/{task without -v2}.hdf5``), or another source of
            :func:`~pogo_torchrl.data.make_replay_buffer` that needs no path.
        folder: folder of the HDF5 files.
        root: folder of the study.

    Returns:
        The data of each task and number of rows.

    Raises:
        ValueError: if ``rows`` are given without HDF5 files, or exceed a file.
        FileNotFoundError: if a file is missing.
    """
    found = []
    for task in study.tasks:
        stem = task.removesuffix("-v2")
        for rows in study.rows:
            name = stem if rows is None else f"{stem}-{rows}"
            if folder is None:
                if rows is not None:
                    raise ValueError(f"rows={rows} needs --data FOLDER, a folder of HDF5 files.")
                found.append(DataFile(name, task, source, None))
                continue
            path = folder / f"{stem}.hdf5"
            if not path.is_file():
                raise FileNotFoundError(f"--data {folder} contains no {path.name}.")
            if rows is not None:
                path = first_rows(path, rows, root / "data" / f"{name}.hdf5")
            found.append(DataFile(name, task, "hdf5", path.resolve()))
    return found


def first_rows(path: Path, rows: int, out: Path) -> Path:
    """Write the first rows of an HDF5 file in D4RL's layout to another file, once.

    Args:
        path: the file.
        rows: the maximum number of rows; the last one kept ends an episode.
        out: the file to write.

    Returns:
        The path ``out``.

    Raises:
        ValueError: if the file has fewer rows, or no episode ends within them.
    """
    if out.exists():
        return out
    with h5py.File(path) as file:
        total = len(file["rewards"])
        if rows > total:
            raise ValueError(f"rows={rows} exceeds the {total} rows of {path}; use fewer.")
        ends = np.asarray(file["terminals"][:rows], dtype=bool).reshape(-1)
        if "timeouts" in file:
            ends |= np.asarray(file["timeouts"][:rows], dtype=bool).reshape(-1)
        if not ends.any():
            raise ValueError(f"rows={rows}: no episode of {path} ends within them; use more.")
        kept = int(np.flatnonzero(ends)[-1]) + 1
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = out.with_suffix(f".{os.getpid()}.tmp")
        with h5py.File(temporary, "w") as part:
            for key in ("observations", "actions", "rewards", "terminals", "timeouts"):
                if key in file:
                    part.create_dataset(key, data=file[key][:kept], compression="lzf")
    os.replace(temporary, out)
    return out


def sweep_runs(study: Study, data: DataFile, setting: str, root: Path) -> list[Run]:
    """Write the sweep file of a setting on a data file, and return its runs.

    Args:
        study: the study.
        data: the data file.
        setting: name of the setting.
        root: folder of the study.

    Raises:
        ValueError: for invalid options; the message names the sweep file and the option.
    """
    options = dict(study.settings[setting] or {})
    by_task = {f"{k.removesuffix('-v2')}-v2": v for k, v in options.pop("by_task", {}).items()}
    folder = root / data.name / setting
    content = {
        "common": {
            "seeds": list(study.seeds),
            "total_steps": study.total_steps,
            "eval_interval": study.eval_interval,
            "eval_episodes": study.eval_episodes,
            "checkpoint_interval": study.eval_interval,
            "log_dir": str(folder),
            "data": data.options,
        },
        "environments": {data.task: {**study.common, **options, **by_task.get(data.task, {})}},
    }
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "sweep.yaml", "x") as file:
        yaml.safe_dump(content, file, sort_keys=False)
    return read_sweep(str(folder / "sweep.yaml"))


def describe_data(data: DataFile, root: Path) -> None:
    """Write ``STUDY/FILE/data.json``, once: rows, mean score and largest discounted return."""
    path = root / data.name / "data.json"
    if path.exists():
        return
    replay_buffer = make_replay_buffer(data.task, normalize=False, batch_size=1, **data.options)
    found = {
        "rows": len(replay_buffer),
        "score": float(score(data.task, replay_buffer.episode_returns).mean()),
        "largest_return": largest_discounted_return(replay_buffer),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "x") as file:
        json.dump(found, file)


def largest_discounted_return(replay_buffer: OfflineReplayBuffer, gamma: float = GAMMA) -> float:
    """Largest magnitude of a discounted return from any state of the data to its episode's end.

    An episode ends where a row is terminal, or its next observation is not that of the next row.

    Args:
        replay_buffer: the data, in order.
        gamma: discount factor. Defaults to the one of all runs.
    """
    rows = replay_buffer[:]
    rewards = rows["next", "reward"].flatten().tolist()
    follows = (rows["next", "observation"][:-1] == rows["observation"][1:]).all(-1)
    follows &= ~rows["next", "terminated"][:-1].squeeze(-1)
    values = [rewards[-1]]
    for reward, continues in zip(reversed(rewards[:-1]), reversed(follows.tolist())):
        values.append(reward + gamma * values[-1] * continues)
    return max(map(abs, values))
