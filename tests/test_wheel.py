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
    (policy,) = (tmp_path / "logs").rglob("policy.safetensors")
    (data,) = (tmp_path / "cache").rglob("*.hdf5")
    (tmp_path / "sweep.yaml").write_text(
        "common: {total_steps: 2, seeds: [1], eval_episodes: 1, hidden_sizes: [8], batch_size: 8,"
        " data: {size: 500, cache_dir: cache}}\nenvironments: {hopper: {medium: {}}}\n"
    )
    for command, output in {
        ("sweep", "sweep=sweep.yaml", "jobs=1", "device=cpu"): "1 of 1 runs",
        ("evaluate", str(policy), "--episodes", "1"): "on hopper-medium-v2, 1 episode",
        ("report",): "Report: results/README.md",
        ("check-dataset", str(data)): "matches",
        ("--version",): "torchrl ",
    }.items():
        process = python("-m", "pogo_torchrl", *command)
        assert process.returncode == 0, process.stderr
        assert output in process.stdout


def test_the_wheel_installs_the_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (entry_points,) = (n for n in archive.namelist() if n.endswith("entry_points.txt"))
        assert "pogo = pogo_torchrl.cli:main" in archive.read(entry_points).decode()
