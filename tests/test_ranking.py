"""Fitted Q evaluation and the ranking of actors without an environment."""

from __future__ import annotations

import csv

import pytest
import torch
from runs import SMALL, Rows, run_folder
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.objectives import SoftUpdate

from pogo_torchrl import POGOTrainer, make_actor, make_qvalue
from pogo_torchrl.cli import main
from pogo_torchrl.experiments import trained_run
from pogo_torchrl.experiments.rank import rank, ranking_table
from pogo_torchrl.objectives import FQELoss
from pogo_torchrl.report import read_runs, write_report
from pogo_torchrl.trainers.ranking import OfflineValue, RankActors, episode_starts, rank_actors


def constant(action: float) -> TensorDictModule:
    """A policy that always takes the same action."""
    return TensorDictModule(
        lambda observation: torch.full_like(observation[..., :1], action),
        in_keys=["observation"],
        out_keys=["action"],
    )


def dataset(episodes: int = 100, length: int = 10, end: float = 0.0, noise: float = 0.0):
    """Episodes that stay in their start state, with reward ``action + noise``."""
    count = episodes * length
    observation = torch.randn(episodes, 2).repeat_interleave(length, 0)
    action = 2 * torch.rand(count, 1) - 1
    terminated = torch.rand(count, 1) < end
    return TensorDict(
        {
            "observation": observation,
            "action": action,
            "next": {
                "observation": observation,
                "reward": action + noise * torch.randn(count, 1),
                "done": terminated,
                "terminated": terminated,
            },
        },
        [count],
    )


SETTINGS = {"updates": 500, "hidden_sizes": (32,), "num_critics": 2}
POLICIES = [constant(-0.5), constant(0.6), constant(0.2)]


def test_values_of_a_bandit_are_its_mean_rewards():
    rows = dataset(500, 1, end=1.0)
    found = rank_actors(POLICIES, rows, gamma=0.9, **SETTINGS)
    assert [v.value for v in found] == pytest.approx([-0.5, 0.6, 0.2], abs=0.05)
    assert [v.rank for v in found] == [3, 1, 2]


@pytest.mark.parametrize("end", [0.0, 0.2])
def test_values_of_a_known_process(end):
    rows, gamma = dataset(end=end), 0.8
    end = rows["next", "terminated"].float().mean().item()
    found = rank_actors(POLICIES, rows, gamma=gamma, **SETTINGS)
    truth = [a / (1 - gamma * (1 - end)) for a in (-0.5, 0.6, 0.2)]
    assert [v.value for v in found] == pytest.approx(truth, abs=0.3)
    assert [v.rank for v in found] == [3, 1, 2]


def test_intervals_cover_the_truth_and_shrink_with_the_data():
    widths = []
    for episodes in (30, 300):
        torch.manual_seed(0)
        rows = dataset(episodes, 1, end=1.0, noise=2.0)
        found = rank_actors(
            POLICIES, rows, gamma=0.9, **{**SETTINGS, "num_critics": 4, "updates": 300}
        )
        assert all(v.low <= v.value <= v.high for v in found)
        assert all(v.low <= a <= v.high for v, a in zip(found, (-0.5, 0.6, 0.2)))
        widths.append(max(v.high - v.low for v in found))
    assert widths[1] < widths[0]


def test_the_centre_of_the_values_is_not_learned():
    """Rewards of 100 are as easy as rewards of 0: values of 1000 after a single update."""
    rows = dataset()
    rows["next", "reward"] = 100 + 0 * rows["next", "reward"]
    (found,) = rank_actors([constant(0.0)], rows, gamma=0.9, updates=1, num_critics=1)
    assert found.value == pytest.approx(1000, rel=0.01)


def test_a_ranking_neither_reads_nor_changes_the_random_state():
    rows = dataset(10)
    before = torch.get_rng_state()
    first = rank_actors(POLICIES, rows, **{**SETTINGS, "updates": 3})
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    assert rank_actors(POLICIES, rows, **{**SETTINGS, "updates": 3}) == first


def test_equal_policies_have_equal_values():
    one, two, _ = rank_actors(
        [*POLICIES[:1] * 2, constant(0.3)], dataset(10), **{**SETTINGS, "updates": 5}
    )
    assert one.value == two.value
    assert (one.low, one.high) == (two.low, two.high)


def test_episodes_start_after_terminal_rows_and_jumps():
    starts = episode_starts(dataset(3, 4))
    assert starts.nonzero().flatten().tolist() == [0, 4, 8]
    assert episode_starts(dataset(3, 4, end=1.0)).all()


# ------------------------------------------------------------------------------- the loss


def make(num_critics: int = 1, policies=tuple(POLICIES)) -> FQELoss:
    loss = FQELoss(policies, make_qvalue(2, 1, (8,)), num_qvalue_nets=num_critics)
    return loss.make_value_estimator(gamma=0.9)


@pytest.mark.parametrize("policies", [POLICIES[:1], POLICIES])
@pytest.mark.parametrize("num_critics", [1, 2])
def test_the_loss_is_that_of_its_equation(policies, num_critics):
    loss, batch = make(num_critics, policies), dataset(4, 4, end=0.3)
    assert len(list(loss.parameters())) == 4
    with torch.no_grad():
        for parameter in loss.qvalue_network_params.parameters():
            parameter.mul_(1.5)  # so that the targets differ
    expected = 0.0
    network = make_qvalue(2, 1, (8,))
    for p, policy in enumerate(policies):
        for j in range(num_critics):
            index = p * num_critics + j

            def q(params, state, action, index=index):
                with params[index].data.to_module(network):
                    return network(TensorDict(observation=state, action=action, batch_size=[16]))[
                        "state_action_value"
                    ]

            action = policy(batch["next"].select("observation"))["action"]
            following = q(loss.target_qvalue_network_params, batch["next", "observation"], action)
            alive = (~batch["next", "terminated"]).float()
            target = batch["next", "reward"] + 0.9 * alive * following
            value = q(loss.qvalue_network_params, batch["observation"], batch["action"])
            expected += (value - target).square().mean()
    out = loss(batch.clone())
    assert out["loss_qvalue"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert out["td_error"].shape == (len(policies),)
    assert set(out.keys()) == set(loss.out_keys)


def test_only_critics_are_trained_and_targets_follow(unit_spec):
    policies = [make_actor(2, unit_spec, (8,)) for _ in range(2)]
    rows = dataset(4)
    rows["action"] = rows["action"].expand(-1, 2).clone()
    loss = FQELoss(policies, make_qvalue(2, 2, (8,))).make_value_estimator(gamma=0.9)
    updater = SoftUpdate(loss, tau=0.5)
    loss(rows)["loss_qvalue"].backward()
    assert all(parameter.grad is None for p in policies for parameter in p.parameters())
    assert all(parameter.grad is not None for parameter in loss.parameters())
    torch.optim.SGD(loss.parameters(), lr=0.1).step()
    before = loss.target_qvalue_network_params.clone()
    updater.step()
    pairs = zip(before.values(True, True), loss.target_qvalue_network_params.values(True, True))
    assert any(not torch.equal(old, new) for old, new in pairs)


def test_bootstrap_weights_weigh_the_rows_of_each_critic():
    loss, batch = make(2, POLICIES[:1]), dataset(4, 4)
    plain = loss(batch)["loss_qvalue"]
    batch["bootstrap_weight"] = torch.tensor([2.0, 2.0]).expand(16, 2)
    assert loss(batch)["loss_qvalue"].item() == pytest.approx(2 * plain.item())
    batch["bootstrap_weight"] = torch.tensor([1.0, 0.0]).expand(16, 2)
    first = loss(batch)["loss_qvalue"]
    batch["bootstrap_weight"] = torch.tensor([0.0, 1.0]).expand(16, 2)
    assert (first + loss(batch)["loss_qvalue"]).item() == pytest.approx(plain.item())


def test_keys_and_keyword_arguments():
    torch.manual_seed(1)
    loss = make()
    batch = dataset(4, 4)
    expected = loss(batch)["loss_qvalue"]
    loss.set_keys(reward="score")
    batch["next", "score"] = batch["next"].pop("reward")
    assert loss(batch)["loss_qvalue"] == expected
    nested = {f"next_{key}": value for key, value in batch["next"].items()}
    flat = {key: batch[key] for key in ("observation", "action")}
    assert loss(**flat, **nested)[0] == expected


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: FQELoss([], make_qvalue(2, 1)), "policies is empty"),
        (
            lambda: FQELoss(POLICIES, make_qvalue(2, 1), num_qvalue_nets=0),
            "num_qvalue_nets=0 must be an integer >= 1",
        ),
        (lambda: rank_actors(POLICIES, dataset(2), updates=0), "updates=0 must be an integer"),
        (lambda: RankActors(interval=0), "interval=0 must be an integer"),
    ],
)
def test_invalid_settings(make_it, message):
    with pytest.raises(ValueError, match=message):
        make_it()


# ------------------------------------------------------------------------------- hook, command


def test_the_hook_ranks_without_affecting_the_training(make_loss, make_buffer):
    buffer, sink, trained = make_buffer(), Rows(), []
    for hooks in ([], [RankActors([sink], interval=2, updates=2, num_critics=1)]):
        torch.manual_seed(0)
        loss = make_loss(average_actors=0.1)
        POGOTrainer(loss, buffer, 4, hooks=hooks, progress_bar=False).train()
        trained.append(loss.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(trained[0].values(), trained[1].values()))
    assert sink.steps == [2, 2, 4, 4]
    assert [row["actor"] for _, row in sink.rows] == [0, 1, 0, 1]
    assert sorted(row["rank"] for _, row in sink.rows[-2:]) == [1, 2]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small trained run."""
    folder = tmp_path_factory.mktemp("run")
    data = [f"data.cache_dir={folder / 'cache'}", f"log_dir={folder / 'logs'}"]
    main(["train", *SMALL, *data, "total_steps=6", "average_actors=0.1"])
    return run_folder(folder)


QUICK = ("--updates", "2", "--critics=1", "progress_bar=false")


def test_rank_prints_a_table_and_writes_it(trained, capsys):
    capsys.readouterr()
    first = rank([str(trained), *QUICK])
    out = capsys.readouterr().out
    assert "FQE value" in out
    assert "D4RL score" in out
    with (trained / "training" / "ranking.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [6, 6]
    assert [float(row["value"]) for row in rows] == [v.value for v in first]
    assert rank([str(trained), *QUICK]) == first  # replaces the rows of the same update
    with (trained / "training" / "ranking.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 2


def test_rank_makes_no_environment_where_it_can_do_without(trained, monkeypatch):
    made = []
    make = trained_run.RunInProgress

    def recorded(cfg):
        made.append(make(cfg))
        return made[-1]

    monkeypatch.setattr(trained_run, "RunInProgress", recorded)
    first = rank([str(trained), *QUICK])
    policy = trained / "checkpoints" / "policy.safetensors"
    hidden = policy.rename(policy.with_name("hidden"))
    try:
        assert rank([str(trained), *QUICK]) == first
    finally:
        hidden.rename(policy)
    assert [one.evaluator is None for one in made] == [True, False]


def test_a_ranking_is_shown_even_if_it_cannot_be_written(trained, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", "ranking.csv")

    monkeypatch.setattr("pogo_torchrl.experiments.rank.CSVSink", refuse)
    with pytest.raises(PermissionError):
        rank([str(trained), "--updates", "2", "--critics=1"])
    shown = capsys.readouterr()
    assert "FQE value" in shown.out
    assert "\r" not in shown.err  # a log file gets lines


def test_the_report_shows_rankings_beside_the_scores(trained, tmp_path, capsys):
    values = rank([str(trained), *QUICK])
    logs = trained.parents[2]
    page = write_report(logs, tmp_path / "results").read_text()
    assert "Which actor to deploy" in page
    with (tmp_path / "results" / "tables" / "ranking.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    scores = read_runs(logs)[0][0].last[:, 0]
    assert [float(row["score"]) for row in rows] == pytest.approx(scores, abs=1e-4)
    assert [int(row["fqe_rank"]) for row in rows] == [v.rank for v in values]
    (trained / "training" / "ranking.csv").write_text("step,actor,value\n6,0,no\0number\n6,")
    assert read_runs(logs)[0][0].ranking is None


def test_large_values_keep_their_columns():
    values = [OfflineValue(0, -152518.1, -169941.9, -135094.3, 1), OfflineValue(1, 0, 0, 0, 2)]
    lines = ranking_table(values, [-1e6, 2.0], "return").splitlines()
    assert lines[1].split() == ["0", "-152518.1", "[-169941.9,", "-135094.3]", "1", "-1000000.0"]
    assert len({len(line) for line in lines[:3]}) == 1
    assert lines[-1].startswith("Rank correlation of values and returns")


def test_values_are_in_units_of_the_data(trained, tmp_path, monkeypatch):
    """IQL trains on scaled rewards, but is ranked with the same ones as POGO."""
    cache = trained.parents[3] / "cache"
    options = [o for o in SMALL if not o.startswith(("w2_weights", "freeze"))]
    data = [f"data.cache_dir={cache}", f"log_dir={tmp_path}"]
    main(["train", *options, *data, "total_steps=2", "algorithm=iql"])
    ranked = []

    def recorded(actors, rows, **settings):
        ranked.append(rows["next", "reward"])
        return rank_actors(actors, rows, **settings)

    monkeypatch.setattr("pogo_torchrl.experiments.rank.rank_actors", recorded)
    for run in (trained, tmp_path / "hopper-medium-v2" / "iql_chain_0" / "seed_0"):
        rank([str(run), *QUICK])
    torch.testing.assert_close(*ranked)


def test_errors_of_rank(trained, tmp_path):
    policy = trained / "checkpoints" / "policy.safetensors"
    for arguments, message in [
        ([], "run is missing"),
        ([str(tmp_path / "none")], "contains no run"),
        ([str(policy)], "exported policies have no critics: give the folder of the run"),
        ([str(trained), "updates=0"], "updates=0 must be an integer >= 1"),
        ([str(trained), "gamma=1"], "gamma=1.0 has no bound"),
        ([str(trained), "gamma=2"], "gamma"),
    ]:
        with pytest.raises((ValueError, OSError), match=message):
            rank(arguments)


def test_a_run_without_a_checkpoint(trained, tmp_path):
    empty = tmp_path / "logs" / "hopper-medium-v2" / "w2_0.1_0.5" / "seed_0"
    (empty / "training").mkdir(parents=True)
    config = (trained / "training" / "config.yaml").read_text()
    (empty / "training" / "config.yaml").write_text(config)
    with pytest.raises(ValueError, match="has no usable checkpoint"):
        rank([str(empty)])
    (empty / "training" / "config.yaml").write_text("task: [")
    with pytest.raises(ValueError, match=r"config\.yaml cannot be read"):
        rank([str(empty)])
