"""Opening the folder of a run whose networks are needed again, critics included."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pogo_torchrl.experiments.config import RunConfig
from pogo_torchrl.experiments.run import RunInProgress
from pogo_torchrl.experiments.run_folder import lock_run_folder


def open_run(path: str | Path, *, device: str = "auto") -> RunInProgress:
    """Load the newest checkpoint of a run and its data, as if the run were resumed.

    Args:
        path: folder of the run, ``LOG_DIR/TASK/w2_WEIGHTS/seed_SEED``.
        device: device of the networks and the data. Defaults to ``"auto"``.

    Returns:
        The run, whose ``loss``, ``replay_buffer`` and ``trainer`` are those of the checkpoint.

    Raises:
        FileNotFoundError: if the folder contains no run.
        ValueError: if the run has no usable checkpoint, or its configuration cannot be read.
        FileExistsError: if another process is training it.
    """
    cfg = _read_config(Path(path).expanduser())
    cfg.device, cfg.progress_bar = device, False
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
