"""Generate offline datasets by rolling out bundled policies in the D4RL environments.

No download is needed. The files have D4RL's layout, so any reader of D4RL's files can read them.
They replace D4RL's datasets but are not the same data: scores obtained on them are comparable only
with each other.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from numbers import Integral
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import gymnasium
import h5py
import mujoco
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pogo_torchrl.data.policies import LinearPolicy, load_manifest, load_policies
from pogo_torchrl.envs import make_env, split_task
from pogo_torchrl.envs.locomotion import clip
from pogo_torchrl.files import atomic_write, cache_folder, cannot_write, make_writable
from pogo_torchrl.hdf5_files import UnsupportedFileError, get_local_array, open_hdf5
from pogo_torchrl.locks import hold
from pogo_torchrl.machine import usable_cores
from pogo_torchrl.progress import progress_bar

_LOGGER = logging.getLogger(__name__)

# Increment with every change that makes the same call yield different data.
_VERSION = 2

# Each episode adds Gaussian noise with one scale, drawn from U(0, MAX_NOISE), in units of half the
# action range. With one scale per episode, episodes range from almost as good as the policy to
# early failures, so an algorithm that distinguishes them can improve on the policy. Measured on the
# bundled medium policies (manifest.json): hopper scores 44 without and 25 with this noise,
# halfcheetah 13 and 9; walker2d falls so easily that its noise is smaller.
MAX_NOISE: dict[str, float] = {"halfcheetah": 0.3, "hopper": 0.8, "walker2d": 0.1}

# Parts of equal size, each with the policies that generate its episodes in random order.
# "untrained" stands for random actions.
_UNTRAINED = "untrained"
_PARTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "medium": (("medium",),),
    "medium-replay": ((_UNTRAINED, "novice", "beginner", "medium", "advanced", "expert"),),
    "medium-expert": (("medium",), ("expert",)),
}

_RECORDED = ("observations", "actions", "rewards", "infos/qpos", "infos/qvel")
_KEYS = (*_RECORDED, "next_observations", "terminals", "timeouts")

Rows = dict[str, NDArray[Any]]


def behaviour_dataset(
    task: str,
    *,
    size: int = 100_000,
    seed: int = 0,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
    workers: int | None = None,
) -> Path:
    """Generate a dataset in D4RL's HDF5 layout, or reuse the cached file.

    ``medium`` is the bundled medium policy with exploration noise, ``medium-replay`` a mixture
    of policies from random actions to the best policy, and ``medium-expert`` half medium and half
    best policy, both with noise. The arrays have one row per transition: ``observations``,
    ``actions``, ``rewards``, ``next_observations``, ``infos/qpos``, ``infos/qvel`` (float32),
    ``terminals`` and ``timeouts`` (bool). The last row of each part is marked as a time-out unless
    it is terminal. ``metadata/`` describes how the file was generated.

    Args:
        task: a locomotion task of level ``medium``, ``medium-replay`` or ``medium-expert``.
        size: number of transitions. Defaults to ``100_000``.
        seed: non-negative seed. On one machine, the arrays are a bit-exact function of task, size
            and seed, regardless of the number of workers. Defaults to ``0``.
        cache_dir: folder of the file. Defaults to ``$XDG_CACHE_HOME/pogo_torchrl`` or
            ``~/.cache/pogo_torchrl``.
        progress: show a progress bar on stderr while generating. Defaults to ``True``.
        workers: number of threads. Defaults to one per usable core, at most 4 (more are slowed
            down by Python's global interpreter lock).

    Returns:
        The path of the file. A damaged file is regenerated.

    Raises:
        ValueError: for a task without bundled policies, or a size, seed or number of workers out of
            range.
        OSError: when the file cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = behaviour_dataset(
        ...         "hopper-medium-v2", size=50, cache_dir=folder, progress=False
        ...     )
        ...     with h5py.File(path) as file:
        ...         file["observations"].shape
        (50, 11)
    """
    environment, level = split_task(task)
    manifest = load_manifest()
    if environment not in manifest or level not in _PARTS:
        offered = [f"{name}-{part}-v2" for name in manifest for part in _PARTS]
        raise ValueError(
            f"task={task!r} has no bundled policies to generate data with; use one of "
            f"{', '.join(offered)}, or another data source, e.g. data.source=d4rl."
        )
    _check_integer("size", size, 1)
    _check_integer("seed", seed, 0)
    if workers is None:
        workers = min(4, usable_cores())
    _check_integer("workers", workers, 1)

    policies = load_policies(environment)
    name = (
        f"{environment}-{level}-v2_size{size}_seed{seed}_{_fingerprint(environment, policies)}.hdf5"
    )
    folder = cache_folder(cache_dir)
    path = folder / name
    if path.exists():
        if _is_intact(path, size):
            return path
        _LOGGER.warning("%s is damaged; regenerating it.", path)
    make_writable(folder, "data.cache_dir")  # fail before the work, not after it

    with hold(folder / f".{name}.lock", wait=True):
        if _is_intact(path, size):
            return path  # generated by another process in the meantime
        bar = progress_bar(total=size, unit="step", desc=f"Generating {task}", disable=not progress)
        with bar:
            rows = _generate(environment, policies, _PARTS[level], size, seed, workers, bar)
        metadata = {
            "algorithm": "linear policies of augmented random search, with exploration noise",
            "policies": json.dumps(manifest[environment]),
            "parts": json.dumps(_PARTS[level]),
            "max_noise": MAX_NOISE[environment],
            "seed": seed,
            "generator_version": _VERSION,
            "mujoco_version": mujoco.__version__,
        }
        try:
            with atomic_write(path) as file:
                file.write(_to_hdf5(rows, metadata))
        except OSError as error:
            raise cannot_write(folder, "data.cache_dir", error) from error
    return path


def rollout(
    env: gymnasium.Env, policy: LinearPolicy, max_noise: float, rng: np.random.Generator
) -> Rows:
    """Roll out one episode.

    Args:
        env: an environment created by :func:`~pogo_torchrl.envs.make_env`.
        policy: the policy.
        max_noise: upper bound of the noise scale. The standard deviation of the Gaussian noise
            added to the actions is drawn once from U(0, max_noise), in units of half the action
            range; noisy actions are clipped to the bounds.
        rng: random generator for the start state and the noise.

    Returns:
        The arrays of :func:`behaviour_dataset`, one row per step. Observations are stored in
        float32, while the policy receives them in float64. Stepping with the stored float32 actions
        reproduces the episode exactly.

    Example:
        >>> env = make_env("hopper-medium-v2")
        >>> policy = LinearPolicy(np.zeros((3, 11)), np.zeros(11))
        >>> episode = rollout(env, policy, 0.1, np.random.default_rng(0))
        >>> episode["terminals"].sum()
        np.int64(1)
    """
    physics: Any = env.unwrapped
    rows: dict[str, list] = {key: [] for key in _RECORDED}
    observation, _ = env.reset(seed=int(rng.integers(2**31)))
    noise = rng.uniform(0.0, max_noise)
    terminated = truncated = False
    while not (terminated or truncated):
        action = policy(observation) + noise * rng.standard_normal(len(policy.gain))
        action = clip(action, -1.0, 1.0).astype(np.float32)
        rows["observations"].append(observation)
        rows["actions"].append(action)
        rows["infos/qpos"].append(physics.data.qpos.copy())
        rows["infos/qvel"].append(physics.data.qvel.copy())
        observation, reward, terminated, truncated, _ = env.step(action)
        rows["rewards"].append(reward)
    episode: Rows = {key: np.array(values, dtype=np.float32) for key, values in rows.items()}
    last = observation.astype(np.float32)[None]
    episode["next_observations"] = np.concatenate([episode["observations"][1:], last])
    for key, ended in (("terminals", terminated), ("timeouts", not terminated)):
        episode[key] = np.zeros(len(rows["rewards"]), dtype=bool)
        episode[key][-1] = ended
    return episode


def _generate(
    environment: str,
    policies: dict[str, LinearPolicy],
    parts: tuple[tuple[str, ...], ...],
    size: int,
    seed: int,
    workers: int,
    bar: tqdm,
) -> Rows:
    """Generate all parts of a dataset, one after the other."""
    shape = next(iter(policies.values())).gain.shape
    policies = {_UNTRAINED: LinearPolicy(np.zeros(shape), np.zeros(shape[1])), **policies}
    # MuJoCo releases the global interpreter lock: threads scale without the start-up of processes.
    envs: SimpleQueue[gymnasium.Env] = SimpleQueue()
    for _ in range(workers):
        envs.put(make_env(f"{environment}-medium-v2"))

    def play(part: int, index: int) -> Rows:
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(part, index)))
        level = parts[part][rng.integers(len(parts[part]))]
        max_noise = 1.0 if level == _UNTRAINED else MAX_NOISE[environment]
        env = envs.get()
        try:
            return rollout(env, policies[level], max_noise, rng)
        finally:
            envs.put(env)

    episodes: list[Rows] = []
    borders = [size * part // len(parts) for part in range(len(parts) + 1)]
    with ThreadPoolExecutor(workers) as pool:
        try:
            for part in range(len(parts)):
                missing = borders[part + 1] - borders[part]
                for complete in _iter_episodes(pool, play, part, 2 * workers):
                    episode = {key: values[:missing] for key, values in complete.items()}
                    episodes.append(episode)
                    missing -= len(episode["rewards"])
                    bar.update(len(episode["rewards"]))
                    if missing == 0:
                        break
                # The next row belongs to another episode, even if this one was truncated.
                episode["timeouts"][-1:] = ~episode["terminals"][-1:]
        finally:
            pool.shutdown(cancel_futures=True)
    return {key: np.concatenate([episode[key] for episode in episodes]) for key in episodes[0]}


def _iter_episodes(
    pool: ThreadPoolExecutor, play: Callable[[int, int], Rows], part: int, ahead: int
) -> Iterator[Rows]:
    """Yield episodes 0, 1, 2, ... of a part, with ``ahead`` of them in progress."""
    pending = deque(pool.submit(play, part, index) for index in range(ahead))
    try:
        for index in count(ahead):
            yield pending.popleft().result()
            pending.append(pool.submit(play, part, index))
    finally:
        for future in pending:
            future.cancel()


def _to_hdf5(rows: Rows, metadata: dict[str, Any]) -> memoryview:
    # In memory first, so that a full disk fails in a plain write instead of inside HDF5.
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        for key, values in rows.items():
            file[key] = values
        for key, value in metadata.items():
            file[f"metadata/{key}"] = value
        file.attrs["sha256"] = _digest(rows)
    return buffer.getbuffer()


def _is_intact(path: Path, size: int) -> bool:
    if not path.exists():
        return False
    try:
        with open_hdf5(path) as file:
            arrays: dict[str, Any] = {key: get_local_array(file, key) for key in _KEYS}
            if any(array is None or len(array) != size for array in arrays.values()):
                return False
            return file.attrs["sha256"] == _digest({key: a[()] for key, a in arrays.items()})
    except UnsupportedFileError:
        return False


def _digest(rows: Rows) -> str:
    digest = hashlib.sha256()
    for key, values in sorted(rows.items()):
        digest.update(f"{key} {values.dtype} {values.shape} ".encode())
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()


def _fingerprint(environment: str, policies: dict[str, LinearPolicy]) -> str:
    """Short hash of everything that determines the data besides task, size and seed."""
    weights = {
        f"{name} {field}": getattr(policy, field)
        for name, policy in policies.items()
        for field in ("gain", "mean")
    }
    generator = f"{_VERSION} {_PARTS} {MAX_NOISE[environment]} {_digest(weights)}"
    return hashlib.sha256(generator.encode()).hexdigest()[:8]


def _check_integer(name: str, value: int, lowest: int) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < lowest:
        raise ValueError(f"{name}={value!r} must be an integer >= {lowest}.")
