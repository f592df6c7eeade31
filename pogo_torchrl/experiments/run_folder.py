"""Run folders: paths, locking, and checks that a run may be continued."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pogo_torchrl.data import OfflineReplayBuffer
from pogo_torchrl.experiments import config
from pogo_torchrl.experiments.csv_log import last_step
from pogo_torchrl.files import cannot_write, make_writable, remove_partial
from pogo_torchrl.locks import Held, hold

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
    "return_temperature",
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

    @property
    def config(self) -> Path:
        """File with the options of the run."""
        return self.training / "config.yaml"

    @property
    def policy(self) -> Path:
        """File of the exported policy."""
        return self.checkpoints / "policy.safetensors"

    @property
    def claim(self) -> Path | None:
        """Copy of :attr:`config` that marks a ``checkpoint_dir`` as that of this run."""
        inside = self.checkpoints == self.root / "checkpoints"
        return None if inside else self.checkpoints / "config.yaml"

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
    """Lock the folders of a run, so that only this process writes to them.

    Files that a killed process was writing are removed, and so are folders that were created here
    if they are still empty at the end.

    Args:
        folder: the folders of the run.

    Raises:
        FileExistsError: if another process holds the lock of a folder.
        OSError: if a folder is not writable.
    """
    paths = {folder.root: "log_dir", folder.checkpoints: "checkpoint_dir"}
    missing = {p for path in paths for p in (path, *path.parents) if not p.exists()}
    try:
        with ExitStack() as locks:
            for path, option in paths.items():
                make_writable(path, option)
                try:
                    locks.enter_context(hold(path / ".lock"))
                except Held as holder:
                    other = (
                        "another seed or log_dir" if option == "log_dir" else f"another {option}"
                    )
                    raise FileExistsError(
                        f"{path} is in use by another process{holder}. Wait for it or stop it, or "
                        f"choose {other}."
                    ) from None
                except OSError as error:
                    raise cannot_write(path, option, error) from error
            remove_partial(folder.training)
            yield
    finally:
        for path in sorted(missing, key=lambda path: len(path.parts), reverse=True):
            with suppress(OSError):  # not empty, or never created
                path.rmdir()


def check_run_folder(folder: RunFolder, cfg: DictConfig) -> None:
    """Check that a run may write to its folders, so that two runs are never mixed.

    A folder that a start has left before its first checkpoint contains no run.

    Args:
        folder: the folders of the run.
        cfg: a :class:`~pogo_torchrl.experiments.config.RunConfig`.

    Raises:
        FileExistsError: if a folder contains a run and ``resume`` is ``False``.
        ValueError: if a folder contains a run that was started with other settings.
    """
    started = folder.config.exists()
    if started and not cfg.resume and _contains_run(folder, cfg):
        raise FileExistsError(
            f"{folder.root} already contains a run. Continue it with resume=true, "
            "choose another seed, variant or log_dir, or delete that folder."
        )
    if started and cfg.resume:
        stored = _read_options(folder.config)
        if stored is None:
            raise ValueError(
                f"{folder.config} cannot be read: delete the folder {folder.root}, or choose "
                "another log_dir."
            )
        if changed := _changed_options(stored, cfg):
            raise ValueError(
                f"resume=true would change the run in {folder.root} ({'; '.join(changed)}). Use "
                "the values it was started with."
            )
    _check_checkpoints(folder, cfg, started=started)


def _check_checkpoints(folder: RunFolder, cfg: DictConfig, *, started: bool) -> None:
    """Check that no other run has left checkpoints or its policy in the folder of checkpoints."""
    found = _saved(folder)
    if not found or (started and folder.claim is None):
        return
    if not cfg.resume:
        raise FileExistsError(
            f"{folder.checkpoints} already contains {found[-1].name} of another run. Choose "
            "another checkpoint_dir, or delete that folder."
        )
    claim = folder.checkpoints / "config.yaml"
    if not claim.exists():  # perhaps the folder of a run without this option
        claim = folder.checkpoints.parent / "training" / "config.yaml"
    stored = _read_options(claim)
    changed = [] if stored is None else _changed_options(stored, cfg)
    if changed or (stored is None and not started and found == [folder.policy]):
        kind = "the policy" if found[-1] == folder.policy else "a checkpoint"
        differences = f" ({'; '.join(changed)})" if changed else ""
        raise ValueError(
            f"{found[-1]} is {kind} of another run{differences}. Use the settings of that run, or "
            "another checkpoint_dir."
        )


def _saved(folder: RunFolder) -> list[Path]:
    """The policy and the checkpoints of a run, the newest last."""
    policy = [folder.policy] if folder.policy.exists() else []
    return policy + sorted(folder.checkpoints.glob("step-*"))


def _contains_run(folder: RunFolder, cfg: DictConfig) -> bool:
    """Whether the folder of a run that was started contains more than an unsuccessful start."""
    if _saved(folder) or folder.done.exists():
        return True
    files = (folder.training / f"{name}.csv" for name in ("metrics", "evaluations"))
    step = max(map(last_step, files))
    if step == 0:
        return False
    # Without a checkpoint, a run can only start again; but it is not replaced by another one, nor
    # one whose checkpoints have been moved.
    stored = _read_options(folder.config)
    return (
        stored is None
        or step >= stored.get("checkpoint_interval", 1)
        or bool(_changed_options(stored, cfg))
    )


def _read_options(file: Path) -> DictConfig | None:
    """Read the options of a run; ``None`` if the file does not exist or is damaged."""
    try:
        stored: Any = OmegaConf.load(file)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError):
        return None
    return stored if isinstance(stored, DictConfig) else None


def _changed_options(stored: DictConfig, cfg: DictConfig) -> list[str]:
    """Differences of the options that may not change on resume, as text."""
    # Options that did not exist when the run was started had their defaults.
    defaults = OmegaConf.structured(config.RunConfig)
    free = _MAY_CHANGE_ON_RESUME - ({"total_steps"} if _follows_total_steps(cfg) else set())
    return [
        f"{key}: {stored.get(key, defaults[key])} -> {cfg[key]}"
        for key in config.top_level_options()
        if key not in free and stored.get(key, defaults[key]) != cfg[key]
    ]


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
