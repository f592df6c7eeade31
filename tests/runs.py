"""Helpers of the tests: small runs of the command line in processes, and their results."""

from __future__ import annotations

import csv
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import torch
from processes import Pogo, pogo

EXAMPLE = Path(__file__).parents[1] / "examples" / "pogo_offline.py"
SMALL = [
    "data.size=2000", "eval_episodes=1", "hidden_sizes=[16]", "log_interval=4", "eval_interval=6",
    "checkpoint_interval=4", "batch_size=16", "w2_weights=[0.1,0.5]", "progress_bar=false",
    "compile=false",
]  # fmt: skip
CLOCKS = ("seconds", "updates_per_second")


def example(name: str) -> ModuleType:
    """Import one of the examples as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLE.with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


class Rows:
    """Sink of trainer hooks that stores all rows."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict]] = []

    def write(self, step: int, rows) -> None:
        self.rows += [(step, dict(row)) for row in rows]

    @property
    def steps(self) -> list[int]:
        return [step for step, _ in self.rows]

    def numbers(self) -> list[tuple[int, dict]]:
        """Rows without measured times."""
        return [(s, {k: v for k, v in row.items() if k not in CLOCKS}) for s, row in self.rows]


def spoil_at(trainer, step: int) -> None:
    """Fill a critic of a trainer with NaN after an update."""

    def spoil() -> None:
        if trainer.collected_frames == step:
            next(trainer.loss_module.qvalue_network_params.parameters()).data.fill_(float("nan"))

    trainer.register_op("post_steps", spoil)


def command(*arguments: str) -> list[str]:
    """Command line of a run in a new interpreter."""
    return [sys.executable, str(EXAMPLE), *SMALL, *arguments]


def start(folder: Path, *arguments: str, **options) -> Pogo:
    return Pogo(folder, "train", *SMALL, *arguments, **options)


def train(folder: Path, *arguments: str, **options) -> subprocess.CompletedProcess:
    return pogo(folder, "train", *SMALL, *arguments, **options)


def run_folder(folder: Path, task: str = "hopper-medium-v2") -> Path:
    return folder / "logs" / task / "w2_0.1_0.5" / "seed_0"


def rows(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file, without measured times."""
    with path.open(newline="") as file:
        return [{k: v for k, v in r.items() if k not in CLOCKS} for r in csv.DictReader(file)]


def state(folder: Path) -> dict[str, object]:
    """Results of a run: its metrics and evaluations, and its newest checkpoint."""
    newest = max((folder / "checkpoints").glob("step-*"))
    found: dict[str, object] = {
        f"{newest.name}/{path.parent.name}": torch.load(path, weights_only=True)
        for path in newest.rglob("state.pt")
    }
    for name in ("metrics", "evaluations"):
        found[name] = rows(folder / "training" / f"{name}.csv")
    return found


def assert_same(left: object, right: object, where: str = "") -> None:
    """Assert that nested states are bitwise identical."""
    assert type(left) is type(right), where
    if isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_same(left[key], right[key], f"{where}/{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for i, pair in enumerate(zip(left, right)):
            assert_same(*pair, f"{where}/{i}")
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right), where
    else:
        assert left == right, where
