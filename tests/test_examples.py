"""The examples that use the Python API."""

from __future__ import annotations

import math

import numpy as np
import pytest
from runs import EXAMPLE, example
from test_data import write


def test_the_plain_loop_runs_and_is_short():
    module = example("pogo_in_torchrl")
    returns = module.main(steps=10, frames=1000, batch_size=32)
    assert len(returns) == 2
    assert all(math.isfinite(value) for value in returns)
    assert len(EXAMPLE.with_name("pogo_in_torchrl.py").read_text().splitlines()) < 80


def test_the_chain_over_iql_runs_and_is_short(tmp_path):
    module = example("jko_chain_iql")
    scores = module.main(base_steps=2, chain_steps=2, size=300, cache_dir=tmp_path)
    assert len(scores) == 3
    assert all(math.isfinite(value) for value in scores)
    assert len(EXAMPLE.with_name("jko_chain_iql.py").read_text().splitlines()) < 80


def test_fine_tuning_runs_and_is_short(tmp_path):
    module = example("pogo_finetune")
    scores = module.main(2, env_steps=50, episodes=1, batch_size=8, size=300, cache_dir=tmp_path)
    assert len(scores) == 2
    assert all(math.isfinite(value) for value in scores)
    assert len(EXAMPLE.with_name("pogo_finetune.py").read_text().splitlines()) < 80


@pytest.mark.parametrize("delay_actor", [False, True])
def test_the_single_file_runs_from_a_dataset_to_scores(tmp_path, capsys, delay_actor):
    module = example("pogo_single_file")
    rng, rows = np.random.default_rng(0), 300
    data = {
        "observations": rng.normal(size=(rows, 11)),
        "actions": rng.uniform(-1, 1, size=(rows, 3)),
        "rewards": rng.normal(size=rows),
        "terminals": rng.random(rows) < 0.1,
        "timeouts": np.zeros(rows, dtype=bool),
    }
    scores = module.main(
        module.Args(
            source="hdf5", path=str(write(tmp_path / "data.hdf5", data)), total_steps=4,
            eval_episodes=1, hidden=16, batch_size=32, policy_freq=2, delay_actor=delay_actor,
        )
    )  # fmt: skip
    assert len(scores) == 3
    assert all(math.isfinite(value) for value in scores)
    assert "D4RL scores of the actors" in capsys.readouterr().out


def test_the_single_file_is_short():
    assert len(EXAMPLE.with_name("pogo_single_file.py").read_text().splitlines()) <= 200
