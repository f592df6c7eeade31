"""Polyak averages of the actors: in the loss, in training, in evaluations and exported policies."""

from __future__ import annotations

import copy
import csv
import dataclasses

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from torchrl.objectives import SoftUpdate

from pogo_torchrl import POGOTrainer, load_actors
from pogo_torchrl.cli import main
from pogo_torchrl.evaluation import Evaluation
from pogo_torchrl.export import policy_weights
from pogo_torchrl.objectives import ActorAverages
from pogo_torchrl.report import read_runs, score_table
from pogo_torchrl.report.content import weights_note
from pogo_torchrl.report.study import settings
from pogo_torchrl.trainers.hooks import Evaluate

RATE = 0.25


def averages(loss):
    return [loss.params(f"average_actor_network_{i}") for i in range(loss.num_actors)]


def actors(loss):
    return [loss.params(f"actor_network_{i}") for i in range(loss.num_actors)]


def test_averages_start_as_copies_and_are_not_trained(make_loss):
    loss = make_loss(average_actors=RATE)
    for average, actor in zip(averages(loss), actors(loss)):
        for name, values in average.items():
            assert torch.equal(values, actor[name])
            assert not values.requires_grad
            assert values.data_ptr() != actor[name].data_ptr()
    plain = make_loss()
    assert len(list(loss.parameters())) == len(list(plain.parameters()))
    assert not any("average" in name for name in plain.state_dict())


def test_a_step_of_soft_update_is_the_weighted_mean(make_loss):
    loss = make_loss(average_actors=RATE)
    updater = SoftUpdate(ActorAverages(loss), tau=RATE)
    before = copy.deepcopy(averages(loss))
    for i in range(2):
        for p in loss.actor_params(i):
            p.data.add_(2.0)
    updater.step()
    for old, new, actor in zip(before, averages(loss), actors(loss)):
        for name, values in new.items():
            if actor[name].requires_grad:
                assert_close(values, old[name] + 2.0 * RATE)


@pytest.mark.parametrize("policy_freq", [1, 2])
def test_training_moves_the_averages_after_each_update_of_the_actors(
    make_loss, make_buffer, policy_freq
):
    loss = make_loss(average_actors=RATE, delay_actor=True)
    expected = [{k: v.double() for k, v in average.items()} for average in averages(loss)]

    def follow():
        if (trainer.optimization_stepper.steps - 1) % policy_freq:
            return
        for mean, actor in zip(expected, actors(loss)):
            for name, values in actor.items():
                mean[name] = (1 - RATE) * mean[name] + RATE * values.detach().double()

    trainer = POGOTrainer(
        loss, make_buffer(), 10, lr=1e-2, policy_freq=policy_freq, progress_bar=False
    )
    trainer.register_op("post_optim", follow)
    trainer.train()
    for mean, average, actor in zip(expected, averages(loss), actors(loss)):
        for name, values in mean.items():
            assert_close(average[name].double(), values, rtol=1e-5, atol=1e-6)
            assert not actor[name].requires_grad or not torch.equal(average[name], actor[name])


def test_averages_do_not_affect_training(make_loss, make_buffer):
    buffer, trained = make_buffer(), []
    for rate in (None, RATE):
        torch.manual_seed(2)
        loss = make_loss(average_actors=rate)
        POGOTrainer(loss, buffer, 6, lr=1e-2, progress_bar=False).train()
        trained.append({k: v for k, v in loss.state_dict().items() if "average" not in k})
    assert_close(*trained, rtol=0, atol=0)


def test_a_resumed_run_continues_the_averages(make_loss, make_buffer, tmp_path):
    loss, buffer = make_loss(average_actors=RATE), make_buffer()

    def train(total, folder):
        torch.manual_seed(1)
        trainer = POGOTrainer(
            copy.deepcopy(loss), buffer, total, lr=1e-2, progress_bar=False, checkpoint_dir=folder
        )
        trainer.resume()
        trainer.train()
        return dict(trainer.loss_module.state_dict())

    train(4, tmp_path / "cut")
    resumed, whole = train(9, tmp_path / "cut"), train(9, tmp_path / "whole")
    assert_close(resumed, whole, rtol=0, atol=0)


def test_averages_follow_the_loss_when_it_is_moved(make_loss, make_buffer):
    loss = make_loss(average_actors=RATE)
    trainer = POGOTrainer(loss, make_buffer(), 4, lr=1e-2, progress_bar=False)
    loss.double().float()
    before = copy.deepcopy(averages(loss))
    trainer.train()
    assert any(not torch.equal(v, before[1][k]) for k, v in averages(loss)[1].items())
    assert loss.double().params("average_actor_network_0")["module.mlp.0.weight"].dtype is (
        torch.float64
    )


def test_the_averaged_policy_acts_with_the_averages(make_loss):
    loss = make_loss(average_actors=RATE)
    for p in loss.actor_params(1):
        p.data.mul_(0.0)
    state = torch.randn(4, 3)
    raw, average = loss.actor(-1), loss.actor(-1, averaged=True)
    assert raw(observation=state).abs().max() == 0
    assert average(observation=state).abs().max() > 0


def test_reset_parameters_copies_the_new_actors(make_loss):
    loss = make_loss(average_actors=RATE)
    loss.reset_parameters_recursive()
    for average, actor in zip(averages(loss), actors(loss)):
        assert_close(average, {k: v.detach() for k, v in actor.items()}, rtol=0, atol=0)


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.5, True, "fast"])
def test_a_rate_out_of_range_is_rejected(make_loss, rate):
    with pytest.raises(ValueError, match=r"average_actors=.* must be a number in \(0, 1\]"):
        make_loss(average_actors=rate)


def test_a_loss_without_averages_says_how_to_get_them(make_loss):
    with pytest.raises(ValueError, match=r"average_actors=0\.002"):
        make_loss().actor(0, averaged=True)
    with pytest.raises(ValueError, match=r"average_actors=0\.002"):
        ActorAverages(make_loss())


def evaluation(score, raw=None):
    values = np.full(2, float(score))
    return Evaluation(0, "deterministic", 10 * values, np.ones(2), values, raw)


class _Collect:
    def __init__(self):
        self.rows = []

    def write(self, step, rows):
        self.rows += rows


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (evaluation(40), {"score": 40.0, "weights": "raw"}),
        (
            evaluation(50, evaluation(30)),
            {"score": 50.0, "weights": "averaged", "raw_return_mean": 300.0, "raw_score": 30.0},
        ),
    ],
)
def test_rows_of_evaluations_say_which_weights_they_show(make_loss, make_buffer, found, expected):
    sink = _Collect()
    hook = Evaluate(lambda: [found], sinks=[sink], interval=2)
    POGOTrainer(make_loss(), make_buffer(), 2, progress_bar=False, hooks=[hook]).train()
    (row,) = sink.rows
    assert {name: row.get(name) for name in expected} == expected
    assert ("raw_score" in row) == ("raw_score" in expected)


def test_a_run_deploys_the_averages(tmp_path, monkeypatch, capsys):
    """evaluations.csv, the table, the report and policy.safetensors show the averaged actors."""
    monkeypatch.chdir(tmp_path)
    arguments = [
        "train", "data.size=2000", f"data.cache_dir={tmp_path}", "eval_episodes=1",
        "hidden_sizes=[8]", "batch_size=8", "w2_weights=[0.1,0.5]", "compile=false",
        "total_steps=4", "eval_interval=4", "log_interval=2", "progress_bar=false", "lr=1e-2",
        "average_actors=0.25",
    ]  # fmt: skip
    main(arguments)
    screen = capsys.readouterr()
    assert "Evaluations show the averaged actors (average_actors=0.25)." in screen.out + screen.err
    assert "(averaged weights of the actors;" in screen.out + screen.err
    folder = tmp_path / "logs" / "hopper-medium-v2" / "w2_0.1_0.5" / "seed_0"
    with (folder / "training" / "evaluations.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["weights"] for row in rows} == {"averaged"}
    assert any(row["score"] != row["raw_score"] for row in rows)
    assert "(averaged weights of the actors;" in score_table(
        folder / "training" / "evaluations.csv", 0.0
    )
    (record,), _ = read_runs(tmp_path / "logs")
    assert record.averaged
    (note,) = weights_note(settings([record]))
    assert note == "Scores are of the averaged actors (average_actors) for all runs."
    plain = dataclasses.replace(record, averaged=False, seed=1)
    assert weights_note(settings([plain])) == ()
    policy = folder / "checkpoints" / "policy.safetensors"
    assert policy_weights(policy) == "averaged"
    main(["evaluate", str(policy), "episodes=1"])
    table = capsys.readouterr().out
    assert "averaged weights" in table
    score = float(rows[2]["score"])  # actor 1, deterministic
    assert f"{score:.1f} ± 0.0" in table.splitlines()[4]
    assert len(load_actors(policy)) == 2
