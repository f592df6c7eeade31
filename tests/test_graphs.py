"""Replayed updates against plain ones; without a GPU a stand-in repeats the captured work."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from pogo_torchrl import POGOTrainer
from pogo_torchrl.data.replay import Normalization, OfflineReplayBuffer
from pogo_torchrl.graphs import CUDAGraph, UpdateGraphs
from pogo_torchrl.hooks import LogMetrics


class Rows:
    def __init__(self):
        self.rows = []

    def write(self, step, rows):
        clocks = ("seconds", "updates_per_second")
        self.rows += [(step, {k: v for k, v in row.items() if k not in clocks}) for row in rows]


class StandIn:
    """A graph of no device: replays change tensors, and no counter of Python's."""

    def __init__(self, trainer):
        self.trainer, self.replays = trainer, 0

    def capture(self, work):
        self.work = work
        for _ in range(3):  # warming up
            work()

    def replay(self):
        stepper = self.trainer.optimization_stepper
        counters = stepper.steps, self.trainer._optim_count
        self.work()
        stepper.steps, self.trainer._optim_count = counters
        # A device's graph writes its last batch where it has written it when captured.
        for graph, last in self.trainer._graphs._graphs.values():
            if graph is self:
                last["observation"].copy_(self.trainer.metrics[0]._observation)
        self.replays += 1


class Broken(StandIn):
    def capture(self, work):
        work()
        raise RuntimeError("operation not permitted when stream is capturing")


@pytest.fixture
def make(make_loss, make_buffer, make_batch):
    loss, plain = make_loss(w2_backend="fast"), make_buffer()
    rows = make_batch(64)
    offline = OfflineReplayBuffer(
        rows,
        normalization=Normalization.identity(rows["observation"]),
        episode_returns=np.ones(1),
        batch_size=16,
    )

    def trained(graph=None, *, total=33, ours=True, longest=4, hook=None, **settings):
        sink, made = Rows(), []
        trainer = POGOTrainer(
            copy.deepcopy(loss),
            offline if ours else plain,
            total,
            progress_bar=False,
            hooks=[LogMetrics([sink], 10)],
            **settings,
        )
        if hook is not None:
            trainer.register_op("post_optim", hook)
        if graph is not None:
            # SoftUpdate is a hook of TorchRL's; compiled, targets are a part of the update.
            trainer._at_each_update = hook is not None

            def new():
                made.append(graph(trainer))
                return made[-1]

            trainer._graphs = UpdateGraphs(trainer, new, longest)
        torch.manual_seed(1)
        if "checkpoint_dir" in settings:
            trainer.resume()
        trainer.train()
        stepper = trainer.optimization_stepper
        state = {
            "loss": dict(trainer.loss_module.state_dict()),
            "stepper": stepper.state_dict(),
            "count": (stepper.steps, trainer._optim_count),
            "rows": sink.rows,
            "random": torch.get_rng_state(),
        }
        return state, made

    return trained


@pytest.fixture(autouse=True)
def _targets_within(monkeypatch):
    """Have targets stay where they are, in both trainers alike: nothing compiles here."""
    monkeypatch.setattr("pogo_torchrl.training.SoftUpdate.step", lambda self: None)


@pytest.mark.parametrize("policy_freq", [1, 2, 3])
@pytest.mark.parametrize("ours", [True, False])
def test_replays_are_the_updates_themselves(make, policy_freq, ours):
    plain, _ = make(ours=ours, policy_freq=policy_freq)
    replayed, made = make(StandIn, ours=ours, policy_freq=policy_freq)
    assert_close(replayed, plain, rtol=0, atol=0)
    replays = sum(graph.replays for graph in made)
    assert replays < 33 if ours else replays == 33  # a replay holds several, or one


def test_a_resumed_run_captures_anew_and_equals_the_unbroken_one(make, tmp_path):
    whole, _ = make(StandIn)
    make(StandIn, total=17, checkpoint_dir=tmp_path)
    resumed, made = make(StandIn, checkpoint_dir=tmp_path)
    assert made
    for part in ("loss", "stepper", "random"):
        assert_close(resumed[part], whole[part], rtol=0, atol=0)


def test_a_capture_that_fails_costs_a_warning_only(make, caplog):
    plain, _ = make()
    replayed, made = make(Broken)
    assert_close(replayed, plain, rtol=0, atol=0)
    assert len(made) == 1
    assert caplog.text.count("No CUDA graphs, the updates are slower for it") == 1


def test_what_others_do_at_each_update_is_not_left_out(make):
    calls = []
    _, made = make(StandIn, hook=lambda: calls.append(1))
    assert len(calls) == 33
    assert not made


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("policy_freq", [1, 2])
def test_a_gpu_replays_the_updates_themselves(make_loss, make_batch, policy_freq):
    loss, rows = make_loss(w2_backend="fast").cuda(), make_batch(64).cuda()
    normalization = Normalization.identity(rows["observation"])

    def trained(graphs):
        buffer = OfflineReplayBuffer(
            rows, normalization=normalization, episode_returns=np.ones(1), batch_size=16
        )
        trainer = POGOTrainer(
            copy.deepcopy(loss), buffer, 60, compile=True, policy_freq=policy_freq,
            progress_bar=False,
        )  # fmt: skip
        assert isinstance(trainer._graphs.make(), CUDAGraph)
        if not graphs:
            trainer._graphs = None
        torch.manual_seed(1)
        trainer.train()
        assert not graphs or not trainer._graphs.failed
        return dict(trainer.loss_module.state_dict())

    assert_close(trained(True), trained(False), rtol=1e-4, atol=1e-5)
