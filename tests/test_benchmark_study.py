"""The study of benchmarks/study: its files, baselines and tables."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import h5py
import numpy as np
import pytest
import torch
import yaml
from tensordict import TensorDict

from pogo_torchrl.data import make_replay_buffer
from pogo_torchrl.experiments.run import run
from pogo_torchrl.experiments.trained_run import open_run

FOLDER = Path(__file__).parents[1] / "benchmarks" / "study"
HORIZON = 50

sys.path.append(str(FOLDER))
import baselines  # noqa: E402
import slopes  # noqa: E402
import study  # noqa: E402
import study_file  # noqa: E402
import study_tables  # noqa: E402


@pytest.fixture
def data(tmp_path):
    """Folder with a hopper-medium file whose actions are a function of the observation."""
    rng = np.random.default_rng(0)
    rows = 20 * HORIZON
    observations = rng.standard_normal((rows, 11), dtype=np.float32)
    folder = tmp_path / "data"
    folder.mkdir()
    with h5py.File(folder / "hopper-medium.hdf5", "w") as file:
        file["observations"] = observations
        file["actions"] = np.tanh(observations[:, :3])
        file["rewards"] = np.arange(rows, dtype=np.float32) % HORIZON / HORIZON
        file["terminals"] = np.zeros(rows, dtype=bool)
        file["timeouts"] = np.arange(rows) % HORIZON == HORIZON - 1
    return folder


def settings(data: Path, *arguments: str):
    path = f"data.path={data / 'hopper-medium.hdf5'}"
    return baselines.read_settings(
        [*arguments, "data.source=hdf5", path, "batch_size=64", "eval_episodes=1"]
    )


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize("method", ["bc", "td3_bc", "iql"])
def test_baselines_reduce_their_losses(data, method):
    run = baselines.Run(settings(data, method))
    batch = run.replay_buffer.sample()
    before = run.metrics(batch)
    for step in range(20):
        run.method.update(run.replay_buffer.sample(), step)
    after = run.metrics(batch)
    assert all(np.isfinite(value) for value in after.values())
    assert after["data_mse_0"] < 0.9 * before["data_mse_0"]
    assert ("pred_value" in after) == (method != "bc")


def test_td3_bc_moves_actor_and_targets_at_every_second_update(data):
    run = baselines.Run(settings(data, "td3_bc"))
    loss = run.method.loss
    groups = {
        "critic": loss.qvalue_network_params,
        "actor": loss.actor_network_params,
        "targets": loss.target_qvalue_network_params,
        "target_actor": loss.target_actor_network_params,
    }

    def moved(step: int) -> set[str]:
        before = {name: params.data.clone() for name, params in groups.items()}
        run.method.update(run.replay_buffer.sample(), step)
        return {name for name, params in groups.items() if (params.data != before[name]).any()}

    assert moved(0) == {"critic"}
    assert moved(1) == set(groups)


def test_iqls_rewards_make_the_returns_span_1000(data):
    with h5py.File(data / "hopper-medium.hdf5", "a") as file:
        file["rewards"][:HORIZON] = 0.0  # one episode of return 0, the others of 24.5
    run = baselines.Run(settings(data, "iql"))
    plain = baselines.Run(settings(data, "td3_bc"))
    for one, largest in ((plain, 0.96), (run, 0.96 * 1000 / 24.5)):
        rewards = one.replay_buffer.sample(4096)["next", "reward"]
        assert rewards.max() == pytest.approx(largest, rel=1e-5)


def test_the_evaluated_policy_is_the_trained_actor_on_raw_observations(data):
    run = baselines.Run(settings(data, "td3_bc"))
    run.method.update(run.replay_buffer.sample(), 1)
    loss, batch = run.method.loss, run.replay_buffer.sample()
    mean, std = run.replay_buffer.normalization
    with torch.no_grad(), loss.actor_network_params.to_module(loss.actor_network):
        expected = loss.actor_network(batch.select("observation"))["action"]
        raw = batch["observation"] * std + mean
        actions = run.policy(observation=raw, noise=torch.randn(len(raw), 3))
    torch.testing.assert_close(actions, expected, atol=1e-5, rtol=1e-5)


def test_a_baseline_starts_over_until_it_is_done_and_is_then_skipped(data, tmp_path, capsys):
    cfg = settings(data, "bc", "total_steps=4", "eval_interval=3", f"folder={tmp_path / 'run'}")
    evaluations = tmp_path / "run" / "training" / "evaluations.csv"
    write(evaluations, "left,by,a\nkilled,run,\n")
    baselines.train(cfg)
    lines = evaluations.read_text().splitlines()
    assert lines[0].startswith("step,actor,mode,return_mean,return_std,score")
    assert [line.split(",")[:3] for line in lines[1:]] == [
        ["3", "0", "deterministic"], ["4", "0", "deterministic"],
    ]  # fmt: skip
    capsys.readouterr()
    baselines.train(cfg)
    assert "is done" in capsys.readouterr().out
    cfg.data.path = "moved.hdf5"
    assert baselines.is_done(tmp_path / "run", cfg)
    cfg.total_steps = 5
    assert not baselines.is_done(tmp_path / "run", cfg)


def test_the_largest_discounted_return_ends_with_episodes(data):
    path = data / "hopper-medium.hdf5"
    with h5py.File(path, "a") as file:
        file["rewards"][:] = 0.0
        file["rewards"][10:12] = [1.0, 2.0]
        file["terminals"][10] = True  # the reward of row 11 belongs to the next episode
    rb = make_replay_buffer("hopper-medium-v2", source="hdf5", path=path, normalize=False)
    assert study_file.largest_discounted_return(rb, gamma=0.5) == 2.0
    with h5py.File(path, "a") as file:
        file["terminals"][10] = False
    rb = make_replay_buffer("hopper-medium-v2", source="hdf5", path=path, normalize=False)
    assert study_file.largest_discounted_return(rb, gamma=0.75) == 2.5


def test_the_first_rows_end_with_an_episode(data, tmp_path):
    first_rows = study_file.first_rows
    source = data / "hopper-medium.hdf5"
    with h5py.File(first_rows(source, 2 * HORIZON + 7, tmp_path / "a" / "part.hdf5")) as part:
        assert {len(part[key]) for key in part} == {2 * HORIZON}
        assert part["timeouts"][-1]
        with h5py.File(source) as whole:
            assert np.array_equal(part["observations"], whole["observations"][: 2 * HORIZON])
    for rows, message in ((10**6, "exceeds the 1000 rows"), (7, "no episode")):
        with pytest.raises(ValueError, match=message):
            first_rows(source, rows, tmp_path / f"{rows}.hdf5")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": []}, "task is unknown; choose from tasks"),
        ({"seeds": []}, "seeds is missing"),
        ({"baselines": ["cql"]}, "cql is unknown"),
        ({"settings": {"a/b": {}}}, "settings.a/b: choose another name"),
        ({"settings": {"bc": {}}}, "settings.bc: choose another name"),
        ({"settings": {"a": 3}}, "must be a mapping"),
        ({"tasks": ["hoper-medium"]}, "not a D4RL version 2 task"),
    ],
)
def test_errors_of_a_study_file_name_the_key(tmp_path, change, message):
    file = tmp_path / "study.yaml"
    content = {"tasks": ["hopper-medium"], "seeds": [0], "total_steps": 10, **change}
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=message):
        study_file.read_study(file)


@pytest.mark.parametrize("name", ["amount", "screening", "final", "short"])
def test_the_runs_of_the_studies_can_be_composed(name, tmp_path):
    content = study_file.read_study(FOLDER / f"{name}.yaml")
    evaluation = (1250, 10) if name in ("amount", "short") else (2500, 20)
    assert (content.eval_interval, content.eval_episodes) == evaluation
    task = content.tasks[0]
    found = study_file.DataFile(task, task, "hdf5", tmp_path / "data.hdf5")
    for setting in content.settings:
        runs = study_file.sweep_runs(content, found, setting, tmp_path)
        assert [run.cfg.seed for run in runs] == content.seeds
        root = tmp_path / task / setting / task
        assert {run.folder.root.parent.parent for run in runs} == {root}
        if setting.startswith("h"):
            h = float(setting[1:].removesuffix("-ln"))
            alpha, (first, *later) = runs[0].cfg.alpha, runs[0].cfg.w2_weights
            assert alpha / (2 * first) == pytest.approx(h)
            assert [alpha / (3 * weight) for weight in later] == pytest.approx([h, h])
            assert runs[0].cfg.critic_layer_norm == setting.endswith("-ln")
    if name == "final":
        (original, *_) = study_file.sweep_runs(content, found, "original-readme", tmp_path)
        assert (original.cfg.alpha, list(original.cfg.w2_weights)) == (1.0, [0.1, 0.5, 0.5])


def make_run(
    folder: Path, scores, *, weights: str = "", done: bool = True, error: str = ""
) -> None:
    """Write the files of a run; ``scores[actor]`` are its scores at updates 10, 20, ..."""
    lines = ["step,actor,mode,score,seconds" + (",weights" if weights else "")]
    for step, row in enumerate(zip(*scores), 1):
        for actor, score in enumerate(row):
            for kind in weights.split() or [""]:
                shown = score + 100 if kind == "averaged" else score
                end = f",{kind}" if kind else ""
                lines.append(f"{10 * step},{actor},deterministic,{shown},1.0{end}")
                lines.append(f"{10 * step},{actor},stochastic,-1000,1.0{end}")
    write(folder / "training" / "evaluations.csv", "\n".join(lines) + "\n60,0,determ")
    steps = range(10, 10 * len(scores[0]) + 1, 10)
    rows = [f"{step},{-step},{step / 1000},{step / 100}" for step in steps]
    header = "step,pred_value,data_mse_1,step_mse_1"
    write(folder / "training" / "metrics.csv", "\n".join([header, *rows]) + "\n")
    write(folder / "training" / "config.yaml", "total_steps: 50\n")
    if done:
        write(folder / "done.json", json.dumps({"total_steps": 50}))
    if error:
        write(folder / "failed.json", json.dumps({"error": error}))


def test_tables_of_hand_computed_runs(tmp_path):
    chain = tmp_path / "hopper" / "chain" / "hopper-medium-v2" / "w2_1_1"
    make_run(chain / "seed_0", [[0, 10, 20, 10, 20], [90, 20, 30, 40, 30]])
    make_run(chain / "seed_1", [[0, 20, 30, 20, 30], [10, 25, 35, 25, 35]])
    make_run(tmp_path / "hopper" / "bc" / "seed_0", [[7, 7, 7, 7, 9]])
    write(tmp_path / "hopper" / "data.json", json.dumps({"largest_return": 70.0}))
    settings, actors, runs = study_tables.write_tables(tmp_path, ["hopper"], ["bc", "chain"])

    rows = {(row[1], row[3]): dict(zip(actors.columns, row)) for row in actors.rows}
    assert list(rows) == [("bc", 0), ("chain", 0), ("chain", 1)]  # in the given order
    last = rows["chain", 1]
    assert last["score"] == (30.0, 30.0, 30.0)  # 120 / 4 for both seeds, without the first 90
    assert last["swing"] == (70 + 10 + 10 + 10 + 15 + 10 + 10 + 10) / 8
    assert last["minus actor 0"] == (10.0, 5.0, 15.0)  # 30 - 15 and 30 - 25
    assert last["from the data"] == "0.035"  # rows 20 to 50 of metrics.csv
    assert last["from actor before"] == "0.350"
    assert last["Q"] == 35.0
    assert last["Q / largest return"] == "0.50"
    assert (last["weights"], last["seeds"], last["updates"]) == ("raw", "2", "50")
    assert rows["chain", 0]["score"].value == 20.0
    assert rows["chain", 0]["minus actor 0"] is None

    best, second = (dict(zip(settings.columns, row)) for row in settings.rows)
    assert (best["setting"], best["last actor"].value, best["actor 0"].value) == ("chain", 30, 20)
    assert (best["last minus actor 0"].value, best["least on a file"]) == (10.0, 10.0)
    assert (second["setting"], second["last actor"].value) == ("bc", 7.5)
    assert [row[6] for row in runs.rows] == ["7.5", "15.0 / 30.0", "25.0 / 30.0"]
    written = {path.name for path in (tmp_path / "tables").iterdir()}
    assert written == {f"{n}.{s}" for n in ("settings", "actors", "runs") for s in ("md", "csv")}


def test_tables_show_averaged_and_raw_weights(tmp_path):
    make_run(tmp_path / "hopper" / "a" / "t" / "w" / "seed_0", [[1] * 5], weights="averaged raw")
    settings, actors, runs = study_tables.write_tables(tmp_path, ["hopper"], ["a"])
    assert [(row[2], row[6].value) for row in actors.rows] == [("averaged", 101.0), ("raw", 1.0)]
    assert [(row[1], row[4].value) for row in settings.rows] == [("averaged", 101.0), ("raw", 1.0)]
    assert [row[5:7] for row in runs.rows] == [("averaged", "101.0")]


def test_tables_show_failed_and_unfinished_runs(tmp_path):
    folder = tmp_path / "hopper" / "a" / "hopper-medium-v2" / "w2_1"
    make_run(folder / "seed_0", [[4, 8]], done=False, error="diverged")
    make_run(folder / "seed_1", [[2]], done=False)
    write(tmp_path / "hopper" / "bc" / "seed_0" / "failed.json", '{"error": "no data"}')
    settings, actors, runs = study_tables.write_tables(tmp_path, ["hopper"], ["a", "bc"])
    assert [row[1:5] for row in runs.rows] == [
        ("a", 0, "failed", 20), ("a", 1, "unfinished", 10), ("bc", 0, "failed", 0),
    ]  # fmt: skip
    assert [row[8] for row in runs.rows] == ["diverged", "", "no data"]
    assert [(row[4], row[5], row[6].value) for row in actors.rows] == [("2 (0 done)", "10-20", 4.0)]
    assert [(row[0], row[3]) for row in settings.rows] == [
        ("a", "2 (0 done)"),
        ("bc", "1 (0 done)"),
    ]


def test_the_command_runs_what_is_missing(data, tmp_path, capsys):
    file = tmp_path / "tiny.yaml"
    small = {"hidden_sizes": [8], "batch_size": 16, "compile": "false", "num_samples": 2}
    content = {
        "tasks": ["hopper-medium"],
        "seeds": [0],
        "total_steps": 4,
        "eval_interval": 2,
        "eval_episodes": 1,
        "settings": {
            "one": {"w2_weights": [0.2], **small},
            "bad": {"w2_weights": [0.2], "lr": 1e30, **small},
        },
        "baselines": ["bc"],
    }
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    arguments = [str(file), "--data", str(data), "--out", str(tmp_path / "out"), "--jobs", "2"]
    with pytest.raises(SystemExit, match="1"):  # the run that diverged
        study.main(arguments)
    assert "pogo: failed: hopper-medium/bad, seed 0" in capsys.readouterr().err
    table = (tmp_path / "out" / "tiny" / "tables" / "runs.csv").read_text().splitlines()
    assert [line.split(",")[1:5] for line in table[1:]] == [
        ["one", "0", "done", "4"], ["bad", "0", "failed", "0"], ["bc", "0", "done", "4"],
    ]  # fmt: skip
    study.main([*arguments, "--dry-run"])
    missing = capsys.readouterr().out.splitlines()
    assert missing[1:] == ["hopper-medium/bad, seed 0"]  # to be retried


class Line(gymnasium.Env):
    """A point x that moves by the action; the reward is x plus twice the action, in [-1, 1]."""

    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), dtype=np.float64)
    model = SimpleNamespace(nq=2)

    def reset(self, *, seed=None, options=None):
        return np.zeros(2), {}

    def set_state(self, position, velocity):
        self.x = float(position[1])

    def step(self, action):
        reward, self.x = self.x + 2 * float(action[0]), self.x + float(action[0])
        return np.array([self.x, 0.0]), reward, self.x > 100, False, {}


def test_simulated_slopes_by_closed_form():
    """With pi(s) = 0, a first action a adds 2 a at once and a to each later reward."""
    states, delta, steps = np.array([[0.5, 0.0], [3.0, 0.0]]), 0.1, 4
    rewards = slopes.simulated_rewards(Line(), lambda s: np.zeros(1), states, delta, steps)
    assert rewards.shape == (2, 1, 2, steps)
    for gamma in (0.0, 0.5, 1.0):
        expected = 2 + sum(gamma**t for t in range(1, steps))
        found = slopes.simulated_slopes(rewards, gamma, delta)
        np.testing.assert_allclose(found, np.full((2, 1), expected))
    assert slopes.correlation(found, 3 * found) == pytest.approx(1)
    assert slopes.correlation(found, -found) == pytest.approx(-1)
    np.testing.assert_allclose(slopes.interval(found, 2 * found), (1, 1))
    ended = slopes.simulated_rewards(Line(), lambda s: np.zeros(1), states + 100, delta, steps)
    assert (ended[..., 0] != 0).all()
    assert (ended[..., 1:] == 0).all()


def test_slopes_of_a_run(make_cfg, monkeypatch, tmp_path):
    run(make_cfg("freeze_critics_at=null"))
    (config,) = (tmp_path / "logs").rglob("config.yaml")
    folder = config.parents[1]
    trained = open_run(folder, device="cpu")
    observations, actions = np.zeros((5, 11)), np.full((5, 3), 0.1)
    found = slopes.critic_slopes(trained, observations, actions)
    assert found.shape == (2, 5, 3)

    def values(shift):
        with trained.loss.qvalue_network_params[0].to_module(trained.loss.qvalue_network):
            mean, std = trained.replay_buffer.normalization
            batch = TensorDict({
                "observation": (torch.zeros(5, 11) - mean) / std,
                "action": torch.tensor(actions + shift, dtype=torch.float32),
            }, [5])  # fmt: skip
            return trained.loss.qvalue_network(batch)["state_action_value"].double().squeeze(-1)

    step = np.array([1e-2, 0, 0])
    numeric = (values(step) - values(-step)) / 2e-2
    np.testing.assert_allclose(found[0, :, 0], numeric.detach(), rtol=0.05, atol=1e-3)
    cells = slopes.measure(folder, 3, 4, 0.1)
    assert cells[0] == str(folder)
    assert len(cells) == 7
    monkeypatch.setattr(slopes, "TASKS", ("walker2d",))
    with pytest.raises(ValueError, match=r"task=hopper-medium-v2.*choose a run on walker2d"):
        slopes.measure(folder, 3, 4, 0.1)
