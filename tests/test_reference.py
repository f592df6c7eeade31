"""The reference pages of the documentation against the code."""

from __future__ import annotations

import csv
import importlib
import re
from pathlib import Path

import pytest

from pogo_torchrl.configs import compose
from pogo_torchrl.experiments.run import run
from pogo_torchrl.experiments.run_folder import RunFolder

REFERENCE = Path(__file__).parents[1] / "docs" / "reference"


def table(heading: str) -> set[str]:
    """First cells of the table below a heading of the page of files."""
    section = (REFERENCE / "files.md").read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    return set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE))


@pytest.fixture(scope="module")
def headers(tmp_path_factory):
    """Columns of the CSV files of a run that writes all of them, by file name."""
    folder = tmp_path_factory.mktemp("run")
    cfg = compose([
        f"log_dir={folder}", f"data.cache_dir={folder}", "data.size=400", "hidden_sizes=[8]",
        "batch_size=8", "total_steps=2", "log_interval=2", "eval_episodes=1", "save_model=false",
        "average_actors=0.1", "alpha_growth=2", "progress_bar=false", "env.max_episode_steps=3",
    ])  # fmt: skip
    run(cfg)
    training = RunFolder.of(cfg).training
    return {
        name: next(csv.reader((training / name).open(newline="")))
        for name in ("metrics.csv", "evaluations.csv")
    }


@pytest.mark.parametrize("name", ["metrics.csv", "evaluations.csv"])
def test_the_columns_of_a_run_are_documented(headers, name):
    columns = {re.sub(r"_\d+$", "_i", column) for column in headers[name]}
    assert table(f"Columns of `{name}`") == columns


DESCRIBED = [
    (module, names.split())
    for page in sorted((REFERENCE / "api").glob("*.md"))
    for module, names in re.findall(r"^```\{api\} (\S+)\n(.*?)^```$", page.read_text(), re.M | re.S)
]


@pytest.mark.parametrize(("module", "names"), DESCRIBED)
def test_the_names_of_the_reference_exist(module, names):
    found = importlib.import_module(module)
    public = names or getattr(found, "__all__", [])
    assert [name for name in public if not hasattr(found, name)] == []


@pytest.mark.parametrize("package", ["data", "envs", "objectives", "report", "trainers", "configs"])
def test_the_reference_has_all_public_names(package):
    described = {
        name
        for module, names in DESCRIBED
        for name in names or getattr(importlib.import_module(module), "__all__", ())
    }
    public = importlib.import_module(f"pogo_torchrl.{package}").__all__
    assert set(public) - described == set()
