"""POGOTrainer as a TorchRL trainer: stages, replay priorities, losses that are moved."""

from __future__ import annotations

import copy
import inspect
import re
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch.testing import assert_close
from torchrl.data import LazyTensorStorage, ReplayBuffer, TensorDictPrioritizedReplayBuffer
from torchrl.data.replay_buffers.samplers import PrioritizedSampler
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives import HardUpdate, SoftUpdate
from torchrl.trainers import Trainer
from torchrl.trainers.trainers import OptimizationStepper

from pogo_torchrl import POGOTrainer, TransportActor, make_qvalue
from pogo_torchrl.modules import make_transport_net
from pogo_torchrl.objectives import POGOLoss
from pogo_torchrl.trainers.trainer import OfflineStepIterator

# Stage names of the installed TorchRL.
STAGES = re.findall(r'dest == "(\w+)"', inspect.getsource(Trainer.register_op))
UNSUPPORTED = ("process_loss", "optimizer")
TOTAL, INTERVAL = 12, 4


class OneUpdate(OptimizationStepper):
    """Reference stepper for TorchRL's trainer, including the stage that steppers have to run."""

    def __init__(self, loss, optimizer):
        self.loss, self.optimizer = loss, optimizer

    def step(self, trainer, sub_batch):
        losses = self.loss(sub_batch)
        trainer._post_loss_hook(sub_batch)
        (losses["loss_actor"] + losses["loss_qvalue"]).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return losses.detach()


def torchrl_trainer(loss, buffer):
    ticks = OfflineStepIterator(TOTAL, [INTERVAL])
    trainer = Trainer(
        collector=ticks, total_frames=TOTAL, frame_skip=1, optim_steps_per_batch=INTERVAL,
        loss_module=loss, progress_bar=False, auto_log_optim_steps=False,
        optimization_stepper=OneUpdate(loss, torch.optim.Adam(loss.parameters())),
    )  # fmt: skip
    trainer.register_op("process_optim_batch", lambda batch: buffer.sample())
    return trainer


def pogo_trainer(loss, buffer, **settings):
    trainer = POGOTrainer(loss, buffer, TOTAL, progress_bar=False, **settings)
    trainer.add_interval(INTERVAL)
    return trainer


def calls(trainer, stages):
    """Stages in the order in which training runs them, with the arguments of each operation."""
    found = []

    def record(stage):
        def op(*arguments):
            types = [
                sorted(map(str, a.keys())) if isinstance(a, TensorDict) else type(a)
                for a in arguments
            ]
            found.append((stage, len(types), types if stage in AT_EACH else None))
            return arguments[0] if stage in ("pre_epoch", "process_optim_batch") else None

        return op

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for stage in stages:
            trainer.register_op(stage, record(stage))
    trainer.train()
    return found


AT_EACH = ("process_optim_batch",)


def test_torchrl_has_the_expected_stages():
    assert {"setup", "shutdown", "pre_epoch", "post_optim_complete_log", "post_loss"} <= set(STAGES)
    assert len(STAGES) >= 18


@pytest.mark.parametrize("stage", [*STAGES, "all"])
def test_each_stage_runs_in_the_same_order_as_in_torchrl(make_loss, make_buffer, stage):
    if stage in UNSUPPORTED:
        with pytest.raises(ValueError, match=f"POGOTrainer has no {stage!r} stage"):
            pogo_trainer(make_loss(), make_buffer()).register_op(stage, print)
        return
    stages = [s for s in STAGES if s not in UNSUPPORTED] if stage == "all" else [stage]
    expected = calls(torchrl_trainer(make_loss(), make_buffer()), stages)
    assert calls(pogo_trainer(make_loss(), make_buffer()), stages) == expected
    assert {name for name, *_ in expected} == set(stages)


def test_training_calls_the_step_method_of_the_stepper(make_loss, make_buffer):
    trainer, seen = pogo_trainer(make_loss(), make_buffer()), []
    trainer.register_op("post_optim_log", lambda batch: seen.append(set(batch.keys())))
    step = trainer.optimization_stepper.step
    trainer.optimization_stepper.step = lambda *args: (seen.append("step"), step(*args))[1]
    trainer.train()
    assert seen.count("step") == TOTAL
    assert {"td_error", "action"} <= seen[1]


def test_hooks_at_each_update_do_not_affect_training(make_loss, make_buffer):
    loss, buffer, states = make_loss(), make_buffer(), []
    for watched in (False, True):
        trainer = pogo_trainer(copy.deepcopy(loss), buffer)
        if watched:
            trainer.register_op("post_optim", lambda: None)
        torch.manual_seed(1)
        trainer.train()
        states.append(dict(trainer.loss_module.state_dict()))
    assert_close(*states, rtol=0, atol=0)


def test_averages_are_taken_over_the_tick(make_loss, make_buffer):
    single, means = [], []
    loss, buffer = make_loss(), make_buffer()
    for watched in (False, True):
        trainer = pogo_trainer(copy.deepcopy(loss), buffer)
        trainer.register_op(
            "post_optim_complete_log",
            lambda count, mean: means.append((count, mean["loss_qvalue"])),
        )
        if watched:
            stepper = trainer.optimization_stepper
            trainer.register_op(
                "post_optim_log", lambda batch, s=stepper: single.append(s.metrics["loss_qvalue"])
            )
        torch.manual_seed(1)
        trainer.train()
    assert [count for count, _ in means] == 2 * [4, 8, 12]
    found = torch.stack([mean for _, mean in means]).view(2, 3)
    assert_close(found[0], torch.stack(single).view(3, 4).mean(1))
    assert_close(found[1], found[0])


# --------------------------------------------------------------------------- replay priorities


def prioritized(rows, alpha=1.0):
    try:
        buffer = TensorDictPrioritizedReplayBuffer(
            alpha=alpha, beta=0.5, storage=LazyTensorStorage(len(rows)), batch_size=16
        )
    except (ImportError, AttributeError, RuntimeError) as error:
        pytest.skip(f"TorchRL's compiled sum trees are not available: {error}")
    buffer.extend(rows)
    return buffer


def rows_with_large_td_errors(make_batch):
    """Rows of which the first 16 have rewards far from any critic's prediction."""
    rows = make_batch(256)
    rows["next", "reward"][:16] += 100.0
    rows["next", "terminated"].fill_(True)
    rows["row"] = torch.arange(256)
    return rows


@pytest.mark.parametrize("compiled", [False, True])
def test_prioritized_replay_samples_large_td_errors(make_loss, make_batch, monkeypatch, compiled):
    monkeypatch.setattr(
        "pogo_torchrl.trainers.fused.update.compiled_update", lambda run, device: run
    )
    buffer, seen = prioritized(rows_with_large_td_errors(make_batch)), []
    trainer = POGOTrainer(
        make_loss(w2_backend="fast"), buffer, 60, progress_bar=False, compile=compiled
    )
    trainer.register_op("post_optim_log", lambda batch: seen.append((batch["row"] < 16).float()))
    trainer.train()
    first, last = (torch.cat(part).mean() for part in (seen[:1], seen[40:]))
    assert last > 0.4 > 0.25 > first


def test_checkpoints_contain_priorities(make_loss, make_batch, tmp_path):
    rows, loss = rows_with_large_td_errors(make_batch), make_loss()

    def trained(total, cut=None, **settings):
        trainer = POGOTrainer(
            copy.deepcopy(loss), prioritized(rows.clone()), total, progress_bar=False, **settings
        )
        torch.manual_seed(1)
        np.random.seed(1)  # noqa: NPY002 - the sampler draws from it
        if settings:
            trainer.resume()
        trainer.train()
        return dict(trainer.loss_module.state_dict())

    uninterrupted = trained(12)
    trained(6, checkpoint_dir=tmp_path)
    assert_close(trained(12, checkpoint_dir=tmp_path), uninterrupted, rtol=0, atol=0)


def test_priorities_that_nobody_would_update_are_rejected(make_loss, make_buffer):
    sampler = PrioritizedSampler.__new__(PrioritizedSampler)  # without TorchRL's compiled trees
    part = SimpleNamespace(sampler=sampler)
    ensemble = make_buffer()
    ensemble._rbs = [make_buffer(), part]
    with pytest.raises(ValueError, match="would not tell it their priorities: use members"):
        POGOTrainer(make_loss(), ensemble, 3)
    plain = make_buffer()
    single = ReplayBuffer(storage=plain.storage, batch_size=16)
    single._sampler = sampler
    with pytest.raises(ValueError, match="use TensorDictPrioritizedReplayBuffer"):
        POGOTrainer(make_loss(), single, 3)


@pytest.mark.parametrize("kind", [TensorDict, list])
def test_data_without_samples_are_rejected(make_loss, make_batch, kind):
    data = make_batch(64) if kind is TensorDict else [make_batch(64)]
    with pytest.raises(ValueError, match=rf"which {kind.__name__} has not: create TensorDictRepl"):
        POGOTrainer(make_loss(), data, 3)


def test_a_buffer_with_another_priority_key_is_rejected(make_loss, make_batch):
    buffer = prioritized(make_batch(64))
    loss = make_loss()
    loss.set_keys(priority="surprise")
    with pytest.raises(ValueError, match=r"reads priorities from 'td_error', .* 'surprise'"):
        POGOTrainer(loss, buffer, 3)


# --------------------------------------------------------------------------- moved losses


def assign(loss):
    loss.load_state_dict({k: v.clone() for k, v in loss.state_dict().items()}, assign=True)


def replace(loss):
    for params in (loss.qvalue_network_params, loss.actor_network_0_params):
        for p in params.parameters():
            p.data = p.data.clone()


@pytest.mark.parametrize("change", [lambda loss: loss.double().float(), assign, replace])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("when", ["before", "between"])
def test_training_updates_the_parameters_that_the_loss_holds(
    make_loss, make_buffer, monkeypatch, change, compiled, when
):
    monkeypatch.setattr(
        "pogo_torchrl.trainers.fused.update.compiled_update", lambda run, device: run
    )
    loss, buffer, states = make_loss(w2_backend="fast", delay_actor=True), make_buffer(), []
    for changed in (False, True):
        trainer = POGOTrainer(
            copy.deepcopy(loss), buffer, 8, progress_bar=False, lr=1e-2, compile=compiled
        )
        torch.manual_seed(1)
        if when == "between":
            trainer.optim_steps(TensorDict({}, [4]))
        if changed:
            change(trainer.loss_module)
        trainer.optim_steps(TensorDict({}, [4]))
        states.append(dict(trainer.loss_module.state_dict()))
    assert_close(*states, rtol=0, atol=0)
    moved = [k for k, v in loss.state_dict().items() if not torch.equal(v, states[1][k])]
    assert {"qvalue", "target", "actor"} <= {k.split("_")[0] for k in moved}


def test_a_loss_of_another_dtype_keeps_its_dtype(make_loss, make_batch):
    rows = make_batch(64, dtype=torch.float64)
    trainer = POGOTrainer(make_loss(), Rows(rows), 8, progress_bar=False, lr=1e-2)
    trainer.loss_module.double()
    before = copy.deepcopy(trainer.loss_module.state_dict())
    trainer.train()
    after = trainer.loss_module.state_dict()
    assert {v.dtype for v in after.values()} == {torch.float64}
    assert not torch.equal(
        after["qvalue_network_params.module.0.weight"],
        before["qvalue_network_params.module.0.weight"],
    )
    assert trainer.optimization_stepper.metrics["loss_qvalue"].dtype == torch.float64


class Rows:
    """A minimal replay buffer."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def sample(self):
        return self.rows[torch.randint(len(self.rows), (16,))]


@pytest.mark.parametrize("compiled", [False, True])
def test_weights_and_alpha_are_read_at_each_update(make_loss, make_buffer, monkeypatch, compiled):
    monkeypatch.setattr(
        "pogo_torchrl.trainers.fused.update.compiled_update", lambda run, device: run
    )
    losses = [make_loss(w2_backend="fast")]
    losses.append(copy.deepcopy(losses[0]))
    buffer, states = make_buffer(), []
    losses[0].w2_weights, losses[0].alpha = (3.0, 0.1), 0.3
    for index, loss in enumerate(losses):
        trainer = POGOTrainer(loss, buffer, 8, progress_bar=False, lr=1e-2, compile=compiled)
        if index:
            loss.w2_weights, loss.alpha = (3.0, 0.1), 0.3
        torch.manual_seed(1)
        trainer.train()
        states.append(dict(loss.state_dict()))
    assert_close(*states)


@pytest.mark.parametrize("updater", [SoftUpdate, HardUpdate])
def test_targets_are_updated_by_the_target_net_updater(make_loss, make_buffer, updater):
    loss = make_loss()
    chosen = (
        SoftUpdate(loss, tau=1.0)
        if updater is SoftUpdate
        else HardUpdate(loss, value_network_update_interval=2)
    )
    trainer = POGOTrainer(loss, make_buffer(), 3, progress_bar=False, target_net_updater=chosen)
    trainer.train()
    online, target = loss.qvalue_network_params, loss.target_qvalue_network_params
    assert_close(target.data.to_dict(), online.data.to_dict(), rtol=0, atol=0)


def test_actors_that_draw_noise_internally_draw_nonzero_noise(unit_spec, make_buffer):
    drawn = []

    class Encoded(TransportActor):
        def _draw(self, *args):
            z = super()._draw(*args)
            drawn.append(z.detach().abs().max())
            return z

    actor = Encoded(make_transport_net(3, 2, (8,)), unit_spec)
    loss = POGOLoss(actor, make_qvalue(3, 2, (8,)), w2_weights=(0.2, 0.5))
    loss.draw_noise = lambda batch, **kwargs: {"smoothing": torch.randn(batch.shape[0], 2)}
    loss.make_value_estimator(gamma=0.9)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        POGOTrainer(loss, make_buffer(), 2, progress_bar=False).train()
    assert len(drawn) == 8
    assert min(drawn) > 0
