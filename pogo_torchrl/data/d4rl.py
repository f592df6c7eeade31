"""D4RL's own datasets, built on TorchRL's ``D4RLExperienceReplay``.

TorchRL provides the URLs, stores a dataset as memory-mapped tensors and samples from them. This
module adds what TorchRL 0.14 lacks: downloads are verified, retried and can come from a mirror;
rows match ``d4rl.qlearning_dataset``; and a cached dataset that is truncated, modified or outdated
is recreated instead of being read.
"""

from __future__ import annotations

import gc
import json
import logging
import urllib.parse
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from tensordict import TensorDict
from torchrl.data.datasets import D4RLExperienceReplay
from torchrl.data.datasets.d4rl_infos import D4RL_DATASETS

from pogo_torchrl.data.download import download
from pogo_torchrl.data.hdf5 import Dataset, read_hdf5
from pogo_torchrl.envs import max_episode_steps, split_task
from pogo_torchrl.files import (
    atomic_write,
    cache_folder,
    cannot_read,
    digests,
    make_writable,
    sha256,
)
from pogo_torchrl.locks import hold

MIRROR = "https://huggingface.co/datasets/imone/D4RL/resolve/main"
"""Public mirror of D4RL's locomotion files, for ``mirror``; D4RL's own server is often down."""

_LOGGER = logging.getLogger(__name__)

# Increment with every change that makes the same file yield different tensors or returns.
_VERSION = 2
_MANIFEST = "pogo_torchrl.json"


class D4RLReplay(D4RLExperienceReplay):
    """TorchRL's D4RL experience replay with exactly the rows of ``d4rl.qlearning_dataset``.

    Unlike TorchRL's class with its default options, the next observation of a row is never
    replaced by zeros; steps that end in a time-out are dropped, as in d4rl, instead of
    bootstrapping from zeros; all tensors are float32 (flags: bool) regardless of the dtypes in the
    file; and ``infos`` are dropped.

    Args:
        task: a D4RL version 2 task, e.g. ``"walker2d-medium-replay-v2"``.
        batch_size: number of rows per sample. Defaults to ``256``.
        mirror: URL or folder of a copy of D4RL's files, such as :data:`MIRROR`. The files may be in
            D4RL's subfolders or directly in the folder. Defaults to D4RL's own server.
        cache_dir: the file and its tensors are stored in ``cache_dir/d4rl``. Defaults to
            ``$XDG_CACHE_HOME/pogo_torchrl`` or ``~/.cache/pogo_torchrl``.
        progress: show a progress bar during the download. Defaults to ``True``.

    Raises:
        ValueError: for an unknown task, or a file that is not in D4RL's layout.
        ConnectionError: when the file cannot be downloaded; the message lists the alternatives.
        FileNotFoundError: when the mirror folder does not contain the file.
        OSError: when the cache folder cannot be written.

    Source: Fu et al., *D4RL: Datasets for Deep Data-Driven Reinforcement Learning*, 2020,
    arXiv:2004.07219.

    Example:
        >>> replay = D4RLReplay("hopper-medium-v2", mirror=MIRROR)  # doctest: +SKIP
        >>> replay.sample()["observation"].shape  # doctest: +SKIP
        torch.Size([256, 11])
    """

    episode_returns: np.ndarray
    """Undiscounted return of each complete episode in the file, ``[episodes]``, float64."""

    def __init__(
        self,
        task: str,
        batch_size: int = 256,
        *,
        mirror: str | Path | None = None,
        cache_dir: str | Path | None = None,
        progress: bool = True,
    ) -> None:
        task = "-".join((*split_task(task), "v2"))
        root = cache_folder(cache_dir) / "d4rl"
        # TorchRL expects these attributes but does not set them for direct downloads.
        self.metadata: dict[str, Any] = {}
        self.specs = None
        found = _locate(task, mirror, root)
        manifest = _read_manifest(root / task, _origin(found[1])) if found else None
        if manifest is not None:
            # Without a lock or a permission to write: another user may have made the cache.
            self._load(task, batch_size, root, manifest)
            return
        make_writable(root, "data.cache_dir")
        # When several runs start at once, only one downloads.
        with hold(root / f".{task}.lock", wait=True):
            self._file, digest = _locate(task, mirror, root) or _fetch(task, mirror, root, progress)
            manifest = _read_manifest(root / task, _origin(digest))
            if manifest is None and (root / task).exists():
                _LOGGER.warning("%s is damaged or outdated; recreating it.", root / task)
            self._load(task, batch_size, root, manifest)
            if manifest is None:
                self._finalize(root / task, _origin(digest))

    def _load(
        self, task: str, batch_size: int, root: Path, manifest: dict[str, Any] | None
    ) -> None:
        """Load the cached tensors, or make them if there are none."""
        super().__init__(
            task,
            batch_size,
            root=root,
            download="force" if manifest is None else True,
            direct_download=True,
            use_truncated_as_done=False,
        )
        if manifest is not None:
            self.episode_returns = np.array(manifest["episode_returns"])

    def _get_dataset_direct_download(self, name: str, env_kwargs: dict[str, Any]) -> TensorDict:
        data = read_hdf5(
            self._file, max_episode_steps=max_episode_steps(name), next_observations=False
        )
        self.episode_returns = data.episode_returns
        # TorchRL zeroes the next observation of rows marked done, so _finalize() sets them later.
        data.transitions["next", "done"].zero_()
        return data.transitions

    def _finalize(self, folder: Path, origin: dict[str, Any]) -> None:
        ends = self[:]["next"]
        ends["done"].copy_(ends["terminated"])
        manifest = {
            "made": origin,
            "episode_returns": self.episode_returns.tolist(),
            "files": digests(folder, without=_MANIFEST),
        }
        # Written last: an unfinished folder has no manifest and is recreated.
        with atomic_write(folder / _MANIFEST, "x") as file:
            json.dump(manifest, file)


def read_d4rl(
    task: str,
    *,
    mirror: str | Path | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> Dataset:
    """Load the transitions of a D4RL task.

    Args:
        task: see :class:`D4RLReplay`.
        mirror: see :class:`D4RLReplay`. Defaults to D4RL's own server.
        cache_dir: see :class:`D4RLReplay`. Defaults to ``$XDG_CACHE_HOME/pogo_torchrl`` or
            ``~/.cache/pogo_torchrl``.
        progress: see :class:`D4RLReplay`. Defaults to ``True``.

    Returns:
        The transitions and the episode returns.

    Raises:
        ValueError: see :class:`D4RLReplay`.
        OSError: see :class:`D4RLReplay`.
    """
    replay = D4RLReplay(task, mirror=mirror, cache_dir=cache_dir, progress=progress)
    data = Dataset(replay[:], replay.episode_returns)
    # The replay buffer is part of reference cycles that keep its large tensors alive.
    del replay
    gc.collect()
    return data


def _origin(digest: str) -> dict[str, Any]:
    """What cached tensors are made from."""
    return {"version": _VERSION, "sha256": digest}


def _locate(task: str, mirror: str | Path | None, root: Path) -> tuple[Path, str] | None:
    """The intact HDF5 file of a task and its SHA-256, or ``None`` if it has to be downloaded."""
    names = _file_names(task)
    if mirror is not None and "://" not in str(mirror):
        folder = Path(str(mirror)).expanduser()
        for name in names:
            if (folder / name).is_file():
                return folder / name, _sha256(folder / name)
        raise FileNotFoundError(
            f"data.mirror={str(mirror)!r} contains neither {names[0]} nor {names[1]}, the file of "
            f"{task}; give the URL or folder of a copy of D4RL's files."
        )
    path = root / names[0]
    if not path.exists():
        return None
    digest, checksum = _sha256(path), path.with_suffix(".sha256")
    return (path, digest) if checksum.exists() and checksum.read_text().strip() == digest else None


def _file_names(task: str) -> tuple[str, str]:
    """Name of D4RL's file of a task, without and with its folder."""
    location = PurePosixPath(urllib.parse.urlparse(D4RL_DATASETS[task]).path)
    return location.name, f"{location.parent.name}/{location.name}"


def _sha256(path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:
        raise cannot_read(path, error) from error


def _fetch(task: str, mirror: str | Path | None, root: Path, progress: bool) -> tuple[Path, str]:
    """Download the HDF5 file of a task; returns its path and SHA-256."""
    names, url = _file_names(task), D4RL_DATASETS[task]
    path = root / names[0]
    checksum = path.with_suffix(".sha256")
    if path.exists():
        _LOGGER.warning("%s is damaged; downloading it again.", path)
    base = str(mirror).rstrip("/")
    urls = [url] if mirror is None else [f"{base}/{name}" for name in names]
    _LOGGER.info("Downloading %s to %s; later runs reuse it.", task, root)
    try:
        _download_first(urls, path, progress)
        _check_content(path)
    except (ConnectionError, FileNotFoundError, ValueError) as error:
        raise ConnectionError(
            f"{task} could not be downloaded: {error}. Try data.mirror={MIRROR} or another copy "
            "of D4RL's files (URL or folder), data.source=hdf5 data.path=FILE, or "
            "data.source=local, which needs no download."
        ) from error
    digest = sha256(path)
    with atomic_write(checksum, "x") as file:
        file.write(digest)
    return path, digest


def _download_first(urls: Sequence[str], path: Path, progress: bool) -> None:
    """Download from the first URL that has the file."""
    for url in urls:
        try:
            return download(url, path, progress=progress)
        except FileNotFoundError as error:
            missing = error
    raise missing


def _check_content(path: Path) -> None:
    """Delete and reject a file not in D4RL's layout, such as a login or error page."""
    try:
        read_hdf5(path)
    except ValueError:
        path.unlink()
        raise


def _read_manifest(folder: Path, origin: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of cached tensors, or ``None`` if they are damaged or outdated."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        files = digests(folder, without=_MANIFEST)
        return manifest if (manifest["made"], manifest["files"]) == (origin, files) else None
    except PermissionError as error:
        raise cannot_read(folder, error) from error
    except (OSError, ValueError, KeyError, TypeError):
        return None
