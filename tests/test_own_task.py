"""Tasks, environments and data of one's own, and runs without an environment."""

from __future__ import annotations

import csv
import sys
import warnings
from collections import OrderedDict
from pathlib import Path

import gymnasium
import h5py
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, Tuple, flatten
from omegaconf import OmegaConf

from pogo_torchrl import load_actors, make_actor
from pogo_torchrl.configs import compose
from pogo_torchrl.data import make_replay_buffer
from pogo_torchrl.envs import Measure, make_gymnasium_env
from pogo_torchrl.envs.flattening import flatten_observations, flatten_rows
from pogo_torchrl.evaluation import Evaluator
from pogo_torchrl.experiments.evaluate import evaluate
from pogo_torchrl.experiments.planner import measure_cost
from pogo_torchrl.experiments.rank import rank
from pogo_torchrl.experiments.run import run
from pogo_torchrl.experiments.run_stack import run_stack
from pogo_torchrl.experiments.sweep_file import read_sweep
from pogo_torchrl.report import read_runs, write_report
from pogo_torchrl.trainers.hooks import EvaluationError

HORIZON = 8

REACH = f"""
import gymnasium, numpy as np
class Reach(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (4,), np.float64)
    action_space = gymnasium.spaces.Box(-2, 2, (2,), np.float32)
    metadata = {{"render_modes": ["rgb_array"], "render_fps": 30}}
    alive = most = made = 0
    bad = lambda self, observation: observation

    def __init__(self, goal=0.0, render_mode=None):
        cls, self.goal, self.render_mode = type(self), goal, render_mode
        cls.alive += 1
        cls.made += 1
        cls.most = max(cls.most, cls.alive)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.p, self.v = self.np_random.uniform(-1, 1, 2), np.zeros(2)
        return np.r_[self.p, self.v], {{}}

    def step(self, action):
        self.v = 0.9 * self.v + 0.05 * np.asarray(action, float)
        self.p = self.p + self.v
        reward = -float(np.linalg.norm(self.p - self.goal))
        return self.bad(np.r_[self.p, self.v]), reward, False, False, {{}}

    def render(self):
        return np.zeros((16, 16, 3), np.uint8)

    def close(self):
        type(self).alive -= 1

gymnasium.register("my/Reach-v0", entry_point="NAME:Reach", max_episode_steps={HORIZON})
"""

SMALL = [
    "total_steps=4", "eval_episodes=2", "hidden_sizes=[8]", "batch_size=16", "progress_bar=false",
    "w2_weights=[0.2,0.3]", "device=cpu",
]  # fmt: skip
DATA = ["data.source=hdf5", "data.path=reach.hdf5"]


def write_data(path: Path, size: int = 4, **changes) -> None:
    """Ten episodes of :data:`HORIZON` steps, without timeouts."""
    rng, n = np.random.default_rng(0), 10 * HORIZON
    data = {
        "observations": rng.normal(size=(n, size)),
        "actions": rng.uniform(-2, 2, size=(n, 2)).astype(np.float32),
        "rewards": np.full(n, -0.5),
        "terminals": np.zeros(n, bool),
        **changes,
    }
    with h5py.File(path, "w") as file:
        for key, values in data.items():
            file[key] = values


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with an environment's module and data of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    write_data(tmp_path / "reach.hdf5")
    yield tmp_path
    for name in [n for n in sys.modules if n.startswith("reach_")]:
        del sys.modules[name]
    gymnasium.registry.pop("my/Reach-v0", None)


@pytest.fixture
def module(folder):
    """Name of the environment's module, which lies in the current folder."""
    name = "reach_env"
    (folder / f"{name}.py").write_text(REACH.replace("NAME", name))
    return name


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def train(*options: str):
    return run(compose([*SMALL, *options]))


# ------------------------------------------------------------------------------- own tasks


def test_a_run_in_an_environment_of_ones_own(folder, module, capsys):
    """Horizon, score, folder, the cutting of data and the report are the environment's."""
    train(f"env.id={module}:my/Reach-v0", *DATA)
    root = folder / "logs" / "my-Reach-v0" / "w2_0.2_0.3" / "seed_0"
    found = rows(root / "training" / "evaluations.csv")
    assert {float(row["episode_length"]) for row in found} == {HORIZON}
    assert {row["score"] for row in found} == {""}
    out = capsys.readouterr().out
    # The last step of each episode has no next state in the file.
    assert f"Data: {10 * (HORIZON - 1)} transitions, 10 episodes, mean return -4.0" in out
    assert "Actor 1 - Stochastic: -" in out
    assert "core" not in out

    page = write_report("logs", "results").read_text()
    table = rows(folder / "results" / "tables" / "headline.csv")[0]
    assert float(table["last_checkpoint_mean"]) == pytest.approx(
        float(found[-2]["return_mean"]), abs=1e-3
    )
    assert (table["task"], float(table["data_return"])) == ("my-Reach-v0", -4.0)
    assert "mean return of an episode" in page
    assert (
        "D4RL's normalised"
        not in page.partition("## Files")[0].replace("D4RL's nine", "").partition("Published")[0]
    )
    summary = rows(folder / "results" / "summary.csv")[0]
    assert summary["last_score"] == summary["best_score"] == ""
    assert float(summary["last_return"]) == pytest.approx(float(found[-4]["return_mean"]), abs=1e-3)
    assert summary["best_return"] == summary["last_return"]

    evaluations = evaluate([str(root / "checkpoints" / "policy.safetensors"), "episodes=2"])
    table = capsys.readouterr().out
    assert "on my-Reach-v0" in table
    assert "core" not in table
    assert evaluations[0].returns.mean() == pytest.approx(float(found[0]["return_mean"]))


def test_a_named_task_with_reference_scores_and_arguments(folder, module, capsys):
    train(
        "task=reach", f"env.id={module}:my/Reach-v0", "env.kwargs={goal: 3}",
        "env.reference_scores=[-40,0]", *DATA,
    )  # fmt: skip
    root = folder / "logs" / "reach" / "w2_0.2_0.3" / "seed_0"
    for row in rows(root / "training" / "evaluations.csv"):
        mean = float(row["return_mean"])
        assert float(row["score"]) == pytest.approx(100 * (mean + 40) / 40)
        assert mean < -3 * HORIZON  # far from the goal of the arguments
    out = capsys.readouterr().out
    assert "mean score 90.0" in out
    assert "Scores (0, 100: the reference returns of the task)" in out
    assert "expert" not in out
    assert "D4RL" not in out
    (recorded,), _ = read_runs("logs")
    assert (recorded.data_score, recorded.evaluations.scored) == (90.0, True)
    evaluate([str(root / "checkpoints" / "policy.safetensors"), "episodes=1"])
    assert "          score" in capsys.readouterr().out


def test_reports_of_scores_and_returns(folder, module):
    """Each task is shown in its own measure, and returns are in no mean over tasks."""
    for options in (["task=a"], ["task=b", "env.reference_scores=[-40,0]"]):
        train(*options, f"env.id={module}:my/Reach-v0", *DATA)
        options += ["algorithm=td3_bc", "variant=more"]
        run(compose([*SMALL[:-2], f"env.id={module}:my/Reach-v0", *DATA, *options]))
    rank(["logs/a/td3_bc_chain_0_more/seed_0", "updates=1", "progress_bar=false"])
    page = write_report("logs", "results").read_text()
    assert "; mean return for a" in page
    assert "D4RL" not in page.partition("Published means")[0]
    both = Path("results/tables/algorithms.md").read_text()
    assert "; mean return for a" in both
    assert "mean of" not in both
    assert "| b | td3_bc | more |" in both
    (ranked,) = rows(Path("results/tables/ranking.csv"))
    value = rows(Path("logs/a/td3_bc_chain_0_more/seed_0/training/evaluations.csv"))[0]
    assert ranked["w2_weights"] == "td3_bc (more)"
    assert float(ranked["return"]) == pytest.approx(float(value["return_mean"]), abs=1e-4)
    assert {row["number_of_tasks"] for row in rows(Path("results/tables/groups.csv"))} == {"1"}
    assert {path.name for path in Path("results/figures").glob("weights_*.png")} == {
        "weights_a.png", "weights_b.png",
    }  # fmt: skip


TASK_FILE = """
task: reach-far
env: {id: "reach_env:my/Reach-v0", kwargs: {goal: 3.0}}
data: {source: hdf5, path: reach.hdf5}
lr: 1e-4
"""


def test_a_task_file(folder, module):
    (folder / "mytask.yaml").write_text(TASK_FILE)
    cfg = compose([*SMALL, "task=./mytask.yaml", "env.kwargs.goal=4"])
    assert (cfg.task, cfg.lr, cfg.data.source) == ("reach-far", 1e-4, "hdf5")
    assert cfg.env.kwargs == {"goal": 4}
    run(cfg)
    assert (folder / "logs" / "reach-far" / "w2_0.2_0.3" / "seed_0" / "done.json").exists()
    (folder / "second.yaml").write_text(TASK_FILE.replace("task: reach-far", ""))
    assert compose([f"task={folder}/second.yaml"]).task == "second"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("env: {idd: x}", r"t\.yaml: unknown option 'env.idd'; did you mean env.id"),
        ("env: {id: x}\nlr: fast", r"t\.yaml: lr='fast' must be a number"),
        ("lr: 1", r"t\.yaml: env.id is missing"),
        ("env: {id: x}\nseed: 1", r"t\.yaml: seed is not part of a task"),
        ("env: {id: x}\ntask: a/b", r"t\.yaml: task: a/b: a task's name"),
        ("env: {id: x}\ntask: hopper-medium-v2", "is a task of D4RL"),
        ("- 1", "must be a mapping"),
        ("a: [", "not valid YAML"),
    ],
)
def test_task_files_with_mistakes(folder, content, message):
    (folder / "t.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        compose(["task=t.yaml"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["task=reach"], r"task=reach is unknown.*env\.id"),
        (["task=no.yaml"], r"no\.yaml is not a file"),
        (["task=a/b", "env.id=x"], "a task's name"),
        (["task=reach", "env.id=x", "env.reference_scores=[1]"], "two different returns"),
        (["task=reach", "env.id=x", "env.reference_scores=[1,1]"], "two different returns"),
        (["task=reach", "env.id=Pendulum-v1"], r"data\.source=local.*task=reach"),
        (["task=reach", "env.id=Pendulum-v1", "env.kwargs={h: 1}"], r"env\.kwargs=\{'h': 1\}"),
        (["task=reach", "env.id=minari", *DATA], "environment of a Minari dataset"),
        (["task=reach", "env.id=nowhere:X-v0", *DATA], "nowhere.*MODULE:ID"),
    ],
)
def test_mistakes_in_the_options_of_own_tasks(folder, options, message):
    compose(["task=reach", "env.id=x"])  # an earlier run leaves no preset behind
    with pytest.raises(ValueError, match=message):
        train(*options)


def test_d4rl_tasks_keep_their_scores_in_other_environments(tmp_path, monkeypatch):
    cfg = compose(["env.id=Pendulum-v1"])  # with D4RL's or local data, the task is D4RL's
    assert (cfg.task, cfg.env.max_episode_steps) == ("hopper-medium-v2", None)
    assert compose(["env.id=Pendulum-v1", "env.max_episode_steps=9"]).env.max_episode_steps == 9
    assert compose([]).env.max_episode_steps == 1000
    assert Measure.of("hopper-medium-v2").name == "D4RL score"


def test_sweeps_of_own_tasks(folder, module):
    (folder / "mytask.yaml").write_text(TASK_FILE)
    (folder / "sweep.yaml").write_text(
        f"""
common: {{total_steps: 4, seeds: [3]}}
environments:
  reach:
    w2_weights_grid: [[0.1], [0.2, 0.3]]
    env: {{id: "{module}:my/Reach-v0", kwargs: {{goal: 2}}, reference_scores: [-40, 0]}}
    data: {{source: hdf5, path: reach.hdf5}}
  ./mytask.yaml: {{w2_weights: [0.4]}}
  hopper: {{medium: {{w2_weights: [0.1]}}}}
"""
    )
    runs = read_sweep("sweep.yaml")
    assert [run.name for run in runs] == [
        "reach/w2_0.1_0.2/seed_3", "reach/w2_0.1_0.3/seed_3", "reach-far/w2_0.4/seed_3",
        "hopper-medium-v2/w2_0.1/seed_3",
    ]  # fmt: skip
    assert runs[0].cfg.env.kwargs == {"goal": 2}
    for one in runs[1:3]:  # a worker composes the same from the arguments
        assert OmegaConf.to_container(compose(one.arguments), resolve=True) == (
            OmegaConf.to_container(one.cfg, resolve=True)
        )


def test_own_data_in_python(folder):
    buffer = make_replay_buffer(
        "reach", source="hdf5", path="reach.hdf5", max_episode_steps=HORIZON, batch_size=4
    )
    assert len(buffer) == 10 * (HORIZON - 1)
    assert len(buffer.episode_returns) == 10


# ------------------------------------------------------------------------------ environments


@pytest.fixture
def counted(folder, module):
    """The class of an environment that counts its instances."""
    make_gymnasium_env(f"{module}:my/Reach-v0").close()
    return sys.modules[module].Reach


def test_one_environment_at_a_time(counted, module):
    """By default for environments of others; all are closed at the end."""
    train("task=reach", f"env.id={module}:my/Reach-v0", *DATA, "eval_interval=2")
    assert (counted.most, counted.alive) == (1, 0)
    policy = Path("logs/reach/w2_0.2_0.3/seed_0/checkpoints/policy.safetensors")
    evaluate([str(policy), "episodes=2", "video=reach.mp4"])
    assert (counted.most, counted.alive) == (1, 0)
    assert Path("reach.mp4").stat().st_size
    counted.made = 0
    cost = measure_cost(compose([*SMALL, "task=reach", "env.id=my/Reach-v0", *DATA]), 0.01)
    assert cost.evaluation > 0
    assert (counted.most, counted.alive) == (1, 0)


def test_a_stack_of_runs_has_one_environment_at_a_time(counted, module):
    options = [*SMALL, "task=reach", "env.id=my/Reach-v0", *DATA, "eval_interval=2"]
    assert run_stack([compose([*options, f"seed={seed}"]) for seed in range(2)]) == [None, None]
    assert (counted.most, counted.alive) == (1, 0)


def test_data_of_another_environment_are_named(folder, caplog, capsys):
    gymnasium.register("my/Reach-v0", entry_point=Sound, max_episode_steps=HORIZON)
    write_data(folder / "reach.hdf5", 3, actions=np.zeros((10 * HORIZON, 2)))  # beyond [-1, 1]
    train("task=reach", "env.id=my/Reach-v0", *DATA)
    assert "are they of this environment?" in capsys.readouterr().out


@pytest.mark.parametrize("eval_envs", [1, 3, 5, None])
def test_results_do_not_depend_on_the_number_of_environments(counted, eval_envs):
    def make():
        return gymnasium.wrappers.TimeLimit(counted(), HORIZON)

    chain, found = [], []
    for number in (8, eval_envs):
        counted.most = 0
        evaluator = Evaluator("reach", episodes=2, env_fn=make, eval_envs=number)
        chain = chain or [make_actor(4, evaluator.action_spec, (8,)) for _ in range(2)]
        found.append(evaluator(chain))
        assert counted.most <= (number or 1)
        evaluator.close()
        assert counted.alive == 0
    for many, few in zip(*found):
        np.testing.assert_allclose(many.returns, few.returns, rtol=1e-5)
        assert (many.lengths == few.lengths).all()
        assert many.scores is None


@pytest.mark.parametrize("options", [["lr=-1"], ["data.path=none.hdf5"], ["batch_size=5000"]])
def test_environments_are_closed_after_errors(counted, module, options):
    with pytest.raises((ValueError, FileNotFoundError)):
        train("task=reach", f"env.id={module}:my/Reach-v0", *DATA, *options)
    assert counted.made > 1
    assert counted.alive == 0


def test_nan_from_the_environment_is_not_divergence(counted, module, monkeypatch):
    """NaN comes in the second step, so that the check before training does not see it."""
    steps = []

    def bad(self, observation):
        steps.append(1)
        return observation * (np.nan if len(steps) > 1 else 1)

    monkeypatch.setattr(counted, "bad", bad)
    with pytest.raises(
        EvaluationError, match=r"env\.id=my/Reach-v0 returned an observation of nan"
    ):
        train("task=reach", f"env.id={module}:my/Reach-v0", *DATA)
    assert counted.alive == 0


class Sound(gymnasium.Env):
    """An environment without mistakes, from which those below differ in one."""

    observation_space = Box(-1, 1, (3,), np.float64)
    action_space = Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        return np.zeros(3), {}

    def step(self, action):
        return np.zeros(3), 0.0, False, False, {}


def mistaken(**changes) -> type:
    return type("Mistaken", (Sound,), changes)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (mistaken(reset=lambda self, seed=None, options=None: np.zeros(3)),
         "reset.* must return .observation, info., but returned one ndarray"),
        (mistaken(reset=lambda self: (np.zeros(3), {})), "unexpected keyword argument 'seed'"),
        (mistaken(step=lambda self, a: (np.zeros(3), 0.0, False, {})),
         "step.* must return .*terminated, truncated.*, but returned 4 values"),
        (mistaken(step=lambda self, a: (np.zeros(4), 0.0, False, False, {})), r"shape \(4,\)"),
        (mistaken(step=lambda self, a: (np.full(3, np.nan), 0.0, False, False, {})), "not finite"),
        (mistaken(step=lambda self, a: (np.zeros(3), np.nan, False, False, {})), "reward of nan"),
        (mistaken(step=lambda self, a: (np.zeros(3), "a", False, False, {})), "reward=a"),
        (mistaken(step=lambda self, a: 1 / 0), "step.* failed before training .*ZeroDivision"),
        (mistaken(reset=lambda self, seed=None, options=None: (np.zeros(3) * 1j, {})), "complex"),
        (mistaken(action_space=Box(-np.inf, np.inf, (2,))), r"without bounds.*env\.action_bounds"),
        (mistaken(action_space=Box(0, 5, (2,), np.int64)), "real numbers"),
        (mistaken(observation_space=Box(0, 255, (4, 4, 3), np.uint8)), "vectors"),
        (mistaken(observation_space=Dict(image=Box(0, 255, (4, 4, 3), np.uint8))), "images"),
    ],
)  # fmt: skip
def test_mistakes_of_environments(folder, env, message):
    gymnasium.register("my/Reach-v0", entry_point=env, max_episode_steps=HORIZON)
    write_data(folder / "reach.hdf5", 3)
    with pytest.raises(ValueError, match=message):
        train("task=reach", "env.id=my/Reach-v0", *DATA)
    assert not Path("logs").exists()


def test_an_environment_without_a_horizon_asks_for_one(folder):
    gymnasium.register("my/Reach-v0", entry_point=Sound)
    with pytest.raises(ValueError, match=r"env\.max_episode_steps=N"):
        make_gymnasium_env("my/Reach-v0")
    env = make_gymnasium_env("my/Reach-v0", max_episode_steps=5, action_bounds=[-3, 3])
    assert env.spec.max_episode_steps == 5
    assert env.action_space.high.tolist() == [3, 3]
    env = make_gymnasium_env("my/Reach-v0", max_episode_steps=5, action_bounds=[[-3, -1], [3, 4]])
    assert (env.action_space.low.tolist(), env.action_space.high.tolist()) == ([-3, -1], [3, 4])


# ------------------------------------------------------------------------------ dictionaries

SPACES = [
    Dict(velocity=Box(-9, 9, (2,)), angle=Box(-3, 3, (2, 2))),
    Dict(OrderedDict(z=Box(-9, 9, (1,)), a=Dict(OrderedDict(c=Discrete(3), b=MultiBinary(2))))),
    Dict(t=Tuple((Box(-1, 1, (2,)), Discrete(2, start=5)))),
    Dict(
        observation=Box(-9, 9, (3,)), achieved_goal=Box(-9, 9, (2,)), desired_goal=Box(-9, 9, (2,))
    ),
]


@pytest.mark.parametrize("space", SPACES)
def test_dictionaries_are_flattened_alike_in_environments_and_data(space):
    """In the order of gymnasium.flatten for the space of the environment."""

    class Env(gymnasium.Env):
        observation_space = space
        action_space = Box(-1, 1, (1,))

        def reset(self, *, seed=None, options=None):
            return samples[0], {}

    samples = [space.sample() for _ in range(4)]
    expected = [flatten(space, sample) for sample in samples]
    stacked = gymnasium.vector.utils.concatenate(
        space, samples, gymnasium.vector.utils.create_empty_array(space, 4)
    )
    np.testing.assert_array_equal(flatten_rows(space, stacked), expected)
    env = flatten_observations(Env())
    np.testing.assert_array_equal(env.reset()[0], expected[0])
    assert env.observation_space.shape == expected[0].shape


# ------------------------------------------------------------------------------------ Minari


@pytest.fixture
def dataset(folder, monkeypatch):
    """Function that writes a Minari dataset of four episodes."""
    minari = pytest.importorskip("minari")
    buffer = pytest.importorskip("minari.data_collector").EpisodeBuffer
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder / "minari"))
    rng = np.random.default_rng(0)

    def write(observations, space, **options) -> None:
        episodes = [
            buffer(
                observations=observations(rng),
                actions=rng.uniform(-1, 1, size=(HORIZON, 2)).astype(np.float32),
                rewards=np.full(HORIZON, -0.5),
                terminations=np.zeros(HORIZON, bool),
                truncations=np.arange(HORIZON) == HORIZON - 1,
            )
            for _ in range(4)
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about missing metadata
            minari.create_dataset_from_buffers(
                "my/data-v0", episodes, observation_space=space,
                action_space=Box(-2, 2, (2,), np.float32), **options,
            )  # fmt: skip

    return write


MINARI = ["data.source=minari", "data.path=my/data-v0"]


def test_minaris_environment_and_reference_scores(dataset, counted, module):
    space = Box(-np.inf, np.inf, (4,), np.float64)
    env = gymnasium.make("my/Reach-v0", goal=3.0).spec
    dataset(lambda rng: rng.normal(size=(HORIZON + 1, 4)), space, env=env,
            ref_min_score=-40.0, ref_max_score=0.0)  # fmt: skip
    train(*MINARI)  # named after the dataset
    training = Path("logs", "my-data-v0", "w2_0.2_0.3", "seed_0", "training")
    for row in rows(training / "evaluations.csv"):
        assert float(row["return_mean"]) < -3 * HORIZON
        assert float(row["score"]) == pytest.approx(100 * (float(row["return_mean"]) + 40) / 40)
    stored = OmegaConf.load(training / "config.yaml").env
    assert (stored.id, stored.max_episode_steps) == (f"{module}:my/Reach-v0", HORIZON)
    assert "mean score 90.0" in (training / "train.log").read_text()
    train(*MINARI, "task=reach", "env.reference_scores=[-10,10]")  # options that are set are kept
    assert "mean score 30.0" in (
        Path("logs", "reach", "w2_0.2_0.3", "seed_0", "training", "train.log").read_text()
    )


def test_minaris_dictionaries(dataset, folder):
    """Goal-conditioned data have all entries, in the order of the environment or the dataset."""
    space = Dict(
        observation=Box(-9, 9, (3,)), achieved_goal=Box(-9, 9, (2,)), desired_goal=Box(-9, 9, (2,))
    )
    written = []

    def observations(rng):
        parts = {key: rng.normal(size=(HORIZON + 1, *s.shape)) for key, s in space.spaces.items()}
        written.append(parts)
        return parts

    dataset(observations, space)
    for given, keys in (
        (None, ["achieved_goal", "desired_goal", "observation"]),
        (space, ["observation", "achieved_goal", "desired_goal"]),
    ):
        buffer = make_replay_buffer(
            "goal", source="minari", path="my/data-v0", normalize=False, batch_size=4,
            dict_space=given,
        )  # fmt: skip
        for key, i in (("observation", 0), (("next", "observation"), 1)):
            expected = np.concatenate([written[0][name][i] for name in keys])
            np.testing.assert_array_equal(buffer[0][key], np.float32(expected))
    with pytest.raises(ValueError, match="records no environment"):
        train(*MINARI)

    class Goal(Sound):
        observation_space = Dict(OrderedDict(reversed(space.spaces.items())))

        def reset(self, *, seed=None, options=None):
            return self.observation_space.sample(), {}

        def step(self, action):
            return self.observation_space.sample(), 0.0, False, False, {}

    gymnasium.register("my/Reach-v0", entry_point=Goal, max_episode_steps=HORIZON)
    assert len(train(*MINARI, "task=goal", "env.id=my/Reach-v0")) == 4


# ---------------------------------------------------------------------------- no environment


def weights(root: Path) -> list[torch.Tensor]:
    actors = load_actors(root / "checkpoints" / "policy.safetensors")
    return [p for actor in actors for p in actor.state_dict().values()]


def test_runs_without_an_environment(folder, module, capsys):
    """They train as others do, need no package of the environment, and say what they are."""
    own = ["task=reach", *DATA, "data.normalize=true"]
    train(*own, f"env.id={module}:my/Reach-v0", "log_dir=a")
    train(*own, "env.id=nowhere:X-v0", "eval_interval=0", "env.action_bounds=[-2,2]",
          f"env.max_episode_steps={HORIZON}", "log_dir=b")  # fmt: skip
    train(*own, "env.id=null", "env.action_bounds=[-2,2]", f"env.max_episode_steps={HORIZON}",
          "log_dir=c")  # fmt: skip
    name = Path("reach", "w2_0.2_0.3", "seed_0")
    for other in ("b", "c"):
        for left, right in zip(weights("a" / name), weights(other / name), strict=True):
            torch.testing.assert_close(left, right, rtol=0, atol=0)
        assert (other / name / "done.json").exists()
        assert not (other / name / "training" / "evaluations.csv").exists()
    assert "not evaluated" in capsys.readouterr().out
    assert "not evaluated" in write_report("c", "results").read_text()
    policy = str("c" / name / "checkpoints" / "policy.safetensors")
    with pytest.raises(ValueError, match=r"task='reach' has no environment: set env\.id"):
        evaluate([policy])
    assert evaluate([policy, f"env.id={module}:my/Reach-v0", "episodes=1"])


def test_runs_are_ranked_without_their_environment(folder, module, monkeypatch):
    """Unless it is needed: here it alone says where episodes end."""
    write_data(folder / "reach.hdf5", timeouts=np.arange(10 * HORIZON) % HORIZON == HORIZON - 1)
    seed = Path("logs", "reach", "w2_0.2_0.3", "seed_0")
    train("task=reach", f"env.id={module}:my/Reach-v0", *DATA)
    quick = [str(seed), "updates=2", "critics=1", "progress_bar=false"]
    with monkeypatch.context() as patch:
        patch.setattr("pogo_torchrl.experiments.run.make_evaluator", None)  # cannot be called
        without = rank(quick)
    (seed / "checkpoints" / "policy.safetensors").unlink()
    assert rank(quick) == without
    write_data(folder / "reach.hdf5")
    train("task=other", f"env.id={module}:my/Reach-v0", *DATA)
    assert len(rank([quick[0].replace("reach", "other"), *quick[1:]])) == 2


def test_bounds_of_each_action(folder):
    actions = np.random.default_rng(0).uniform([-2, -1], [2, 3], size=(10 * HORIZON, 2))
    write_data(folder / "reach.hdf5", actions=actions)
    cfg = ["task=reach", "eval_interval=0", f"env.max_episode_steps={HORIZON}", *DATA]
    with pytest.raises(ValueError, match=r"beyond the bounds .* \(-2 to 2\) in dimension 1"):
        train(*cfg, "env.action_bounds=[[-2,-2],[2,2]]")
    for bad in ("[[-2,-1,-1],[2,3,1]]", "[[-2],[2]]"):
        with pytest.raises(ValueError, match=r"lower bounds, but there are 2 action dimensions"):
            train(*cfg, f"env.action_bounds={bad}")
    for bad in ("[[-2,-1],[2]]", "[[-2,-1]]", "[[-2,3],[2,3]]", "[a,b]", "[[[1]],[[2]]]"):
        with pytest.raises(ValueError, match=r"env\.action_bounds=.*or \[\[-1,-2\],\[1,2\]\]"):
            train(*cfg, f"env.action_bounds={bad}")
    train(*cfg, "env.action_bounds=[[-2,-1],[2,3]]")
    train(*cfg, "env.action_bounds=[[-1,-1],[1,1]]", "data.clip_actions=true", "log_dir=clipped")
    actor = load_actors("logs/reach/w2_0.2_0.3/seed_0/checkpoints/policy.safetensors")[0]
    space = actor.action_spec.space
    assert (space.low.tolist(), space.high.tolist()) == ([-2, -1], [2, 3])


def test_bounds_of_actions_without_an_environment(folder):
    cfg = ["task=reach", "eval_interval=0", f"env.max_episode_steps={HORIZON}", *DATA]
    with pytest.raises(ValueError, match=r"actions up to .*env\.action_bounds=\[low,high\]"):
        train(*cfg)
    with pytest.raises(ValueError, match="beyond the bounds"):
        train(*cfg, "env.action_bounds=[-1,1]")
    with pytest.raises(ValueError, match=r"env\.action_bounds=\[2.*lower and the upper"):
        train(*cfg, "env.action_bounds=[2,-2]")
    write_data(folder / "reach.hdf5", actions=np.zeros((10 * HORIZON, 2)))
    train(*cfg)  # [-1, 1] is the convention
    with pytest.raises(ValueError, match=r"no timeouts.*env\.max_episode_steps"):
        train(*cfg, "env.max_episode_steps=null", "log_dir=other")


def test_steps_of_chains_without_an_environment(folder):
    """The data have the number of action dimensions d in ``w = 1 / (h d)``."""
    write_data(folder / "reach.hdf5", actions=np.zeros((10 * HORIZON, 2)))
    own = ["task=reach", "env.id=null", f"env.max_episode_steps={HORIZON}", *DATA]
    small = [option for option in SMALL if not option.startswith(("w2_weights", "total_steps"))]

    def start(*options: str) -> None:
        run(compose([*small, *own, *options]))

    start("step_sizes=[0.1,0.25]", "total_steps=2")
    start("algorithm=td3_bc", "chain=1", "total_steps=2")
    start("algorithm=td3_bc", "chain=1", "total_steps=4", "resume=true")
    done = {path.parent.parent.name for path in Path("logs").rglob("done.json")}
    assert done == {"w2_5_2", "td3_bc_chain_1_w2_5"}
    with pytest.raises(FileNotFoundError, match=r"'none\.hdf5' is not a file"):
        start("step_sizes=[0.1]", "data.path=none.hdf5")
