"""The plain TorchRL loop."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "examples" / "pogo_in_torchrl.py"


def test_the_plain_loop_runs_and_is_short():
    spec = importlib.util.spec_from_file_location("pogo_in_torchrl", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    returns = module.main(steps=10, frames=1000, batch_size=32)
    assert len(returns) == 2
    assert all(math.isfinite(value) for value in returns)
    assert len(EXAMPLE.read_text().splitlines()) < 80
