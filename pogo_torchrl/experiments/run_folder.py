"""The folder of a run: where it is, who may write there, and what may continue it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pogo_torchrl.data import OfflineReplayBuffer
from pogo_torchrl.experiments import config
from pogo_torchrl.files import make_writable

# What may change between a run and its continuation; everything else shapes the training.
_MAY_CHANGE_ON_RESUME = {
    "total_steps", "eval_interval", "eval_episodes", "log_interval", "checkpoint_interval",
    "resume", "device", "compile", "log_dir", "checkpoint_dir", "save_model", "logger",
    "progress_bar", "env",
    "data",  # its content is compared, not its place
}  # fmt: skip


class RunFolder(NamedTuple):
    """Where a run writes."""

    training: Path
    checkpoints: Path

    @property
    def root(self) -> Path:
        """The run's folder."""
        return self.training.parent

    @property
    def done(self) -> Path:
        """Written when the run is complete: a JSON object with the ``total_steps`` it has made."""
        return self.root / "done.json"

    @classmethod
    def of(cls, cfg: DictConfig) -> RunFolder:
        """``log_dir/task/w2_.../seed_.../{training,checkpoints}``."""
        weights = "_".join(f"{w:g}" for w in cfg.w2_weights)
        root = Path(cfg.log_dir) / cfg.task / f"w2_{weights}" / f"seed_{cfg.seed}"
        checkpoints = cfg.checkpoint_dir or root / "checkpoints"
        return cls(root / "training", Path(checkpoints))


@contextmanager
def lock_run_folder(folder: RunFolder) -> Iterator[None]:
    """Hold a run's folder: no second process may write there; nothing stays if nothing is written.

    The lock is one of the operating system: it goes with the process, however that ends.
    """
    places = {folder.root: "log_dir", folder.checkpoints: "checkpoint_dir"}
    missing = {p for place in places for p in (place, *place.parents) if not p.exists()}
    lock = folder.root / ".lock"
    try:
        for place, option in places.items():
            make_writable(place, option)
        with FileLock(lock, timeout=0):
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)  # while it is ours
    except Timeout:
        raise FileExistsError(
            f"{folder.root} is in use by another process. Wait for it or stop it, or choose "
            "another seed or log_dir."
        ) from None
    finally:
        for path in sorted(missing, key=lambda path: len(path.parts), reverse=True):
            with suppress(OSError):  # it holds something, or was never made
                path.rmdir()


def check_run_folder(folder: RunFolder, cfg: DictConfig) -> None:
    """Never mix two runs in one folder.

    Raises:
        FileExistsError: when it holds a run and ``resume`` is off.
        ValueError: when it holds a run that was started with other settings.
    """
    file = folder.training / "config.yaml"
    if not file.exists():
        return
    if not cfg.resume:
        raise FileExistsError(
            f"{folder.training.parent} already holds a run. Continue it with resume=true, or "
            "choose another seed or log_dir, or delete that folder."
        )
    try:
        before: Any = OmegaConf.load(file)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError):
        before = None
    if not isinstance(before, DictConfig):
        raise ValueError(
            f"{file} cannot be read: delete the folder {folder.root}, or choose another log_dir."
        )
    # An option that the release of then did not have had its default.
    defaults = OmegaConf.structured(config.RunConfig)
    free = _MAY_CHANGE_ON_RESUME if _constant_lr(cfg) else _MAY_CHANGE_ON_RESUME - {"total_steps"}
    changed = [
        f"{key}: {before.get(key, defaults[key])} -> {cfg[key]}"
        for key in config.top_level_options()
        if key not in free and before.get(key, defaults[key]) != cfg[key]
    ]
    if changed:
        raise ValueError(
            f"resume=true would change the run in {folder.training.parent} "
            f"({'; '.join(changed)}). Give the values it was started with."
        )


def fingerprint(cfg: DictConfig, replay_buffer: OfflineReplayBuffer) -> dict[str, Any]:
    """What a checkpoint must share with a run to be continued by it."""
    settings = {
        key: OmegaConf.to_object(cfg[key]) if OmegaConf.is_config(cfg[key]) else cfg[key]
        for key in config.top_level_options()
        if key not in _MAY_CHANGE_ON_RESUME
    }
    if not _constant_lr(cfg):
        settings["total_steps"] = cfg.total_steps
    return {**settings, "data": replay_buffer.fingerprint()}


def _constant_lr(cfg: DictConfig) -> bool:
    """Whether the training does not depend on ``total_steps``."""
    names = (cfg.lr_schedule, cfg.lr_schedule_actor, cfg.lr_schedule_critic)
    return set(names) <= {"constant", None}
