"""POGOTrainer: order of updates, intervals, checkpoints, resuming."""

from __future__ import annotations

import copy
import inspect
import random
from functools import partial

import pytest
import torch
from runs import Rows, spoil_at
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.testing import assert_close

from pogo_torchrl import POGOLoss, POGOTrainer
from pogo_torchrl.evaluation import Evaluation, EvaluationInterrupted
from pogo_torchrl.trainers.checkpoints import is_intact
from pogo_torchrl.trainers.hooks import (
    DivergenceError,
    Evaluate,
    EvaluationError,
    LogMetrics,
    StopOnDivergence,
)
from pogo_torchrl.trainers.step_control import GrowSteps
from pogo_torchrl.trainers.trainer import OfflineStepIterator


@pytest.fixture
def make_trainer(make_loss, make_buffer):
    """Factory of trainers with identical weights, data and random state."""
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


def test_ticks_end_at_every_multiple_and_at_the_total():
    ends, step = set(), 0
    for tick in OfflineStepIterator(47, [10, 15]):
        step += tick.numel()
        ends.add(step)
    assert ends >= {10, 15, 20, 30, 40, 45, 47}
    assert step == 47


def test_rows_are_written_at_multiples_of_the_interval_and_at_the_end(make_trainer):
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


def test_rows_contain_metrics_of_every_actor(make_trainer):
    trainer = make_trainer(2, log=2)
    trainer.train()
    row = trainer.rows.rows[0][1]
    for name in ("actor_loss", "q_actor", "lmbd", "std"):
        assert {f"{name}_0", f"{name}_1"} <= set(row)
    assert {"bc_mse", "w2_1"} <= set(row)
    assert list(row)[-2:] == ["updates_per_second", "seconds"]


def test_the_log_shows_how_far_each_actor_has_moved(make_trainer):
    trainer = make_trainer(10, log=5)
    trainer.train()
    row, loss = trainer.rows.rows[-1][1], trainer.loss_module
    batch = trainer.optimization_stepper.last_batch
    inputs = batch.select("observation").set("noise", torch.zeros_like(batch["action"]))
    first, second = (loss.actor(i)(inputs.clone())["action"] for i in (0, 1))
    assert "step_mse_0" not in row
    for name, moved in {
        "data_mse_0": first - batch["action"],
        "data_mse_1": second - batch["action"],
        "step_mse_1": second - first,
    }.items():
        assert row[name] == pytest.approx(moved.square().mean().item(), rel=1e-6)
        assert row[name] > 0


def test_evaluations_run_at_multiples_of_the_interval_and_once_at_the_end(make_trainer):
    import numpy as np

    one = np.ones(2)
    result = [Evaluation(0, "deterministic", one, one, one)]
    for interval, steps in ((4, [4, 8, 10]), (5, [5, 10]), (1000, [10])):
        sink = Rows()
        make_trainer(10, evaluate=Evaluate(lambda: result, sinks=[sink], interval=interval)).train()
        assert sink.steps == steps


def test_logging_does_not_affect_training(make_trainer):
    plain = make_trainer(9)
    plain.train()
    logged = make_trainer(9, log=2)
    logged.train()
    assert_close(state(plain), state(logged), rtol=0, atol=0)


@pytest.mark.parametrize("policy_freq", [1, 2])
@pytest.mark.parametrize("cut", [3, 7])
def test_a_resumed_run_is_bitwise_identical_to_an_uninterrupted_one(
    make_trainer, tmp_path, cut, policy_freq
):
    settings = {"log": 4, "policy_freq": policy_freq}
    uninterrupted = make_trainer(10, **settings)
    uninterrupted.train()
    folder = tmp_path / "checkpoints"
    first = make_trainer(cut, checkpoint_dir=folder, **settings)
    # an interrupted run would not have logged its last step
    first.rows.write = lambda *_: None
    stop_at(first, cut)
    first.total_frames = first.collector.total = 10
    first.train()
    second = make_trainer(10, checkpoint_dir=folder, **settings)
    torch.manual_seed(99)
    assert second.resume() == cut
    second.train()
    assert_close(state(uninterrupted), state(second), rtol=0, atol=0)
    assert [r for r in uninterrupted.rows.numbers() if r[0] > cut] == second.rows.numbers()


def stop_at(trainer, step):
    trainer.add_interval(step)

    def stop():
        if trainer.collected_frames == step:
            trainer.request_stop("test")

    trainer.register_op("post_steps", stop)


def test_checkpoints_are_rotated_and_do_not_contain_the_data(make_trainer, tmp_path):
    trainer = make_trainer(10, checkpoint_dir=tmp_path, checkpoint_interval=3)
    trainer.train()
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["step-000000000009", "step-000000000010"]
    assert not [p for p in tmp_path.rglob("*") if "replay" in p.name]


def test_a_damaged_newest_checkpoint_is_skipped(make_trainer, tmp_path, caplog):
    make_trainer(10, checkpoint_dir=tmp_path, checkpoint_interval=6).train()
    (tmp_path / "step-000000000010" / "manifest.json").write_text("{")
    assert make_trainer(10, checkpoint_dir=tmp_path).resume() == 6
    damaged = tmp_path / "step-000000000010"
    assert f"Skipping damaged or incomplete checkpoint {damaged}." in caplog.text


@pytest.mark.parametrize("seed", range(20))
def test_a_truncated_or_corrupted_checkpoint_is_not_intact(make_trainer, tmp_path, seed):
    make_trainer(2, checkpoint_dir=tmp_path).train()
    (checkpoint,) = tmp_path.iterdir()
    assert is_intact(checkpoint)
    rng = random.Random(seed)
    file = rng.choice([p for p in sorted(checkpoint.rglob("*")) if p.is_file()])
    content = bytearray(file.read_bytes())
    position = rng.randrange(len(content))
    if seed % 3 == 0:
        file.unlink()
    elif seed % 3 == 1:
        file.write_bytes(content[:position])
    else:
        content[position] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
    assert not is_intact(checkpoint)
    assert make_trainer(2, checkpoint_dir=tmp_path).resume() is None


def test_leftovers_of_a_killed_process_are_removed(make_trainer, tmp_path):
    make_trainer(2, checkpoint_dir=tmp_path).train()
    for name in (".step-000000000004.stage-1f", ".step-000000000001.backup-2e"):
        (tmp_path / name / "components").mkdir(parents=True)
    assert make_trainer(4, checkpoint_dir=tmp_path).resume() == 2
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000000002"]


def test_checkpoints_of_another_training_are_not_mixed_with(make_trainer, tmp_path):
    make_trainer(2, checkpoint_dir=tmp_path).train()
    kept = sorted(tmp_path.rglob("*"))
    for fingerprint in (None, {"data": "b"}):
        other = make_trainer(4, checkpoint_dir=tmp_path, fingerprint=fingerprint)
        with pytest.raises(FileExistsError, match=r"contains step-0+2 of another .*resume\(\)"):
            other.train()
        assert other.collected_frames == 0
    assert sorted(tmp_path.rglob("*")) == kept
    resumed = make_trainer(4, checkpoint_dir=tmp_path)
    assert resumed.resume() == 2
    resumed.train()
    for checkpoint in tmp_path.glob("step-*"):
        next(checkpoint.rglob("state.pt")).write_bytes(b"damaged")
    again = make_trainer(2, checkpoint_dir=tmp_path)
    assert again.resume() is None
    again.train()  # nothing is lost


def test_a_checkpoint_with_another_fingerprint_is_rejected(make_trainer, tmp_path):
    make_trainer(2, checkpoint_dir=tmp_path, fingerprint={"data": "a", "lr": 0.1}).train()
    other = make_trainer(4, checkpoint_dir=tmp_path, fingerprint={"data": "b", "lr": 0.1})
    with pytest.raises(ValueError, match=r"step-000000000002 is .* another run \(data: a -> b\)"):
        other.resume()


@pytest.mark.parametrize(
    ("of_loss", "of_trainer", "change"),
    [
        ({"alpha": 2.0}, {}, r"\(alpha: 1.0 -> 2.0\)"),
        ({"w2_weights": (0.2, 0.3)}, {}, r"\(w2_weights: \[0.2, 0.5\] -> \[0.2, 0.3\]\)"),
        ({"reduction": "sum"}, {}, r"\(reduction: mean -> sum\)"),
        ({"shared_noise": True}, {}, r"\(shared_noise: False -> True\)"),
        ({"gamma": 0.5}, {}, r"\(gamma: 0.9 -> 0.5\)"),
        ({"dtype": torch.float64}, {}, r"\(dtype: torch.float32 -> torch.float64\)"),
        ({}, {"policy_freq": 2}, r"\(policy_freq: 1 -> 2\)"),
        ({}, {"tau": 0.01}, r"\(tau: 0.005 -> 0.01\)"),
        ({}, {"freeze_critics_at": 3}, r"\(freeze_critics_at: None -> 3\)"),
        (
            {},
            {"qvalue_optimizer": torch.optim.SGD},
            r"\(qvalue_optimizer: Adam\(lr=0.0003\) -> SGD\(lr=0.001\)\)",
        ),
        ({}, {"lr": 0.1}, r"\(actor_0_optimizer: Adam\(lr=0.0003\) -> Adam\(lr=0.1\); actor_1"),
    ],
)
def test_a_checkpoint_of_other_settings_is_rejected(
    make_loss, make_buffer, tmp_path, of_loss, of_trainer, change
):
    def make(gamma=0.9, dtype=torch.float32, trainer=None, **settings):
        loss = make_loss(**settings).make_value_estimator(gamma=gamma).to(dtype)
        saved = {"checkpoint_dir": tmp_path, "progress_bar": False}
        return POGOTrainer(loss, make_buffer(), 4, **saved, **(trainer or {}))

    make().train()
    other = make(**of_loss, trainer=of_trainer)
    before = copy.deepcopy(other.loss_module.state_dict())
    with pytest.raises(ValueError, match=f"another run {change}.* Use the settings of"):
        other.resume()
    assert_close(other.loss_module.state_dict(), before, rtol=0, atol=0)
    assert make().resume() == 4


def test_settings_are_those_at_the_start(make_loss, make_buffer, tmp_path):
    """Hooks and schedules change some of them; the run can be resumed nevertheless."""

    def make(total):
        return POGOTrainer(
            make_loss(), make_buffer(), total, checkpoint_dir=tmp_path, progress_bar=False,
            hooks=[GrowSteps(4.0, interval=1)], checkpoint_interval=2,
            qvalue_lr_scheduler=partial(CosineAnnealingLR, T_max=9),
        )  # fmt: skip

    first = make(3)
    first.train()
    assert first.loss_module.alpha == pytest.approx(4.0)
    assert first.fingerprint["alpha"] == 1.0
    second = make(6)
    assert second.resume() == 3
    second.train()
    assert make(6).resume() == 6


def test_a_checkpoint_that_records_no_settings_is_resumed(make_trainer, tmp_path):
    """As those of earlier versions."""
    make_trainer(2, checkpoint_dir=tmp_path, fingerprint={}).train()
    assert make_trainer(4, checkpoint_dir=tmp_path, lr=0.1).resume() == 2


def test_all_options_of_the_loss_are_compared(make_loss):
    options = set(inspect.signature(POGOLoss.__init__).parameters)
    initial = {"self", "actor_network", "qvalue_network", "chain_init", "deactivate_vmap"}
    given_otherwise = {"step_sizes", "action_spec", "bounds"}  # as weights, min_ and max_action
    settings = make_loss(data_weight=0.5, trajectory_weights=True).settings()
    assert options - initial - given_otherwise <= set(settings)
    assert {"gamma", "min_action", "max_action", "num_actors"} <= set(settings)


def test_a_checkpoint_with_another_format_version_is_rejected(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setattr("pogo_torchrl.trainers.trainer.FORMAT_VERSION", 7)
    make_trainer(2, checkpoint_dir=tmp_path).train()
    monkeypatch.undo()
    with pytest.raises(ValueError, match="has format version 7, this release reads 3:"):
        make_trainer(4, checkpoint_dir=tmp_path).resume()


def test_a_resumed_run_does_not_modify_earlier_checkpoints(make_trainer, tmp_path):
    settings = {"checkpoint_dir": tmp_path, "keep_checkpoints": 9}
    make_trainer(3, **settings).train()
    second = make_trainer(8, **settings)
    second.resume()
    second.train()
    assert all(is_intact(path) for path in tmp_path.iterdir())


def guarded(make_trainer, largest_return=None, **settings):
    metrics, warnings = LogMetrics([Rows()], 4), []
    guard = StopOnDivergence(metrics, largest_return, warn=warnings.append)
    return make_trainer(12, hooks=[guard, metrics], checkpoint_interval=3, **settings), warnings


def test_a_non_finite_loss_stops_the_run(make_loss, make_buffer, tmp_path):
    def make(total, **settings):
        return POGOTrainer(
            make_loss(w2_weights=(0.2,)), make_buffer(), total, progress_bar=False, **settings
        )

    trainer, warnings = guarded(make, checkpoint_dir=tmp_path)
    spoil_at(trainer, 9)
    with pytest.raises(DivergenceError, match=r"at update 12.*loss_qvalue.*larger w2_weights"):
        trainer.train()
    assert sorted(p.name[-2:] for p in tmp_path.iterdir()) == ["06", "09"]
    assert not warnings


def test_a_non_finite_actor_stops_the_run(make_trainer):
    trainer = make_trainer(12)
    trainer.loss_module.actor_params(0)[0].data.fill_(float("nan"))
    with pytest.raises(
        DivergenceError, match=r"Training has diverged: at update \d+, .*not finite"
    ):
        trainer.train()


def test_critics_beyond_the_largest_return_trigger_one_warning(make_trainer, monkeypatch, tmp_path):
    monkeypatch.setattr(StopOnDivergence, "explosion", 1e12)
    trainer, warnings = guarded(make_trainer, largest_return=1e-6, checkpoint_dir=tmp_path)
    trainer.train()
    assert len(warnings) == 1
    assert warnings[0].startswith("The critics overestimate: at update 3 the mean Q value is")


def test_critics_far_beyond_the_largest_return_stop_the_run(make_trainer):
    trainer, _ = guarded(make_trainer, largest_return=1e-12)
    with pytest.raises(DivergenceError, match=r"Training has diverged.*no return beyond 1e-12"):
        trainer.train()
    trainer, warnings = guarded(make_trainer, largest_return=1e6)
    trainer.train()
    assert not warnings


def test_values_of_untrained_critics_are_no_divergence_if_rewards_are_tiny(make_trainer):
    metrics, warnings = LogMetrics([Rows()], 4), []
    guard = StopOnDivergence(metrics, 1e-12, untrained=100.0, warn=warnings.append)
    make_trainer(12, hooks=[guard, metrics]).train()
    assert not warnings


def test_an_interrupted_evaluation_is_repeated_on_resume(make_trainer, tmp_path):
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
    # interrupted again while repeating the evaluation: no update may run before it is written
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


def test_a_failed_evaluation_loses_no_updates(make_trainer, tmp_path):
    def fail():
        raise OSError("gone")

    trainer = make_trainer(9, evaluate=Evaluate(fail, interval=5), checkpoint_dir=tmp_path)
    with pytest.raises(
        EvaluationError, match=r"evaluation at update 5 failed: gone\. .*resume=true"
    ):
        trainer.train()
    assert make_trainer(9, checkpoint_dir=tmp_path).resume() == 5


def test_resume_without_checkpoints_returns_none(make_trainer, tmp_path):
    assert make_trainer(checkpoint_dir=tmp_path).resume() is None
    assert make_trainer().resume() is None


def test_the_trainer_accumulates_no_logs(make_trainer):
    trainer = make_trainer(60, log=10)
    trainer.train()
    assert not trainer._log_dict


def test_tau_one_copies_the_networks_to_the_targets(make_trainer):
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
def test_out_of_range_settings_are_named(make_trainer, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        make_trainer(**settings)


@pytest.mark.parametrize("cast_first", [False, True])
def test_float16_parameters_are_rejected(make_loss, make_buffer, cast_first):
    loss, buffer = make_loss(), make_buffer()
    message = r"torch\.float16, which become infinite or NaN.*loss\.float\(\).*bf16=True"
    if cast_first:
        with pytest.raises(ValueError, match=message):
            POGOTrainer(loss.half(), buffer, 3, progress_bar=False)
        return
    trainer = POGOTrainer(loss, buffer, 3, progress_bar=False)
    loss.half()
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_zero_updates_are_rejected(make_trainer):
    with pytest.raises(ValueError, match="total_steps=0"):
        make_trainer(0)
