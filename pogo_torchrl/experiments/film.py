"""Videos of a chain: one episode of every actor, shown next to each other."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import gymnasium
import imageio_ffmpeg
import mujoco
import numpy as np
import torch

from pogo_torchrl.envs.antmaze import D4RLAntMaze
from pogo_torchrl.files import cannot_write
from pogo_torchrl.modules import TransportActor

# Maximum frame rate of a video; environments run at up to 125 steps per second.
_MAX_FPS = 50

Frame = np.ndarray
"""RGB image, ``[height, width, 3]``, uint8."""


def check_film(path: Path, env_fn: Callable[[], gymnasium.Env]) -> None:
    """Check that a video can be recorded.

    Args:
        path: the MP4 file to write.
        env_fn: factory of an environment with ``render_mode="rgb_array"``.

    Raises:
        ValueError: if ``path`` does not end in ``.mp4``, or rendering fails for lack of OpenGL.
        OSError: if the folder of ``path`` does not exist.
    """
    if path.suffix != ".mp4":
        raise ValueError(f"video={path} must end in .mp4.")
    if not path.absolute().parent.is_dir():
        raise OSError(
            f"video={path}: the folder {path.absolute().parent} does not exist; create it."
        )
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")  # renders without a display
    try:
        with closing(env_fn()) as env:
            env.reset(seed=0)
            env.render()
    except Exception as error:  # MuJoCo, PyOpenGL and Gymnasium raise various types
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"video={path} needs OpenGL to render the frames, which failed here ({reason}): "
            "install Mesa (Debian and Ubuntu: apt install libegl1 libgl1-mesa-dri), select a "
            "backend with the environment variable MUJOCO_GL=egl, osmesa or glfw, or leave video "
            "out."
        ) from error


def film(
    path: Path,
    actors: Sequence[TransportActor],
    env_fn: Callable[[], gymnasium.Env],
    seed: int = 0,
    *,
    at_once: bool = True,
) -> int:
    """Record one deterministic episode of every actor, from left to right in one video.

    An actor whose episode has ended freezes until all episodes have ended.

    Args:
        path: the MP4 file (H.264); an existing file is replaced.
        actors: a chain that acts on raw observations.
        env_fn: factory of an environment with ``render_mode="rgb_array"``.
        seed: seed of the environment resets. Defaults to ``0``.
        at_once: whether the environments of all actors may exist at once. If not, the episodes are
            played one after the other, and their frames kept in temporary files. Defaults to
            ``True``.

    Returns:
        Number of frames.

    Raises:
        OSError: if the file cannot be written.
    """
    with closing(env_fn()) as env:
        fps = int(env.metadata.get("render_fps", 30))
    stride = -(-fps // _MAX_FPS)
    episodes = [_episode(actor, env_fn, seed, stride) for actor in actors]
    with ExitStack() as stack:
        for episode in episodes:
            stack.enter_context(closing(episode))  # closes its environment
        frames = _frames(episodes if at_once else [_stored(episode) for episode in episodes])
        return _write(path, frames, fps / stride)


def _write(path: Path, frames: Iterator[Frame], fps: float) -> int:
    """Write a video and return the number of its frames."""
    first = next(frames)
    temporary = path.with_name(f".{path.stem}.tmp.mp4")
    count = 1
    try:
        writer = imageio_ffmpeg.write_frames(
            str(temporary), first.shape[1::-1], fps=fps, macro_block_size=2
        )
        writer.send(None)
        writer.send(first.tobytes())
        for frame in frames:
            writer.send(frame.tobytes())
            count += 1
        writer.close()
        os.replace(temporary, path)
    except OSError as error:
        raise cannot_write(path.absolute().parent, "video", error) from error
    finally:
        temporary.unlink(missing_ok=True)
    return count


def _frames(episodes: Sequence[Iterator[Frame]]) -> Iterator[Frame]:
    """Concatenate the frames of all episodes horizontally until the longest has ended."""
    last = [next(episode) for episode in episodes]
    while True:
        yield np.ascontiguousarray(np.concatenate(last, axis=1))
        new = [next(episode, None) for episode in episodes]
        if all(frame is None for frame in new):
            return
        last = [old if frame is None else frame for old, frame in zip(last, new)]


@torch.no_grad()
def _episode(
    actor: TransportActor, env_fn: Callable[[], gymnasium.Env], seed: int, stride: int
) -> Generator[Frame, None, None]:
    """Yield every ``stride``-th frame of an episode."""
    with closing(env_fn()) as env:
        observation, _ = env.reset(seed=seed)
        _track_robot(env)
        step, ended = 0, False
        while not ended:
            if step % stride == 0:
                yield np.asarray(env.render())
            inputs = torch.as_tensor(observation, dtype=torch.float32)
            noise = torch.zeros(actor.noise_dim)
            observation, _, terminated, truncated, _ = env.step(actor(inputs, noise).numpy())
            step, ended = step + 1, terminated or truncated


def _stored(episode: Iterator[Frame]) -> Iterator[Frame]:
    """Play an episode to its end when its first frame is asked for, then yield its frames."""
    with tempfile.TemporaryFile() as file:
        first = next(episode)
        file.write(first.tobytes())
        for frame in episode:
            file.write(frame.tobytes())
        file.seek(0)
        while content := file.read(first.nbytes):
            yield np.frombuffer(content, first.dtype).reshape(first.shape)


def _track_robot(env: gymnasium.Env) -> None:
    """Make the camera follow the robot, unless there is a maze to show.

    Since Gymnasium 1.4 the default camera is static.
    """
    renderer = getattr(env.unwrapped, "mujoco_renderer", None)
    if renderer is not None and not isinstance(env.unwrapped, D4RLAntMaze):
        renderer.camera_id = mujoco.mj_name2id(renderer.model, mujoco.mjtObj.mjOBJ_CAMERA, "track")
