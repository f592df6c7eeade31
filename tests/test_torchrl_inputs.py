"""What TorchRL's users pass: specs of any environment, lazy networks, scalars, several agents."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torch.testing import assert_close
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import GymEnv, RenameTransform, SerialEnv, TransformedEnv
from torchrl.modules import (
    MLP,
    Actor,
    NormalParamExtractor,
    ProbabilisticActor,
    TanhNormal,
    ValueOperator,
)

from pogo_torchrl import POGOLoss, POGOTrainer, TransportActor, make_actor, make_qvalue
from pogo_torchrl.modules import make_transport_net
from pogo_torchrl.trainers.checkpoints import is_intact


def pendulum():
    return GymEnv("Pendulum-v1", device="cpu")


class TestSpecs:
    @pytest.mark.parametrize("name", ["action_spec", "full_action_spec"])
    def test_a_batched_environment(self, name):
        env = SerialEnv(3, pendulum)
        actor = make_actor(3, getattr(env, name), (8,))
        assert actor.action_spec.shape == (1,)
        assert actor.action_scale.tolist() == [2.0]
        assert env.rollout(2, actor)["action"].shape == (3, 2, 1)
        assert actor(observation=torch.zeros(7, 3)).shape == (7, 1)
        env.close()

    def test_an_environment_with_another_action_key(self):
        env = TransformedEnv(pendulum(), RenameTransform([], [], ["action"], ["torque"]))
        actor = make_actor(3, env.full_action_spec, (8,))
        assert actor.out_keys == ["torque"]
        assert env.rollout(2, actor)["torque"].shape == (2, 1)
        env.close()

    def test_the_only_entry_of_a_composite(self, wide_spec):
        spec = Composite(agents=Composite(move=wide_spec.expand(4, 2), shape=(4,)))
        assert make_actor(3, spec, (8,)).out_keys == [("agents", "move")]
        actor = TransportActor(make_transport_net(3, 2, (8,)), spec)
        assert actor.action_spec == wide_spec
        assert actor.out_keys == ["action"]

    def test_several_entries_are_named(self, unit_spec):
        with pytest.raises(ValueError, match=r"no entry 'action', but \['left', 'right'\]"):
            make_actor(3, Composite(left=unit_spec, right=unit_spec))
        with pytest.raises(ValueError, match=r"no entry 'action', but \[\]"):
            make_actor(3, Composite())

    @pytest.mark.parametrize("composite", [False, True])
    def test_bounds_that_differ_between_agents_are_rejected(self, composite):
        spec = Bounded(low=-torch.ones(2, 1), high=torch.tensor([[1.0], [2.0]]))
        with pytest.raises(ValueError, match=r"shape \[2, 1\], and its bounds differ"):
            make_actor(3, Composite(action=spec, shape=(2,)) if composite else spec)

    def test_the_spec_of_torchrls_actors_gives_the_bounds(self, wide_spec):
        qvalue = make_qvalue(3, 2, (8,))
        for actor in (
            Actor(nn.Linear(3, 2), spec=wide_spec),
            Actor(nn.Linear(3, 2), spec=Composite(action=wide_spec)),
            gaussian_actor(spec=wide_spec),
            gaussian_actor(spec=wide_spec, out_keys=["torque"]),
        ):
            loss = POGOLoss(actor, qvalue, w2_weights=(0.2,))
            assert torch.equal(loss.min_action, wide_spec.space.low)
            assert torch.equal(loss.max_action, wide_spec.space.high)

    def test_the_spec_of_an_actor_is_no_bound_without_numbers(self, unit_spec):
        qvalue = make_qvalue(3, 2, (8,))
        for actor in (Actor(nn.Linear(3, 2)), gaussian_actor(), Unspecified()):
            with pytest.raises(ValueError, match="needs action bounds"):
                POGOLoss(actor, qvalue, w2_weights=(0.2,))
        with pytest.raises(ValueError, match="must be a Bounded spec, got Unbounded"):
            POGOLoss(Actor(nn.Linear(3, 2), spec=Unbounded(shape=(2,))), qvalue, w2_weights=(0.2,))


def gaussian_actor(**kwargs):
    net = nn.Sequential(nn.Linear(3, 4), NormalParamExtractor())
    net = TensorDictModule(net, ["observation"], ["loc", "scale"])
    return ProbabilisticActor(
        net, in_keys=["loc", "scale"], distribution_class=TanhNormal, **kwargs
    )


class Unspecified(TensorDictModule):
    """An actor whose ``spec`` is something else."""

    spec = "v2"

    def __init__(self):
        super().__init__(nn.Linear(3, 2), ["observation"], ["action"])


class TestLazyNetworks:
    @pytest.fixture
    def networks(self, unit_spec):
        actor = TransportActor(MLP(out_features=2, num_cells=[8]), unit_spec)
        critic = MLP(out_features=1, num_cells=[8])
        return actor, ValueOperator(critic, in_keys=["observation", "action"])

    def test_unknown_sizes_are_rejected(self, networks, unit_spec):
        actor, qvalue = networks
        with pytest.raises(ValueError, match=r"the actor has lazy layers.*module\.0\.weight"):
            POGOLoss(actor, make_qvalue(3, 2))
        with pytest.raises(ValueError, match=r"qvalue_network\(batch\), before it is passed"):
            POGOLoss(make_actor(3, unit_spec), [qvalue, qvalue])

    def test_after_a_call_they_are_networks_like_others(self, networks, make_batch):
        batch = make_batch()
        for network in networks:
            network(batch.clone())
        loss = POGOLoss(*networks, w2_weights=(0.2, 0.5))
        out = loss(batch)
        (out["loss_actor"] + out["loss_qvalue"]).backward()
        assert all(p.grad.abs().sum() > 0 for p in loss.actor_params(1))


NUMBERS = {
    "alpha": 0.5, "num_samples": 3, "num_qvalue_nets": 3, "blur": 0.1, "w2_fraction": 0.5,
    "policy_noise": 0.1, "noise_clip": 0.3, "data_weight": 0.25, "critic_bc_weight": 0.0,
    "average_actors": 0.125, "advantage_temperature": 1.0,
}  # fmt: skip


class TestScalars:
    @pytest.mark.parametrize("kind", [np.asarray, torch.tensor, "generic"])
    def test_settings_of_the_loss(self, make_loss, make_batch, kind):
        def scalar(value):
            if kind == "generic":
                return np.int64(value) if isinstance(value, int) else np.float64(value)
            return kind(value)

        batch, outputs = make_batch(), []
        for convert in (lambda value: value, scalar):
            torch.manual_seed(0)
            loss = make_loss(**{name: convert(value) for name, value in NUMBERS.items()})
            outputs.append(loss(batch.clone()))
        for name, value in NUMBERS.items():
            found = getattr(loss, name)
            assert found == pytest.approx(value)
            assert type(found) is type(value)
        assert_close(outputs[0].to_dict(), outputs[1].to_dict())

    @pytest.mark.parametrize("kind", [np.float32, torch.tensor])
    def test_step_sizes(self, make_loss, kind):
        plain = make_loss(step_sizes=0.5, alpha=2.0)
        assert make_loss(step_sizes=kind(0.5), alpha=kind(2.0)).w2_weights == plain.w2_weights
        assert make_loss(step_sizes=kind([0.5, 0.5]), alpha=2.0).w2_weights == plain.w2_weights

    @pytest.mark.parametrize(
        "kwargs",
        [
            {"alpha": np.float32(-1)},
            {"alpha": torch.ones(2)},
            {"num_samples": np.float64(4)},
            {"num_samples": np.True_},
            {"w2_fraction": torch.tensor(0.0)},
            {"blur": np.array([0.1])},
            {"average_actors": np.float32(2)},
        ],
        ids=str,
    )
    def test_out_of_range_scalars_are_still_rejected(self, make_loss, kwargs):
        with pytest.raises(ValueError, match=next(iter(kwargs))):
            make_loss(**kwargs)

    @pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
    def test_settings_of_the_trainer(self, make_loss, make_buffer, tmp_path, kind):
        numbers = {
            "total_steps": 4, "policy_freq": 2, "checkpoint_interval": 2, "keep_checkpoints": 1,
            "lr": 2**-10, "clip_grad_norm": 1.0, "tau": 2**-7, "freeze_critics_at": 0.5,
        }  # fmt: skip
        weights = []
        for i, convert in enumerate((lambda value: value, kind)):
            torch.manual_seed(0)
            settings = {name: convert(value) for name, value in numbers.items()}
            folder = tmp_path / str(i)
            trainer = POGOTrainer(
                make_loss(), make_buffer(), checkpoint_dir=folder, progress_bar=False, **settings
            )
            trainer.train()
            assert is_intact(next(folder.glob("step*")))
            weights.append(trainer.loss_module.state_dict())
        assert_close(*weights, rtol=0, atol=0)

    def test_invalid_settings_of_the_trainer_are_still_rejected(self, make_loss, make_buffer):
        with pytest.raises(ValueError, match="total_steps=0 must be an integer >= 1"):
            POGOTrainer(make_loss(), make_buffer(), np.int64(0))


class TestSeveralAgents:
    def agents(self, make_batch):
        """A batch of 8 with 3 agents, whose batch size is [8]; the same of batch size [8, 3]."""
        full = make_batch(8, 3)
        few = full.clone()
        few["next"].batch_size = few.batch_size = [8]
        return few, full

    @pytest.mark.parametrize("shared_noise", [False, True])
    @pytest.mark.parametrize("w2_fraction", [1.0, 0.5])
    def test_the_batch_size_does_not_matter(self, make_loss, make_batch, shared_noise, w2_fraction):
        loss = make_loss(shared_noise=shared_noise, w2_fraction=w2_fraction, data_weight=0.5)
        outputs = []
        for batch in self.agents(make_batch):
            torch.manual_seed(0)
            outputs.append(loss(batch))
            assert batch["td_error"].shape == (8, 3)
        assert_close(outputs[0].to_dict(), outputs[1].to_dict())

    def test_as_many_agents_as_samples_are_not_confused(self, unit_spec, make_batch):
        """Of an actor that draws its own noise, samples are not mistaken for agents."""
        actor = Actor(nn.Linear(3, 2), spec=unit_spec)
        loss = POGOLoss(actor, make_qvalue(3, 2, (8,)), w2_weights=(0.2, 0.5), num_samples=3)
        few, full = self.agents(make_batch)
        assert_close(loss.actor_loss(few, 1)[1], loss.actor_loss(full, 1)[1])

    def test_nested_keys(self, unit_spec):
        keys = {name: ("agents", name) for name in ("action", "reward", "done", "terminated")}
        actor = TransportActor(
            make_transport_net(3, 2, (8,)),
            unit_spec,
            in_keys=[("agents", "observation")],
            out_keys=[keys["action"]],
            noise_key=("agents", "noise"),
        )
        qvalue = ValueOperator(
            MLP(5, 1, num_cells=[8]),
            in_keys=[("agents", "observation"), keys["action"]],
            out_keys=[("agents", "state_action_value")],
        )
        loss = POGOLoss(actor, qvalue, w2_weights=(0.2, 0.5))
        loss.set_keys(
            **keys,
            state_action_value=("agents", "state_action_value"),
            priority=("agents", "td_error"),
        )
        loss.make_value_estimator(gamma=0.9)
        flags = torch.zeros(8, 3, 1, dtype=torch.bool)
        agents = {"observation": torch.randn(8, 3, 3), "action": unit_spec.rand([8, 3])}
        following = {
            "observation": torch.randn(8, 3, 3),
            "reward": torch.randn(8, 3, 1),
            "done": flags,
            "terminated": flags,
        }
        batch = TensorDict({"agents": agents, "next": {"agents": following}}, [8])
        out = loss(batch)
        (out["loss_actor"] + out["loss_qvalue"]).backward()
        assert all(p.grad.abs().sum() > 0 for p in loss.actor_params(1))

    def test_one_state_for_all_agents_is_rejected(self, make_loss, make_batch):
        few, _ = self.agents(make_batch)
        few["observation"] = torch.randn(8, 5)
        with pytest.raises(ValueError, match=r"'observation' has shape \(8, 5\).*\(8, 3\)"):
            make_loss().actor_loss(few, 1)

    def test_one_reward_for_all_agents_is_rejected(self, make_loss, make_batch):
        few, _ = self.agents(make_batch)
        few["next", "reward"] = torch.randn(8, 1)
        with pytest.raises(ValueError, match=r"reward.*\(8, 1\), but must be \(8, 3, 1\)"):
            make_loss()(few)
