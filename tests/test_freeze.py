"""Freeze, then flow: which networks change when, in every kind of update, and exact resuming."""

from __future__ import annotations

import copy
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
from runs import Rows, assert_same
from torch.optim.lr_scheduler import LinearLR
from torch.testing import assert_close
from torchrl.data import LazyTensorStorage, TensorDictPrioritizedReplayBuffer

from pogo_torchrl import POGOTrainer
from pogo_torchrl.trainers import TrainerStack
from pogo_torchrl.trainers.freeze import FreezeThenFlow
from pogo_torchrl.trainers.hooks import LogMetrics
from pogo_torchrl.trainers.step_control import HoldDisplacement
from pogo_torchrl.trainers.ticks import OfflineStepIterator

TOTAL, FRACTION, SWITCH = 15, 0.45, 7


@pytest.fixture
def make(make_loss, make_buffer, monkeypatch):
    """Factory of trainers of three actors with identical weights, data and random state."""
    # Run the function that torch.compile would trace in eager mode.
    monkeypatch.setattr(
        "pogo_torchrl.trainers.fused.update.compiled_update", lambda run, device: run
    )
    loss = make_loss(w2_weights=(0.2, 0.5, 0.5), w2_backend="fast", delay_actor=True)
    buffer = make_buffer()

    def make(total=TOTAL, *, log=4, alpha=1.0, hooks=(), **settings):
        torch.manual_seed(1)
        own, sink = copy.deepcopy(loss), Rows()
        own.alpha = alpha
        settings.setdefault("freeze_critics_at", FRACTION)
        trainer = POGOTrainer(
            own, buffer, total, lr=1e-2, progress_bar=False,
            hooks=[LogMetrics([sink], log), *hooks], **settings,
        )  # fmt: skip
        trainer.rows = sink
        return trainer

    make.loss = loss
    return make


def networks(loss):
    """Weights by network: ``actor_network_0``, ..., ``qvalue_network``, ``target_...``."""
    found: dict[str, dict] = {}
    for name, values in loss.state_dict().items():
        network, _, rest = name.partition("_params.")
        found.setdefault(network, {})[rest] = values.clone()
    return found


def changed(before, after):
    """Names of the networks of which any weight has changed."""
    return {
        name
        for name, weights in before.items()
        if any(not torch.equal(values, after[name][key]) for key, values in weights.items())
    }


def watch(trainer):
    """Record the networks after each update by its number, without running updates singly."""
    found = {0: networks(trainer.loss_module)}
    trainer.add_interval(1)
    trainer.register_op(
        "post_steps",
        lambda: found.update({trainer.collected_frames: networks(trainer.loss_module)}),
    )
    return found


def run(kind, trainer):
    if kind == "stacked":
        twin = copy.deepcopy(trainer.loss_module)
        other = POGOTrainer(
            twin, trainer.dataset, TOTAL, lr=1e-2, progress_bar=False, freeze_critics_at=FRACTION,
            policy_freq=trainer.optimization_stepper.policy_freq,
        )  # fmt: skip
        assert TrainerStack([trainer, other], lambda _: nullcontext()).train() == [None, None]
    else:
        trainer.train()


@pytest.mark.parametrize("kind", ["eager", "compiled", "stacked"])
@pytest.mark.parametrize("policy_freq", [1, 2])
def test_critics_and_actor_0_are_trained_first_and_later_actors_afterwards(make, kind, policy_freq):
    trainer = make(compile=kind == "compiled", policy_freq=policy_freq)
    found = watch(trainer)
    run(kind, trainer)
    first = {"qvalue_network", "target_qvalue_network", "actor_network_0", "target_actor_network_0"}
    later = {"actor_network_1", "actor_network_2"}
    for step in range(1, SWITCH):
        trained = changed(found[step - 1], found[step]) - later
        assert trained == first if (step - 1) % policy_freq == 0 else first - trained < first
    for step in range(1, SWITCH + 1):
        for name in later:
            assert_same(found[step][name], found[step]["actor_network_0"])
    for step in range(SWITCH + 1, TOTAL + 1):
        assert changed(found[step - 1], found[step]) == later
    counts = {
        name: {float(state["step"]) for state in one["state"].values()}
        for name, one in trainer.optimization_stepper.state_dict()["optimizers"].items()
    }
    flow = TOTAL - SWITCH
    assert counts == {
        "qvalue": {SWITCH}, "actor_0": {-(-SWITCH // policy_freq)}, "actor_1": {flow},
        "actor_2": {flow},
    }  # fmt: skip


def test_actor_0_is_frozen_at_its_average(make_loss, make_buffer):
    loss = make_loss(w2_weights=(0.2, 0.5, 0.5), average_actors=0.2)
    trainer = POGOTrainer(
        loss, make_buffer(), TOTAL, lr=1e-2, progress_bar=False, freeze_critics_at=FRACTION
    )
    found = watch(trainer)
    trainer.train()
    before, at, last = found[SWITCH - 1], found[SWITCH], found[TOTAL]
    assert changed(before, at) >= {"average_actor_network_0", "actor_network_0"}
    for network in ("actor_network_0", "actor_network_1", "average_actor_network_2"):
        assert_same(at[network], at["average_actor_network_0"])
    assert not torch.equal(
        before["actor_network_0"]["module.mlp.0.weight"],
        before["average_actor_network_0"]["module.mlp.0.weight"],
    )
    assert changed(at, last) == {
        f"{prefix}actor_network_{i}" for prefix in ("", "average_") for i in (1, 2)
    }


def test_before_the_switch_training_equals_that_of_a_chain_of_one(make, make_loss):
    """Actor 0 and the critics do not notice the later actors, which draw no noise."""
    trainer = make()
    found = watch(trainer)
    trainer.train()
    alone = make_loss(w2_weights=(0.2,), w2_backend="fast", delay_actor=True)
    state = {k: v for k, v in make.loss.state_dict().items() if k in alone.state_dict()}
    alone.load_state_dict(state)
    torch.manual_seed(1)
    POGOTrainer(alone, trainer.dataset, SWITCH, lr=1e-2, progress_bar=False).train()
    expected = networks(alone)
    for name in ("qvalue_network", "target_qvalue_network", "actor_network_0"):
        assert_same(found[SWITCH][name], expected[name])


def test_a_traced_update_is_specialised_on_the_trained_networks(make, monkeypatch):
    """Dynamo traces one graph for each set of networks; Inductor would only take time."""
    trace = partial(torch.compile, fullgraph=True, dynamic=False, backend="eager")
    monkeypatch.setattr(
        "pogo_torchrl.trainers.fused.update.compiled_update", lambda run, device: trace(run)
    )
    found = []
    for compiled in (False, True):
        trainer = make(compile=compiled, policy_freq=2)
        trainer.train()
        found.append((dict(trainer.loss_module.state_dict()), trainer.rows.numbers()))
    assert_close(*found, rtol=1e-4, atol=1e-5)


def test_runs_of_a_stack_equal_single_runs(make):
    alone = make(policy_freq=2)
    alone.train()
    both = [make(policy_freq=2), make(policy_freq=2, alpha=0.1)]
    torch.manual_seed(1)
    streams = [torch.get_rng_state()] * 2  # both runs draw what the single run draws

    @contextmanager
    def active(index):
        torch.set_rng_state(streams[index])
        yield
        streams[index] = torch.get_rng_state()

    assert TrainerStack(both, active).train() == [None, None]
    one, other = (dict(t.loss_module.state_dict()) for t in (alone, both[0]))
    assert_close(other, one, rtol=1e-4, atol=1e-5)
    assert_close(both[0].rows.numbers(), alone.rows.numbers(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("cut", [SWITCH - 2, SWITCH, SWITCH + 2])
def test_a_resumed_run_equals_an_uninterrupted_one(make, tmp_path, cut, compiled):
    def trainer(**settings):
        schedule = partial(LinearLR, start_factor=1.0, end_factor=0.0, total_iters=TOTAL)
        control = HoldDisplacement(0.06, interval=3)
        return make(
            compile=compiled, policy_freq=2, actor_lr_scheduler=schedule,
            qvalue_lr_scheduler=schedule, hooks=[control], **settings,
        )  # fmt: skip

    uninterrupted = trainer()
    uninterrupted.train()
    first = trainer(checkpoint_dir=tmp_path)
    first.add_interval(cut)
    first.register_op(
        "post_steps", lambda: first.collected_frames == cut and first.request_stop("test")
    )
    first.train()
    second = trainer(checkpoint_dir=tmp_path)
    torch.manual_seed(99)
    assert second.resume() == cut
    second.train()
    states = [
        (dict(one.loss_module.state_dict()), one.optimization_stepper.state_dict(),
         one.loss_module.alpha, [row for row in one.rows.numbers() if row[0] > cut])
        for one in (uninterrupted, second)
    ]  # fmt: skip
    for parts in zip(*states):
        assert_same(*parts)
    rates = second.optimization_stepper.rates()
    assert max(rates) < 1e-12  # the schedules of all networks count all updates


def test_networks_that_are_not_trained_repeat_their_last_metrics(make):
    trainer = make(log=1)
    trainer.train()
    rows = dict(trainer.rows.rows)
    for name in ("actor_loss_1", "q_actor_2", "w2_1", "lmbd_2"):
        assert {rows[step][name] for step in range(1, SWITCH + 1)} == {0.0}
        assert len({rows[step][name] for step in range(SWITCH + 1, TOTAL + 1)}) > 1
    for name in ("loss_qvalue", "pred_value", "actor_loss_0", "bc_mse", "lmbd_0"):
        assert len({rows[step][name] for step in range(SWITCH, TOTAL + 1)}) == 1
        assert len({rows[step][name] for step in range(1, SWITCH + 1)}) == SWITCH
    assert rows[SWITCH]["step_mse_1"] == rows[SWITCH]["step_mse_2"] == 0
    assert rows[TOTAL]["step_mse_2"] > 0


def test_alpha_is_kept_once_actor_0_is_frozen(make):
    alphas = []
    trainer = make(hooks=[HoldDisplacement(0.06, interval=1)])
    trainer.register_op("post_steps", lambda: alphas.append(trainer.loss_module.alpha))
    trainer.train()
    assert len(set(alphas[: SWITCH - 1])) == SWITCH - 1
    assert len(set(alphas[SWITCH - 2 :])) == 1


def test_with_hooks_at_each_update_the_result_is_the_same(make):
    plain, watched = make(), make()
    batches = []
    watched.register_op("post_optim_log", lambda batch: batches.append("td_error" in batch))
    plain.train()
    torch.manual_seed(1)
    watched.train()
    assert_same(dict(watched.loss_module.state_dict()), dict(plain.loss_module.state_dict()))
    assert batches == [True] * SWITCH + [False] * (TOTAL - SWITCH)


def test_ticks_end_at_single_stops():
    ticks, ends = OfflineStepIterator(60, [20], stops=[7, 33, 40]), []
    for _ in ticks:
        ends.append(ticks.step)
    assert ends == [7, 20, 33, 40, 60]
    assert [step for step in range(1, 61) if ticks.at_boundary(step)] == ends


def test_trainers_of_a_stack_share_the_switch(make):
    trainers = [make(), make(freeze_critics_at=0.8)]
    with pytest.raises(ValueError, match="must share their settings"):
        TrainerStack(trainers, lambda _: nullcontext())


@pytest.mark.parametrize("at", [0, -0.5, 1.5, -3, float("nan"), float("inf")])
def test_values_out_of_range_are_named(at):
    with pytest.raises(ValueError, match=rf"freeze_critics_at={at}.* in \(0, 1\).* integer >= 1"):
        FreezeThenFlow(at)


def test_a_number_of_updates_equals_the_fraction(make):
    trained = []
    for at in (FRACTION, SWITCH):
        trainer = make(freeze_critics_at=at)
        trainer.train()
        trained.append(dict(trainer.loss_module.state_dict()))
    assert_close(*trained, rtol=0, atol=0)


def test_a_run_that_ends_before_the_switch_can_be_extended(make, tmp_path):
    short = make(5, freeze_critics_at=SWITCH, checkpoint_dir=tmp_path)
    short.train()
    first, last = (networks(short.loss_module)[f"actor_network_{i}"] for i in (0, 2))
    assert_same(first, last)
    extended = make(freeze_critics_at=SWITCH, checkpoint_dir=tmp_path)
    assert extended.resume() == 5
    extended.train()
    whole = make(freeze_critics_at=SWITCH)
    whole.train()
    assert_same(networks(extended.loss_module), networks(whole.loss_module))


@pytest.mark.parametrize(
    ("total", "fraction", "step"), [(2, 0.6, 1), (10, 0.01, 1), (10, 0.99, 9), (10, 0.6, 6)]
)
def test_a_fraction_leaves_an_update_on_both_sides(total, fraction, step):
    assert FreezeThenFlow(fraction).switch(total) == step


def test_a_run_of_one_update_does_not_reach_the_switch(make):
    trainer = make(1, freeze_critics_at=0.5)
    trainer.train()
    trained = networks(trainer.loss_module)
    assert_same(trained["actor_network_0"], trained["actor_network_2"])


def test_a_single_actor_is_trained_throughout(make_loss, make_buffer):
    loss, buffer, trained = make_loss(w2_weights=(0.2,)), make_buffer(), []
    for at in (None, 0.5):
        torch.manual_seed(1)
        own = copy.deepcopy(loss)
        POGOTrainer(own, buffer, 10, progress_bar=False, freeze_critics_at=at).train()
        trained.append(dict(own.state_dict()))
    assert_close(*trained, rtol=0, atol=0)


def test_prioritised_replay_is_rejected(make_loss, make_batch):
    try:
        buffer = TensorDictPrioritizedReplayBuffer(
            alpha=1.0, beta=0.5, storage=LazyTensorStorage(64), batch_size=16
        )
    except (ImportError, AttributeError, RuntimeError) as error:
        pytest.skip(f"TorchRL's compiled sum trees are not available: {error}")
    buffer.extend(make_batch(64))
    with pytest.raises(ValueError, match="does not support a prioritised replay buffer"):
        POGOTrainer(make_loss(), buffer, 10, freeze_critics_at=0.5)
