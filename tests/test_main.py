"""Single runs of the command line, in real processes."""

from __future__ import annotations

import shutil
import subprocess
from types import SimpleNamespace

import gymnasium
import h5py
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from processes import pogo
from runs import SMALL, assert_same, command, rows, run_folder, state, train

from pogo_torchrl import load_actors
from pogo_torchrl.envs import make_env
from pogo_torchrl.experiments.build import choose_compile
from pogo_torchrl.experiments.overrides import compose
from pogo_torchrl.experiments.run_folder import RunFolder, check_run_folder, fingerprint


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Cache folder shared by all runs of this file."""
    return f"data.cache_dir={tmp_path_factory.mktemp('cache')}"


@pytest.fixture(scope="module")
def finished(cache, tmp_path_factory):
    """Working folder and process of a finished run of 12 updates."""
    folder = tmp_path_factory.mktemp("run")
    arguments = command(cache, "total_steps=12")  # in a new interpreter, as users start it
    return folder, subprocess.run(
        arguments, cwd=folder, capture_output=True, text=True, timeout=300
    )


def test_run_prints_evaluations_and_scores(finished):
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


def test_run_writes_only_to_its_folder(finished):
    folder, _ = finished
    assert [p.name for p in folder.iterdir()] == ["logs"]
    training, checkpoints = (run_folder(folder) / n for n in ("training", "checkpoints"))
    assert {p.name for p in training.iterdir()} == {
        "config.yaml", "metrics.csv", "evaluations.csv", "train.log", "curves.png",
    }  # fmt: skip
    assert {p.name for p in checkpoints.iterdir()} == {
        "step-000000000008", "step-000000000012", "policy.safetensors",
    }  # fmt: skip
    assert [r["step"] for r in rows(training / "metrics.csv")] == ["4", "8", "12"]
    assert len(rows(training / "evaluations.csv")) == 2 * 2 * 2


def test_policy_acts_on_raw_observations(finished):
    folder, _ = finished
    chain = load_actors(run_folder(folder) / "checkpoints" / "policy.safetensors")
    assert len(chain) == 2
    action = chain[-1](observation=torch.zeros(5, 11))
    assert action.shape == (5, 3)
    assert action.abs().max() <= 1


def test_same_options_give_bitwise_identical_runs(finished, cache, tmp_path):
    folder, _ = finished
    assert train(tmp_path, cache, "total_steps=12").returncode == 0
    assert_same(state(run_folder(tmp_path)), state(run_folder(folder)))


def test_logging_and_evaluation_do_not_affect_training(finished, cache, tmp_path):
    folder, _ = finished
    process = train(
        tmp_path, cache, "total_steps=12", "log_interval=5", "eval_interval=100",
        "eval_episodes=2", "checkpoint_interval=7", "save_model=false", "deterministic=true",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    mine, other = state(run_folder(tmp_path)), state(run_folder(folder))
    for name in ("loss_module", "optimization_stepper", "rng"):
        (key,) = (key for key in mine if key.endswith(name))
        assert_same(mine[key], other[key])


def test_different_seeds_give_different_runs(finished, cache, tmp_path):
    folder, _ = finished
    assert train(tmp_path, cache, "total_steps=12", "seed=1").returncode == 0
    other = run_folder(tmp_path).with_name("seed_1")
    mine, theirs = (rows(f / "training" / "metrics.csv") for f in (run_folder(folder), other))
    assert all(a["loss_qvalue"] != b["loss_qvalue"] for a, b in zip(mine, theirs))


def test_second_start_without_resume_is_rejected(finished, cache):
    folder, _ = finished
    process = train(folder, cache, "total_steps=12")
    assert process.returncode == 2
    assert process.stderr.startswith("pogo: ")
    assert "resume=true" in process.stderr


def test_resume_with_another_lr_is_rejected(finished, cache):
    folder, _ = finished
    process = train(folder, cache, "total_steps=20", "resume=true", "lr=1e-3")
    assert process.returncode == 2
    assert "lr: 0.0003 -> 0.001" in process.stderr


def test_resumed_run_logs_the_same_metrics_as_an_uninterrupted_one(finished, cache, tmp_path):
    folder, _ = finished
    short = train(tmp_path, cache, "total_steps=8", "eval_interval=4")
    assert short.returncode == 0, short.stderr
    longer = train(tmp_path, cache, "total_steps=12", "resume=true")
    assert longer.returncode == 0, longer.stderr
    folders = (run_folder(tmp_path), run_folder(folder))
    resumed, uninterrupted = (rows(f / "training" / "metrics.csv") for f in folders)
    assert resumed == uninterrupted


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
def test_bad_input_gives_a_one_line_error(cache, tmp_path, arguments, answer):
    process = train(tmp_path, cache, *arguments)
    assert process.returncode == 2
    assert answer in process.stderr
    assert len(process.stderr.strip().splitlines()) == 1


def random_episodes(path, env, length, episodes=3):
    """Write a file in D4RL's layout with episodes of random actions."""
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


def test_antmaze_trains_and_evaluates(cache, tmp_path):
    random_episodes(tmp_path / "data.hdf5", make_env("antmaze-umaze-v2"), 20)
    process = train(
        tmp_path, cache, "task=antmaze-umaze-v2", "data.source=hdf5", "data.path=data.hdf5",
        "total_steps=4", "env.max_episode_steps=25",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert "Actor 1 - Stochastic: 0.0, D4RL score: 0.0" in process.stdout
    folder = tmp_path / "logs" / "antmaze-umaze-v2" / "w2_0.1_0.5" / "seed_0"
    assert len(rows(folder / "training" / "evaluations.csv")) == 4


def test_custom_environment(cache, tmp_path):
    random_episodes(tmp_path / "data.hdf5", gymnasium.make("Pendulum-v1"), 20)
    process = train(
        tmp_path, cache, "env.id=Pendulum-v1", "data.source=hdf5", "data.path=data.hdf5",
        "total_steps=4", "env.max_episode_steps=25",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert "  Actor 0 - Deterministic: -" in process.stdout  # a pendulum's returns are negative
    process = train(
        tmp_path, cache, "data.source=hdf5", "data.path=data.hdf5", "log_dir=other"
    )  # fmt: skip
    assert process.returncode == 2
    assert "(3, 1), but task=hopper-medium-v2 has (11, 3)" in process.stderr


def test_options_added_later_do_not_change_the_fingerprint_of_older_runs():
    task = "task=walker2d-expert-v2"  # has no preset
    buffer = SimpleNamespace(fingerprint=lambda: "rows")
    added = {
        "step_sizes", "critic_hidden_sizes", "num_critics", "chain_init", "data_weight",
        "average_actors", "actor_q", "target_action", "critic_bc_weight", "advantage_temperature",
        "displacement", "alpha_growth", "freeze_critics_at", "return_temperature",
    }  # fmt: skip
    assert added.isdisjoint(fingerprint(compose([task]), buffer))
    assert set(fingerprint(compose([task]), buffer)) == {  # those of checkpoint format 3
        "alpha", "batch_size", "bf16", "blur", "clip_grad_norm", "critic_layer_norm", "data",
        "delay_actor", "deterministic", "gamma", "hidden_sizes", "lr", "lr_actor", "lr_critic",
        "lr_schedule", "lr_schedule_actor", "lr_schedule_critic", "noise_clip", "num_samples",
        "policy_freq", "policy_noise", "q_normalization", "seed", "shared_noise", "task", "tau",
        "w2_backend", "w2_fraction", "w2_weights", "weight_decay",
    }  # fmt: skip
    found = fingerprint(compose(["num_critics=3", "step_sizes=[1,2]"]), buffer)
    assert (found["num_critics"], found["step_sizes"]) == (3, [1.0, 2.0])


def test_step_sizes_and_other_options_of_the_networks(cache, tmp_path):
    options = (
        cache, "step_sizes=[0.5,0.25]", "alpha=1", "critic_hidden_sizes=[12,8]", "num_critics=3",
        "chain_init=copy", "save_model=false", "resume=true", "critic_bc_weight=0.1",
        "target_action=min_clean_noisy", "actor_q=mean", "advantage_temperature=0.5",
    )  # fmt: skip

    def start(*more):
        small = [word for word in SMALL if not word.startswith("w2_weights")]
        return pogo(tmp_path, "train", *small, *options, *more)

    assert start("total_steps=4").returncode == 0
    process = start("total_steps=8")
    assert process.returncode == 0, process.stderr
    assert "Resumed at update 4." in process.stdout
    folder = tmp_path / "logs" / "hopper-medium-v2" / "w2_1_1.33333" / "seed_0"
    config = OmegaConf.load(folder / "training" / "config.yaml")
    assert list(config.w2_weights) == pytest.approx([1, 4 / 3])
    loss = torch.load(
        next(folder.glob("checkpoints/step-*8/components/*loss_module/state.pt")),
        weights_only=True,
    )
    shapes = {tuple(v.shape) for k, v in loss.items() if k.startswith("qvalue_network") and v.dim()}
    assert {(3, 12, 14), (3, 8, 12), (3, 1, 8)} <= shapes


def test_steps_that_change_during_training(cache, tmp_path):
    process = train(
        tmp_path, cache, "alpha_growth=4", "freeze_critics_at=0.5", "alpha=0.5", "total_steps=104",
        "log_interval=52", "eval_interval=104",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    found = rows(run_folder(tmp_path) / "training" / "metrics.csv")
    assert list(found[0])[-1] == "alpha"  # wall-clock columns, left out here, are the last ones
    alphas = [0.5, 0.5 * 4 ** (100 / 104)]
    assert [float(row["alpha"]) for row in found] == pytest.approx(alphas)
    first, second = ({k: float(v) for k, v in row.items()} for row in found)
    assert first["w2_1"] == first["step_mse_1"] == 0 < second["step_mse_1"]
    process = train(
        tmp_path, cache, "alpha_growth=4", "freeze_critics_at=0.5", "alpha=0.5", "total_steps=200",
        "resume=true",
    )  # fmt: skip
    assert process.returncode == 2
    assert "total_steps: 104 -> 200" in process.stderr


def test_help_lists_every_option(cache, tmp_path):
    from pogo_torchrl.experiments.config import options

    process = train(tmp_path, cache, "--help")
    assert process.returncode == 0
    assert [name for name in options() if f"  {name} " not in process.stdout] == []


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(
    ("choice", "total_steps", "compiled"),
    [("auto", 9_999, False), ("auto", 10_000, True), ("true", 1, True), ("false", 10**6, False)],
)
def test_compile_auto_depends_on_total_steps(choice, total_steps, compiled):
    assert choose_compile(choice, total_steps) is compiled


def test_without_a_compiler_auto_falls_back_and_true_is_an_error(monkeypatch, caplog):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert choose_compile("auto", 10_000) is False
    assert "a C++ compiler (g++) is missing" in caplog.text
    with pytest.raises(ValueError, match="compile=true needs a C"):
        choose_compile("true", 1)


def test_compile_auto_skips_backends_that_cannot_be_compiled():
    assert choose_compile("auto", 10_000, "tensorized") is False
    with pytest.raises(ValueError, match="compile=true needs w2_backend=fast or exact"):
        choose_compile("true", 10_000, "tensorized")


def started(tmp_path, *options, without=()):
    """Folder of a run that was started with these options."""
    cfg = compose([f"log_dir={tmp_path}", *options])
    folder = RunFolder.of(cfg)
    folder.training.mkdir(parents=True)
    content = OmegaConf.to_container(cfg, resolve=True)
    for name in without:
        del content[name]
    (folder.training / "config.yaml").write_text(OmegaConf.to_yaml(content))
    return folder


def test_options_missing_from_an_older_config_have_their_defaults(tmp_path):
    folder = started(tmp_path, without=["lr_actor", "lr_schedule", "weight_decay", "w2_fraction"])
    options = [f"log_dir={tmp_path}", "resume=true"]
    check_run_folder(folder, compose(options))
    with pytest.raises(ValueError, match=r"weight_decay: 0\.0 -> 0\.1"):
        check_run_folder(folder, compose([*options, "weight_decay=0.1"]))


@pytest.mark.parametrize(
    "option",
    ["lr_schedule=linear", "lr_schedule_actor=cosine", "alpha_growth=4.0", "freeze_critics_at=0.5"],
)
def test_schedules_fix_total_steps(tmp_path, option):
    longer = [f"log_dir={tmp_path}", "resume=true", "total_steps=5000"]
    check_run_folder(started(tmp_path, "seed=1"), compose([*longer, "seed=1"]))
    folder = started(tmp_path, option)
    check_run_folder(folder, compose([*longer, option, "total_steps=3000"]))
    with pytest.raises(ValueError, match="total_steps: 3000 -> 5000"):
        check_run_folder(folder, compose([*longer, option]))
