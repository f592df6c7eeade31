"""Import and settings of Matplotlib, independent of those of the user."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# An MPLBACKEND inherited, e.g. from a notebook, may not be installed here. Matplotlib then fails to
# be imported, and a second attempt finds it half imported.
_inherited = None if "matplotlib" in sys.modules else os.environ.pop("MPLBACKEND", None)
try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
finally:
    if _inherited is not None:
        os.environ["MPLBACKEND"] = _inherited
if _inherited:
    with suppress(ValueError):
        matplotlib.rcParams["backend"] = _inherited

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
