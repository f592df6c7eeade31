"""The command line, in real processes."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium
import h5py
import numpy as np
import pytest
import torch

from pogo_torchrl import load_actors
from pogo_torchrl.envs import make_env

EXAMPLE = Path(__file__).parents[1] / "examples" / "pogo_offline.py"
SMALL = [
    "data.size=2000", "eval_episodes=1", "hidden_sizes=[16]", "log_interval=4", "eval_interval=6",
    "checkpoint_interval=4", "batch_size=16", "w2_weights=[0.1,0.5]",
]  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache folder that all runs of this file share."""
    return tmp_path_factory.mktemp("cache")


def command(cache, *arguments):
    return [sys.executable, str(EXAMPLE), *SMALL, f"data.cache_dir={cache}", *arguments]


def pogo(cache, folder, *arguments):
    return subprocess.run(
        command(cache, *arguments), cwd=folder, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def finished(cache, tmp_path_factory):
    """A finished run of 12 updates: its working folder and process."""
    folder = tmp_path_factory.mktemp("run")
    return folder, pogo(cache, folder, "total_steps=12", "progress_bar=false")


def run_folder(folder):
    return folder / "logs" / "hopper-medium-v2" / "w2_0.1_0.5" / "seed_0"


def rows(path, without=("seconds", "updates_per_second")):
    with path.open(newline="") as file:
        return [{k: v for k, v in r.items() if k not in without} for r in csv.DictReader(file)]


def test_a_run_says_what_it_did(finished):
    _, process = finished
    assert process.returncode == 0, process.stderr
    out = process.stdout
    assert out.count("Evaluation over 1 episodes:") == 2  # at 6 and at 12
    for actor in (0, 1):
        assert f"  Actor {actor} - Deterministic: " in out
        assert f"  Actor {actor} - Stochastic: " in out
    assert "D4RL scores (0: random policy, 100: expert)" in out
    assert "curves.png" in out
    assert "Warning" not in process.stderr
    assert "Traceback" not in process.stderr


def test_a_run_writes_its_folder_and_nothing_else(finished):
    folder, _ = finished
    assert [p.name for p in folder.iterdir()] == ["logs"]
    training, checkpoints = (run_folder(folder) / n for n in ("training", "checkpoints"))
    assert {p.name for p in training.iterdir()} == {
        "config.yaml", "metrics.csv", "evaluations.csv", "train.log", "curves.png",
    }  # fmt: skip
    assert {p.name for p in checkpoints.iterdir()} == {
        "step-000000000008", "step-000000000012", "policy.pt",
    }  # fmt: skip
    assert [r["step"] for r in rows(training / "metrics.csv")] == ["4", "8", "12"]
    assert len(rows(training / "evaluations.csv")) == 2 * 2 * 2


def test_the_policy_acts_on_raw_observations(finished):
    folder, _ = finished
    chain = load_actors(run_folder(folder) / "checkpoints" / "policy.pt")
    assert len(chain) == 2
    action = chain[-1](observation=torch.zeros(5, 11))
    assert action.shape == (5, 3)
    assert action.abs().max() <= 1


def test_a_second_start_is_refused(finished, cache):
    folder, _ = finished
    process = pogo(cache, folder, "total_steps=12")
    assert process.returncode == 2
    assert process.stderr.startswith("pogo: ")
    assert "resume=true" in process.stderr


def test_resume_with_another_lr_is_refused(finished, cache):
    folder, _ = finished
    process = pogo(cache, folder, "total_steps=20", "resume=true", "lr=1e-3")
    assert process.returncode == 2
    assert "lr: 0.0003 -> 0.001" in process.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_goes_on(finished, cache, tmp_path, number):
    process = subprocess.Popen(
        command(cache, "total_steps=1000000", "progress_bar=false", "eval_interval=1000000"),
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    checkpoints = run_folder(tmp_path) / "checkpoints"
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 128 + number, stderr
    step = max(int(p.name.split("-")[1]) for p in checkpoints.glob("step-*"))
    assert f"Stopped at update {step}; resume=true continues from there." in stderr
    if number == signal.SIGINT:
        return
    resumed = pogo(cache, tmp_path, f"total_steps={step + 4}", "resume=true")
    assert resumed.returncode == 0, resumed.stderr
    assert f"Resumed at update {step}." in resumed.stdout
    steps = [int(r["step"]) for r in rows(run_folder(tmp_path) / "training" / "metrics.csv")]
    assert steps == sorted(set(steps))


def test_a_resumed_run_writes_what_a_long_one_writes(finished, cache, tmp_path):
    folder, _ = finished
    short = pogo(cache, tmp_path, "total_steps=8", "eval_interval=4")
    assert short.returncode == 0, short.stderr
    longer = pogo(cache, tmp_path, "total_steps=12", "resume=true")
    assert longer.returncode == 0, longer.stderr
    parts = (run_folder(tmp_path), run_folder(folder))
    mine, whole = (rows(part / "training" / "metrics.csv") for part in parts)
    assert mine == whole


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["total_step=1"], "total_steps"),
        (["data.source=hdf5"], "data.path"),
        (["lr=-1"], "lr=-1"),
        (["log_interval=0"], "log_interval"),
        (["data.source=minari"], "data.path"),
        (["data.mirror=copy"], "data.mirror"),
        (["env.id=Hoper-v5"], "env.id=Hoper-v5"),
        (["env.id=Hopper-v5", "env.backend=d4rl"], "env.backend=d4rl"),
        (["env.max_episode_steps=-1"], "env.max_episode_steps=-1"),
    ],
)
def test_bad_input_gets_one_sentence(cache, tmp_path, arguments, answer):
    process = pogo(cache, tmp_path, *arguments)
    assert process.returncode == 2
    assert answer in process.stderr
    assert len(process.stderr.strip().splitlines()) == 1


def random_episodes(path, env, length, episodes=3):
    """A file in D4RL's layout, of random actions."""
    keys = ("observations", "actions", "rewards", "terminals", "timeouts")
    data = {key: [] for key in keys}
    for episode in range(episodes):
        observation, _ = env.reset(seed=episode)
        env.action_space.seed(episode)
        for step in range(length):
            action = env.action_space.sample()
            following, reward, terminated, _, _ = env.step(action)
            row = (observation, action, reward, terminated, step == length - 1)
            for key, value in zip(keys, row):
                data[key].append(value)
            observation = following
    with h5py.File(path, "w") as file:
        for key, values in data.items():
            file[key] = np.array(values)


def test_antmaze_starts_trains_and_evaluates(cache, tmp_path):
    random_episodes(tmp_path / "data.hdf5", make_env("antmaze-umaze-v2"), 20)
    process = pogo(
        cache, tmp_path, "task=antmaze-umaze-v2", "data.source=hdf5", "data.path=data.hdf5",
        "total_steps=4", "env.max_episode_steps=25",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert "Actor 1 - Stochastic: 0.0, D4RL score: 0.0" in process.stdout
    folder = tmp_path / "logs" / "antmaze-umaze-v2" / "w2_0.1_0.5" / "seed_0"
    assert len(rows(folder / "training" / "evaluations.csv")) == 4


def test_another_environment(cache, tmp_path):
    random_episodes(tmp_path / "data.hdf5", gymnasium.make("Pendulum-v1"), 20)
    process = pogo(
        cache, tmp_path, "env.id=Pendulum-v1", "data.source=hdf5", "data.path=data.hdf5",
        "total_steps=4", "env.max_episode_steps=25",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert "  Actor 0 - Deterministic: -" in process.stdout  # a pendulum's returns are negative
    process = pogo(
        cache, tmp_path, "data.source=hdf5", "data.path=data.hdf5", "log_dir=other"
    )  # fmt: skip
    assert process.returncode == 2
    assert "(3, 1), task=hopper-medium-v2 has (11, 3)" in process.stderr


def test_help_lists_every_option(cache, tmp_path):
    from pogo_torchrl.configs import options

    process = pogo(cache, tmp_path, "--help")
    assert process.returncode == 0
    assert [name for name in options() if f"  {name} " not in process.stdout] == []
