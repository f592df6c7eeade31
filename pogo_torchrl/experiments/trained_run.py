"""Opening the folder of a run whose networks are needed again, critics included."""

from __future__ import annotations

import copy
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pogo_torchrl.experiments import algorithms
from pogo_torchrl.experiments.config import RunConfig
from pogo_torchrl.experiments.run import RunInProgress
from pogo_torchrl.experiments.run_folder import RunFolder, lock_run_folder
from pogo_torchrl.experiments.simulator import has_simulator
from pogo_torchrl.export import load_actors


def open_run(path: str | Path, *, device: str = "auto", environment: bool = True) -> RunInProgress:
    """Load the newest checkpoint of a run and its data, as if the run were resumed.

    Args:
        path: folder of the run, ``LOG_DIR/TASK/w2_WEIGHTS/seed_SEED``.
        device: device of the networks and the data. Defaults to ``"auto"``.
        environment: whether the run's environment is needed. If not, it is only created if the
            run's data and policy do not tell enough without it. Defaults to ``True``.

    Returns:
        The run, whose ``loss``, ``replay_buffer`` and ``trainer`` are those of the checkpoint.

    Raises:
        FileNotFoundError: if the folder contains no run.
        ValueError: if the run has no usable checkpoint, or its configuration cannot be read.
        FileExistsError: if another process is training it.
    """
    cfg = _read_config(Path(path).expanduser())
    cfg.device, cfg.progress_bar = device, False
    if not environment and has_simulator(cfg):
        # Data that are read in another way than in the training do not fit its checkpoints.
        with suppress(ValueError, FileNotFoundError):  # e.g. a policy is written at the end
            return _open(_without_environment(cfg), path)
    return _open(cfg, path)


def _without_environment(cfg: DictConfig) -> DictConfig:
    """The options of a run without its environment, with the action bounds of its policy."""
    cfg = copy.deepcopy(cfg)
    actor = load_actors(RunFolder.of(algorithms.resolve(cfg)).policy)[0]
    space = actor.action_spec.space
    cfg.env.action_bounds = [space.low.tolist(), space.high.tolist()]
    cfg.env.id = None
    return cfg


def _open(cfg: DictConfig, path: str | Path) -> RunInProgress:
    run = RunInProgress(cfg)
    with run.environments(), lock_run_folder(run.folder), closing(run):
        run.read_data()
    if run.resumed is None:
        raise ValueError(
            f"{path} has no usable checkpoint in {run.folder.checkpoints}: train the run first, or "
            "set checkpoint_dir in its training/config.yaml to where the checkpoints are."
        )
    return run


def _read_config(folder: Path) -> DictConfig:
    """Options of a run, for resuming it wherever its folder is now."""
    file = folder / "training" / "config.yaml"
    if folder.is_file():
        raise FileNotFoundError(
            f"{folder} is a file, and exported policies have no critics: give the folder of the "
            "run that wrote it, LOG_DIR/TASK/w2_WEIGHTS/seed_SEED."
        )
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} contains no run (no training/config.yaml): give the folder of a run, "
            "LOG_DIR/TASK/w2_WEIGHTS/seed_SEED."
        )
    try:
        stored: Any = OmegaConf.merge(OmegaConf.structured(RunConfig), OmegaConf.load(file))
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ValueError(
            f"{file} cannot be read ({str(error).splitlines()[0]}): restore the file, or train the "
            "run again."
        ) from error
    stored.log_dir, stored.resume = str(folder.resolve().parents[2]), True
    return stored
