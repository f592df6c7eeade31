"""D4RL's own datasets, through TorchRL's ``D4RLExperienceReplay``, with its gaps closed.

TorchRL knows the addresses, keeps a dataset as memory-mapped tensors and samples from them. What
it does not do, as of 0.14, is done here: the download is checked, retried and taken from a mirror;
rows are those of ``d4rl.qlearning_dataset``; and a kept dataset that was cut short, changed or
made in another way is made again instead of being read.
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
from filelock import FileLock
from tensordict import TensorDict
from torchrl.data.datasets import D4RLExperienceReplay
from torchrl.data.datasets.d4rl_infos import D4RL_DATASETS

from pogo_torchrl.data.download import download
from pogo_torchrl.data.hdf5 import Dataset, read_hdf5
from pogo_torchrl.envs import max_episode_steps, split_task
from pogo_torchrl.files import atomic_write, cache_folder, digests, make_writable, sha256

MIRROR = "https://huggingface.co/datasets/imone/D4RL/resolve/main"
"""A public copy of D4RL's locomotion files, for ``mirror``; D4RL's own server is often down."""

_LOGGER = logging.getLogger(__name__)

# Raise this number with every change after which the same file would give other tensors.
_VERSION = 1
_MANIFEST = "pogo_torchrl.json"


class D4RLReplay(D4RLExperienceReplay):
    """TorchRL's D4RL experience replay, holding exactly the rows of ``d4rl.qlearning_dataset``.

    Against TorchRL's class with its default options: the next observation of a row is never
    zeros; steps that end in a time-out are left out, as d4rl does, instead of bootstrapping from
    zeros; all tensors are float32 (flags: bool), whatever the file holds, and ``infos`` are left
    out.

    Args:
        task: a D4RL version 2 task, e.g. ``"walker2d-medium-replay-v2"``.
        batch_size: rows of a sample. Defaults to ``256``.
        mirror: where the file is taken from: the address or the folder of a copy of D4RL's files
            (:data:`MIRROR`, for instance), which may stand in D4RL's subfolders or beside each
            other. Defaults to D4RL's own server.
        cache_dir: the file and its tensors are kept in ``cache_dir/d4rl``. Defaults to
            ``$XDG_CACHE_HOME/pogo_torchrl`` or ``~/.cache/pogo_torchrl``.
        progress: show a progress bar of the download. Defaults to ``True``.

    Raises:
        ValueError: for an unknown task, or a file that is not in D4RL's layout.
        ConnectionError: when the file cannot be downloaded; the message says how to go on.
        FileNotFoundError: when the mirror does not have it.

    Source: Fu et al. (2020), D4RL: Datasets for Deep Data-Driven Reinforcement Learning.

    Example:
        >>> replay = D4RLReplay("hopper-medium-v2", mirror=MIRROR)  # doctest: +SKIP
        >>> replay.sample()["observation"].shape  # doctest: +SKIP
        torch.Size([256, 11])
    """

    episode_returns: np.ndarray
    """Undiscounted return of each complete episode in the file, float64."""

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
        make_writable(root, "data.cache_dir")
        # TorchRL's attributes, which it leaves empty for direct downloads.
        self.metadata: dict[str, Any] = {}
        self.specs = None
        # Of several runs that start at once, one downloads.
        with FileLock(root / f".{task}.lock"):
            self._file, digest = _fetch(task, mirror, root, progress)
            made = {"version": _VERSION, "sha256": digest}
            manifest = _read_manifest(root / task, made)
            if manifest is None and (root / task).exists():
                _LOGGER.warning("%s is damaged or outdated and is made again.", root / task)
            super().__init__(
                task,
                batch_size,
                root=root,
                download="force" if manifest is None else True,
                direct_download=True,
                use_truncated_as_done=False,
            )
            if manifest is None:
                self._complete(root / task, made)
            else:
                self.episode_returns = np.array(manifest["episode_returns"])

    def _get_dataset_direct_download(self, name: str, env_kwargs: dict[str, Any]) -> TensorDict:
        data = read_hdf5(self._file, max_episode_steps=max_episode_steps(name))
        self.episode_returns = data.episode_returns
        # TorchRL zeroes the next observations of rows that are done: _complete() sets that.
        data.transitions["next", "done"].zero_()
        return data.transitions

    def _complete(self, folder: Path, made: dict[str, Any]) -> None:
        ends = self[:]["next"]
        ends["done"].copy_(ends["terminated"])
        manifest = {
            "made": made,
            "episode_returns": self.episode_returns.tolist(),
            "files": digests(folder, without=_MANIFEST),
        }
        # Last of all: a folder that was left unfinished has none, and is made again.
        with atomic_write(folder / _MANIFEST, "x") as file:
            json.dump(manifest, file)


def read_d4rl(
    task: str, *, mirror: str | Path | None = None, cache_dir: str | Path | None = None
) -> Dataset:
    """The transitions of a D4RL task, in memory; arguments as of :class:`D4RLReplay`."""
    replay = D4RLReplay(task, mirror=mirror, cache_dir=cache_dir)
    data = Dataset(replay[:], replay.episode_returns)
    # Replay buffers hold on to their tensors in reference cycles, and these tensors are large.
    del replay
    gc.collect()
    return data


def _fetch(task: str, mirror: str | Path | None, root: Path, progress: bool) -> tuple[Path, str]:
    """The task's HDF5 file, from a mirror's folder, the cache or a server, and its SHA-256."""
    url = D4RL_DATASETS[task]
    place = PurePosixPath(urllib.parse.urlparse(url).path)
    names = (place.name, f"{place.parent.name}/{place.name}")
    remote = mirror is None or "://" in str(mirror)
    if not remote:
        folder = Path(str(mirror)).expanduser()
        for name in names:
            if (folder / name).is_file():
                return folder / name, sha256(folder / name)
        raise FileNotFoundError(
            f"data.mirror={str(mirror)!r} is a folder without {names[0]} or {names[1]}, the file "
            f"of {task}."
        )
    path = root / place.name
    checksum = path.with_suffix(".sha256")
    if path.exists():
        digest = sha256(path)
        if checksum.exists() and checksum.read_text().strip() == digest:
            return path, digest
        _LOGGER.warning("%s is damaged and is downloaded again.", path)
    base = str(mirror).rstrip("/")
    urls = [url] if mirror is None else [f"{base}/{name}" for name in names]
    _LOGGER.info("Downloading %s, once; it is kept in %s.", task, root)
    try:
        _download_first(urls, path, progress)
        _check_content(path)
    except (ConnectionError, FileNotFoundError, ValueError) as error:
        raise ConnectionError(
            f"{task} could not be downloaded: {error}. Try data.mirror={MIRROR} or another copy "
            "of D4RL's files (an address or a folder), or data.source=hdf5 data.path=FILE, or "
            "data.source=local, which needs no download."
        ) from error
    digest = sha256(path)
    with atomic_write(checksum, "x") as file:
        file.write(digest)
    return path, digest


def _download_first(urls: Sequence[str], path: Path, progress: bool) -> None:
    """From the first address that has the file."""
    for url in urls:
        try:
            return download(url, path, progress=progress)
        except FileNotFoundError as error:
            missing = error
    raise missing


def _check_content(path: Path) -> None:
    """Refuse what is not a file in D4RL's layout, such as the page of a login or an error."""
    try:
        read_hdf5(path)
    except ValueError:
        path.unlink()
        raise


def _read_manifest(folder: Path, made: dict[str, Any]) -> dict[str, Any] | None:
    """What is known of kept tensors, or None where they are not what they should be."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        files = digests(folder, without=_MANIFEST)
        return manifest if (manifest["made"], manifest["files"]) == (made, files) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
