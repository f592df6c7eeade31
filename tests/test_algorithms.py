"""``algorithm=`` and ``chain=``: JKO chains on top of other algorithms, from the command line."""

from __future__ import annotations

import copy
import csv
import re
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from runs import assert_same, state
from tensordict import TensorDict
from test_report_study import constant, make_run
from torch.testing import assert_close
from torchrl.objectives import SoftUpdate

from pogo_torchrl import JKOChain, load_actors
from pogo_torchrl.experiments import algorithms
from pogo_torchrl.experiments.evaluate import evaluate
from pogo_torchrl.experiments.overrides import compose
from pogo_torchrl.experiments.planner import measure_cost
from pogo_torchrl.experiments.run import RunInProgress, run
from pogo_torchrl.experiments.run_folder import RunFolder
from pogo_torchrl.experiments.signals import Stopped
from pogo_torchrl.experiments.sweep import make_jobs
from pogo_torchrl.experiments.sweep_file import read_sweep
from pogo_torchrl.report import read_runs, write_report
from pogo_torchrl.trainers.chain_stepper import ChainOptimizationStepper

TASK = "hopper-medium-v2"
BASES = ("td3_bc", "iql", "rebrac", "paper")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A file in D4RL's layout with hopper's sizes and random content."""
    path = tmp_path_factory.mktemp("data") / "hopper.hdf5"
    rng, rows = np.random.default_rng(0), 300
    with h5py.File(path, "w") as file:
        file["observations"] = rng.normal(size=(rows, 11)).astype(np.float32)
        file["actions"] = rng.uniform(-1, 1, (rows, 3)).astype(np.float32)
        file["rewards"] = rng.normal(size=rows).astype(np.float32)
        file["terminals"] = np.arange(rows) % 40 == 39
        file["timeouts"] = np.arange(rows) % 50 == 49
    return path


@pytest.fixture
def options(data, tmp_path):
    """Options of small runs that write below ``tmp_path``."""

    def make(*arguments: str):
        return compose([
            f"task={TASK}", "data.source=hdf5", f"data.path='{data}'", "total_steps=8",
            "eval_interval=8", "eval_episodes=1", "log_interval=4", "checkpoint_interval=4",
            "hidden_sizes=[8]", "batch_size=16", "env.max_episode_steps=10", "progress_bar=false",
            f"log_dir='{tmp_path / 'logs'}'", *arguments,
        ])  # fmt: skip

    return make


def folder(cfg) -> Path:
    return RunFolder.of(algorithms.resolve(cfg)).root


@pytest.mark.parametrize("chain", [0, 2])
@pytest.mark.parametrize("algorithm", BASES)
def test_runs_end_to_end(options, algorithm, chain, tmp_path):
    cfg = options(f"algorithm={algorithm}", f"chain={chain}")
    last = run(cfg)
    assert [(e.actor, e.mode) for e in last] == [
        (i, mode) for i in range(chain + 1) for mode in ("deterministic", "stochastic")
    ]
    root = folder(cfg)
    weights = ["3.33333"] * (chain + (algorithm == "paper"))  # h = 0.1, d = 3
    name = "_".join([f"{algorithm}_chain_{chain}", *(["w2", *weights] if weights else [])])
    assert root == tmp_path / "logs" / TASK / name / "seed_0"
    with (root / "training" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["4", "8"]
    wanted = {"loss_qvalue", "loss_actor", "pred_value", "data_mse_0", "std_0"}
    wanted |= {f"{name}_{i}" for i in range(1, chain + 1) for name in ("w2", "step_mse", "q_actor")}
    assert wanted <= rows[-1].keys()
    assert all(np.isfinite(float(value)) for value in rows[-1].values())

    policy = root / "checkpoints" / "policy.safetensors"
    again = evaluate([str(policy), "episodes=1"])
    assert [e.returns.tolist() for e in again] == [e.returns.tolist() for e in last]
    actors = load_actors(policy)
    assert len(actors) == chain + 1
    state = torch.randn(5, 11)
    one, other = (
        actors[-1](observation=state, noise=noise)
        for noise in (torch.zeros(5, 3), torch.ones(5, 3))
    )
    assert torch.equal(one, other) == (algorithm in ("td3_bc", "rebrac"))  # others are Gaussian
    assert one.abs().max() <= 1


def trained_by_hand(cfg, base, buffer) -> None:
    """Train the bare TorchRL loss in a plain loop."""
    base.make_value_estimator(gamma=cfg.gamma)
    targets = SoftUpdate(base, tau=cfg.tau)
    more = {"iql": ["value"], "paper": ["behaviour"]}.get(cfg.algorithm, [])
    names = ["actor", "qvalue", *more]
    adam = {
        name: torch.optim.Adam(getattr(base, f"{name}_network_params").parameters(), cfg.lr)
        for name in names
    }
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam["actor"], cfg.total_steps)

    def minimise(loss, *names):
        for name in names:
            adam[name].zero_grad()
        loss.backward()
        for name in names:
            adam[name].step()

    for update in range(1, cfg.total_steps + 1):
        batch = buffer.sample()
        if cfg.algorithm == "iql":
            losses = base(batch)
            minimise(sum(losses[f"loss_{name}"] for name in names), *names)
            schedule.step()
            targets.step()
            continue
        if cfg.algorithm == "paper":
            minimise(base.behaviour_loss(batch)[0], "behaviour")
        minimise(base.qvalue_loss(batch)[0], "qvalue")
        if cfg.algorithm == "paper" or update % 2 == 0:
            minimise(base.actor_loss(batch)[0], "actor")
            targets.step()


@pytest.mark.parametrize("algorithm", BASES)
def test_without_a_chain_it_is_the_bare_loss(options, algorithm):
    cfg = algorithms.resolve(options(f"algorithm={algorithm}", "chain=0"))
    one = RunInProgress(cfg)
    one.read_data()
    base = copy.deepcopy(one.loss.base_loss)
    torch.manual_seed(3)
    one.trainer.train()
    torch.manual_seed(3)
    trained_by_hand(cfg, base, one.replay_buffer)
    found = one.loss.base_loss.state_dict()
    for name, expected in base.state_dict().items():
        assert_close(found[name], expected, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_the_actors_of_the_chain_do_not_change_the_base(options):
    base, chain = options("algorithm=iql", "chain=0"), options("algorithm=iql", "chain=2")
    losses = []
    for cfg in (base, chain):
        one = RunInProgress(cfg)
        one.read_data()
        stepper = ChainOptimizationStepper(one.loss, order=algorithms.BASES["iql"].order, lr=1e-2)
        for seed in range(4):  # the chain draws noise: fix the batches
            torch.manual_seed(seed)
            stepper.update(one.replay_buffer.sample())
        losses.append(one.loss)
    alone, below = (dict(loss.base_loss.state_dict()) for loss in losses)
    assert_same(alone, below)
    states = torch.randn(4, 11)
    first, *others = (algorithms.policy(losses[1], i)(observation=states) for i in range(3))
    assert all(not torch.equal(first, other) for other in others)


@pytest.mark.parametrize("algorithm", BASES)
def test_targets_stay_targets(options, algorithm, tmp_path):
    """A second trainer can be made for a trained loss, as the plan of a sweep does."""
    one = RunInProgress(options(f"algorithm={algorithm}", "chain=1"))
    one.read_data()
    one.trainer.train()
    one.settings["checkpoint_dir"] = tmp_path / "second"
    one.make_trainer(one.replay_buffer, one.replay_buffer, {})
    one.trainer.train()
    trainable = [name for name, p in one.loss.named_parameters() if p.requires_grad]
    assert not [name for name in trainable if "target" in name]


@pytest.mark.parametrize(
    ("algorithm", "more"),
    [("td3_bc", ["lr_schedule=linear", "clip_grad_norm=0.5"]), ("iql", []), ("rebrac", []),
     ("iql", ["freeze_critics_at=4"]), ("paper", [])],
)  # fmt: skip
def test_resume_is_exact(options, algorithm, more, tmp_path):
    arguments = [f"algorithm={algorithm}", "chain=2", "eval_interval=3", "log_interval=5", *more]
    whole = options(*arguments, f"log_dir='{tmp_path / 'whole'}'")
    run(whole)
    parts = options(*arguments, "resume=true")
    one = RunInProgress(parts)
    one.read_data()
    with one.opened():
        one.trainer.register_op(
            "post_steps", lambda: one.trainer.collected_frames == 3 and one.stop("SIGTERM")
        )
        one.trainer.train()
        with pytest.raises(Stopped):
            one.finish()
    run(parts)
    assert_same(state(folder(parts)), state(folder(whole)))


def test_frozen_base(options):
    """Until the switch only the base is trained; then only the chain, from copies of its actor."""
    one = RunInProgress(options("algorithm=td3_bc", "chain=1", "freeze_critics_at=4"))
    one.read_data()
    seen = {}

    def look():
        seen[one.trainer.collected_frames] = {
            name: values.clone() for name, values in one.loss.state_dict().items()
        }

    one.trainer.register_op("post_steps", look)
    one.trainer.train()
    middle, end = seen[4], seen[8]
    added = {name for name in end if name.startswith("chain_actor_1")}
    changed = {name for name in end if not torch.equal(middle[name], end[name])}
    assert changed
    assert changed <= added
    for name in added:
        base = name.replace("chain_actor_1_params", "base_loss.actor_network_params")
        assert torch.equal(middle[name], middle[base])


BAD = [
    ("algorithm=sac", "algorithm=sac is unknown; choose one of"),
    ("chain=2", "chain=2 differs from the 2 w2_weights of algorithm=pogo"),
    ("chain=-1", "chain=-1 must be an integer from 0 to 31"),
    ("algorithm=td3_bc chain=40", "from 0 to 31"),
    ("algorithm=td3_bc chain=1 step_sizes=[0.1,0.1]", "differs from the 2 step_sizes"),
    ("algorithm=td3_bc chain=1 w2_weights=[1,2]", "differs from the 2 w2_weights"),
    ("algorithm=paper chain=1 step_sizes=[0.1]", "one for its own actor and one for each"),
    ("algorithm=paper w2_weights=[1,-1]", "w2_weights=[1.0, -1.0] must be"),
    ("algorithm=td3_bc step_sizes=[-1]", "step_sizes"),
    ("algorithm=td3_bc w2_weights=[-1]", "w2_weights"),
    ("algorithm=td3_bc compile=true", "compile=true is for algorithm=pogo"),
    ("algorithm=td3_bc bf16=true", "bf16=true has no meaning for algorithm=td3_bc"),
    ("algorithm=iql q_normalization=null", "q_normalization=null has no meaning for algorithm=iql"),
    ("algorithm=iql policy_freq=2", "policy_freq=2 has no meaning for algorithm=iql"),
    ("algorithm=iql average_actors=0.01", "average_actors=0.01 has no meaning"),
    ("algorithm=td3_bc actor_q=mean", "for algorithm=td3_bc and chain=0"),
    ("algorithm=td3_bc chain=1 actor_q=advantage", "needs a value network"),
    ("algorithm=td3_bc chain=1 actor_q=all", "actor_q"),
    ("algorithm=td3_bc critic_bc_weight=0.1", "critic_bc_weight=0.1 has no meaning"),
    ("actor_bc_weight=0.1", "actor_bc_weight=0.1 has no meaning for algorithm=pogo"),
    ("algorithm=rebrac actor_bc_weight=-1", "actor_bc_weight"),
    ("algorithm=rebrac actor_bc_weight=null", "actor_bc_weight"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_values_are_refused_before_the_data_are_read(tmp_path, arguments, message):
    words = [*arguments.split(), "hidden_sizes=[8]", f"log_dir='{tmp_path}'", "data.source=hdf5"]
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        RunInProgress(compose(words))
    assert "\n" not in str(caught.value)


def test_length_of_the_chain():
    assert algorithms.resolve(compose(["chain=2"])).chain is None  # that of the preset
    for arguments, chain, weights in (
        (["algorithm=td3_bc"], 0, []),
        (["algorithm=td3_bc", "w2_weights=[1,2]"], 2, [1, 2]),
        (["algorithm=iql", "chain=1", "step_sizes=[0.5]"], 1, [2 / 3]),
        (["algorithm=paper"], 1, [10 / 3, 10 / 3]),
        (["algorithm=paper", "chain=0"], 0, [10 / 3]),
    ):
        cfg = algorithms.resolve(compose(arguments))
        assert (cfg.chain, cfg.step_sizes) == (chain, None)
        assert list(cfg.w2_weights) == pytest.approx(weights)


def test_options_that_presets_set_for_pogo_do_not_apply():
    cfg = compose(["algorithm=td3_bc", "task=antmaze-umaze-v2"])
    assert (cfg.lr, cfg.policy_freq, cfg.data.reward_shift) == (3e-4, 2, -1)
    assert compose(["algorithm=td3_bc", "lr=1e-2"]).lr == 1e-2


def test_bounds_of_actions(wide_spec):
    """Actors of all bases act, and are exported, in the environment's units."""
    for name in BASES:
        cfg = algorithms.resolve(compose([f"algorithm={name}", "hidden_sizes=[8]"]))
        loss = algorithms.BASES[name].make_loss(cfg, 3, wide_spec)
        chain = JKOChain(loss, w2_weights=[1.0], action_spec=wide_spec)
        states = 100 * torch.randn(64, 3)
        actor = algorithms.policy(chain, 1)
        action = actor(observation=states, noise=10 * torch.randn(64, 2))
        assert wide_spec.space.low.le(action).all()
        assert wide_spec.space.high.ge(action).all()
        if name in ("iql", "paper"):
            dist = chain.actor(1).get_dist(TensorDict(observation=states))
            assert_close(actor(observation=states, noise=torch.zeros(64, 2)), dist.mean)


# -------------------------------------------------------------------------- sweeps and reports

SWEEP = """
common: {{seeds: [0, 1], algorithm: [td3_bc, iql], chain: [0, 2], total_steps: 4,
         data: {{source: hdf5, path: '{data}'}}, eval_interval: 4, eval_episodes: 1,
         hidden_sizes: [8], batch_size: 16, env: {{max_episode_steps: 10}}}}
environments: {{hopper-medium: {{}}}}
"""


def test_sweep_over_algorithms_and_chains(tmp_path, data):
    file = tmp_path / "sweep.yaml"
    file.write_text(SWEEP.format(data=data))
    runs = read_sweep(str(file), [f"log_dir='{tmp_path / 'logs'}'"])
    assert [run.name for run in runs] == [
        f"{TASK}/{name}/seed_{seed}"
        for algorithm in ("td3_bc", "iql")
        for name in (f"{algorithm}_chain_0", f"{algorithm}_chain_2_w2_3.33333_3.33333")
        for seed in (0, 1)
    ]
    assert [run.label for run in runs[2:5]] == ["td3_bc + 2 (3.33333, 3.33333)"] * 2 + ["iql"]
    for one in runs:
        again = algorithms.resolve(compose(one.arguments))
        assert again == one.cfg  # its process trains the same
    with pytest.raises(ValueError, match=r"stack=true trains algorithm=pogo only, but .*td3_bc"):
        make_jobs(runs, stack=True)
    cost = measure_cost(runs[-1].cfg, seconds=0.01)
    for one in runs[::2]:
        run(one.cfg)
    assert cost.policy == 4 * 3 * ((11 * 8 + 8) + (8 * 3 + 3) + 3)  # float32, three actors

    page = write_report(tmp_path / "logs", tmp_path / "results").read_text()
    assert page.count("## Algorithms, and chains on top") == 1
    with (tmp_path / "results" / "tables" / "algorithms.csv").open() as table:
        rows = list(csv.DictReader(table))
    assert [(r["algorithm"], bool(r["2_mean"])) for r in rows] == [
        ("iql", False), ("iql", True), ("td3_bc", False), ("td3_bc", True)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("algorithm: [td3_bc, sac]", "algorithm=.*sac.* is unknown"),
        ("algorithm: []", r"algorithm=\[\] is empty"),
        ("algorithm: [pogo, iql], chain: 0", "chain=0 differs from the 3 w2_weights"),
        ("algorithm: iql, chain: [0, 0]", "listed twice"),
        ("algorithm: iql, chain: [0, 1.5]", "chain=1.5 must be an integer"),
        ("algorithm: iql, step_sizes: [0.1], w2_weights: [1]", "give one of the two"),
    ],
)
def test_sweep_files_that_are_not_valid(tmp_path, section, message):
    file = tmp_path / "sweep.yaml"
    file.write_text(f"common: {{seeds: [0], {section}}}\nenvironments: {{hopper-medium: {{}}}}\n")
    with pytest.raises(ValueError, match=message):
        read_sweep(str(file))


def test_sweep_weights_and_overrides(tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text(
        "common: {seeds: [0], algorithm: [pogo, iql]}\n"
        "environments: {hopper-medium: {w2_weights_grid: [[1, 2], [3]]}}\n"
    )
    names = [run.folder.root.parent.name for run in read_sweep(str(file))]
    assert names == ["w2_1_3", "w2_2_3", "iql_chain_2_w2_1_3", "iql_chain_2_w2_2_3"]
    names = [run.folder.root.parent.name for run in read_sweep(str(file), ["algorithm=td3_bc"])]
    assert names == ["td3_bc_chain_2_w2_1_3", "td3_bc_chain_2_w2_2_3"]


def study(logs: Path) -> None:
    """Runs of three methods on two tasks; each actor scores 10 more than the one before."""
    bases = {"pogo": (20.0, (0.1, 0.5)), "iql": (30.0, ()), "td3_bc": (40.0, (2.0, 2.0))}
    for task, more in ((TASK, 0.0), ("walker2d-medium-v2", 4.0)):
        for algorithm, (score, weights) in bases.items():
            actors = max(len(weights) + (algorithm != "pogo"), 1)
            curves = constant(*(score + more + 10 * i for i in range(actors)))
            folder = make_run(logs, task, weights, 0, curves, algorithm=algorithm)
            if algorithm == "pogo":
                continue
            name = f"{algorithm}_chain_{len(weights)}" + ("_w2_2_2" if weights else "")
            folder.parent.rename(logs / task / name)


def test_report_of_base_plus_one_plus_two(tmp_path):
    study(tmp_path / "logs")
    page = write_report(tmp_path / "logs", tmp_path / "results").read_text()
    tables = tmp_path / "results" / "tables"
    assert (tables / "algorithms.md").read_text().splitlines()[2:] == [
        "| task | algorithm | w2_weights | seeds | base | +1 | +2 |",
        "|---|---|---|---|---|---|---|",
        "| hopper-medium-v2 | pogo | 0.1, 0.5 | 1 | 20.0 | 30.0 | – |",
        "| hopper-medium-v2 | iql | – | 1 | 30.0 | – | – |",
        "| hopper-medium-v2 | td3_bc | 2, 2 | 1 | 40.0 | 50.0 | 60.0 |",
        "| walker2d-medium-v2 | pogo | 0.1, 0.5 | 1 | 24.0 | 34.0 | – |",
        "| walker2d-medium-v2 | iql | – | 1 | 34.0 | – | – |",
        "| walker2d-medium-v2 | td3_bc | 2, 2 | 1 | 44.0 | 54.0 | 64.0 |",
        "| mean of 2 tasks | pogo | best of each task | 2 | 22.0 | 32.0 | – |",
        "| mean of 2 tasks | iql | best of each task | 2 | 32.0 | – | – |",
        "| mean of 2 tasks | td3_bc | best of each task | 2 | 42.0 | 52.0 | 62.0 |",
    ]
    assert "6 combinations of task, algorithm and w2_weights" in page
    # Other tables do not mix algorithms.
    with (tables / "groups.csv").open() as file:
        means = {
            (row["tasks"], row["actor"]): row["last_checkpoint_mean"]
            for row in csv.DictReader(file)
            if row["mode"] == "deterministic"
        }
    assert means["all tasks", "last"] == "32.0000"
    assert means["iql, all tasks", "last"] == "32.0000"
    assert means["td3_bc + 2, all tasks", "last"] == "62.0000"
    with (tables / "published.csv").open() as file:
        assert [row["pogo_here_mean"] for row in csv.DictReader(file)] == ["30.0000", "34.0000"]
    with (tmp_path / "results" / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (2 + 1 + 3) * 2
    assert {(r["algorithm"], r["w2_weights"]) for r in rows} == {
        ("pogo", "0.1_0.5"), ("iql", ""), ("td3_bc", "2_2")
    }  # fmt: skip
    runs, left_out = read_runs(tmp_path / "logs")
    assert [run.num_actors for run in runs] == [2, 1, 3] * 2
    assert left_out == {}
