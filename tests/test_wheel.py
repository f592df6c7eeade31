"""The wheel is complete and runs outside the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Path of the wheel, built by the project's build backend."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_is_complete(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in (
        "experiments/conf",
        "experiments/conf/task",
        "experiments/conf/sweep",
        "data/policies",
    ):
        for file in (ROOT / "pogo_torchrl" / folder).iterdir():
            if file.suffix in (".py", ".yaml", ".npz", ".json"):
                assert f"pogo_torchrl/{folder}/{file.name}" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_example_runs_from_the_wheel(wheel, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    example = shutil.copy(ROOT / "examples" / "pogo_offline.py", tmp_path)
    environment = os.environ | {"PYTHONPATH": str(site)}

    def python(*arguments):
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )

    where = python("-c", "import pogo_torchrl; print(pogo_torchrl.__file__)")
    assert Path(where.stdout.strip()).is_relative_to(site)
    process = python(
        example, "data.size=500", "data.cache_dir=cache", "total_steps=3", "eval_episodes=1",
        "hidden_sizes=[8]", "batch_size=8",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "logs").is_dir()
