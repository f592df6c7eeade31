"""TorchRL's offline recipe for TD3+BC, with its own loss and with POGO's (docs/recipes.md)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn, optim
from torchrl._utils import compile_with_warmup
from torchrl.data import Bounded, LazyTensorStorage, TensorDictReplayBuffer
from torchrl.data.replay_buffers import SamplerWithoutReplacement
from torchrl.envs import (
    Compose,
    DoubleToFloat,
    ExplorationType,
    GymEnv,
    InitTracker,
    RewardSum,
    StepCounter,
    TransformedEnv,
    set_exploration_type,
)
from torchrl.modules import MLP, TanhModule, ValueOperator
from torchrl.objectives import SoftUpdate
from torchrl.objectives.td3_bc import TD3BCLoss

from pogo_torchrl import POGOLoss, TransportActor
from pogo_torchrl.data import make_replay_buffer

CFG = SimpleNamespace(
    hidden_sizes=[16, 16],
    loss_function="l2",
    policy_noise=0.2,
    noise_clip=0.5,
    alpha=2.5,
    gamma=0.99,
    lr=3e-4,
    adam_eps=1e-4,
    target_update_polyak=0.995,
    policy_update_delay=2,
    batch_size=16,
    w2_weights=[1.0, 0.5],
    w2_backend="tensorized",
)


@pytest.fixture(scope="module")
def env():
    """The recipe's environment and transforms."""
    env = GymEnv("pogo_torchrl.envs:pogo_torchrl/hopper-medium-v2")
    transforms = Compose(StepCounter(max_steps=20), InitTracker(), DoubleToFloat(), RewardSum())
    yield (env := TransformedEnv(env, transforms))
    env.close()


@pytest.fixture
def replay_buffer():
    """Local data in place of the recipe's download, sampled as in the recipe."""
    data = make_replay_buffer("hopper-medium-v2", size=1000, normalize=False)[:]
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(len(data)),
        sampler=SamplerWithoutReplacement(drop_last=True),
        batch_size=CFG.batch_size,
        prefetch=4,
    )
    buffer.extend(data)
    return buffer


def deterministic_actor(cfg, spec) -> TensorDictSequential:
    net = MLP(num_cells=cfg.hidden_sizes, out_features=spec.shape[-1], activation_class=nn.ReLU)
    return TensorDictSequential(
        TensorDictModule(net, in_keys=["observation"], out_keys=["param"]),
        TanhModule(in_keys=["param"], out_keys=["action"], spec=spec),
    )


def transport_actor(cfg, spec) -> TransportActor:
    net = MLP(num_cells=cfg.hidden_sizes, out_features=spec.shape[-1], activation_class=nn.ReLU)
    return TransportActor(net, spec)


def make_model(cfg, env, actor) -> nn.ModuleList:
    net = MLP(num_cells=cfg.hidden_sizes, out_features=1, activation_class=nn.ReLU)
    qvalue = ValueOperator(net, in_keys=["action", "observation"])
    model = nn.ModuleList([actor(cfg, env.action_spec_unbatched), qvalue])
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        td = env.fake_tensordict()
        for net in model:  # the layers are lazy
            net(td)
    return model


def make_loss_module(cfg, model, spec, loss_class):
    chain = {"w2_weights": cfg.w2_weights, "w2_backend": cfg.w2_backend}
    chain = chain if loss_class is POGOLoss else {}
    loss = loss_class(
        actor_network=model[0],
        qvalue_network=model[1],
        num_qvalue_nets=2,
        loss_function=cfg.loss_function,
        delay_actor=True,
        delay_qvalue=True,
        action_spec=spec,
        policy_noise=cfg.policy_noise,
        noise_clip=cfg.noise_clip,
        alpha=cfg.alpha,
        **chain,
    )
    loss.make_value_estimator(gamma=cfg.gamma)
    return loss, SoftUpdate(loss, eps=cfg.target_update_polyak)


def make_update(cfg, loss, targets, in_order: bool = False):
    """The recipe's update; ``in_order``: the actors one after the other."""
    actor_params = list(loss.actor_network_params.values(True, True))
    critic_params = list(loss.qvalue_network_params.values(True, True))
    optimizer_actor = optim.Adam(actor_params, lr=cfg.lr, eps=cfg.adam_eps)
    optimizer_critic = optim.Adam(critic_params, lr=cfg.lr, eps=cfg.adam_eps)

    def update(td, update_actor):
        q_loss, *_ = loss.qvalue_loss(td)
        q_loss.backward()
        optimizer_critic.step()
        optimizer_critic.zero_grad(set_to_none=True)
        metadata, actor_loss = {}, q_loss.new_zeros(())
        if update_actor:
            for which in [(i,) for i in range(loss.num_actors)] if in_order else [()]:
                actor_loss, found = loss.actor_loss(td, *which)
                actor_loss.backward()
                optimizer_actor.step()
                optimizer_actor.zero_grad(set_to_none=True)
                metadata.update(found)
            targets.step()
        metadata = TensorDict(metadata)
        metadata.set("q_loss", q_loss.detach())
        metadata.set("actor_loss", actor_loss.detach())
        return metadata

    return update


def parameters(loss) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in loss.state_dict().items() if v.is_floating_point()}


def trains(cfg, loss, update, replay_buffer, steps: int = 4) -> None:
    """Assert that the recipe's loop trains: parameters and targets move, losses are finite."""
    before = parameters(loss)
    for step in range(steps):
        metadata = update(replay_buffer.sample(), step % cfg.policy_update_delay == 0).clone()
        assert all(bool(value.isfinite().all()) for value in metadata.values())
    networks = {k: v for k, v in parameters(loss).items() if "weight" in k or "bias" in k}
    assert {key.split("_")[0] for key in networks} == {"actor", "qvalue", "target"}
    for key, value in networks.items():
        assert not torch.equal(value, before[key]), key
        if key.startswith("target_"):
            online = networks[key.removeprefix("target_")]
            # the target is between where it started and the network it follows
            assert (value - before[key]).abs().max() < (online - before[key]).abs().max(), key


def acts_in_bounds(policy, env) -> None:
    with set_exploration_type(ExplorationType.DETERMINISTIC), torch.no_grad():
        rollout = env.rollout(max_steps=20, policy=policy, auto_cast_to_device=True)
    assert env.action_spec_unbatched.space.low.le(rollout["action"]).all()
    assert env.action_spec_unbatched.space.high.ge(rollout["action"]).all()
    assert rollout["next", "reward"].sum(-2).isfinite().all()


@pytest.mark.parametrize(
    ("loss_class", "actor", "in_order"),
    [
        (TD3BCLoss, deterministic_actor, False),
        (POGOLoss, deterministic_actor, False),
        (POGOLoss, transport_actor, False),
        (POGOLoss, transport_actor, True),
    ],
)
def test_the_recipe_trains(env, replay_buffer, loss_class, actor, in_order):
    model = make_model(CFG, env, actor)
    loss, targets = make_loss_module(CFG, model, env.action_spec_unbatched, loss_class)
    trains(CFG, loss, make_update(CFG, loss, targets, in_order), replay_buffer)
    acts_in_bounds(model[0], env)
    if loss_class is POGOLoss:
        last = loss.actor(-1)
        acts_in_bounds(last, env)
        td = replay_buffer.sample().select("observation")
        assert not torch.equal(last(td.clone())["action"], model[0](td)["action"])


@pytest.mark.slow
@pytest.mark.parametrize("actor", [deterministic_actor, transport_actor])
def test_the_compiled_recipe_trains(env, replay_buffer, actor):
    cfg = SimpleNamespace(**{**vars(CFG), "w2_backend": "fast"})
    model = make_model(cfg, env, actor)
    loss, targets = make_loss_module(cfg, model, env.action_spec_unbatched, POGOLoss)
    update = compile_with_warmup(make_update(cfg, loss, targets), mode="default", warmup=1)
    trains(cfg, loss, update, replay_buffer)
    acts_in_bounds(loss.actor(-1), env)


def test_a_chain_of_one_deterministic_actor_is_td3_bc(make_batch):
    """The same losses and gradients; without target noise, whose draws differ."""
    spec, batch = Bounded(low=-torch.ones(2), high=torch.ones(2)), make_batch(16)
    cfg = SimpleNamespace(**{**vars(CFG), "policy_noise": 0.0, "w2_weights": [1.0]})
    found = []
    for loss_class in (TD3BCLoss, POGOLoss):
        torch.manual_seed(1)
        qvalue_net = MLP(num_cells=[16], out_features=1)
        qvalue = ValueOperator(qvalue_net, in_keys=["action", "observation"])
        model = nn.ModuleList([deterministic_actor(cfg, spec), qvalue])
        for net in model:
            net(batch.clone())
        loss, _ = make_loss_module(cfg, model, spec, loss_class)
        for params in (loss.qvalue_network_params, loss.target_qvalue_network_params):
            torch.manual_seed(2)
            params.data.apply_(lambda p: p.copy_(torch.randn_like(p)))
        q_loss, actor_loss = loss.qvalue_loss(batch)[0], loss.actor_loss(batch)[0]
        (q_loss + actor_loss).backward()
        grads = [p.grad for p in loss.actor_network_params.values(True, True) if p.requires_grad]
        found.append([q_loss.detach(), actor_loss.detach(), *grads])
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_actor_network_params_are_the_trained_parameters(make_loss):
    loss = make_loss()
    together = [p for p in loss.actor_network_params.values(True, True) if p.requires_grad]
    each = [*loss.actor_params(0), *loss.actor_params(1)]
    assert {id(p) for p in together} == {id(p) for p in each}
