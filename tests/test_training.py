"""The trainer: order, boundaries, checkpoints, resume."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from runs import Rows, spoil_at
from torch.testing import assert_close

from pogo_torchrl import POGOTrainer
from pogo_torchrl.evaluation import Evaluation, EvaluationInterrupted
from pogo_torchrl.trainers.checkpoints import is_intact
from pogo_torchrl.trainers.hooks import (
    DivergenceError,
    Evaluate,
    EvaluationError,
    LogMetrics,
    StopOnDivergence,
)
from pogo_torchrl.trainers.trainer import OfflineStepIterator


@pytest.fixture
def make_trainer(make_loss, make_buffer):
    """Trainers that start from the same weights, data and random state."""
    loss, buffer = make_loss(), make_buffer()

    def make(total=10, *, log=None, evaluate=None, hooks=(), **settings):
        torch.manual_seed(1)
        hooks, sink = list(hooks), Rows()
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
    optimizers = trainer.optimization_stepper.state_dict()["optimizers"]
    return {
        "loss": dict(trainer.loss_module.state_dict()),
        "moments": {name: optimizer["state"] for name, optimizer in optimizers.items()},
    }


def test_ticks_meet_every_multiple_and_the_end():
    ends, step = set(), 0
    for tick in OfflineStepIterator(47, [10, 15]):
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


def test_a_damaged_newest_checkpoint_is_skipped(make_trainer, tmp_path, caplog):
    make_trainer(10, checkpoint_dir=tmp_path, checkpoint_interval=6).train()
    (tmp_path / "step-000000000010" / "manifest.json").write_text("{")
    assert make_trainer(10, checkpoint_dir=tmp_path).resume() == 6
    assert "step-000000000010 is damaged or unfinished and is passed over" in caplog.text


@pytest.mark.parametrize("seed", range(20))
def test_a_checkpoint_cut_or_changed_anywhere_is_not_intact(make_trainer, tmp_path, seed):
    make_trainer(2, checkpoint_dir=tmp_path).train()
    (checkpoint,) = tmp_path.iterdir()
    assert is_intact(checkpoint)
    chance = random.Random(seed)
    file = chance.choice([p for p in sorted(checkpoint.rglob("*")) if p.is_file()])
    content = bytearray(file.read_bytes())
    where = chance.randrange(len(content))
    if seed % 3 == 0:
        file.unlink()
    elif seed % 3 == 1:
        file.write_bytes(content[:where])
    else:
        content[where] ^= 1 << chance.randrange(8)
        file.write_bytes(content)
    assert not is_intact(checkpoint)
    assert make_trainer(2, checkpoint_dir=tmp_path).resume() is None


def test_what_a_killed_process_left_is_removed(make_trainer, tmp_path):
    make_trainer(2, checkpoint_dir=tmp_path).train()
    for name in (".step-000000000004.stage-1f", ".step-000000000001.backup-2e"):
        (tmp_path / name / "components").mkdir(parents=True)
    assert make_trainer(4, checkpoint_dir=tmp_path).resume() == 2
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000000002"]


def test_a_checkpoint_with_another_fingerprint_is_refused(make_trainer, tmp_path):
    make_trainer(2, checkpoint_dir=tmp_path, fingerprint={"data": "a", "lr": 0.1}).train()
    other = make_trainer(4, checkpoint_dir=tmp_path, fingerprint={"data": "b", "lr": 0.1})
    with pytest.raises(ValueError, match=r"step-000000000002 is .* another run \(data: a -> b\)"):
        other.resume()


def test_a_checkpoint_of_another_format_is_refused(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setattr("pogo_torchrl.trainers.trainer.FORMAT_VERSION", 7)
    make_trainer(2, checkpoint_dir=tmp_path).train()
    monkeypatch.undo()
    with pytest.raises(ValueError, match="has format version 7, this release reads 3:"):
        make_trainer(4, checkpoint_dir=tmp_path).resume()


def test_a_resumed_run_leaves_the_checkpoint_it_came_from_as_it_was(make_trainer, tmp_path):
    settings = {"checkpoint_dir": tmp_path, "keep_checkpoints": 9}
    make_trainer(3, **settings).train()
    second = make_trainer(8, **settings)
    second.resume()
    second.train()
    assert all(is_intact(path) for path in tmp_path.iterdir())


def guarded(make_trainer, largest_return=None, **settings):
    metrics, said = LogMetrics([Rows()], 4), []
    guard = StopOnDivergence(metrics, largest_return, warn=said.append)
    return make_trainer(12, hooks=[guard, metrics], checkpoint_interval=3, **settings), said


def test_a_loss_that_is_not_finite_stops_the_run(make_loss, make_buffer, tmp_path):
    def make(total, **settings):
        return POGOTrainer(
            make_loss(w2_weights=(0.2,)), make_buffer(), total, progress_bar=False, **settings
        )

    trainer, said = guarded(make, checkpoint_dir=tmp_path)
    spoil_at(trainer, 9)
    with pytest.raises(DivergenceError, match=r"at update 12.*loss_qvalue.*larger w2_weights"):
        trainer.train()
    assert sorted(p.name[-2:] for p in tmp_path.iterdir()) == ["06", "09"]
    assert not said


def test_an_actor_that_is_not_finite_stops_the_run(make_trainer):
    trainer = make_trainer(12)
    trainer.loss_module.actor_params(0)[0].data.fill_(float("nan"))
    with pytest.raises(
        DivergenceError, match=r"Training has diverged: at update \d+, .*not finite"
    ):
        trainer.train()


def test_critics_beyond_the_largest_return_are_warned_of_once(make_trainer, monkeypatch, tmp_path):
    monkeypatch.setattr(StopOnDivergence, "explosion", 1e12)
    trainer, said = guarded(make_trainer, largest_return=1e-6, checkpoint_dir=tmp_path)
    trainer.train()
    assert len(said) == 1
    assert said[0].startswith("The critics overestimate: at update 3 Q is")


def test_critics_far_beyond_the_largest_return_stop_the_run(make_trainer):
    trainer, _ = guarded(make_trainer, largest_return=1e-12)
    with pytest.raises(DivergenceError, match=r"Training has diverged.*no return beyond 1e-12"):
        trainer.train()
    trainer, said = guarded(make_trainer, largest_return=1e6)
    trainer.train()
    assert not said


def test_a_gap_that_an_interrupted_evaluation_left_is_filled(make_trainer, tmp_path):
    import numpy as np

    one = np.ones(2)
    result = [Evaluation(0, "deterministic", one, one, one)]

    def interrupted():
        raise EvaluationInterrupted

    sink = Rows()
    first = Evaluate(interrupted, sinks=[sink], interval=4)
    trainer = make_trainer(8, evaluate=first, checkpoint_dir=tmp_path)
    first.evaluate = lambda: (trainer.request_stop("test"), interrupted())
    trainer.train()
    assert (trainer.collected_frames, sink.steps) == (4, [])
    # cut off once more, in the evaluation that catches up: no update is made before it is there
    second = Evaluate(interrupted, sinks=[sink], interval=4)
    trainer = make_trainer(8, evaluate=second, checkpoint_dir=tmp_path)
    assert trainer.resume() == 4
    trainer.train()
    assert (trainer.collected_frames, sink.steps) == (4, [])
    third = Evaluate(lambda: result, sinks=[sink], interval=4)
    trainer = make_trainer(8, evaluate=third, checkpoint_dir=tmp_path)
    assert trainer.resume() == 4
    trainer.train()
    assert sink.steps == [4, 8]


def test_an_evaluation_that_fails_costs_no_update(make_trainer, tmp_path):
    def fail():
        raise OSError("gone")

    trainer = make_trainer(9, evaluate=Evaluate(fail, interval=5), checkpoint_dir=tmp_path)
    with pytest.raises(
        EvaluationError, match=r"evaluation at update 5 failed: gone\. .*resume=true"
    ):
        trainer.train()
    assert make_trainer(9, checkpoint_dir=tmp_path).resume() == 5


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
