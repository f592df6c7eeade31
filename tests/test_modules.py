"""The transport-map actor as a TorchRL policy, the critic, and reinitialised copies."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import GymEnv
from torchrl.envs.utils import ExplorationType, check_env_specs, set_exploration_type

from pogo_torchrl import TransportActor, make_actor, make_qvalue
from pogo_torchrl.modules import Normalized, fresh_copies, make_transport_net

DETERMINISTIC = [ExplorationType.DETERMINISTIC, ExplorationType.MEAN, ExplorationType.MODE]


def states(*batch_size):
    return TensorDict({"observation": torch.randn(*batch_size, 3)}, batch_size)


@pytest.fixture
def actor(wide_spec):
    return make_actor(3, wide_spec, (8, 8))


class TestExploration:
    def test_random_draws_independent_noise_per_call_and_state(self, actor):
        td = states(3).apply(lambda x: x[:1].expand(3, 3))
        with set_exploration_type(ExplorationType.RANDOM):
            first, second = actor(td.copy())["action"], actor(td.copy())["action"]
        assert len(torch.cat([first, second]).unique(dim=0)) == 6

    @pytest.mark.parametrize("kind", DETERMINISTIC)
    def test_deterministic_types_act_with_zero_noise(self, actor, kind):
        td = states(5)
        with set_exploration_type(kind):
            action = actor(td.copy())["action"]
        assert torch.equal(action, actor(td.copy().set("noise", torch.zeros(5, 2)))["action"])

    def test_without_an_exploration_type_it_is_deterministic(self, actor):
        td = states(5)
        zero = actor(td.copy().set("noise", torch.zeros(5, 2)))["action"]
        assert torch.equal(actor(td)["action"], zero)

    @pytest.mark.parametrize("kind", [*DETERMINISTIC, ExplorationType.RANDOM, None])
    def test_noise_in_the_tensordict_overrides_the_exploration_type(self, actor, kind):
        td = states(5).set("noise", torch.randn(5, 2))
        expected = actor(td.copy())["action"]
        with set_exploration_type(kind):
            assert torch.equal(actor(td.copy())["action"], expected)

    def test_the_action_depends_on_the_noise_and_on_the_state(self, actor):
        td = states(5).set("noise", torch.randn(5, 2))
        action = actor(td.copy())["action"]
        assert (actor(td.copy().set("noise", torch.randn(5, 2)))["action"] != action).any()
        assert (actor(td.copy().set("observation", torch.randn(5, 3)))["action"] != action).any()

    def test_random_noise_is_standard_normal_and_of_the_action_dimension(self, wide_spec):
        seen = []

        class Spy(nn.Module):
            def forward(self, observation, noise):
                seen.append(noise)
                return noise

        with set_exploration_type(ExplorationType.RANDOM):
            TransportActor(Spy(), wide_spec)(states(20_000))
        assert seen[0].shape == (20_000, 2)
        torch.testing.assert_close(seen[0].mean(0), torch.zeros(2), rtol=0, atol=0.03)
        torch.testing.assert_close(seen[0].T.cov(), torch.eye(2), rtol=0, atol=0.05)


class TestActions:
    def test_it_is_the_scaled_tanh_of_the_network(self, actor):
        td = states(5).set("noise", torch.randn(5, 2))
        raw = actor.module(td["observation"], td["noise"]).tanh()
        expected = torch.tensor([1.0, 1.25]) + torch.tensor([2.0, 0.75]) * raw
        torch.testing.assert_close(actor(td)["action"], expected)

    @pytest.mark.parametrize("sign", [-1, 1])
    def test_saturated_networks_reach_the_bounds(self, wide_spec, sign):
        actor = TransportActor(make_transport_net(3, 2, (8,)), wide_spec)
        nn.init.constant_(actor.module.mlp[-1].bias, sign * 100.0)
        bound = wide_spec.space.high if sign > 0 else wide_spec.space.low
        torch.testing.assert_close(actor(states(5))["action"], bound.expand(5, 2))

    @pytest.mark.parametrize("batch_size", [(), (5,), (2, 3, 4)])
    def test_any_batch_shape_gives_actions_inside_the_spec(self, actor, wide_spec, batch_size):
        with set_exploration_type(ExplorationType.RANDOM):
            action = actor(states(*batch_size))["action"]
        assert action.shape == (*batch_size, 2)
        assert wide_spec.expand(*batch_size, 2).is_in(action)

    def test_a_batch_is_the_stack_of_its_rows(self, actor):
        td = states(4).set("noise", torch.randn(4, 2))
        rows = torch.stack([actor(td[i].clone())["action"] for i in range(4)])
        torch.testing.assert_close(actor(td)["action"], rows)

    def test_gradients_reach_the_state_and_the_noise(self, actor):
        s, z = torch.randn(5, 3, requires_grad=True), torch.randn(5, 2, requires_grad=True)
        actor(observation=s, noise=z).sum().backward()
        assert s.grad.abs().sum() > 0
        assert z.grad.abs().sum() > 0

    def test_float64_is_preserved(self, actor):
        actor = actor.double()
        with set_exploration_type(ExplorationType.RANDOM):
            action = actor(states(5).double())["action"]
        assert action.dtype == torch.float64


class TestInterface:
    def test_dispatch_by_keyword_by_position_and_by_tensordict_agree(self, actor):
        s, z = torch.randn(5, 3), torch.randn(5, 2)
        expected = actor(TensorDict({"observation": s, "noise": z}, [5]))["action"]
        assert torch.equal(actor(observation=s, noise=z), expected)
        assert torch.equal(actor(s, z), expected)

    def test_dispatch_without_noise(self, actor):
        s = torch.randn(5, 3)
        assert torch.equal(actor(s), actor(s, torch.zeros(5, 2)))
        assert torch.equal(actor(observation=s), actor(s))

    def test_keys(self, actor):
        assert actor.in_keys == ["observation"]
        assert actor.out_keys == ["action"]

    def test_custom_and_nested_keys(self, wide_spec):
        actor = TransportActor(
            make_transport_net(3, 2, (8,)),
            Composite(agent=Composite(move=wide_spec)),
            in_keys=[("agent", "obs")],
            out_keys=[("agent", "move")],
            noise_key=("agent", "z"),
        )
        td = TensorDict({"agent": {"obs": torch.randn(5, 3), "z": torch.randn(5, 2)}}, [5])
        expected = actor.module(td["agent", "obs"], td["agent", "z"]).tanh()
        expected = torch.tensor([1.0, 1.25]) + torch.tensor([2.0, 0.75]) * expected
        torch.testing.assert_close(actor(td)["agent", "move"], expected)

    def test_only_the_action_is_written(self, actor):
        td = states(5)
        assert actor(td) is td
        assert set(td.keys()) == {"observation", "action"}

    def test_state_dict_round_trip(self, actor, wide_spec):
        twin = make_actor(3, wide_spec, (8, 8))
        td = states(5).set("noise", torch.randn(5, 2))
        assert not torch.equal(twin(td.copy())["action"], actor(td.copy())["action"])
        twin.load_state_dict(actor.state_dict())
        assert torch.equal(twin(td.copy())["action"], actor(td.copy())["action"])

    def test_deepcopy_is_independent(self, actor):
        td = states(5)
        twin, before = copy.deepcopy(actor), actor(td.copy())["action"]
        nn.init.zeros_(actor.module.mlp[-1].weight)
        assert torch.equal(twin(td.copy())["action"], before)

    def test_it_works_inside_a_tensordict_sequential(self, actor):
        chain = TensorDictSequential(actor, make_qvalue(3, 2, (8,)))
        assert chain(states(5))["state_action_value"].shape == (5, 1)

    def test_normalized_takes_raw_observations(self, actor, wide_spec):
        mean, std = torch.randn(3), torch.rand(3) + 0.5
        raw = TransportActor(Normalized(actor.module, mean, std), wide_spec)
        s, z = torch.randn(5, 3), torch.randn(5, 2)
        torch.testing.assert_close(raw(s * std + mean, z), actor(s, z))


class TestActionSpec:
    @pytest.mark.parametrize("leading", [(), (4,), (4, 2)])
    def test_the_action_spec_of_a_composite(self, wide_spec, leading):
        spec = Composite(action=wide_spec.expand(*leading, 2), shape=leading)
        actor = make_actor(3, spec, (8,))
        assert actor.action_spec == wide_spec
        assert actor.noise_dim == 2

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            (Unbounded(shape=(2,)), "must be a Bounded"),
            (Categorical(3), "must be a Bounded"),
            (Composite(action=Unbounded(shape=(2,))), "must be a Bounded"),
            (Bounded(low=torch.zeros(2), high=torch.tensor([1.0, math.inf])), "finite"),
            (Bounded(low=torch.tensor([-math.inf, 0.0]), high=torch.ones(2)), "finite"),
            (Bounded(low=-1, high=1, shape=()), "shape"),
            (Bounded(low=torch.zeros(2), high=torch.tensor([1.0, -1.0])), "not below"),
            (Bounded(low=torch.zeros(2), high=torch.tensor([1.0, 0.0])), "not below"),
        ],
        ids=["unbounded", "discrete", "nested", "inf", "-inf", "no dims", "inverted", "empty"],
    )
    def test_specs_without_valid_bounds_raise(self, spec, message):
        with pytest.raises(ValueError, match=message):
            make_actor(3, spec)
        with pytest.raises(ValueError, match=message):
            TransportActor(make_transport_net(3, 2, (8,)), spec)


@pytest.fixture(scope="module")
def env():
    env = GymEnv("Pendulum-v1", device="cpu")
    yield env
    env.close()


class TestInEnvironment:
    def test_it_is_a_policy(self, env):
        check_env_specs(env)
        actor = make_actor(3, env.action_spec, (8,))
        env.set_seed(0)
        with set_exploration_type(ExplorationType.RANDOM):
            rollout = env.rollout(10, actor)
        assert rollout.shape == (10,)
        assert rollout["action"].abs().max() <= 2  # Pendulum's bound
        noise_free = actor(rollout.select("observation"))["action"]
        assert not torch.allclose(rollout["action"], noise_free)

    @pytest.mark.parametrize("kind", DETERMINISTIC)
    def test_deterministic_rollouts_repeat(self, env, kind):
        actor = make_actor(3, env.full_action_spec, (8,))
        with set_exploration_type(kind):
            rollouts = []
            for _ in range(2):
                env.set_seed(0)
                rollouts.append(env.rollout(10, actor))
        assert torch.equal(*(r["next", "reward"] for r in rollouts))


class TestQValue:
    @pytest.mark.parametrize("layer_norm", [False, True])
    def test_layers(self, layer_norm):
        qvalue = make_qvalue(3, 2, (8, 16), layer_norm=layer_norm)
        kinds = [type(m) for m in qvalue.module]
        hidden = [nn.Linear, nn.LayerNorm, nn.ReLU] if layer_norm else [nn.Linear, nn.ReLU]
        assert sorted(map(str, kinds)) == sorted(map(str, [*hidden, *hidden, nn.Linear]))
        assert [m.out_features for m in qvalue.module if isinstance(m, nn.Linear)] == [8, 16, 1]
        norms = [m.normalized_shape for m in qvalue.module if isinstance(m, nn.LayerNorm)]
        assert norms == ([(8,), (16,)] if layer_norm else [])

    @pytest.mark.parametrize("layer_norm", [False, True])
    def test_value_equals_a_plain_network_on_state_and_action(self, layer_norm):
        qvalue = make_qvalue(3, 2, (8,), layer_norm=layer_norm)
        layers = list(qvalue.module)
        s, a = torch.randn(5, 3), torch.randn(5, 2)
        value = torch.cat([s, a], -1)
        value = layers[0](value)
        if layer_norm:
            norm = next(m for m in layers if isinstance(m, nn.LayerNorm))
            value = nn.functional.layer_norm(value, (8,), norm.weight, norm.bias)
        value = layers[-1](value.relu())
        torch.testing.assert_close(qvalue(observation=s, action=a), value)

    @pytest.mark.parametrize("batch_size", [(), (5,), (2, 3)])
    def test_one_value_per_state_and_action(self, batch_size):
        td = states(*batch_size).set("action", torch.randn(*batch_size, 2))
        assert make_qvalue(3, 2, (8,))(td)["state_action_value"].shape == (*batch_size, 1)

    def test_keys(self):
        qvalue = make_qvalue(3, 2)
        assert qvalue.in_keys == ["observation", "action"]
        assert qvalue.out_keys == ["state_action_value"]

    def test_default_widths_are_256_256(self, unit_spec):
        for module in (make_qvalue(3, 2), make_actor(3, unit_spec)):
            linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
            assert [(m.in_features, m.out_features) for m in linears[:2]] == [(5, 256), (256, 256)]
            assert linears[2].in_features == 256


class TestFreshCopies:
    def test_the_first_is_the_module_itself_and_all_differ(self):
        module = make_transport_net(3, 2, (8,))
        copies = fresh_copies(module, 3, "actor")
        assert copies[0] is module
        for name in dict(module.named_parameters()):
            values = [dict(c.named_parameters())[name] for c in copies]
            assert not any(torch.equal(values[i], values[j]) for i, j in [(0, 1), (0, 2), (1, 2)])

    def test_the_original_module_is_unchanged(self):
        module = make_transport_net(3, 2, (8,))
        before = copy.deepcopy(module.state_dict())
        fresh_copies(module, 3, "actor")
        assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())

    def test_copies_use_the_initialisation_of_the_layers(self):
        twin = fresh_copies(nn.Sequential(nn.Linear(100, 50), nn.LayerNorm(50)), 2, "critic")[1]
        bound = 1 / math.sqrt(100)
        assert 0.9 * bound < twin[0].weight.abs().max() <= bound
        assert torch.equal(twin[1].weight, torch.ones(50))

    @pytest.mark.parametrize("nested", [False, True])
    def test_modules_without_reset_parameters_raise(self, nested):
        class Gain(nn.Module):
            def __init__(self):
                super().__init__()
                self.gain = nn.Parameter(torch.ones(2))

        module = nn.Sequential(nn.Linear(2, 2), Gain()) if nested else Gain()
        with pytest.raises(ValueError, match=r"actor cannot be copied.*Gain"):
            fresh_copies(module, 2, "actor")
        assert fresh_copies(module, 1, "actor") == [module]

    def test_modules_without_parameters_need_no_reset(self):
        module = TensorDictModule(nn.Tanh(), ["observation"], ["action"])
        assert len(fresh_copies(module, 2, "actor")) == 2
