"""The tutorials of the documentation: all of their cells run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from matplotlib import pyplot as plt

TUTORIALS = sorted(
    path
    for path in (Path(__file__).parents[1] / "docs" / "tutorials").glob("*.md")
    if path.stem != "index"
)


@pytest.mark.slow  # the build of the documentation runs them, too
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_the_tutorial_runs(path, tmp_path, monkeypatch):
    plt.switch_backend("Agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cells = re.findall(r"^```\{code-cell\}\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)
    assert cells
    names = {"__name__": path.stem}
    for number, cell in enumerate(cells):
        exec(compile(cell, f"{path.name}, cell {number}", "exec"), names)
    plt.close("all")
