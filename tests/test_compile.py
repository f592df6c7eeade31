"""Updates compiled with Inductor against eager updates. For stacks see tests/test_stack.py."""

from __future__ import annotations

import copy
import shutil
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from pogo_torchrl import POGOTrainer
from pogo_torchrl.trainers import lr_scheduler
from pogo_torchrl.trainers.step_control import GrowSteps

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile needs a C++ compiler"
)

STEPS, LR = 9, 3e-3
OPTIMIZERS = {
    "qvalue_optimizer": partial(torch.optim.AdamW, lr=LR, weight_decay=0.1),
    "actor_optimizer": partial(torch.optim.Adam, lr=LR, weight_decay=0.1),
    "actor_lr_scheduler": lr_scheduler("cosine", STEPS),
    "clip_grad_norm": 0.05,
}


def state(trainer):
    return dict(trainer.loss_module.state_dict())


@pytest.fixture
def trained(make_loss, make_buffer):
    def trained(loss, buffer, steps=STEPS, **settings):
        trainer = POGOTrainer(copy.deepcopy(loss), buffer, steps, progress_bar=False, **settings)
        torch.manual_seed(1)
        if "checkpoint_dir" in settings:
            trainer.resume()
        trainer.train()
        return trainer

    return trained


class Move:
    """Trainer hook that moves the loss at an update, after which nothing may be compiled again."""

    def __init__(self, step):
        self.step = step

    def register(self, trainer):
        def move():
            if trainer.collected_frames == self.step:
                assert float(trainer.optimization_stepper.metrics["loss_qvalue"]) > 0
                trainer.loss_module.double().float()
                torch.compiler.set_stance("fail_on_recompile")

        trainer.register_op("post_steps", move)


def test_default_settings_and_bitwise_identical_resume(trained, make_loss, make_buffer, tmp_path):
    loss, buffer = make_loss(w2_backend="fast"), make_buffer()
    eager = trained(loss, buffer)
    saving = {"checkpoint_dir": tmp_path, "checkpoint_interval": 4, "keep_checkpoints": 3}
    with torch.compiler.set_stance("default"):
        compiled = trained(loss, buffer, compile=True, hooks=[Move(4)], **saving)
    assert_close(state(compiled), state(eager), rtol=1e-4, atol=1e-5)
    # Within one mode (eager or compiled), resuming is bitwise identical. The resumed loss is not
    # moved: an update follows a loss that was.
    for step in (8, STEPS):
        shutil.rmtree(tmp_path / f"step-{step:012}")
    resumed = trained(loss, buffer, compile=True, **saving)
    assert_close(state(resumed), state(compiled), rtol=0, atol=0)


def test_other_settings(trained, make_loss, make_batch, make_buffer, wide_spec):
    """Delayed actor, policy_freq, asymmetric bounds, w2_fraction, weight decay, clipping, a
    growing alpha, averages, and the options of the TD target and of the actors' Q and D_0.
    """
    loss = make_loss(
        wide_spec, w2_backend="fast", delay_actor=True, q_normalization=None, alpha=0.1,
        w2_fraction=0.5, data_weight=0.3, shared_noise=True, num_qvalue_nets=3,
        average_actors=0.2,
        critic_bc_weight=0.1, target_action="min_clean_noisy", actor_q="mean",
        advantage_temperature=0.5, trajectory_weights=True,
    )  # fmt: skip
    buffer = make_buffer()
    buffer.empty()
    batch = make_batch(64, spec=wide_spec)
    batch["next", "action"] = wide_spec.rand([64])
    batch["next", "action"][::5] = torch.nan
    batch["trajectory_weight"] = torch.rand(64)
    buffer.extend(batch)
    eager, compiled = (
        trained(
            loss, buffer, compile=c, policy_freq=2, hooks=[GrowSteps(20.0, interval=2)],
            **OPTIMIZERS,
        )
        for c in (False, True)
    )  # fmt: skip
    assert_close(state(compiled), state(eager), rtol=1e-4, atol=1e-5)
    assert compiled.loss_module.alpha == 0.1 * 20 ** (8 / 9)
    optimizers = compiled.optimization_stepper.optimizers
    counts = {
        name: {float(s["step"]) for s in optimizer.state.values()}
        for name, optimizer in optimizers.items()
    }
    assert counts == {"qvalue": {STEPS}, "actor_0": {5}, "actor_1": {5}}


def test_bfloat16(trained, make_loss, make_buffer):
    loss, buffer = make_loss(w2_backend="fast"), make_buffer()
    trainers = {
        (compile, bf16): trained(loss, buffer, lr=LR, compile=compile, bf16=bf16)
        for compile, bf16 in ((False, False), (False, True), (True, True))
    }
    start, full, eager, compiled = (
        torch.cat([v.flatten() for v in found.values()])
        for found in (loss.state_dict(), *map(state, trainers.values()))
    )
    assert compiled.dtype == torch.float32
    # They round differently: as far from each other as from float32, but not identical.
    moved = (full - start).abs().mean()
    for one, other in ((eager, full), (compiled, eager), (compiled, full)):
        assert 0 < (one - other).abs().mean() < 0.2 * moved
