"""Import and settings of Matplotlib, independent of those of the user."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

try:
    import matplotlib
except ValueError:  # an MPLBACKEND inherited, e.g. from a notebook, that is not installed here
    inherited = os.environ.pop("MPLBACKEND", "")
    try:
        import matplotlib
    finally:
        os.environ["MPLBACKEND"] = inherited

from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["Axes", "Figure", "default_style", "matplotlib"]


@contextmanager
def default_style() -> Iterator[None]:
    """Use Matplotlib's defaults in place of the user's settings, such as ``text.usetex``.

    Figures must be created and saved within the ``with`` block. They then look the same everywhere,
    and need no other programs.

    Example:
        >>> with matplotlib.rc_context({"text.usetex": True}), default_style():
        ...     matplotlib.rcParams["text.usetex"]
        False
    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        yield
