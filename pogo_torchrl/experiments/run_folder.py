"""Run folders: paths, locking, and checks that a run may be continued."""

from __future__ import annotations

import re
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

# Options that may change on resume; all others affect the training.
_MAY_CHANGE_ON_RESUME = {
    "total_steps", "eval_interval", "eval_episodes", "eval_envs", "log_interval",
    "checkpoint_interval", "resume", "device", "compile", "log_dir", "checkpoint_dir",
    "save_model", "logger", "progress_bar", "env", "variant",
    "data",  # the content of the data is compared, not its location
}  # fmt: skip


# Options added after checkpoint format 3. Their defaults are not part of a fingerprint, so that
# runs of earlier versions can be resumed.
_ADDED_LATER = {
    "step_sizes", "critic_hidden_sizes", "num_critics", "chain_init", "data_weight",
    "average_actors", "actor_q", "target_action", "critic_bc_weight", "advantage_temperature",
    "displacement", "alpha_growth", "freeze_critics_at", "algorithm", "chain", "actor_bc_weight",
}  # fmt: skip


class RunFolder(NamedTuple):
    """Folders of a run."""

    training: Path
    """Folder of the configuration, CSV files, log and figure."""
    checkpoints: Path
    """Folder of the checkpoints and the exported policy."""

    @property
    def root(self) -> Path:
        """Folder of the run, which contains :attr:`training`."""
        return self.training.parent

    @property
    def done(self) -> Path:
        """File that marks a complete run: a JSON object with its ``total_steps``."""
        return self.root / "done.json"

    @classmethod
    def of(cls, cfg: DictConfig) -> RunFolder:
        """Folders ``log_dir/task/w2_.../seed_.../{training,checkpoints}`` of a run.

        Those of other algorithms than POGO are in ``log_dir/task/ALGORITHM_chain_N_w2_.../...``.

        Args:
            cfg: a :class:`~pogo_torchrl.experiments.config.RunConfig` with its chain in numbers,
                see :func:`pogo_torchrl.experiments.algorithms.resolve`.

        Raises:
            ValueError: if ``variant`` cannot be part of a folder's name.
        """
        weights = "_".join(f"{w:g}" for w in cfg.w2_weights)
        parts = [f"w2_{weights}"] if weights else []
        if cfg.algorithm != "pogo":
            parts.insert(0, f"{cfg.algorithm}_chain_{cfg.chain}")
        if cfg.variant is not None:
            if not re.fullmatch(r"[\w.+=-]{1,150}", cfg.variant):
                raise ValueError(
                    f"variant={cfg.variant!r} becomes part of a folder's name: use letters, digits "
                    "and _ . + = - only, at most 150."
                )
            parts.append(cfg.variant)
        root = Path(cfg.log_dir) / cfg.task / "_".join(parts) / f"seed_{cfg.seed}"
        checkpoints = cfg.checkpoint_dir or root / "checkpoints"
        return cls(root / "training", Path(checkpoints))


@contextmanager
def lock_run_folder(folder: RunFolder) -> Iterator[None]:
    """Lock a run folder, so that only this process writes to it.

    The lock belongs to the operating system, which releases it however the process ends. Folders
    that were created here are removed again if they are still empty at the end.

    Args:
        folder: the folders of the run.

    Raises:
        FileExistsError: if another process holds the lock.
        OSError: if a folder is not writable.
    """
    paths = {folder.root: "log_dir", folder.checkpoints: "checkpoint_dir"}
    missing = {p for path in paths for p in (path, *path.parents) if not p.exists()}
    lock = folder.root / ".lock"
    try:
        for path, option in paths.items():
            make_writable(path, option)
        with FileLock(lock, timeout=0):
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)  # before another process can acquire it
    except Timeout:
        raise FileExistsError(
            f"{folder.root} is in use by another process. Wait for it or stop it, or choose "
            "another seed or log_dir."
        ) from None
    finally:
        for path in sorted(missing, key=lambda path: len(path.parts), reverse=True):
            with suppress(OSError):  # not empty, or never created
                path.rmdir()


def check_run_folder(folder: RunFolder, cfg: DictConfig) -> None:
    """Check that a run may write to its folder, so that two runs are never mixed.

    Args:
        folder: the folders of the run.
        cfg: a :class:`~pogo_torchrl.experiments.config.RunConfig`.

    Raises:
        FileExistsError: if the folder contains a run and ``resume`` is ``False``.
        ValueError: if the folder contains a run that was started with other settings.
    """
    file = folder.training / "config.yaml"
    if not file.exists():
        return
    if not cfg.resume:
        raise FileExistsError(
            f"{folder.training.parent} already contains a run. Continue it with resume=true, "
            "choose another seed, variant or log_dir, or delete that folder."
        )
    try:
        stored: Any = OmegaConf.load(file)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError):
        stored = None
    if not isinstance(stored, DictConfig):
        raise ValueError(
            f"{file} cannot be read: delete the folder {folder.root}, or choose another log_dir."
        )
    # Options that did not exist when the run was started had their defaults.
    defaults = OmegaConf.structured(config.RunConfig)
    free = _MAY_CHANGE_ON_RESUME - ({"total_steps"} if _follows_total_steps(cfg) else set())
    changed = [
        f"{key}: {stored.get(key, defaults[key])} -> {cfg[key]}"
        for key in config.top_level_options()
        if key not in free and stored.get(key, defaults[key]) != cfg[key]
    ]
    if changed:
        raise ValueError(
            f"resume=true would change the run in {folder.training.parent} "
            f"({'; '.join(changed)}). Use the values it was started with."
        )


def fingerprint(cfg: DictConfig, replay_buffer: OfflineReplayBuffer) -> dict[str, Any]:
    """Settings and data that a checkpoint must share with a run that resumes from it.

    Args:
        cfg: a :class:`~pogo_torchrl.experiments.config.RunConfig`.
        replay_buffer: the data of the run.

    Returns:
        The settings that affect the training, and the fingerprint of the data.
    """
    defaults = OmegaConf.structured(config.RunConfig)
    settings = {
        key: OmegaConf.to_object(cfg[key]) if OmegaConf.is_config(cfg[key]) else cfg[key]
        for key in config.top_level_options()
        if key not in _MAY_CHANGE_ON_RESUME
        and not (key in _ADDED_LATER and cfg[key] == defaults[key])
    }
    if _follows_total_steps(cfg):
        settings["total_steps"] = cfg.total_steps
    return {**settings, "data": replay_buffer.fingerprint()}


def _follows_total_steps(cfg: DictConfig) -> bool:
    """Whether training depends on ``total_steps``, by a schedule over all updates."""
    names = {cfg.lr_schedule, cfg.lr_schedule_actor, cfg.lr_schedule_critic}
    constant_lr = names <= {"constant", None}
    freezes_at_fraction = cfg.freeze_critics_at is not None and cfg.freeze_critics_at < 1
    return not constant_lr or cfg.alpha_growth != 1 or freezes_at_fraction
