"""Tasks of one's own: ``task=NAME env.id=ID``, or a YAML file, ``task=./mytask.yaml``.

Hydra selects a preset by the value of ``task``. A task that has no preset becomes one here, before
Hydra sees the options.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from pogo_torchrl.experiments.option_files import flatten, read_yaml, to_override
from pogo_torchrl.experiments.presets import all_tasks, own_tasks

FROM_DATA = "minari"
"""Value of ``env.id`` for the environment that is recorded in a Minari dataset."""

# The task of a run that sets its environment and data, but no task.
_UNNAMED = "unnamed"

# The name is part of the run folder's.
_NAME = re.compile(r"[\w+-][\w.+-]*", re.ASCII)

# Options that say which run it is, not what the task is.
_NOT_IN_FILES = ("seed", "resume", "log_dir", "checkpoint_dir")


def _name_of(env_id: str | None, data_path: str | None) -> str:
    """Name of an unnamed task: that of its environment or, if the data name that, of its data."""
    name = data_path if env_id in (None, FROM_DATA) else str(env_id).partition(":")[2] or env_id
    return re.sub(r"[^\w.+-]+", "-", str(name)).strip("-.")


OmegaConf.register_new_resolver("own_task", _name_of, replace=True)


def resolve_task(
    arguments: Sequence[str], check: Callable[[Sequence[str]], None] = lambda options: None
) -> list[str]:
    """Make presets of the tasks of one's own among the options of a run.

    An unknown name is a task of one's own if the options also say what it is evaluated on:
    ``env.id``, ``eval_interval=0`` (nothing) or ``data.source=minari`` (the dataset's environment).
    Options without a task are one if they set the data (``data.source=hdf5`` or ``minari``) and the
    environment; it is named after the environment, or the Minari dataset.

    Args:
        arguments: options as ``option=value``.
        check: called with the options of a task file, to raise for those that are invalid. Defaults
            to no check.

    Returns:
        The options, with task files replaced by the names of their tasks.

    Raises:
        ValueError: for a task file that cannot be read or has invalid keys, or an invalid name.

    Example:
        >>> resolve_task(["task=reach", "env.id=myreach:Reach-v0"])
        ['task=reach', 'env.id=myreach:Reach-v0']
        >>> resolve_task(["data.source=hdf5", "data.path=reach.hdf5", "env.id=Pendulum-v1"])[-1]
        'task=unnamed'
    """
    # Hydra adds keys to a mapping only where it is told to.
    arguments = [f"++{a}" if a.startswith("env.kwargs") else a for a in arguments]
    given = {key: value.strip("'\" ") for key, _, value in (a.partition("=") for a in arguments)}
    if "task" not in given:
        source, env_id = given.get("data.source"), given.get("env.id", FROM_DATA)
        own_env = not env_id.startswith("pogo_torchrl/") and env_id != "null"
        if (source == "hdf5" and "env.id" in given and own_env) or (
            source == "minari" and "data.path" in given and own_env
        ):
            _register(_UNNAMED, {"task": "${own_task:${env.id},${data.path}}"}, given)
            return [*arguments, f"task={_UNNAMED}"]
        return list(arguments)
    names = [_resolve(name.strip(), given, check) for name in given["task"].split(",")]
    return [f"task={','.join(names)}" if a.startswith("task=") else a for a in arguments]


def _resolve(name: str, given: Mapping[str, str], check: Callable[[Sequence[str]], None]) -> str:
    """Register the preset of one value of ``task``, and return its name."""
    if name in all_tasks():
        return name
    if name.endswith((".yaml", ".yml")):
        return _read_file(Path(name).expanduser(), given, check)
    if name in own_tasks():
        ConfigStore.instance().repo["task"].pop(f"{name}.yaml")  # of an earlier call
    if _says_environment(given):
        _check_name(name, f"task={name}")
        _register(name, {"task": name}, given)
    return name  # an unknown task, unless it was registered


def _says_environment(given: Mapping[str, Any]) -> bool:
    return (
        "env.id" in given
        or str(given.get("eval_interval")) == "0"
        or given.get("data.source") == "minari"
    )


def _check_name(name: str, where: str) -> None:
    if not _NAME.fullmatch(name) or name == _UNNAMED:
        raise ValueError(
            f"{where}: a task's name, which is part of folder names, has letters, digits, '_', "
            "'-', '+' and '.', e.g. reach-v0."
        )


def _read_file(path: Path, given: Mapping[str, str], check: Callable[[Sequence[str]], None]) -> str:
    if not path.is_file():
        raise ValueError(f"task={path} is not a file; give a task's name or a YAML file.")
    options = dict(flatten(read_yaml(path)))
    name = str(options.pop("task", path.stem))
    _check_name(name, f"{path}: task: {name}")
    if name in all_tasks():
        raise ValueError(f"{path}: task: {name} is a task of D4RL; choose another name.")
    for key, value in options.items():
        if key in _NOT_IN_FILES:
            raise ValueError(f"{path}: {key} is not part of a task; give it on the command line.")
        try:
            check([f"{key}={to_override(value)}"])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    if not _says_environment({**options, **given}):
        raise ValueError(
            f"{path}: env.id is missing; give the environment's Gymnasium ID, or null for none."
        )
    _register(name, {**options, "task": name}, given)
    return name


def _register(name: str, options: Mapping[str, Any], given: Mapping[str, str]) -> None:
    """Make a preset of these options that Hydra finds as ``task=NAME``."""
    node = OmegaConf.create({"env": {"id": None, "max_episode_steps": None}})
    if {**options, **given}.get("data.source") == "minari":
        node.env.id = FROM_DATA
    for key, value in options.items():
        OmegaConf.update(node, key, value)
    ConfigStore.instance().store(group="task", name=name, node=node, package="_global_")
