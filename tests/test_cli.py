"""The command ``pogo``."""

from __future__ import annotations

import csv
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from runs import run_folder, train
from torchrl.data import Bounded

from pogo_torchrl import make_actor
from pogo_torchrl.cli import main
from pogo_torchrl.experiments import film as film_module
from pogo_torchrl.experiments.build import env_fn
from pogo_torchrl.experiments.config import EnvConfig
from pogo_torchrl.experiments.evaluate import evaluate, evaluation_table
from pogo_torchrl.experiments.film import check_film, film
from pogo_torchrl.experiments.overrides import from_flags
from pogo_torchrl.export import on_raw_observations, policy_environment, save_actors
from pogo_torchrl.trainers.hooks import Evaluation

COMMANDS = ("train", "evaluate", "rank", "finetune", "sweep", "report", "check-dataset")


def policy(folder, observation_dim: int = 11, action_dim: int = 3, **kwargs):
    """Write a policy file of two untrained actors; returns its path and the actors."""
    spec = Bounded(low=-torch.ones(action_dim), high=torch.ones(action_dim))
    actors = [
        on_raw_observations(
            make_actor(observation_dim, spec, (8,)),
            torch.zeros(observation_dim),
            torch.ones(observation_dim),
        )
        for _ in range(2)
    ]
    path = folder / "policy.safetensors"
    save_actors(path, actors, hidden_sizes=(8,), **kwargs)
    return path, actors


def exit_code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    return end.value.code


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_help_lists_all_commands(arguments, capsys):
    main(arguments)
    out = capsys.readouterr().out
    assert all(f"  pogo {command}" in out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS[1:])
def test_help_of_each_command_lists_its_options(command, capsys):
    main([command, "--help"])
    out = capsys.readouterr().out
    assert f"  pogo {command}" in out
    assert "Options:" in out


@pytest.mark.parametrize("command", ["train", "sweep"])
def test_help_into_a_closed_pipe_is_quiet(command):
    help = [sys.executable, "-m", "pogo_torchrl", command, "--help"]
    with subprocess.Popen(help, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE


def test_ctrl_c_is_one_line(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pogo_torchrl.evaluation.Evaluator.__call__", interrupted)
    path, _ = policy(tmp_path)
    assert exit_code("evaluate", str(path), "task=hopper-medium-v2") == 128 + signal.SIGINT
    assert capsys.readouterr().err == "pogo: stopped immediately\n"


def test_versions(capsys):
    main(["--version"])
    out = capsys.readouterr().out
    assert f"torch {torch.__version__}" in out
    assert "Devices: cpu" in out


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("trian", "unknown command 'trian'; did you mean train?"),
        ("xyz", "unknown command 'xyz'; choose one of train, evaluate"),
        ("seed=1", "did you mean pogo train seed=1?"),
    ],
)
def test_unknown_command(word, answer, capsys):
    assert exit_code(word) == 2
    err = capsys.readouterr().err
    assert answer in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["--seed", "3"], ["seed=3"]),
        (["--seed=3", "lr=1"], ["seed=3", "lr=1"]),
        (["--data.source", "minari"], ["data.source=minari"]),
        (["--total-steps", "5"], ["total_steps=5"]),
        (["--alpha", "-1"], ["alpha=-1"]),
        (["--resume"], ["resume=true"]),
        (["--resume", "--bf16", "seed=1"], ["resume=true", "bf16=true", "seed=1"]),
        (["--resume", "false"], ["resume=false"]),
        (["--cfg", "job", "-m"], ["--cfg", "job", "-m"]),
        (["lr=1,2", "-m", "seed=1"], ["-m", "lr=1,2", "seed=1"]),
        (["--config-dir=here"], ["--config-dir=here"]),
    ],
)
def test_options_in_either_style(given, meant):
    assert from_flags(given) == meant


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        (["--sed", "3"], "unknown option 'sed'; did you mean seed"),
        (["--seed"], "--seed needs a value: write seed=VALUE"),
        (["--seed", "lr=1"], "--seed needs a value"),
    ],
)
def test_invalid_flags(given, answer):
    with pytest.raises(ValueError, match=answer):
        from_flags(given)


def test_evaluate_reproduces_the_last_evaluation_of_a_run(tmp_path, capsys):
    run = train(tmp_path, "data.cache_dir=cache", "--total-steps", "6")
    assert run.returncode == 0, run.stderr
    folder = run_folder(tmp_path)
    with (folder / "training" / "evaluations.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["step"] == "6"]
    path = folder / "checkpoints" / "policy.safetensors"
    assert policy_environment(path)["task"] == "hopper-medium-v2"
    found = evaluate([str(path), "episodes=1"])
    assert [(e.actor, e.mode, float(e.returns.mean())) for e in found] == [
        (int(row["actor"]), row["mode"], float(row["return_mean"])) for row in rows
    ]
    out = capsys.readouterr().out
    assert f"{path} on hopper-medium-v2, 1 episode, seed 0" in out
    assert out.count("deterministic") == out.count("stochastic") == 2


def test_policy_is_evaluated_in_its_training_environment_by_default(tmp_path):
    short = {"task": "hopper-medium-v2", "id": None, "max_episode_steps": 5, "backend": "mujoco"}
    path, _ = policy(tmp_path, environment=short)
    lengths = [e.lengths.max() for e in evaluate([str(path), "episodes=2"])]
    assert max(lengths) == 5
    (one, *_) = evaluate([str(path), "episodes=2", "env.max_episode_steps=3"])
    assert one.lengths.tolist() == [3, 3]
    (one, *_) = evaluate([str(path), "episodes=2", "--task", "hopper-expert-v2"])
    assert one.lengths.max() > 5


def test_large_values_keep_the_columns_of_the_table():
    values = np.array([-1234567.0, 3e6])
    both = [
        Evaluation(0, "deterministic", values, values, 1e3 * values),
        Evaluation(1, "stochastic", np.ones(2), np.ones(2), np.ones(2)),
    ]
    lines = evaluation_table(both).splitlines()
    assert len({len(line) for line in lines}) == 1
    ends = [[found.end() for found in re.finditer(r"± \S+", line)] for line in lines[1:]]
    assert ends[0] == ends[1]


def test_errors_of_evaluate(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path, _ = policy(tmp_path)

    def message(*arguments: str) -> str:
        assert exit_code("evaluate", *arguments) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        return err

    assert "policy is missing" in message()
    assert "gone.safetensors is not a file" in message("gone.safetensors")
    assert "does not contain its task" in message(str(path))
    assert "unknown option 'episode'" in message(str(path), "episode=3")
    assert "episodes=0 must be an integer" in message(str(path), "episodes=0")
    assert "episodes=many must be an integer" in message(str(path), "--episodes", "many")
    assert "task=walker2d-medium-v2 has (17, 6)" in message(str(path), "task=walker2d-medium-v2")
    assert "task='hoper'" in message(str(path), "task=hoper")
    hopper = (str(path), "task=hopper-medium-v2", "episodes=1", "env.max_episode_steps=3")
    assert "video=film.avi must end in .mp4" in message(*hopper, "video=film.avi")
    assert "folder" in message(*hopper, "video=gone/film.mp4")

    def no_gl(*_, **__):
        raise AttributeError("'NoneType' object has no attribute 'glGetError'")

    monkeypatch.setattr("gymnasium.envs.mujoco.MujocoEnv.render", no_gl)
    error = message(*hopper, "video=film.mp4")
    assert "video=film.mp4 needs OpenGL to render the frames" in error
    assert "glGetError" in error
    assert "MUJOCO_GL" in error
    assert not list(tmp_path.glob("*.mp4"))


def test_video_shows_all_actors(tmp_path):
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    make = env_fn("hopper-medium-v2", EnvConfig(max_episode_steps=20), render_mode="rgb_array")
    path, (_, actors) = tmp_path / "film.mp4", policy(tmp_path)
    try:
        check_film(path, make)
    except ValueError as error:
        pytest.skip(str(error))
    frames = film(path, actors, make, seed=0)
    assert 1 < frames <= 7  # every third of up to 20 steps
    reader = imageio_ffmpeg.read_frames(str(path))
    assert next(reader)["size"] == (2 * 480, 480)
    shown = list(reader)
    assert len(shown) >= frames - 1
    assert shown[0] != shown[-1]
    assert [p.name for p in tmp_path.glob("*.mp4")] == ["film.mp4"]


def test_actor_freezes_after_its_episode_has_ended():
    import numpy as np

    def frames(values):
        return iter([np.full((2, 2, 3), value, dtype=np.uint8) for value in values])

    shown = list(film_module._frames([frames([1]), frames([2, 3, 4])]))
    assert [(frame[0, 0, 0], frame[0, -1, 0]) for frame in shown] == [(1, 2), (1, 3), (1, 4)]
