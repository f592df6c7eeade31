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
        "experiments/conf/algorithm",
        "experiments/conf/group",
        "experiments/conf/task",
        "experiments/conf/sweep",
        "data/policies",
    ):
        for file in (ROOT / "pogo_torchrl" / folder).iterdir():
            if file.suffix in (".py", ".yaml", ".npz", ".json"):
                assert f"pogo_torchrl/{folder}/{file.name}" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


# Each line of input is a command line; one interpreter runs all, as imports take seconds.
COMMANDS = """
import runpy, sys
import pogo_torchrl
print(pogo_torchrl.__file__)
for line in sys.stdin.read().splitlines():
    sys.argv[1:] = line.split()
    try:
        runpy.run_module("pogo_torchrl", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        assert not end.code, line
"""


@pytest.mark.slow
def test_examples_and_commands_run_from_the_wheel(wheel, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)

    def python(*arguments, **options):
        process = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(site)},
            capture_output=True, text=True, timeout=300, **options,
        )  # fmt: skip
        assert process.returncode == 0, process.stderr
        return process.stdout

    offline, sweep = (
        shutil.copy(ROOT / "examples" / f"pogo_{name}.py", tmp_path)
        for name in ("offline", "sweep")
    )
    python(
        offline, "data.size=500", "data.cache_dir=cache", "total_steps=3", "eval_episodes=1",
        "hidden_sizes=[8]", "batch_size=8",
    )  # fmt: skip
    (policy,) = (tmp_path / "logs").rglob("policy.safetensors")
    (data,) = (tmp_path / "cache").rglob("*.hdf5")
    (tmp_path / "sweep.yaml").write_text(
        "common: {total_steps: 2, seeds: [1], eval_episodes: 1, hidden_sizes: [8], batch_size: 8,"
        " data: {size: 500, cache_dir: cache}}\nenvironments: {hopper: {medium: {}}}\n"
    )
    assert "1 of 1 runs" in python(sweep, "sweep=sweep.yaml", "jobs=1", "device=cpu")
    commands = {
        f"evaluate {policy} --episodes 1": "on hopper-medium-v2, 1 episode",
        "report": "Report: results/README.md",
        f"check-dataset {data}": "matches",
        "--version": "torchrl ",
    }
    out = python("-c", COMMANDS, input="\n".join(commands))
    assert Path(out.splitlines()[0]).is_relative_to(site)
    for expected in commands.values():
        assert expected in out


def test_the_wheel_installs_the_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (entry_points,) = (n for n in archive.namelist() if n.endswith("entry_points.txt"))
        assert "pogo = pogo_torchrl.cli:main" in archive.read(entry_points).decode()
