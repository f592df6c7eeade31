"""Fine-tuning of a trained chain in an environment."""

from __future__ import annotations

from functools import partial

import gymnasium
import h5py
import numpy as np
import pytest
import torch
from runs import SMALL, rows, run_folder
from tensordict import TensorDict
from torchrl.envs.utils import ExplorationType, set_exploration_type

from pogo_torchrl import load_actors
from pogo_torchrl.cli import main
from pogo_torchrl.data.replay_buffer import Normalization, OfflineReplayBuffer
from pogo_torchrl.experiments.finetune import FineTuning, OnlineBuffer, finetune, make_collector
from pogo_torchrl.experiments.signals import Stopped
from pogo_torchrl.experiments.trained_run import open_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small trained run with episodes of 5 steps."""
    folder = tmp_path_factory.mktemp("run")
    data = [f"data.cache_dir={folder / 'cache'}", f"log_dir={folder / 'logs'}"]
    main(["train", *SMALL, *data, "total_steps=6", "env.max_episode_steps=5"])
    return run_folder(folder)


SETTINGS = [
    "log_interval=10", "eval_interval=10", "eval_episodes=1", "checkpoint_interval=5",
    "progress_bar=false", "compile=false",
]  # fmt: skip


def test_all_networks_are_trained_together(trained, tmp_path):
    out = tmp_path / "tuned"
    last = finetune([str(trained), "env_steps=20", "flow_updates=0", *SETTINGS, f"out={out}"])
    assert [(e.actor, e.mode) for e in last] == [
        (i, mode) for i in (0, 1) for mode in ("deterministic", "stochastic")
    ]
    evaluations = rows(out / "training" / "evaluations.csv")
    assert [int(row["step"]) for row in evaluations] == [0] * 4 + [10] * 4 + [20] * 4
    # The score before is that of the trained run.
    before = rows(trained / "training" / "evaluations.csv")[-4:]
    for new, old in zip(evaluations[:4], before):
        assert new["return_mean"] == old["return_mean"]
    assert [int(row["step"]) for row in rows(out / "training" / "metrics.csv")] == [10, 20]
    assert (out / "done.json").exists()
    first, tuned = (load_actors(f / "checkpoints" / "policy.safetensors") for f in (trained, out))
    for one, other in zip(first, tuned):
        pairs = list(zip(one.module.module.parameters(), other.module.module.parameters()))
        assert any(not torch.equal(a, b) for a, b in pairs)
        # 20 steps of Adam at a rate of 3e-4 change a weight by about 0.006 at most.
        assert max((a - b).abs().max() for a, b in pairs) < 0.02
        assert torch.equal(one.module.mean, other.module.mean)


@pytest.mark.parametrize("actor", [-1, 0])
def test_later_actors_flow_from_the_one_that_collects_data(trained, tmp_path, monkeypatch, actor):
    built = []
    initialise = FineTuning.__init__

    def recorded(self, cfg):
        initialise(self, cfg)
        built.append(self)

    monkeypatch.setattr(FineTuning, "__init__", recorded)
    settings = ["env_steps=12", "flow_updates=8", "step_size=0.5", f"actor={actor}"]
    finetune([str(trained), *settings, *SETTINGS, "eval_interval=6", f"out={tmp_path}"])
    (tuned,) = built
    assert len(tuned.buffer.online) == 12  # none during the flow
    start = load_actors(trained / "checkpoints" / "policy.safetensors")[actor]
    first, last = load_actors(tmp_path / "checkpoints" / "policy.safetensors")
    weights = [list(one.module.module.parameters()) for one in (start, first, last)]
    assert all(map(torch.equal, weights[0], weights[1]))
    assert not any(map(torch.equal, weights[0], weights[2]))
    before = [r["return_mean"] for r in rows(trained / "training" / "evaluations.csv")[-4:]]
    found = {}
    for row in rows(tmp_path / "training" / "evaluations.csv"):
        if row["mode"] == "deterministic":
            found.setdefault(int(row["step"]), []).append(row["return_mean"])
    assert list(found) == [0, 6, 12, 18, 20]
    for step in (0, 6, 12):  # both are copies until the steps end
        assert found[step] == [before[2 * actor]] * 2
    assert found[20][0] == before[2 * actor]
    # h = alpha / (w d), whatever the weights of the run
    assert tuned.loss.w2_weights[1] == pytest.approx(tuned.loss.alpha / (0.5 * 3))
    critics = open_run(trained).loss.qvalue_network_params, tuned.loss.qvalue_network_params
    assert not any(torch.equal(a, b) for a, b in zip(*(c.values(True, True) for c in critics)))


def test_a_stopped_fine_tuning_continues_with_its_transitions(trained, tmp_path, monkeypatch):
    arguments = [str(trained), "env_steps=20", "--updates-per-step", "2", *SETTINGS]
    arguments += ["flow_updates=10"]
    arguments += [f"out={tmp_path}"]
    built = []
    initialise = FineTuning.__init__

    def recorded(self, cfg):
        initialise(self, cfg)
        built.append(self)

    monkeypatch.setattr(FineTuning, "__init__", recorded)
    sample = OnlineBuffer.sample

    def stopping(self):
        if self.samples == 14 and not built[0].trainer.stopping:
            built[0].stop("SIGTERM")
        return sample(self)

    monkeypatch.setattr(OnlineBuffer, "sample", stopping)
    with pytest.raises(Stopped):
        finetune(arguments)
    stopped = built[0].buffer
    assert len(stopped.online) == (stopped.samples + 1) // 2 < 20
    with pytest.raises(FileExistsError, match="resume=true, choose another seed or out"):
        finetune(arguments)
    with pytest.raises(ValueError, match="updates_per_step"):
        finetune([*arguments, "updates_per_step=1", "env_steps=40", "resume=true"])
    with pytest.raises(ValueError, match=r"env_steps \* updates_per_step: 40.0 -> 80.0"):
        finetune([*arguments, "env_steps=40", "resume=true"])
    finetune([*arguments, "resume=true"])
    resumed = built[-1].buffer
    assert resumed.samples == 50
    assert len(resumed.online) == 20
    count = len(stopped.online)
    for key in stopped.keys:
        assert torch.equal(resumed.online[:count][key], stopped.online[:][key])
    evaluations = rows(tmp_path / "training" / "evaluations.csv")
    assert [int(row["step"]) for row in evaluations] == [
        s for s in (0, 10, 20, 30, 40, 50) for _ in "1234"
    ]


def test_new_transitions_are_those_of_the_environment(trained):
    """Normalised as the data, with time-outs that are not terminal."""
    run = open_run(trained)
    offline, policy = run.replay_buffer, run.loss.actor(-1)
    env = run.evaluator._make_env
    collector = make_collector(env, policy, offline, reward_shift=2.0, seed=3)
    new = [next(step) for step in [iter(collector)] for _ in range(12)]
    collector.shutdown()
    raw, mirror = torch.cat(new), env()
    mean, std = offline.normalization
    observations = raw["observation"] * std + mean
    assert observations.abs().max() < 10
    assert raw["next", "truncated"].flatten().nonzero().flatten().tolist() == [4, 9]
    assert not raw["next", "terminated"].any()
    assert (raw["observation"][1:5] == raw["next", "observation"][:4]).all()
    assert not torch.equal(raw["observation"][5], raw["next", "observation"][4])
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        mean_action = policy(raw.select("observation"))["action"]
    assert not torch.equal(mean_action, raw["action"])  # explores by its own z
    mirror.reset(seed=0)
    _, reward, *_ = mirror.step(mirror.action_space.sample())
    assert abs(raw["next", "reward"].mean() - 2.0 - reward) < 1.5


def test_exploration_noise(trained):
    run = open_run(trained)
    policy = run.loss.actor(-1)
    new = []
    for noise in (0.0, 0.3, 100.0):
        settings = {"exploration_noise": noise, "seed": 3}
        collector = make_collector(run.evaluator._make_env, policy, run.replay_buffer, **settings)
        new.append(torch.cat([next(step) for step in [iter(collector)] for _ in range(40)]))
        collector.shutdown()
    own = [policy(rows.select("observation", "noise", strict=False))["action"] for rows in new]
    spread = [float((rows["action"] - action).std()) for rows, action in zip(new, own)]
    assert spread[0] < 0.3 < spread[2]
    assert spread[1] == pytest.approx((spread[0] ** 2 + 0.3**2) ** 0.5, rel=0.4)
    assert new[2]["action"].abs().eq(1).float().mean() > 0.9  # clipped to the bounds


def offline_buffer(count: int = 32) -> OfflineReplayBuffer:
    data = TensorDict(
        {
            "observation": torch.zeros(count, 1),
            "action": torch.zeros(count, 1),
            "next": {
                "observation": torch.zeros(count, 1),
                "action": torch.zeros(count, 1),
                "reward": torch.zeros(count, 1),
                "done": torch.zeros(count, 1, dtype=torch.bool),
                "terminated": torch.zeros(count, 1, dtype=torch.bool),
            },
        },
        [count],
    )
    normalization = Normalization.identity(data["observation"])
    return OfflineReplayBuffer(
        data, normalization=normalization, episode_returns=torch.zeros(1).numpy()
    )


def test_batches_are_half_offline_and_half_new():
    offline = offline_buffer()
    steps = (
        offline[:1].exclude(("next", "action")).apply(partial(torch.full_like, fill_value=1 + k))
        for k in range(100)
    )
    buffer = OnlineBuffer(offline, steps, capacity=10, batch_size=8, updates_per_step=2)
    sizes, new = [], []
    for _ in range(20):
        batch = buffer.sample()
        assert batch.shape == (8,)
        sizes.append(len(buffer.online))
        new.append(int((batch["observation"] > 0).sum()))
        assert batch["next", "action"].isnan().sum() == new[-1]
    assert sizes == [k // 2 for k in range(2, 22)]  # a step before every second update
    for _ in range(5):
        assert (buffer.sample()["observation"] > 0).sum() == 4
    assert len(buffer.online) == 10  # its capacity
    assert new[:6] == [0] * 6  # until there are enough for a half
    assert new[6:] == [4] * 14


def test_errors(trained, tmp_path):
    policy = trained / "checkpoints" / "policy.safetensors"
    for arguments, message in [
        ([], "run is missing"),
        ([str(policy)], "exported policies have no critics: give the folder of the run"),
        ([str(tmp_path)], "contains no run"),
        ([str(trained), "actor=2"], "actor=2 is out of range: the run has the actors 0 to 1"),
        ([str(trained), "step_size=0"], r"step_size=0.* must be a finite number > 0"),
        ([str(trained), "exploration_noise=-1"], r"exploration_noise=-1.* >= 0"),
        ([str(trained), "env_steps=0"], "env_steps=0 must be an integer >= 1"),
        ([str(trained), "env_step=1"], "unknown option 'env_step'; did you mean env_steps"),
    ]:
        with pytest.raises((ValueError, OSError), match=message):
            finetune(arguments)
    assert not (trained / "finetune").exists()


def test_a_run_without_an_environment(trained, tmp_path):
    data = f"data.cache_dir={trained.parents[3] / 'cache'}"
    main(["train", *SMALL, data, f"log_dir={tmp_path}", "total_steps=4", "env.id=null"])
    with pytest.raises(ValueError, match="was trained without an environment"):
        finetune([str(tmp_path / "hopper-medium-v2" / "w2_0.1_0.5" / "seed_0")])


def test_a_missing_environment_is_named(trained, monkeypatch, capsys):
    def missing(*args, **kwargs):
        raise gymnasium.error.NameNotFound("no such environment")

    monkeypatch.setattr(gymnasium, "make", missing)
    config = trained / "training" / "config.yaml"
    text = config.read_text()
    lines = ["  id: Missing-v0" if line.startswith("  id:") else line for line in text.split("\n")]
    config.write_text("\n".join(lines))
    try:
        with pytest.raises(SystemExit) as end:
            main(["finetune", str(trained)])
    finally:
        config.write_text(text)
    assert end.value.code == 2
    assert "env.id=Missing-v0 is not a known Gymnasium environment" in capsys.readouterr().err


class Single(gymnasium.Env):
    """An environment of which only one may exist at a time."""

    observation_space = gymnasium.spaces.Box(-1, 1, (2,), dtype=np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), dtype=np.float32)
    alive = 0

    def __init__(self):
        if Single.alive:
            raise RuntimeError("port 5005 is in use")
        Single.alive += 1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2, dtype=np.float32), {}

    def step(self, action):
        return np.zeros(2, dtype=np.float32), 0.0, False, False, {}

    def close(self):
        Single.alive -= 1


def test_an_environment_that_may_exist_once(tmp_path):
    gymnasium.register("Single-v0", entry_point=Single, max_episode_steps=5)
    rng, count = np.random.default_rng(0), 40
    with h5py.File(tmp_path / "data.hdf5", "w") as file:
        file["observations"] = rng.uniform(-1, 1, (count, 2))
        file["actions"] = rng.uniform(-1, 1, (count, 1))
        file["rewards"] = np.zeros(count)
        file["terminals"] = np.zeros(count, dtype=bool)
        file["timeouts"] = np.arange(count) % 5 == 4
    own = ["task=single", "env.id=Single-v0", "data.source=hdf5", "w2_weights=[0.1]"]
    own += [f"data.path={tmp_path / 'data.hdf5'}", f"log_dir={tmp_path}"]
    small = [x for x in SMALL if "w2_weights" not in x]
    main(["train", *small, *own, "total_steps=4"])
    run = str(tmp_path / "single" / "w2_0.1" / "seed_0")
    with pytest.raises(ValueError, match=r"has a single actor.* set flow_updates=0"):
        finetune([run, "env_steps=20", *SETTINGS])
    finetune([run, "env_steps=20", "flow_updates=0", *SETTINGS])
    assert len(rows(tmp_path / run / "finetune/seed_0/training/evaluations.csv")) == 3 * 2
    assert Single.alive == 0
