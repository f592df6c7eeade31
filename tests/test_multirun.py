"""`pogo train --multirun`: a folder for each run, failures of single runs, and no other files."""

from __future__ import annotations

import json
import sys

import pytest
from omegaconf import OmegaConf

from pogo_torchrl.cli import main
from pogo_torchrl.data import behaviour_dataset
from pogo_torchrl.experiments.config import RunConfig
from pogo_torchrl.experiments.multirun import variant_of, with_variant
from pogo_torchrl.experiments.overrides import compose
from pogo_torchrl.experiments.run_folder import RunFolder
from pogo_torchrl.report import read_runs
from pogo_torchrl.report.study import settings

SMALL = [
    "data.size=1000", "eval_episodes=1", "hidden_sizes=[8]", "batch_size=16", "total_steps=2",
    "w2_weights=[0.5]", "progress_bar=false", "compile=false", "freeze_critics_at=null",
]  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Option of the cache folder with the data of all runs of this file."""
    folder = tmp_path_factory.mktemp("cache")
    behaviour_dataset("hopper-medium-v2", size=1000, cache_dir=folder, progress=False)
    return f"data.cache_dir={folder}"


def train(monkeypatch, folder, *arguments) -> int:
    """Run ``pogo train`` in a folder; returns its exit code."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", list(sys.argv))  # which the command sets
    try:
        main(["train", *SMALL, *arguments])
    except SystemExit as end:
        return end.code
    return 0


def test_runs_that_differ_in_any_option_have_their_own_folders(
    cache, tmp_path, monkeypatch, capsys
):
    grid = ["-m", "lr=1e-4,3e-4,0", "seed=0,1", cache]
    assert train(monkeypatch, tmp_path, *grid) == 1
    task = tmp_path / "logs" / "hopper-medium-v2"
    expected = {f"w2_0.5_lr_{lr}/seed_{seed}" for lr in ("0.0001", "0.0003") for seed in (0, 1)}
    done = {path.parent.relative_to(task).as_posix() for path in task.rglob("done.json")}
    assert done == expected
    assert {path.name for path in tmp_path.iterdir()} == {"logs"}  # nothing of Hydra's
    error = capsys.readouterr().err
    assert "lr=0.0 must be a positive number" in error
    assert "2 run(s) failed" in error
    assert "lr=0 seed=1" in error
    # Reports keep them apart, too.
    found = settings(read_runs(tmp_path / "logs")[0])
    assert [(s.label, len(s.runs)) for s in found] == [
        ("0.5 (lr_0.0001)", 2),
        ("0.5 (lr_0.0003)", 2),
    ]
    # The same command resumes; a single run finds its own folder.
    assert train(monkeypatch, tmp_path, *grid, "resume=true") == 1
    assert train(monkeypatch, tmp_path, "lr=1e-4", "seed=0", cache) == 0
    assert json.loads((task / "w2_0.5" / "seed_0" / "done.json").read_text())["total_steps"] == 2


def test_runs_of_several_algorithms(cache, tmp_path, monkeypatch, capsys):
    """Their folders are those of single runs."""
    common = [f for f in SMALL if not f.startswith(("w2_weights", "freeze"))]
    monkeypatch.setattr(sys.modules[__name__], "SMALL", common)
    assert train(monkeypatch, tmp_path, "-m", "algorithm=td3_bc,iql", "chain=0,1", cache) == 0
    done = {path.parent.parent.name for path in tmp_path.rglob("done.json")}
    assert done == {
        "td3_bc_chain_0", "td3_bc_chain_1_w2_3.33333", "iql_chain_0", "iql_chain_1_w2_3.33333",
    }  # fmt: skip
    assert train(monkeypatch, tmp_path, "-m", "algorithm=td3_bc,sac", cache) == 2
    assert "algorithm=sac is unknown; choose one of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "differ"),
    [
        (["-m", "seed=0,1", "w2_weights=[1],[2]", "task=a,b", "log_dir=a,b"], None),
        (["-m", "lr=1e-4,3e-4", "variant=mine"], None),
        (["-m", "lr=1e-4", "hydra.verbose=true,false"], None),
        (["--multirun", "alpha=1,2", "data.size=range(1,3)", "lr=1"], "alpha,data.size"),
    ],
)
def test_only_what_differs_names_the_folder(given, differ):
    added = [f"variant='${{variant_of:{differ}}}'"] if differ else []
    assert with_variant(given) == [*given, *added]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"lr": 3e-4, "batch_size": 64}, "lr_0.0003_batch_size_64"),
        ({"hidden_sizes": [8, 16], "bf16": True}, "hidden_sizes_8-16_bf16_true"),
        ({"q_normalization": None}, "q_normalization_null"),
        ({"device": "a/b: c*?"}, "device_a-b-c-"),
    ],
)
def test_names_of_variants(options, name):
    found = variant_of(*options, _root_=OmegaConf.structured(RunConfig(**options)))
    assert found.startswith(name)
    assert compose(["variant=" + found]).variant == found
    assert RunFolder.of(compose(["variant=" + found])).root.parent.name.endswith(found)


def test_values_that_look_alike_as_names_stay_apart():
    roots = [OmegaConf.create({"device": text}) for text in ("a/b", "a:b", "a-b")]
    assert len({variant_of("device", _root_=root) for root in roots}) == len(roots)


@pytest.mark.parametrize("variant", ["a/b", "..\\x", "a b", "", "x" * 200])
def test_variants_that_cannot_be_folders(variant):
    cfg = compose([])
    cfg.variant = variant
    with pytest.raises(ValueError, match=r"variant=.*letters, digits and _"):
        RunFolder.of(cfg)


def test_a_finished_run_that_is_started_with_fewer_updates_is_not_undone(
    cache, tmp_path, monkeypatch
):
    assert train(monkeypatch, tmp_path, cache) == 0
    assert train(monkeypatch, tmp_path, cache, "resume=true", "total_steps=1") == 0
    (done,) = tmp_path.rglob("done.json")
    assert json.loads(done.read_text())["total_steps"] == 2
