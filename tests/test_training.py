"""The trainer: order, boundaries, checkpoints, resume."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.testing import assert_close

from pogo_torchrl import POGOTrainer
from pogo_torchrl.evaluation import Evaluation
from pogo_torchrl.hooks import Evaluate, LogMetrics
from pogo_torchrl.training import Ticks


class Rows:
    """A sink that remembers."""

    def __init__(self):
        self.rows = []

    def write(self, step, rows):
        self.rows += [(step, dict(row)) for row in rows]

    @property
    def steps(self):
        return [step for step, _ in self.rows]

    def numbers(self):
        clocks = ("seconds", "updates_per_second")
        return [(s, {k: v for k, v in row.items() if k not in clocks}) for s, row in self.rows]


@pytest.fixture
def make_trainer(make_loss, make_buffer):
    """Trainers that start from the same weights, data and random state."""
    loss, buffer = make_loss(), make_buffer()

    def make(total=10, *, log=None, evaluate=None, **settings):
        torch.manual_seed(1)
        hooks, sink = [], Rows()
        if log:
            hooks.append(LogMetrics([sink], log))
        if evaluate:
            hooks.append(evaluate)
        trainer = POGOTrainer(
            copy.deepcopy(loss), buffer, total, progress_bar=False, hooks=hooks, **settings
        )
        trainer.rows = sink
        return trainer

    return make


def state(trainer):
    return {
        "loss": dict(trainer.loss_module.state_dict()),
        "stepper": trainer.optimization_stepper.state_dict()["optimizers"],
    }


def test_ticks_meet_every_multiple_and_the_end():
    ends, step = set(), 0
    for tick in Ticks(47, [10, 15]):
        step += tick.numel()
        ends.add(step)
    assert ends >= {10, 15, 20, 30, 40, 45, 47}
    assert step == 47


def test_rows_are_written_at_the_multiples_and_at_the_end(make_trainer):
    trainer = make_trainer(11, log=4)
    trainer.train()
    assert trainer.rows.steps == [4, 8, 11]


def test_a_row_is_the_mean_over_its_interval(make_trainer):
    every = make_trainer(6, log=1)
    every.train()
    third = make_trainer(6, log=3)
    third.train()
    single = [row["loss_qvalue"] for _, row in every.rows.rows]
    means = [sum(single[:3]) / 3, sum(single[3:]) / 3]
    assert [row["loss_qvalue"] for _, row in third.rows.rows] == pytest.approx(means, rel=1e-5)


def test_the_log_names_every_actor(make_trainer):
    trainer = make_trainer(2, log=2)
    trainer.train()
    row = trainer.rows.rows[0][1]
    for name in ("loss_actor", "q_actor", "w2", "lmbd", "std"):
        assert {f"{name}_0", f"{name}_1"} <= set(row)
    assert list(row)[-2:] == ["updates_per_second", "seconds"]


def test_evaluations_run_at_the_multiples_and_once_at_the_end(make_trainer):
    import numpy as np

    one = np.ones(2)
    result = [Evaluation(0, "deterministic", one, one, one)]
    for interval, steps in ((4, [4, 8, 10]), (5, [5, 10]), (1000, [10])):
        sink = Rows()
        make_trainer(10, evaluate=Evaluate(lambda: result, sinks=[sink], interval=interval)).train()
        assert sink.steps == steps


def test_logging_leaves_the_training_alone(make_trainer):
    plain = make_trainer(9)
    plain.train()
    logged = make_trainer(9, log=2)
    logged.train()
    assert_close(state(plain), state(logged), rtol=0, atol=0)


@pytest.mark.parametrize("policy_freq", [1, 2])
@pytest.mark.parametrize("cut", [3, 7])
def test_a_resumed_run_equals_the_uninterrupted_one(make_trainer, tmp_path, cut, policy_freq):
    settings = {"log": 4, "policy_freq": policy_freq}
    whole = make_trainer(10, **settings)
    whole.train()
    folder = tmp_path / "checkpoints"
    first = make_trainer(cut, checkpoint_dir=folder, **settings)
    # what a cut run would have logged: nothing at its last step
    first.rows.write = lambda *_: None
    stop_at(first, cut)
    first.total_frames = first.collector.total = 10
    first.train()
    second = make_trainer(10, checkpoint_dir=folder, **settings)
    torch.manual_seed(99)
    assert second.resume() == cut
    second.train()
    assert_close(state(whole), state(second), rtol=0, atol=0)
    assert [r for r in whole.rows.numbers() if r[0] > cut] == second.rows.numbers()


def stop_at(trainer, step):
    trainer.add_interval(step)

    def stop():
        if trainer.collected_frames == step:
            trainer.request_stop("test")

    trainer.register_op("post_steps", stop)


def test_checkpoints_are_rotated_and_leave_the_data_out(make_trainer, tmp_path):
    trainer = make_trainer(10, checkpoint_dir=tmp_path, checkpoint_interval=3)
    trainer.train()
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["step-000000000009", "step-000000000010"]
    assert not [p for p in tmp_path.rglob("*") if "replay" in p.name]


def test_a_damaged_newest_checkpoint_is_skipped(make_trainer, tmp_path):
    make_trainer(10, checkpoint_dir=tmp_path, checkpoint_interval=6).train()
    (tmp_path / "step-000000000010" / "manifest.json").write_text("{")
    assert make_trainer(10, checkpoint_dir=tmp_path).resume() == 6


def test_nothing_to_resume(make_trainer, tmp_path):
    assert make_trainer(checkpoint_dir=tmp_path).resume() is None
    assert make_trainer().resume() is None


def test_nothing_piles_up_in_the_trainer(make_trainer):
    trainer = make_trainer(60, log=10)
    trainer.train()
    assert not trainer._log_dict


def test_targets_follow_by_tau(make_trainer):
    trainer = make_trainer(1, tau=1.0)
    trainer.train()
    loss = trainer.loss_module
    assert_close(
        loss.target_qvalue_network_params.data.to_dict(), loss.qvalue_network_params.data.to_dict()
    )


@pytest.mark.parametrize(
    "settings",
    [{"lr": 0}, {"lr": float("nan")}, {"tau": 0}, {"tau": 2}, {"policy_freq": 0}],
)
def test_settings_out_of_range_are_named(make_trainer, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        make_trainer(**settings)


def test_no_updates_are_refused(make_trainer):
    with pytest.raises(ValueError, match="total_steps=0"):
        make_trainer(0)
