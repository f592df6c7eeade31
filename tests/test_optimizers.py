"""Optimizers: those of torch, the fused Adam, learning-rate schedules, gradient clipping."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, StepLR
from torch.testing import assert_close
from torchrl.objectives import SoftUpdate
from torchrl.trainers import LRSchedulerHook

from pogo_torchrl import POGOLoss, POGOTrainer, make_actor, make_qvalue
from pogo_torchrl.trainers import lr_scheduler
from pogo_torchrl.trainers.fused.adam import FusedAdam, unsupported_reason

LR, TAU, STEPS = 1e-2, 0.1, 20


@pytest.mark.parametrize(
    "make",
    [
        torch.optim.Adam,
        partial(torch.optim.Adam, betas=(0.8, 0.99), eps=1e-4, weight_decay=0.1),
        partial(torch.optim.AdamW, weight_decay=0.1),
    ],
    ids=["adam", "adam with decay", "adamw"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fused_steps_equal_those_of_torch(make, dtype):
    def optimizer():
        torch.manual_seed(0)
        shapes = ((4, 5), (5,))
        params = [torch.nn.Parameter(torch.randn(*shape, dtype=dtype)) for shape in shapes]
        return make(params, lr=0.01), params

    (mine, params), (theirs, copies) = optimizer(), optimizer()
    fused = FusedAdam([mine], [params], [p.detach() for p in params])
    for step in range(140):
        if step == 70:  # continue with the optimizer's own step() from the same state
            fused.write_steps()
        for p, twin in zip(params, copies):
            p.grad = twin.grad = torch.randn_like(twin)
        if step < 70:
            fused.step([p.grad for p in params], torch.tensor(0.01, dtype=torch.float64))
        else:
            mine.step()
        theirs.step()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert_close(params, copies, rtol=tolerance, atol=tolerance)
    for p, twin in zip(params, copies):
        assert_close(mine.state[p], theirs.state[twin], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (torch.optim.SGD, "not SGD"),
        (partial(torch.optim.Adam, amsgrad=True), "without amsgrad"),
        (partial(torch.optim.AdamW, maximize=True), "without maximize"),
    ],
)
def test_unsupported_optimizers_are_named(make, reason):
    optimizer = make([torch.nn.Parameter(torch.zeros(2))])
    assert reason in unsupported_reason(optimizer)
    assert "torch.optim.Adam and AdamW" in unsupported_reason(optimizer)


@pytest.fixture
def make(make_loss, make_buffer):
    """Factory of trainers with identical weights, data and random state."""
    loss, buffer = make_loss(w2_backend="fast"), make_buffer()

    def make(total=STEPS, loss=loss, **settings):
        settings.setdefault("lr", LR)
        torch.manual_seed(1)
        return POGOTrainer(
            copy.deepcopy(loss), buffer, total, tau=TAU, progress_bar=False, **settings
        )

    make.loss, make.buffer = loss, buffer
    return make


def state(trainer):
    return dict(trainer.loss_module.state_dict())


def looped(make, qvalue, actor, *, schedule=None, clip=None):
    """The same training as a hand-written loop; ``qvalue`` and ``actor`` create the optimizers."""
    loss, torch_clip = copy.deepcopy(make.loss), torch.nn.utils.clip_grad_norm_
    torch.manual_seed(1)
    targets = SoftUpdate(loss, tau=TAU)
    optimizers = [qvalue(loss.qvalue_params())]
    optimizers += [actor(loss.actor_params(i)) for i in range(loss.num_actors)]
    schedulers = [schedule(optimizer) for optimizer in optimizers if schedule]
    for _ in range(STEPS):
        batch = make.buffer.sample()
        noise = loss.draw_noise(batch)
        loss.draw_noise = lambda *args, noise=noise, **kwargs: noise
        for index, optimizer in enumerate(optimizers):
            value, _ = loss.actor_loss(batch, index - 1) if index else loss.qvalue_loss(batch)
            value.backward()
            if clip:
                torch_clip(optimizer.param_groups[0]["params"], clip)
            optimizer.step()
            loss.zero_grad()
        targets.step()
        for scheduler in schedulers:
            scheduler.step()
        del loss.draw_noise
    return dict(loss.state_dict())


SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
ADAMW = partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.1)


@pytest.mark.parametrize(
    ("qvalue", "actor", "schedule", "clip"),
    [
        (torch.optim.RMSprop, SGD, None, None),
        (ADAMW, partial(torch.optim.Adam, lr=LR), None, 0.05),
        (ADAMW, SGD, partial(CosineAnnealingLR, T_max=STEPS), None),
    ],
    ids=["any", "clipped", "scheduled"],
)
def test_any_optimizer_trains_as_in_a_plain_loop(make, qvalue, actor, schedule, clip):
    trainer = make(
        qvalue_optimizer=qvalue,
        actor_optimizer=actor,
        qvalue_lr_scheduler=schedule,
        actor_lr_scheduler=schedule,
        clip_grad_norm=clip,
    )
    trainer.train()
    assert_close(state(trainer), looped(make, qvalue, actor, schedule=schedule, clip=clip))


def test_optimizer_instances_are_accepted(make):
    expected = make(qvalue_optimizer=ADAMW, actor_optimizer=SGD)
    expected.train()
    loss = copy.deepcopy(make.loss)
    trainer = POGOTrainer(
        loss,
        make.buffer,
        STEPS,
        tau=TAU,
        progress_bar=False,
        qvalue_optimizer=ADAMW(loss.qvalue_params()),
        actor_optimizer=[SGD(loss.actor_params(i)) for i in range(2)],
    )
    torch.manual_seed(1)
    trainer.train()
    assert_close(state(trainer), state(expected), rtol=0, atol=0)


@pytest.mark.parametrize("cut", [7, 13])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_resumed_run_equals_an_uninterrupted_one(make, tmp_path, cut, schedule):
    def trainer():
        return make(
            checkpoint_dir=tmp_path,
            qvalue_optimizer=ADAMW,
            actor_optimizer=SGD,
            actor_lr_scheduler=lr_scheduler(schedule, STEPS),
            qvalue_lr_scheduler=lr_scheduler("linear", STEPS),
            clip_grad_norm=0.5,
        )

    first = trainer()
    first.add_interval(cut)
    first.register_op(
        "post_steps", lambda: first.collected_frames == cut and first.request_stop("test")
    )
    first.train()
    second = trainer()
    torch.manual_seed(99)
    assert second.resume() == cut
    second.train()
    (tmp_path / "step-000000000020").rename(tmp_path / "other")
    uninterrupted = make(
        qvalue_optimizer=ADAMW,
        actor_optimizer=SGD,
        actor_lr_scheduler=lr_scheduler(schedule, STEPS),
        qvalue_lr_scheduler=lr_scheduler("linear", STEPS),
        clip_grad_norm=0.5,
    )
    uninterrupted.train()
    assert_close(state(second), state(uninterrupted), rtol=0, atol=0)
    rates = [one.param_groups[0]["lr"] for one in second.optimization_stepper.optimizers.values()]
    assert max(rates) < 1e-12


def test_the_schedule_of_a_hook_is_followed(make):
    """Uses TorchRL's LRSchedulerHook with an optimizer created by the trainer."""
    trainer, rates = make(), []
    optimizer = trainer.optimization_stepper.optimizers["actor_1"]
    LRSchedulerHook(StepLR(optimizer, step_size=5, gamma=0.1), "optim").register(trainer)
    trainer.register_op("post_optim", lambda: rates.append(optimizer.param_groups[0]["lr"]))
    trainer.train()
    assert rates == pytest.approx([LR * 0.1 ** ((i + 1) // 5) for i in range(STEPS)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"qvalue_optimizer": 3e-4}, "qvalue_optimizer must be a torch.optim class"),
        ({"actor_optimizer": [3e-4, 3e-4]}, "actor_optimizer must be a torch.optim class"),
        ({"actor_optimizer": []}, "actor_optimizer holds 0 optimizers for 2 actors"),
        ({"clip_grad_norm": 0.0}, r"clip_grad_norm=0\.0 must be a positive number"),
    ],
)
def test_invalid_optimizers_are_rejected(make, settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_an_optimizer_of_other_parameters_is_rejected(make):
    trainer = make(qvalue_optimizer=ADAMW(copy.deepcopy(make.loss).qvalue_params()))
    with pytest.raises(ValueError, match="optimizer of qvalue does not hold the parameters"):
        trainer.train()


def test_settings_that_cannot_be_compiled_are_rejected(make, make_loss):
    with pytest.raises(ValueError, match=r"supports only torch\.optim\.Adam and AdamW .* not SGD"):
        make(compile=True, actor_optimizer=SGD).train()
    with pytest.raises(ValueError, match=r"w2_backend='tensorized' reads .* w2_backend='fast'"):
        make(compile=True, loss=make_loss(w2_backend="tensorized"))


def test_the_default_value_estimator_exists_before_an_update_is_traced(
    make, unit_spec, monkeypatch
):
    found = []

    def traced(run, device):
        found.append(run.__self__.loss.has_value_estimator)
        return run

    monkeypatch.setattr("pogo_torchrl.trainers.fused.update.compiled_update", traced)
    loss = POGOLoss(make_actor(3, unit_spec, (8,)), make_qvalue(3, 2, (8,)), w2_backend="fast")
    assert not loss.has_value_estimator
    make(compile=True, loss=loss).train()
    assert found == [True]


def test_changing_compiled_settings_is_rejected(make, monkeypatch):
    monkeypatch.setattr(
        "pogo_torchrl.trainers.fused.update.compiled_update", lambda run, device: run
    )
    trainer = make(compile=True)

    def change():
        trainer.optimization_stepper.optimizers["actor_0"].param_groups[0]["eps"] = 1e-3

    trainer.add_interval(10)
    trainer.register_op("post_steps", change)
    with pytest.raises(ValueError, match="eps of Adam changed during training"):
        trainer.train()


@pytest.mark.parametrize(("name", "cls"), [("linear", LinearLR), ("cosine", CosineAnnealingLR)])
def test_schedules_decay_from_the_initial_rate_to_zero(name, cls):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = lr_scheduler(name, 10)(optimizer)
    assert isinstance(scheduler, cls)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[0] == 0.5
    assert rates[5] == pytest.approx(0.25)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)
    assert sorted(rates, reverse=True) == rates
    assert lr_scheduler("constant", 10) is None
    with pytest.raises(ValueError, match=r"lr_schedule='step' is unknown; choose one of"):
        lr_scheduler("step", 10)
