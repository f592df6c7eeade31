"""The loss and its training step against a plain PyTorch implementation of the algorithm.

``Plain`` below is written from the method's equations: nn.Sequential networks, GeomLoss called
directly, one Adam per actor; it shares no code with the package.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from geomloss import SamplesLoss
from tensordict import TensorDict
from torch import nn
from torch.nn.functional import mse_loss
from torchrl.data import Bounded
from torchrl.objectives import SoftUpdate

from pogo_torchrl import POGOLoss, make_actor, make_qvalue
from pogo_torchrl.training import POGOOptimizationStepper

OBS, ACT, BATCH = 3, 2, 16
GAMMA, SIGMA, CLIP, BLUR = 0.9, 0.4, 0.5, 0.05
WEIGHTS = (0.3, 0.5, 2.0)
BOUNDS = {
    "unit": ((-1.0, -1.0), (1.0, 1.0)),
    "asymmetric": ((-1.0, 0.5), (3.0, 2.0)),
}


def plain_net(n_in, n_out):
    return nn.Sequential(
        nn.Linear(n_in, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, n_out)
    )


def noisy_copy(net):
    net = copy.deepcopy(net).requires_grad_(False)
    for p in net.parameters():
        p.add_(0.1 * torch.randn_like(p))
    return net


def copy_weights(source, destination):
    for p, q in zip(source.parameters(), destination.parameters(), strict=True):
        q.data.copy_(p.data)
    return destination


def layers(params):
    """``{"0.weight": ..., "0.bias": ..., "2.weight": ...}`` of a network's TensorDict."""
    return {
        ".".join(key[-2:]): value
        for key, value in params.items(True, True)
        if key[-1] in ("weight", "bias")
    }


class Plain:
    """The algorithm in plain PyTorch, all draws of noise given from outside."""

    def __init__(self, low, high, *, q_normalization, alpha, num_samples, delay_actor, dtype):
        self.low, self.high = torch.tensor(low, dtype=dtype), torch.tensor(high, dtype=dtype)
        self.q_normalization, self.alpha = q_normalization, alpha
        self.num_samples, self.delay_actor, self.dtype = num_samples, delay_actor, dtype
        self.actors = [plain_net(OBS + ACT, ACT).to(dtype) for _ in WEIGHTS]
        self.critics = [plain_net(OBS + ACT, 1).to(dtype) for _ in range(2)]
        # Targets that differ from the online networks, as they do during training.
        self.target_actors = [noisy_copy(net) for net in self.actors]
        self.target_critics = [noisy_copy(net) for net in self.critics]

    def randn(self, *shape):
        return torch.randn(*shape, dtype=self.dtype)

    def act(self, net, s, z):
        middle, half = (self.high + self.low) / 2, (self.high - self.low) / 2
        return middle + half * torch.tanh(net(torch.cat([s, z], -1)))

    def value(self, net, s, a):
        return net(torch.cat([s, a], -1))[..., 0]

    def unit(self, a):
        return -1 + 2 * (a - self.low) / (self.high - self.low)

    def qvalue_loss(self, batch, noise=None):
        z, n = noise or (self.randn(BATCH, ACT), self.randn(BATCH, ACT))
        with torch.no_grad():
            s = batch["next", "observation"]
            a = self.act(self.target_actors[0] if self.delay_actor else self.actors[0], s, z)
            a = a + torch.clip(SIGMA * n, -CLIP, CLIP) * (self.high - self.low) / 2
            a = torch.minimum(torch.maximum(a, self.low), self.high)
            q = torch.minimum(*(self.value(net, s, a) for net in self.target_critics))
            alive = 1 - batch["next", "terminated"][:, 0].to(self.dtype)
            y = batch["next", "reward"][:, 0] + GAMMA * alive * q
        s, a = batch["observation"], batch["action"]
        return sum(mse_loss(self.value(net, s, a), y) for net in self.critics)

    def actor_loss(self, batch, i, noise=None):
        k = self.num_samples
        z, z_own, z_reference = noise or (
            self.randn(BATCH, ACT),
            self.randn(BATCH, k, ACT),
            self.randn(BATCH, k, ACT),
        )
        s = batch["observation"]
        a = self.act(self.actors[i], s, z)
        q = self.value(self.critics[0], s, a)
        scale = self.alpha / q.abs().mean().item() if self.q_normalization else self.alpha
        if i == 0:
            distance = mse_loss(self.unit(a), self.unit(batch["action"]))
        else:
            s = s[:, None].expand(-1, k, -1)
            own = self.unit(self.act(self.actors[i], s, z_own))
            reference = self.unit(self.act(self.actors[i - 1], s, z_reference)).detach()
            divergence = SamplesLoss("sinkhorn", p=2, blur=BLUR, backend="tensorized")
            distance = divergence(own, reference.contiguous()).mean()
        return -scale * q.mean() + WEIGHTS[i] * distance

    def as_pogo_loss(self):
        """A POGOLoss of the same weights and settings."""
        spec = Bounded(low=self.low, high=self.high)
        actors = [
            copy_weights(net, make_actor(OBS, spec, (16, 16)).to(self.dtype)) for net in self.actors
        ]
        critics = [
            copy_weights(net, make_qvalue(OBS, ACT, (16, 16)).to(self.dtype))
            for net in self.critics
        ]
        loss = POGOLoss(
            actors,
            critics,
            w2_weights=WEIGHTS,
            num_samples=self.num_samples,
            blur=BLUR,
            policy_noise=SIGMA,
            noise_clip=CLIP,
            q_normalization=self.q_normalization,
            alpha=self.alpha,
            delay_actor=self.delay_actor,
        ).make_value_estimator(gamma=GAMMA)
        self.load_targets(loss)
        return loss

    def load_targets(self, loss):
        targets = [(self.target_critics, loss.target_qvalue_network_params)]
        if self.delay_actor:
            targets.append((self.target_actors, loss.target_actor_network_params))
        for nets, params in targets:
            for i, net in enumerate(nets):
                for name, value in layers(params.data[i]).items():
                    value.copy_(net.get_parameter(name))


@pytest.fixture
def make_plain():
    def make(bounds="unit", *, dtype=torch.float64, **kwargs):
        settings = {
            "q_normalization": "mean_abs",
            "alpha": 1.0,
            "num_samples": 4,
            "delay_actor": False,
        }
        return Plain(*BOUNDS[bounds], **{**settings, **kwargs}, dtype=dtype)

    return make


def make_batch(plain):
    """Transitions of which a quarter are terminal and a quarter mere time-outs."""
    rows = torch.arange(BATCH)[:, None]
    return TensorDict(
        {
            "observation": plain.randn(BATCH, OBS),
            "action": plain.low + (plain.high - plain.low) * torch.rand(BATCH, ACT).to(plain.low),
            "next": {
                "observation": plain.randn(BATCH, OBS),
                "reward": plain.randn(BATCH, 1),
                "done": rows % 2 == 0,
                "terminated": rows % 4 == 0,
            },
        },
        [BATCH],
    )


@pytest.fixture
def draws(monkeypatch):
    """The noise that ``draw_noise`` gave last."""
    recorded, draw_noise = {}, POGOLoss.draw_noise

    def recording(*args, **kwargs):
        noise = draw_noise(*args, **kwargs)
        recorded.clear()
        recorded.update({name: z.clone() for name, z in noise.items()})
        return noise

    monkeypatch.setattr(POGOLoss, "draw_noise", recording)
    return recorded


def noise_of_qvalue_loss(draws):
    """``z'`` and the smoothing noise."""
    return draws["target"], draws["smoothing"]


def noise_of_actor_loss(draws, i):
    """K draws for actor i, the first for the Q term too, and K for its reference."""
    own = draws[f"actor_{i}"]
    return own[:, 0], own, draws.get(f"reference_{i}")


def assert_gradients_equal(params, i, net):
    """Slice i of the stacked gradients equals those of a plain network."""
    ours, plain = layers(params), dict(net.named_parameters())
    assert ours.keys() == plain.keys()
    for name, parameter in plain.items():
        assert parameter.grad.abs().sum() > 0
        torch.testing.assert_close(ours[name].grad[i], parameter.grad, rtol=1e-5, atol=1e-9)


def assert_only_slice_has_gradient(params, i):
    for p in params.parameters():
        assert all((g == 0).all() for j, g in enumerate(p.grad) if j != i)


def assert_weights_equal(params, net):
    ours, plain = layers(params), dict(net.named_parameters())
    assert ours.keys() == plain.keys()
    for name, parameter in plain.items():
        torch.testing.assert_close(ours[name].data, parameter.data, rtol=0, atol=1e-6)


settings = pytest.mark.parametrize(
    ("bounds", "q_normalization", "alpha"),
    [
        ("unit", "mean_abs", 1.0),
        ("unit", None, 1.0),
        ("asymmetric", "mean_abs", 2.5),
        ("asymmetric", None, 0.7),
    ],
)


class TestFixedNoise:
    """The same noise gives the same value and the same gradients."""

    @pytest.mark.parametrize("bounds", BOUNDS)
    @pytest.mark.parametrize("delay_actor", [False, True])
    def test_qvalue_loss(self, make_plain, draws, bounds, delay_actor):
        plain = make_plain(bounds, delay_actor=delay_actor)
        loss, batch = plain.as_pogo_loss(), make_batch(plain)
        value, _ = loss.qvalue_loss(batch)
        expected = plain.qvalue_loss(batch, noise_of_qvalue_loss(draws))
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
        value.backward()
        expected.backward()
        for i, net in enumerate(plain.critics):
            assert_gradients_equal(loss.qvalue_network_params, i, net)
        assert all(p.grad is None for p in loss.actor_network_params.parameters())

    @settings
    @pytest.mark.parametrize("index", range(len(WEIGHTS)))
    @pytest.mark.parametrize("num_samples", [1, 4])
    def test_actor_loss(
        self, make_plain, draws, bounds, q_normalization, alpha, index, num_samples
    ):
        plain = make_plain(
            bounds, q_normalization=q_normalization, alpha=alpha, num_samples=num_samples
        )
        loss, batch = plain.as_pogo_loss(), make_batch(plain)
        value, _ = loss.actor_loss(batch, index)
        expected = plain.actor_loss(batch, index, noise_of_actor_loss(draws, index))
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
        value.backward()
        expected.backward()
        assert_gradients_equal(loss.actor_network_params, index, plain.actors[index])
        assert_only_slice_has_gradient(loss.actor_network_params, index)
        assert all(p.grad is None for p in loss.qvalue_network_params.parameters())

    @settings
    def test_metadata(self, make_plain, draws, bounds, q_normalization, alpha):
        plain = make_plain(bounds, q_normalization=q_normalization, alpha=alpha)
        loss, batch = plain.as_pogo_loss(), make_batch(plain)
        value, metadata = loss.actor_loss(batch, 2)
        z, _, _ = noise_of_actor_loss(draws, 2)
        s = batch["observation"]
        q = plain.value(plain.critics[0], s, plain.act(plain.actors[2], s, z))
        scale = alpha / q.abs().mean() if q_normalization else torch.tensor(alpha).to(q)
        torch.testing.assert_close(metadata["q_actor_2"], q.mean().detach())
        torch.testing.assert_close(metadata["lmbd_2"], scale.detach())
        torch.testing.assert_close(metadata["loss_actor_2"], value.detach())
        distance = (value + scale * q.mean()) / WEIGHTS[2]
        torch.testing.assert_close(metadata["w2_2"], distance.detach())


class TestOwnNoise:
    """With noise of their own both implementations have the same mean."""

    repeats = 150

    def assert_same_mean(self, ours, plain):
        samples = torch.stack(
            [torch.stack([f().detach() for _ in range(self.repeats)]) for f in (ours, plain)]
        ).double()
        assert (samples.std(1) > 0).all()
        error = (samples.var(1).sum() / self.repeats).sqrt()
        assert (samples[0].mean() - samples[1].mean()).abs() < 4 * error
        # ... and about the same spread, within 4 standard errors of the ratio's logarithm
        spread = samples.var(1).log().diff().abs()
        assert spread < 4 * (4 / (self.repeats - 1)) ** 0.5

    @pytest.mark.parametrize("delay_actor", [False, True])
    def test_qvalue_loss(self, make_plain, delay_actor):
        plain = make_plain("asymmetric", delay_actor=delay_actor)
        loss, batch = plain.as_pogo_loss(), make_batch(plain)
        self.assert_same_mean(lambda: loss.qvalue_loss(batch)[0], lambda: plain.qvalue_loss(batch))

    @pytest.mark.parametrize("index", range(len(WEIGHTS)))
    def test_actor_loss(self, make_plain, index):
        plain = make_plain("asymmetric", alpha=2.5)
        loss, batch = plain.as_pogo_loss(), make_batch(plain)
        self.assert_same_mean(
            lambda: loss.actor_loss(batch, index)[0], lambda: plain.actor_loss(batch, index)
        )


class TestSequentialUpdate:
    """Three whole updates, with the targets' Polyak steps, end at the same weights."""

    lr, tau = 1e-2, 0.1

    def update(self, plain, optimizers, batch, noise, with_actors):
        """One update in the method's order; ``noise`` holds the draws of each loss in turn."""

        def minimise(name, value):
            optimizers[name].zero_grad()
            value.backward()
            optimizers[name].step()

        minimise("critics", plain.qvalue_loss(batch, noise[0]))
        if with_actors:
            for i in range(len(WEIGHTS)):
                minimise(i, plain.actor_loss(batch, i, noise[1 + i]))
        online = [*plain.critics, *plain.actors]
        for net, target in zip(online, [*plain.target_critics, *plain.target_actors]):
            for p, q in zip(net.parameters(), target.parameters()):
                q.data = (1 - self.tau) * q.data + self.tau * p.data

    @pytest.mark.parametrize("bounds", BOUNDS)
    @pytest.mark.parametrize("policy_freq", [1, 2])
    @pytest.mark.parametrize("delay_actor", [False, True])
    def test_weights_after_three_updates(self, make_plain, draws, bounds, policy_freq, delay_actor):
        plain = make_plain(bounds, delay_actor=delay_actor)
        loss = plain.as_pogo_loss()
        stepper = POGOOptimizationStepper(loss, lr=self.lr, policy_freq=policy_freq)
        updater = SoftUpdate(loss, tau=self.tau)
        plain.load_targets(loss)  # making the updater has set them to the online networks
        critics = [p for net in plain.critics for p in net.parameters()]
        optimizers = {
            "critics": torch.optim.Adam(critics, lr=self.lr),
            **{i: torch.optim.Adam(a.parameters(), lr=self.lr) for i, a in enumerate(plain.actors)},
        }
        trainer = SimpleNamespace(replay_buffer=None)
        for step in range(3):
            batch, with_actors = make_batch(plain), step % policy_freq == 0
            stepper.step(trainer, batch)
            updater.step()
            assert len(draws) == (7 if with_actors else 2)
            noise = [noise_of_qvalue_loss(draws)]
            if with_actors:
                noise += [noise_of_actor_loss(draws, i) for i in range(len(WEIGHTS))]
            self.update(plain, optimizers, batch, noise, with_actors)
        for i, net in enumerate(plain.actors):
            assert_weights_equal(loss.actor_network_params[i], net)
        for i, (net, target) in enumerate(zip(plain.critics, plain.target_critics)):
            assert_weights_equal(loss.qvalue_network_params[i], net)
            assert_weights_equal(loss.target_qvalue_network_params[i], target)
        if delay_actor:
            assert_weights_equal(loss.target_actor_network_params[0], plain.target_actors[0])

    @pytest.mark.parametrize("policy_freq", [1, 2, 3])
    def test_actors_move_only_every_policy_freq_steps(self, make_plain, policy_freq):
        plain = make_plain()
        loss, batch = plain.as_pogo_loss(), make_batch(plain)
        stepper = POGOOptimizationStepper(loss, lr=self.lr, policy_freq=policy_freq)
        for step in range(5):
            before = copy.deepcopy(loss.state_dict())
            metrics = stepper.step(SimpleNamespace(replay_buffer=None), batch)
            moved = {k: (v != before[k]).any() for k, v in loss.state_dict().items() if v.dim() > 1}
            assert {m.item() for k, m in moved.items() if k.startswith("qvalue")} == {True}
            assert {
                m.item()
                for k, m in moved.items()
                if k.startswith("actor") and k.endswith(("weight", "bias"))
            } == {step % policy_freq == 0}
            assert {"loss_qvalue", "loss_actor_0", "loss_actor_2", "w2_1"} <= set(metrics.keys())
            assert not any(v.requires_grad for v in metrics.values())
