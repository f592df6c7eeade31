"""Replayed against plain updates. Without a GPU, a tape of operations replaces the CUDA graph."""

from __future__ import annotations

import contextlib
import copy
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runs import Rows, spoil_at
from tensordict import TensorDict
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pogo_torchrl import POGOLoss, POGOTrainer, make_actor, make_qvalue
from pogo_torchrl.data.replay_buffer import Normalization, OfflineReplayBuffer
from pogo_torchrl.trainers import POGOOptimizationStepper
from pogo_torchrl.trainers.hooks import DivergenceError, LogMetrics, StopOnDivergence
from pogo_torchrl.trainers.step_control import GrowSteps

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

_READS = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal)


class Tape(TorchDispatchMode):
    """CPU stand-in for a CUDA graph: replays operations on the memory of their capture.

    A replay does not run the Python code of the captured work, and reading a value on the host
    makes a capture fail.
    """

    def __init__(self):
        super().__init__()
        self.operations, self.replays = [], 0

    def capture(self, work):
        for _ in range(2):
            work()
        with self:
            work()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in _READS:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for func, args, kwargs, out in self.operations:
            results = tree_leaves(func(*args, **kwargs))
            for old, new in zip(tree_leaves(out), results, strict=True):
                # Views and tensors changed in place are already up to date.
                if isinstance(old, torch.Tensor) and _address(old) != _address(new):
                    old.copy_(new)


def _address(x):
    return x.untyped_storage().data_ptr()


def offline(rows):
    return OfflineReplayBuffer(
        rows,
        normalization=Normalization.identity(rows["observation"]),
        episode_returns=np.ones(1),
        batch_size=16,
    )


@pytest.fixture
def make(make_loss, make_buffer, make_batch, monkeypatch):
    """Factory of trainers with identical weights, data and random state, with or without graphs."""
    # Run the function that torch.compile would trace in eager mode.
    monkeypatch.setattr(
        "pogo_torchrl.trainers.fused.update.compiled_update", lambda run, device: run
    )
    default = make_loss(w2_backend="fast")
    batch = make_batch(64)
    batch["next", "action"] = batch["action"].roll(-1, 0)
    batch["next", "action"][::5] = torch.nan  # no next action
    buffers = {True: offline(batch), False: make_buffer()}

    def make(
        graphs, *, loss=default, total=33, offline_buffer=True, guard=False, hook=None, **settings
    ):
        metrics = LogMetrics([Rows()], 10)
        hooks = [StopOnDivergence(metrics), metrics] if guard else [metrics]
        trainer = POGOTrainer(
            copy.deepcopy(loss), buffers[offline_buffer], total, progress_bar=False,
            compile=True, hooks=hooks, **settings,
        )  # fmt: skip
        trainer.metrics = metrics
        if hook is not None:
            trainer.register_op("post_optim", hook)
        trainer.tapes = []

        def tape():
            trainer.tapes.append(Tape())
            return trainer.tapes[-1]

        trainer.optimization_stepper.graph_maker = lambda: tape if graphs else None
        trainer.optimization_stepper.max_graph_updates = 4
        torch.manual_seed(1)
        return trainer

    return make


def trained(trainer):
    trainer.train()
    stepper = trainer.optimization_stepper.state_dict()
    stepper["optimizers"] = {name: one["state"] for name, one in stepper["optimizers"].items()}
    return {
        "loss": dict(trainer.loss_module.state_dict()),
        "stepper": stepper,
        "count": trainer._optim_count,
        "rows": trainer.metrics.sinks[0].numbers(),
        "random": torch.get_rng_state(),
    }


def add_host_read(trainer):
    """Make each update of a trainer read a value on the host."""
    stepper = trainer.optimization_stepper
    draw_noise = stepper.draw_noise

    def read(batch):
        noise = draw_noise(batch)
        assert noise["smoothing"].sum().item() < 1e9
        return noise

    stepper.draw_noise = read


def assert_same(one, other):
    assert_close(one, other, rtol=0, atol=0)


def test_optional_terms_can_be_captured(make, make_loss):
    loss = make_loss(
        w2_backend="fast", critic_bc_weight=0.1, target_action="min_clean_noisy", actor_q="mean",
        advantage_temperature=0.5,
    )  # fmt: skip
    plain, trainer = trained(make(False, loss=loss)), make(True, loss=loss)
    assert_same(trained(trainer), plain)
    assert not trainer.optimization_stepper._graphs.failed
    assert sum(tape.replays for tape in trainer.tapes) > 0


@pytest.mark.parametrize("policy_freq", [1, 2, 3, 5])
@pytest.mark.parametrize("offline_buffer", [True, False])
def test_replays_are_bitwise_identical_to_plain_updates(make, policy_freq, offline_buffer):
    plain = trained(make(False, offline_buffer=offline_buffer, policy_freq=policy_freq))
    trainer = make(True, offline_buffer=offline_buffer, policy_freq=policy_freq)
    assert_same(trained(trainer), plain)
    assert [step for step, _ in plain["rows"]] == [10, 20, 30, 33]
    assert not trainer.optimization_stepper._graphs.failed
    replays = sum(tape.replays for tape in trainer.tapes)
    # a replay runs several updates, or one if the buffer samples outside of the graph
    assert replays < 33 if offline_buffer else replays == 33


@pytest.mark.parametrize("policy_freq", [1, 2])
@pytest.mark.parametrize("offline_buffer", [True, False])
def test_replays_freeze_the_critics_at_the_switch(make, policy_freq, offline_buffer):
    settings = {
        "offline_buffer": offline_buffer, "policy_freq": policy_freq, "freeze_critics_at": 0.55,
    }  # fmt: skip
    plain = trained(make(False, **settings))
    trainer = make(True, **settings)
    assert_same(trained(trainer), plain)
    graphs = trainer.optimization_stepper._graphs
    assert not graphs.failed
    networks = {("qvalue", "actor_0"), ("actor_1",)}
    assert {trained for _, trained in graphs._graphs} - {("qvalue",)} == networks


def test_a_tick_is_split_into_long_and_single_graphs(make):
    trainer = make(True, total=11)
    trained(trainer)
    long, single = trainer.tapes
    assert (long.replays, single.replays) == (2, 3)


def test_replays_are_exact_with_deterministic_algorithms(make):
    torch.use_deterministic_algorithms(True)
    try:
        assert_same(trained(make(True)), trained(make(False)))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("policy_freq", [1, 2])
@pytest.mark.parametrize("cut", [3, 17])
def test_a_resumed_run_captures_again_and_equals_an_uninterrupted_one(
    make, tmp_path, cut, policy_freq
):
    uninterrupted = trained(make(False, policy_freq=policy_freq))
    settings = {"checkpoint_dir": tmp_path, "policy_freq": policy_freq}
    first = make(True, **settings)
    first.add_interval(cut)
    first.register_op(
        "post_steps", lambda: first.collected_frames == cut and first.request_stop("test")
    )
    trained(first)
    second = make(True, **settings)
    torch.manual_seed(99)
    assert second.resume() == cut
    resumed = trained(second)
    assert second.tapes
    for part in ("loss", "stepper", "random", "count"):
        assert_same(resumed[part], uninterrupted[part])
    assert resumed["rows"] == [row for row in uninterrupted["rows"] if row[0] > cut]


def test_replays_continue_from_a_checkpoint_loaded_in_between(make, tmp_path):
    trainer = make(True, total=8, checkpoint_dir=tmp_path)
    trained(trainer)
    trainer.optim_steps(TensorDict({}, [4]))  # beyond the checkpoint
    trainer.resume()
    trainer.optim_steps(TensorDict({}, [4]))
    expected = make(False, total=12)
    expected.train()
    assert_same(dict(trainer.loss_module.state_dict()), dict(expected.loss_module.state_dict()))


def test_a_failed_capture_only_logs_a_warning(make, caplog):
    plain = trained(make(False))
    caplog.clear()
    trainer = make(True)
    add_host_read(trainer)
    assert_same(trained(trainer), plain)
    assert len(trainer.tapes) == 1
    assert [record.getMessage() for record in caplog.records] == [
        "CUDA graph capture failed, updates run slower without it: operation not permitted when "
        "stream is capturing"
    ]


def test_batches_of_another_size_run_without_a_graph(make, make_batch):
    def with_a_short_batch(graphs):
        trainer = make(graphs, total=6, offline_buffer=False)
        sizes = iter([16, 16, 5, 16, 16, 5])
        trainer.dataset = SimpleNamespace(sample=lambda: make_batch(next(sizes)))
        return trained(trainer), trainer

    plain, _ = with_a_short_batch(False)
    replayed, trainer = with_a_short_batch(True)
    assert_same(replayed, plain)
    assert trainer.tapes[0].replays == 4


def test_divergence_is_detected_during_replays(make):
    trainer = make(True, guard=True)
    spoil_at(trainer, 20)
    with pytest.raises(DivergenceError, match=r"at update 30.*loss_qvalue.*became infinite or NaN"):
        trainer.train()


def test_hooks_at_each_update_disable_graphs(make):
    calls = []
    trainer = make(True, hook=lambda: calls.append(1))
    trained(trainer)
    assert len(calls) == 33
    assert not trainer.tapes


def test_learning_rates_reach_each_replayed_update(make):
    schedule = partial(torch.optim.lr_scheduler.LinearLR, end_factor=0.1, total_iters=30)
    settings = {"qvalue_lr_scheduler": schedule, "lr": 1e-2}
    plain = trained(make(False, **settings))
    trainer = make(True, **settings)
    assert_same(trained(trainer), plain)
    assert trainer.tapes[0].replays > 1
    constant = trained(make(True, lr=1e-2))
    name = "qvalue_network_params.module.0.weight"
    assert not torch.allclose(constant["loss"][name], plain["loss"][name])


def test_changed_step_sizes_reach_replayed_updates(make):
    runs = []
    for graphs in (False, True):
        trainer = make(graphs, total=12)
        trainer.loss_module.q_normalization = None  # lambda is alpha
        GrowSteps(1000.0, interval=4).register(trainer)
        runs.append(trained(trainer))
    assert_same(*runs)
    assert [tape.replays for tape in trainer.tapes] == [2, 4]
    lambdas = [row["lmbd_0"] for _, row in trainer.metrics.sinks[0].rows]
    assert lambdas == pytest.approx([(4 * 1 + 4 * 10 + 2 * 100) / 10, 100])


def test_graphs_are_captured_again_after_the_loss_was_moved(make):
    found = []
    for graphs in (False, True):
        trainer = make(graphs, total=16)
        trainer.optim_steps(TensorDict({}, [8]))
        trainer.loss_module.double().float()
        trainer.optim_steps(TensorDict({}, [8]))
        found.append(dict(trainer.loss_module.state_dict()))
    assert_same(*found)
    assert len(trainer.tapes) == 2


class Watch(TorchDispatchMode):
    """Fails if an operation needs the host: if it reads a value or receives a CPU tensor."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in _READS, func
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        # A CPU scalar is passed with the kernel launch, unless it is copied separately.
        assert all(x.device.type == "meta" or x.dim() == 0 for x in tensors), func
        if func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            assert len({x.device for x in tensors}) == 1, func
        return out


def test_an_update_never_synchronizes_with_the_host(unit_spec, make_batch, monkeypatch):
    """Uses the device "meta", which stores no values, in place of a GPU."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    monkeypatch.setattr(
        "pogo_torchrl.trainers.fused.update.compiled_update", lambda run, device: run
    )
    loss = POGOLoss(
        make_actor(3, unit_spec, (8, 8)).to("meta"),
        make_qvalue(3, 2, (8, 8)).to("meta"),
        w2_weights=(0.2, 0.5),
        w2_backend="fast",
    )
    loss.make_value_estimator(gamma=0.9)
    buffer = offline(make_batch(64).to("meta"))
    assert buffer.samples_on(torch.device("meta"))
    stepper = POGOOptimizationStepper(loss, compile=True, policy_freq=2, tau=0.005)
    stepper.track()
    stepper.run(2, buffer)  # creates the optimizer states and the learning rates
    with Watch():
        stepper.run(4, buffer)
    add_host_read(SimpleNamespace(optimization_stepper=stepper))
    with pytest.raises(AssertionError, match="_local_scalar_dense"), Watch():
        stepper.run(1, buffer)


@pytest.fixture
def make_on_gpu(make_loss, make_batch):
    loss = make_loss(w2_backend="fast")
    rows = make_batch(64)

    def make(**settings):
        metrics = LogMetrics([Rows()], 30)
        trainer = POGOTrainer(
            copy.deepcopy(loss).cuda(), offline(rows.cuda()), 60, compile=True,
            progress_bar=False, hooks=[metrics], **settings,
        )  # fmt: skip
        trainer.metrics = metrics
        torch.manual_seed(1)
        return trainer

    return make


@needs_gpu
@pytest.mark.parametrize("policy_freq", [1, 2])
def test_replays_on_a_gpu_equal_plain_updates(make_on_gpu, policy_freq):
    plain, replayed = (make_on_gpu(policy_freq=policy_freq) for _ in range(2))
    plain.optimization_stepper.graph_maker = lambda: None
    expected, random = trained(plain), torch.cuda.get_rng_state()
    torch.manual_seed(1)
    found = trained(replayed)
    assert replayed.optimization_stepper._graphs._graphs
    assert not replayed.optimization_stepper._graphs.failed
    assert torch.equal(torch.cuda.get_rng_state(), random)
    assert_close(found, expected, rtol=1e-4, atol=1e-5)


@needs_gpu
def test_training_on_a_gpu_continues_after_a_failed_capture(make_on_gpu, caplog):
    plain, broken = make_on_gpu(), make_on_gpu()
    plain.optimization_stepper.graph_maker = lambda: None
    expected = trained(plain)
    add_host_read(broken)
    torch.manual_seed(1)
    found = trained(broken)
    assert broken.optimization_stepper._graphs.failed
    assert "CUDA graph capture failed" in caplog.text
    assert_close(found, expected, rtol=1e-4, atol=1e-5)


@needs_gpu
def test_an_update_never_synchronizes_with_the_gpu(make_on_gpu):
    trainer = make_on_gpu()
    trainer.optim_steps(TensorDict({}, [25]))  # captures
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.optim_steps(TensorDict({}, [50]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
