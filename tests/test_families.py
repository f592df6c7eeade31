"""Tests of D4RL's tasks that have no environment in the package."""

from __future__ import annotations

import pytest
from torchrl.data.datasets.d4rl_infos import D4RL_DATASETS

from pogo_torchrl.cli import main
from pogo_torchrl.data import behaviour_dataset
from pogo_torchrl.envs import TASKS, score, split_task
from pogo_torchrl.envs.families import other_family
from pogo_torchrl.experiments.overrides import compose
from pogo_torchrl.experiments.sweep_file import read_sweep


def test_every_task_of_d4rl_is_known():
    unknown = [task for task in D4RL_DATASETS if task not in TASKS and not other_family(task)]
    assert unknown == []
    assert not any(map(other_family, TASKS))


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("maze2d-umaze-v1", "Maze2D.*environment of your own|Maze2D.*one of your own.*env.id"),
        ("pen-human-v1", "Adroit.*one of your own.*env.id=MODULE:ID.*AdroitHandPen"),
        ("kitchen-mixed-v0", "FrankaKitchen.*one of your own"),
        ("bullet-hopper-medium-v0", "PyBullet.*one of your own"),
        ("flow-ring-random-v0", "traffic.*one of your own"),
        ("carla-lane-v0", "camera images.*not supported"),
        ("hopper-medium-v0", "only version 2 is supported: use hopper-medium-v2"),
    ],
)
def test_messages(task, words, capsys):
    with pytest.raises(ValueError, match=words):
        split_task(task)
    with pytest.raises(SystemExit) as end:
        main(["train", f"task={task}"])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert f"task={task} is " in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("environment", ["halfcheetah", "hopper", "walker2d"])
@pytest.mark.parametrize("level", ["random", "expert", "full-replay"])
def test_levels_without_published_weights(environment, level):
    task = f"{environment}-{level}-v2"
    cfg = compose([f"task={task}", "data.source=d4rl"])
    assert (cfg.task, cfg.env.id) == (task, f"pogo_torchrl/{task}")
    assert list(cfg.w2_weights) == [0.2, 0.2, 0.2]  # the default of the option
    assert score(task, 1000.0) == score(f"{environment}-medium-v2", 1000.0)
    with pytest.raises(ValueError, match=rf"task='{task}' has no bundled policies"):
        behaviour_dataset(task)


def test_sweeps_over_levels_without_published_weights(tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text("common: {seeds: [0]}\nenvironments: {hopper: {random: {}, medium: {}}}\n")
    tasks = {run.cfg.task for run in read_sweep(str(file))}
    assert tasks == {"hopper-medium-v2", "hopper-random-v2"}
