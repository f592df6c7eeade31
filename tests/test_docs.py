"""The README's code, and the task table of the documentation against the code."""

from __future__ import annotations

import re
import shlex
from pathlib import Path, PurePosixPath

import pytest
import torch
from hydra import compose, initialize_config_module
from torchrl.data.datasets.d4rl_infos import D4RL_DATASETS

from pogo_torchrl import load_actors
from pogo_torchrl.cli import main
from pogo_torchrl.envs import REFERENCE_RETURNS, make_env, split_task
from pogo_torchrl.experiments import config

TABLE = [
    [cell.strip(" `") for cell in line.strip("|").split("|")]
    for line in (Path(__file__).parents[1] / "docs" / "tasks.md").read_text().splitlines()
    if line.startswith("| `")
]


def test_task_table_is_complete():
    assert sorted(row[0] for row in TABLE) == config.tasks()


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row[0])
def test_task_table_matches_the_code(row):
    task, environment, file, _, horizon, low, high, weights = row
    with initialize_config_module("pogo_torchrl.experiments.conf", version_base="1.3"):
        cfg = compose("config", overrides=[f"task={task}", "algorithm=original"])
    env = make_env(task)
    sizes = f"{env.observation_space.shape[0]} / {env.action_space.shape[0]}"
    assert environment.endswith(f", {sizes}")
    assert file == PurePosixPath(D4RL_DATASETS[task]).name
    assert int(horizon) == env.spec.max_episode_steps
    assert (float(low), float(high)) == REFERENCE_RETURNS[split_task(task)[0]]
    assert [float(w) for w in weights.split(",")] == list(cfg.w2_weights)


README = Path(__file__).parents[1] / "README.md"


def test_the_code_of_the_readme_runs(tmp_path, monkeypatch):
    """The blocks of Python, and then the command that trains on the file they write."""
    monkeypatch.chdir(tmp_path)
    text = README.read_text()
    for block in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        exec(compile(block, README.name, "exec"), {"__name__": "readme"})
    (command,) = re.findall(r"^pogo (train .*)$", text, re.MULTILINE)
    small = "total_steps=2 eval_episodes=1 hidden_sizes=[8] batch_size=8 progress_bar=false"
    main([*shlex.split(command), *small.split()])
    (policy,) = tmp_path.rglob("policy.safetensors")
    assert load_actors(policy)[-1](observation=torch.zeros(3)).shape == (1,)
