"""Films of a chain: an episode of every actor, side by side."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import gymnasium
import imageio_ffmpeg
import mujoco
import numpy as np
import torch

from pogo_torchrl.envs.antmaze import D4RLAntMaze
from pogo_torchrl.files import cannot_write
from pogo_torchrl.modules import TransportActor

# Frames a second that a film has at most; environments step up to 125 times a second.
_MAX_FPS = 50

Frame = np.ndarray
"""An image, ``[height, width, 3]``, of uint8."""


def check_film(path: Path, env_fn: Callable[[], gymnasium.Env]) -> None:
    """Check that a film can be made, before there is anything to film.

    Args:
        path: where it is to be written.
        env_fn: makes an environment with ``render_mode="rgb_array"``.

    Raises:
        ValueError: when ``path`` is no name of an MP4 file, or there is no OpenGL to draw with.
        OSError: when the folder does not exist.
    """
    if path.suffix != ".mp4":
        raise ValueError(f"video={path} must end in .mp4.")
    if not path.absolute().parent.is_dir():
        raise OSError(f"video={path}: the folder {path.absolute().parent} does not exist; make it.")
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")  # draws without a screen
    try:
        env = env_fn()
        env.reset(seed=0)
        env.render()
        env.close()
    except Exception as error:  # MuJoCo, PyOpenGL and Gymnasium each raise their own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"video={path} needs OpenGL to draw the frames, which does not work here ({reason}): "
            "install Mesa (Debian and Ubuntu: apt install libegl1 libgl1-mesa-dri), choose a "
            "library with the environment variable MUJOCO_GL=egl, osmesa or glfw, or leave video "
            "out."
        ) from error


def film(
    path: Path,
    actors: Sequence[TransportActor],
    env_fn: Callable[[], gymnasium.Env],
    seed: int = 0,
) -> int:
    """Film one episode of every actor, acting deterministically, side by side from the left.

    An actor whose episode is over stands still until the last one is.

    Args:
        path: the MP4 file (H.264), new or to be replaced.
        actors: a chain on raw observations.
        env_fn: makes an environment with ``render_mode="rgb_array"``.
        seed: the environments are reset with. Defaults to ``0``.

    Returns:
        How many frames it has.

    Raises:
        OSError: when the file cannot be written.
    """
    fps = int(env_fn().metadata.get("render_fps", 30))
    stride = -(-fps // _MAX_FPS)
    frames = _frames([_episode(actor, env_fn(), seed, stride) for actor in actors])
    first = next(frames)
    temporary = path.with_name(f".{path.stem}.tmp.mp4")
    count = 1
    try:
        writer = imageio_ffmpeg.write_frames(
            str(temporary), first.shape[1::-1], fps=fps / stride, macro_block_size=2
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
    """Frames of all episodes beside each other, until the longest is over."""
    last = [next(episode) for episode in episodes]
    while True:
        yield np.ascontiguousarray(np.concatenate(last, axis=1))
        new = [next(episode, None) for episode in episodes]
        if all(frame is None for frame in new):
            return
        last = [old if frame is None else frame for old, frame in zip(last, new)]


@torch.no_grad()
def _episode(actor: TransportActor, env: gymnasium.Env, seed: int, stride: int) -> Iterator[Frame]:
    """Every ``stride``-th frame of an episode."""
    observation, _ = env.reset(seed=seed)
    _follow(env)
    step, over = 0, False
    while not over:
        if step % stride == 0:
            yield np.asarray(env.render())
        inputs = torch.as_tensor(observation, dtype=torch.float32)
        noise = torch.zeros(actor.noise_dim)
        observation, _, terminated, truncated, _ = env.step(actor(inputs, noise).numpy())
        step, over = step + 1, terminated or truncated
    env.close()


def _follow(env: gymnasium.Env) -> None:
    """Have the camera follow the robot, where the model has such a camera and no maze to show.

    From Gymnasium 1.4 on, the default camera stays where it is.
    """
    renderer = getattr(env.unwrapped, "mujoco_renderer", None)
    if renderer is not None and not isinstance(env.unwrapped, D4RLAntMaze):
        renderer.camera_id = mujoco.mj_name2id(renderer.model, mujoco.mjtObj.mjOBJ_CAMERA, "track")
