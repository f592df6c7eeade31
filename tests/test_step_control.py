"""Hooks that change alpha during training: rules, resuming, logs, and every kind of update."""

from __future__ import annotations

import copy
import math
from contextlib import contextmanager

import pytest
import torch
from runs import Rows, assert_same
from torch.testing import assert_close
from torchrl.checkpoint import GlobalRNGState

from pogo_torchrl import POGOTrainer
from pogo_torchrl.experiments.build import step_control
from pogo_torchrl.experiments.overrides import compose
from pogo_torchrl.trainers import TrainerStack
from pogo_torchrl.trainers.hooks import LogMetrics
from pogo_torchrl.trainers.step_control import GrowSteps, HoldDisplacement


@pytest.fixture
def make(make_loss, make_buffer, monkeypatch):
    """Factory of trainers with identical weights, data and random state, and a hook."""
    # Run the function that torch.compile would trace in eager mode.
    monkeypatch.setattr(
        "pogo_torchrl.trainers.fused.update.compiled_update", lambda run, device: run
    )
    loss, buffer = make_loss(w2_backend="fast"), make_buffer()

    def make(hook, total=12, *, alpha=1.0, **settings):
        torch.manual_seed(1)
        own, sink = copy.deepcopy(loss), Rows()
        own.alpha = alpha
        metrics = LogMetrics([sink], 3, {"alpha": lambda: own.alpha})
        trainer = POGOTrainer(
            own, buffer, total, lr=1e-2, progress_bar=False, hooks=[metrics, hook], **settings
        )
        trainer.rows = sink
        return trainer

    return make


def record_alpha(trainer):
    """Return a list to which the trainer appends alpha after each change."""
    found = []
    trainer.register_op("post_steps", lambda: found.append(trainer.loss_module.alpha))
    return found


def respond(hook, displacement):
    """Replace the measurement of a hook by a function of alpha."""

    class Means:
        def __call__(self):
            return {"bc_mse": displacement(hook.loss.alpha)}

        def reset(self):
            pass

    hook.means = Means()


@pytest.mark.parametrize("rate", [0.125, 0.5, 0.75])
def test_without_residual_variance_the_error_shrinks_by_a_constant_factor(make, rate):
    """D_0 = c alpha^2: log(alpha / alpha*) is multiplied by 1 - 2 rate."""
    hook = HoldDisplacement(0.06, interval=1, rate=rate, limit=100.0)
    trainer = make(hook)
    respond(hook, lambda alpha: 0.24 * alpha**2)
    alphas = record_alpha(trainer)
    trainer.train()
    expected = [0.5 ** (1 - (1 - 2 * rate) ** k) for k in range(1, 13)]
    assert alphas == pytest.approx(expected)


def test_with_residual_variance_the_target_is_approached_without_overshoot(make):
    hook = HoldDisplacement(0.06, interval=1, rate=0.5, limit=100.0)
    trainer = make(hook, 60)
    respond(hook, lambda alpha: 0.01 * alpha**2 + 0.05)
    alphas = record_alpha(trainer)
    trainer.loss_module.alpha = 0.1
    trainer.train()
    assert sorted(alphas) == alphas
    assert alphas[-1] == pytest.approx(1.0, rel=1e-3)


def test_a_target_below_the_residual_variance_lowers_alpha_to_its_bound(make):
    hook = HoldDisplacement(0.04, interval=1, limit=1.1, bound=1.5)
    trainer = make(hook, alpha=2.0)
    respond(hook, lambda alpha: 1e9)
    alphas = record_alpha(trainer)
    trainer.train()
    assert alphas[:4] == pytest.approx([2 / 1.1, 2 / 1.21, 2 / 1.331, 2 / 1.4641])
    assert alphas[4:] == pytest.approx([2 / 1.5] * 8)


def test_alpha_follows_the_mean_of_its_interval(make):
    """The hook reads bc_mse, averaged over exactly the updates since the last change."""
    hook = HoldDisplacement(0.06, interval=4, rate=0.5, limit=1e6)
    trainer = make(hook)
    every = Rows()
    LogMetrics([every], 1).register(trainer)
    alphas = record_alpha(trainer)
    trainer.train()
    distances = [row["bc_mse"] for _, row in every.rows]
    expected = [1.0]
    for k in (0, 4, 8):
        expected.append(expected[-1] * (0.06 / (sum(distances[k : k + 4]) / 4)) ** 0.5)
    assert alphas[3::4] == pytest.approx(expected[1:], rel=1e-5)
    assert len(set(alphas)) == 4


def test_the_displacement_of_a_trained_actor_is_held(make_loss, make_batch, make_buffer):
    """Data with one action per state, so that no residual variance is left."""
    loss, buffer = make_loss(w2_weights=(0.2,)), make_buffer()
    buffer.empty()
    rows = make_batch(64)
    rows["action"] = 0.1 * rows["observation"][:, :2].tanh()
    buffer.extend(rows)
    found = []
    for target in (0.03, 0.12):
        sink, own = Rows(), copy.deepcopy(loss)
        hooks = [LogMetrics([sink], 100), HoldDisplacement(target, interval=10)]
        torch.manual_seed(1)
        POGOTrainer(own, buffer, 500, lr=1e-2, progress_bar=False, hooks=hooks).train()
        found.append(sink.rows[-1][1]["bc_mse"])
        assert found[-1] == pytest.approx(target, rel=0.25)
    assert found[1] > 2 * found[0]


def test_steps_grow_geometrically_over_the_training(make):
    trainer = make(GrowSteps(8.0, interval=4), alpha=0.5)
    alphas = record_alpha(trainer)
    trainer.train()
    ticks = [3, 4, 6, 8, 9, 12]  # metrics are written every 3 updates
    assert alphas == pytest.approx([0.5 * 8 ** (t // 4 * 4 / 12) for t in ticks])
    assert [row["alpha"] for _, row in trainer.rows.rows] == pytest.approx([0.5, 1, 2, 2])


def test_the_logged_lambda_is_that_of_the_current_alpha(make):
    """Without normalisation, lambda is alpha."""
    trainer = make(GrowSteps(8.0, interval=3))
    trainer.loss_module.q_normalization = None
    trainer.train()
    found = [row["lmbd_1"] for _, row in trainer.rows.rows]
    assert found == pytest.approx([8 ** (t / 12) for t in (0, 3, 6, 9)])


CONTROLS = {
    "held": lambda: HoldDisplacement(0.06, interval=4),
    "growing": lambda: GrowSteps(8.0, interval=4),
}


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("cut", [4, 6])
def test_a_resumed_run_equals_an_uninterrupted_one(make, tmp_path, control, compiled, cut):
    hook, settings = CONTROLS[control], {"compile": compiled}
    uninterrupted = make(hook(), **settings)
    uninterrupted.train()
    first = make(hook(), checkpoint_dir=tmp_path, **settings)
    first.add_interval(cut)
    first.register_op(
        "post_steps", lambda: first.collected_frames == cut and first.request_stop("test")
    )
    first.train()
    second = make(hook(), checkpoint_dir=tmp_path, **settings)
    torch.manual_seed(99)
    assert second.resume() == cut
    second.train()
    assert second.loss_module.alpha == uninterrupted.loss_module.alpha != 1.0
    assert_same(dict(second.loss_module.state_dict()), dict(uninterrupted.loss_module.state_dict()))
    assert second.rows.numbers() == [r for r in uninterrupted.rows.numbers() if r[0] > cut]


@pytest.mark.parametrize("control", CONTROLS)
def test_runs_of_a_stack_have_their_own_alpha(make, control):
    alphas, rng = (1.0, 0.3), GlobalRNGState()

    def trained(stacked):
        trainers = [make(CONTROLS[control](), alpha=alpha) for alpha in alphas]
        torch.manual_seed(1)
        streams = [rng.state_dict() for _ in alphas]

        @contextmanager
        def active(index):
            rng.load_state_dict(streams[index])
            yield
            streams[index] = rng.state_dict()

        if stacked:
            assert TrainerStack(trainers, active).train() == [None, None]
        else:
            for index, trainer in enumerate(trainers):
                with active(index):
                    trainer.train()
        return trainers

    for one, other in zip(trained(False), trained(True)):
        assert other.loss_module.alpha == pytest.approx(one.loss_module.alpha, rel=1e-4)
        assert_close(
            dict(other.loss_module.state_dict()),
            dict(one.loss_module.state_dict()),
            rtol=1e-4,
            atol=1e-5,
        )
        assert one.loss_module.alpha not in alphas


@pytest.mark.parametrize(
    ("make_hook", "message"),
    [
        (lambda: HoldDisplacement(0.0), "displacement=0"),
        (lambda: HoldDisplacement(math.nan), "displacement=nan"),
        (lambda: HoldDisplacement(0.06, interval=0), "interval=0"),
        (lambda: HoldDisplacement(0.06, rate=1.0), r"rate=1\.0 must be in \(0, 1\)"),
        (lambda: HoldDisplacement(0.06, limit=0.5), r"limit=0\.5 must be"),
        (lambda: HoldDisplacement(0.06, bound=math.inf), "bound=inf must be"),
        (lambda: GrowSteps(0.0), "alpha_growth=0"),
        (lambda: GrowSteps(2.0, interval=-1), "interval=-1"),
    ],
)
def test_settings_out_of_range_are_named(make_hook, message):
    with pytest.raises(ValueError, match=message):
        make_hook()


def test_a_chain_without_a_distance_term_is_rejected(make_loss, make_buffer):
    loss = make_loss(w2_weights=(0.0, 0.5))
    with pytest.raises(ValueError, match=r"displacement needs w2_weights\[0\] > 0"):
        POGOTrainer(loss, make_buffer(), 3, hooks=[HoldDisplacement(0.06)])


def test_options_choose_the_hook():
    assert step_control(compose([])) is None
    held, grown = (step_control(compose([o])) for o in ("displacement=0.1", "alpha_growth=3"))
    assert isinstance(held, HoldDisplacement)
    assert held.target == 0.1
    assert isinstance(grown, GrowSteps)
    assert grown.growth == 3
