"""Imports of libraries that fail on some machines, for want of something that is not needed."""

from __future__ import annotations

import getpass
import importlib
import importlib.util
import logging
import os
import sys
import tempfile
from contextlib import suppress

_LOGGER = logging.getLogger(__name__)


def import_mujoco() -> None:
    """Import MuJoCo, if it is installed, whatever ``MUJOCO_GL`` selects.

    MuJoCo loads the OpenGL library of ``MUJOCO_GL`` when it is imported, and cannot be imported if
    that fails. In that case it is imported without rendering; rendering then fails when it is used,
    with the reason.
    """
    if not os.environ.get("MUJOCO_GL") or importlib.util.find_spec("mujoco") is None:
        return
    before = {name: os.environ.get(name) for name in ("MUJOCO_GL", "PYOPENGL_PLATFORM")}
    try:
        importlib.import_module("mujoco")
    except Exception:  # MuJoCo and PyOpenGL raise various types
        os.environ["MUJOCO_GL"] = "disabled"
        try:
            importlib.import_module("mujoco")
        finally:
            for name, value in before.items():  # MuJoCo sets the second one
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


def provide_compile_cache() -> None:
    """Replace the folder for compiled code by a temporary one if it cannot be written.

    torch creates this folder when it is imported, ``TORCHINDUCTOR_CACHE_DIR`` or one named after
    the user, and cannot be imported if that fails.
    """
    if "torch._dynamo" in sys.modules:
        return
    wanted, temporary = os.environ.get("TORCHINDUCTOR_CACHE_DIR"), tempfile.gettempdir()
    if not wanted:
        with suppress(OSError, KeyError):  # the user has no name, in some containers
            wanted = os.path.join(temporary, f"torchinductor_{getpass.getuser()}")
    own = os.path.join(temporary, f"torchinductor_{getattr(os, 'getuid', int)()}")
    for folder in filter(None, (wanted, own)):
        if _is_writable(folder):
            break
    else:
        folder = tempfile.mkdtemp(prefix="torchinductor_")
    if folder != wanted:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    if wanted not in (None, folder):
        _LOGGER.warning("%s, for compiled code, cannot be written: using %s.", wanted, folder)


def _is_writable(folder: str) -> bool:
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)
