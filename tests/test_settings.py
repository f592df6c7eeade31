"""Settings of losses that are set later, and as scalars of NumPy and tensors; records of them."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR
from torchrl.objectives import TD3BCLoss
from torchrl.objectives.value import GAE, MultiAgentGAE, VTrace

from pogo_torchrl import (
    GaussianPOGOLoss,
    JKOChain,
    POGOTrainer,
    ReBRACLoss,
    make_actor,
    make_gaussian_actor,
    make_qvalue,
    sinkhorn_divergence,
)
from pogo_torchrl.trainers import ChainTrainer
from pogo_torchrl.trainers.ranking import RankActors
from pogo_torchrl.trainers.step_control import GrowSteps, HoldDisplacement


@pytest.fixture
def make_chain(unit_spec):
    """Factory of chains over TD3+BC."""

    def make(hidden=8, gamma=0.9, base=None, **settings):
        networks = make_actor(3, unit_spec, (hidden,)), make_qvalue(3, 2, (8,))
        loss = TD3BCLoss(*networks, action_spec=unit_spec, **(base or {}))
        loss.make_value_estimator(gamma=gamma)
        settings.setdefault("w2_weights", (0.2, 0.5))
        return JKOChain(loss, **settings)

    return make


class TestSetLater:
    """A setting is checked as in the constructor, whenever it is set."""

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("alpha", -1.0, r"alpha=-1.0 must be a finite number > 0"),
            ("alpha", "x", r"alpha='x' must be a finite number > 0"),
            ("w2_weights", (3.0,), r"has 1 weights, but the chain was created with 2: set as many"),
            ("w2_weights", (1, 2, 3), r"has 3 weights, but the chain was created with 2"),
            ("w2_weights", (1.0, np.nan), r"must be a sequence of finite numbers >= 0"),
            ("w2_weights", 0.2, r"w2_weights=0.2 must be a sequence of finite numbers >= 0"),
            ("num_samples", -1, r"num_samples=-1 must be an integer >= 1"),
            ("loss_function", "l7", r"choose one of \['l2', 'l1', 'smooth_l1'\]"),
            ("q_normalization", "mean", r"choose one of \['mean_abs', None\]"),
            ("w2_backend", "exact", r"num_samples=12 is too large for w2_backend='exact'"),
            ("num_qvalue_nets", 3, r"num_qvalue_nets=3 comes too late.* create another loss"),
            ("delay_actor", True, r"delay_actor=True comes too late"),
            ("average_actors", 0.1, r"average_actors=0.1 comes too late"),
        ],
    )
    def test_a_loss_refuses_what_its_constructor_refuses(self, make_loss, name, value, message):
        loss = make_loss(num_samples=12)
        before = getattr(loss, name)
        with pytest.raises(ValueError, match=message):
            setattr(loss, name, value)
        assert getattr(loss, name) == before

    def test_valid_values_are_kept_as_plain_numbers(self, make_loss):
        loss = make_loss(average_actors=0.1)
        loss.alpha, loss.num_samples = torch.tensor(2.0), np.int64(3)
        loss.w2_weights, loss.average_actors = torch.tensor([3.0, 4.0]), 0.2
        loss.delay_actor = False  # as it was
        assert (loss.alpha, loss.num_samples, loss.average_actors) == (2.0, 3, 0.2)
        assert loss.w2_weights == (3.0, 4.0)
        assert type(loss.alpha) is float
        assert type(loss.num_samples) is int

    def test_a_penalty_on_next_actions_needs_them_from_then_on(self, make_loss, make_batch):
        loss = make_loss()
        loss.critic_bc_weight = 0.1
        with pytest.raises(KeyError, match=r"needs the dataset's next actions"):
            loss(make_batch())

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("alpha", 0.0, r"alpha=0.0 must be a finite number > 0"),
            ("w2_weights", (0.1,), r"has 1 weights, but the chain was created with 2"),
            ("distance", "w2", r"distance='w2' is unknown"),
            ("distance", "kl", r"needs an actor with an IndependentNormal or a TanhNormal"),
            ("actor_q", "advantage", r"TD3BCLoss does not have"),
            ("entropy_weight", 0.1, r"needs an actor with an IndependentNormal"),
        ],
    )
    def test_a_chain_does_the_same(self, make_chain, name, value, message):
        with pytest.raises(ValueError, match=message):
            setattr(make_chain(), name, value)

    def test_losses_of_a_single_actor_do_the_same(self, unit_spec):
        networks = make_actor(3, unit_spec, (8,)), make_qvalue(3, 2, (8,))
        loss = ReBRACLoss(*networks, action_spec=unit_spec)
        with pytest.raises(ValueError, match="actor_bc_weight=-1 must be a finite number >= 0"):
            loss.actor_bc_weight = -1
        with pytest.raises(ValueError, match="delay_qvalue=False comes too late"):
            loss.delay_qvalue = False


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("change", ["blur", "gamma", "weights"])
def test_a_compiled_update_follows_settings(make_loss, make_buffer, monkeypatch, compiled, change):
    traced = []

    def compiled_update(run, device):
        traced.append(run)
        return run

    monkeypatch.setattr("pogo_torchrl.trainers.fused.update.compiled_update", compiled_update)
    loss = make_loss(w2_backend="fast")
    trainer = POGOTrainer(loss, make_buffer(), 9, progress_bar=False, compile=compiled)
    stepper, buffer = trainer.optimization_stepper, trainer.dataset
    stepper.run(2, buffer)
    stepper.run(2, buffer)
    assert len(traced) == compiled
    if change == "blur":
        loss.blur = 0.5
    elif change == "gamma":
        loss.make_value_estimator(gamma=0.5)
    else:
        loss.w2_weights, loss.alpha = (1.0, 2.0), 0.5
    stepper.run(2, buffer)
    # weights and alpha are inputs of the graph
    assert len(traced) == compiled * (1 if change == "weights" else 2)


def test_geomloss_names_the_backend_that_compiles():
    compiled = torch.compile(sinkhorn_divergence, fullgraph=True, backend="eager")
    x = torch.randn(2, 4, 2)
    with pytest.raises(Exception, match="use w2_backend='fast', which is the same divergence"):
        compiled(x, x + 1)


# --------------------------------------------------------------------------- scalars

KINDS = [np.float32, torch.tensor]


@pytest.mark.parametrize("kind", KINDS)
def test_settings_of_a_chain_may_be_scalars(make_chain, make_batch, kind):
    chain = make_chain(alpha=kind(0.5), blur=kind(0.1), num_samples=np.int64(3))
    assert (chain.alpha, chain.num_samples) == (0.5, 3)
    assert chain.actor_loss(make_batch())[0].isfinite()


@pytest.mark.parametrize("kind", KINDS)
def test_settings_of_losses_of_a_single_actor_may_be_scalars(unit_spec, make_batch, kind):
    critic = make_qvalue(3, 2, (8,))
    gaussian = GaussianPOGOLoss(
        make_gaussian_actor(3, unit_spec, (8,)), critic, alpha=kind(0.5), step_size=kind(0.25),
        entropy_weight=kind(0.5), num_qvalue_nets=np.int64(3), policy_noise=kind(0.5),
    )  # fmt: skip
    assert (gaussian.alpha, gaussian.w2_weight, gaussian.num_qvalue_nets) == (0.5, 1.0, 3)
    rebrac = ReBRACLoss(
        make_actor(3, unit_spec, (8,)), critic, actor_bc_weight=kind(0.5), critic_bc_weight=kind(0)
    )
    for loss in (gaussian, rebrac):
        assert loss(make_batch())["loss_actor"].isfinite()


@pytest.mark.parametrize("kind", KINDS)
def test_settings_of_hooks_and_the_trainer_may_be_scalars(make_loss, make_buffer, kind):
    every = np.int64(2) if kind is np.float32 else torch.tensor(2)
    for hook in (HoldDisplacement(kind(0.1), interval=every), GrowSteps(kind(2.0), interval=every)):
        trainer = POGOTrainer(
            make_loss(), make_buffer(), 4, hooks=[hook], log_interval=every, progress_bar=False
        )
        trainer.train()
        assert trainer.loss_module.alpha != 1.0
    assert type(RankActors(interval=every).interval) is int


# --------------------------------------------------------------------------- empty batches


def test_no_term_of_a_chain_accepts_a_batch_without_rows(make_loss, make_chain, make_batch):
    empty = make_batch(8)[:0]
    for term in (make_loss().actor_loss, make_chain().actor_loss):
        with pytest.raises(ValueError, match=r"the batch has no rows .*sample at least one"):
            term(empty, 1)


# --------------------------------------------------------------------------- keys and estimators


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"state_action_value": "q"}, r"reads 'q' .*which writes \['state_action_value'\]"),
        (
            {"action": "force"},
            r"reads 'force' .*which writes \['action'\].*set_keys\(action=\.\.\.",
        ),
    ],
)
def test_keys_that_no_network_writes(make_loss, make_batch, keys, message):
    loss = make_loss()
    loss.set_keys(**keys)
    batch = make_batch()
    batch["force"] = batch["action"]
    with pytest.raises(ValueError, match=message):
        loss(batch)


@pytest.mark.parametrize("kind", [GAE, MultiAgentGAE, VTrace])
def test_estimators_of_state_values_are_refused_as_classes_too(make_loss, kind):
    with pytest.raises(NotImplementedError, match=f"{kind.__name__} needs a network of state"):
        make_loss().make_value_estimator(kind, gamma=0.9)


# --------------------------------------------------------------------------- records


@pytest.mark.parametrize(
    ("changes", "change"),
    [
        ({"weight_decay": 0.1}, r"qvalue_optimizer.weight_decay: 0 -> 0.1"),
        ({"betas": (0.5, 0.9)}, r"qvalue_optimizer.betas: \[0.9, 0.999\] -> \[0.5, 0.9\]"),
    ],
)
def test_settings_of_optimizers_are_recorded(make_loss, make_buffer, tmp_path, changes, change):
    def make(**settings):
        make_adam = functools.partial(torch.optim.Adam, lr=3e-4, **settings)
        return POGOTrainer(
            make_loss(), make_buffer(), 2, qvalue_optimizer=make_adam, checkpoint_dir=tmp_path,
            progress_bar=False,
        )  # fmt: skip

    make().train()
    with pytest.raises(ValueError, match=rf"another run \({change}\)"):
        make(**changes).resume()
    assert make().resume() == 2


def test_schedules_and_sizes_of_networks_are_recorded(make_loss, make_buffer, tmp_path, unit_spec):
    def make(loss, **settings):
        return POGOTrainer(
            loss, make_buffer(), 2, checkpoint_dir=tmp_path, progress_bar=False, **settings
        )

    make(make_loss()).train()
    cosine = functools.partial(CosineAnnealingLR, T_max=9)
    with pytest.raises(ValueError, match=r"qvalue_lr_scheduler: None -> CosineAnnealingLR"):
        make(make_loss(), qvalue_lr_scheduler=cosine).resume()
    wider = type(make_loss())(
        make_actor(3, unit_spec, (9, 8)), make_qvalue(3, 2, (8, 8)), w2_weights=(0.2, 0.5)
    ).make_value_estimator(gamma=0.9)
    with pytest.raises(
        ValueError, match=r"actor_network: .*8x5.* -> .*9x5[^;]*\. Use the settings"
    ):
        make(wider).resume()


@pytest.mark.parametrize(
    ("changes", "change"),
    [
        ({"gamma": 0.99}, r"base.gamma: 0.9 -> 0.99"),
        ({"base": {"alpha": 1.0}}, r"base.alpha: 2.5 -> 1.0"),
        ({"hidden": 9}, r"base.actor_network: .*8x5.* -> .*9x5"),
    ],
)
def test_settings_of_the_base_of_a_chain_are_recorded(
    make_chain, make_buffer, tmp_path, changes, change
):
    def make(**settings):
        return ChainTrainer(
            make_chain(**settings), make_buffer(), 2, checkpoint_dir=tmp_path, progress_bar=False
        )

    make().train()
    with pytest.raises(ValueError, match=rf"another run \({change}"):
        make(**changes).resume()
    assert make().resume() == 2


def test_the_divergence_takes_scalars():
    x = torch.randn(2, 4, 2)
    expected = sinkhorn_divergence(x, x + 1, blur=0.5)
    torch.testing.assert_close(sinkhorn_divergence(x, x + 1, blur=np.float32(0.5)), expected)
