"""The loss and its training against plain PyTorch, examples/pogo_single_file.py.

That file implements the equations directly, with nn.Sequential networks, GeomLoss and one
torch.optim.Adam per actor. It shares no code with the loss and the trainer.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from runs import example
from tensordict import TensorDict
from torchrl.data import Bounded, LazyTensorStorage, TensorDictReplayBuffer
from torchrl.objectives import SoftUpdate

from pogo_torchrl import POGOLoss, POGOTrainer, make_actor, make_qvalue
from pogo_torchrl.trainers import POGOOptimizationStepper

single_file = example("pogo_single_file")

OBS, ACT, BATCH = 3, 2, 16
GAMMA, SIGMA, CLIP, BLUR, LR, TAU = 0.9, 0.4, 0.5, 0.05, 1e-2, 0.1
WEIGHTS = (0.3, 0.5, 2.0)
BOUNDS = {
    "unit": ((-1.0, -1.0), (1.0, 1.0)),
    "asymmetric": ((-1.0, 0.5), (3.0, 2.0)),
}


class Plain(single_file.POGO):
    """POGO in plain PyTorch, with targets that differ from the online networks."""

    def __init__(self, low, high, dtype, **settings):
        args = single_file.Args(
            hidden=16, w2_weights=WEIGHTS, blur=BLUR, policy_noise=SIGMA, noise_clip=CLIP,
            gamma=GAMMA, tau=TAU, lr=LR, **settings,
        )  # fmt: skip
        super().__init__(OBS, torch.tensor(low, dtype=dtype), torch.tensor(high, dtype=dtype), args)
        with torch.no_grad():
            for net in [*self.target_actors, *self.target_critics]:
                for p in net.parameters():
                    p.add_(0.1 * torch.randn_like(p))

    def as_pogo_loss(self, **settings):
        """Return a POGOLoss with the same weights and settings."""
        spec, args = Bounded(low=self.low, high=self.high), self.args
        dtype = self.low.dtype
        loss = POGOLoss(
            [copy_weights(n, make_actor(OBS, spec, (16, 16)).to(dtype)) for n in self.actors],
            [copy_weights(n, make_qvalue(OBS, ACT, (16, 16)).to(dtype)) for n in self.critics],
            w2_weights=WEIGHTS,
            num_samples=args.num_samples,
            blur=BLUR,
            policy_noise=SIGMA,
            noise_clip=CLIP,
            q_normalization=args.q_normalization,
            alpha=args.alpha,
            delay_actor=args.delay_actor,
            **settings,
        ).make_value_estimator(gamma=GAMMA)
        self.load_targets(loss)
        return loss

    def load_targets(self, loss):
        """Copy the targets to a loss."""
        stacked = loss.target_qvalue_network_params.data
        targets = [(net, stacked[i]) for i, net in enumerate(self.target_critics)]
        if self.args.delay_actor:
            targets.append((self.target_actors[0], loss.target_actor_network_0_params.data))
        for net, params in targets:
            for name, value in layers(params).items():
                value.copy_(net.get_parameter(name).data)


def copy_weights(source, destination):
    for p, q in zip(source.parameters(), destination.parameters(), strict=True):
        q.data.copy_(p.data)
    return destination


def layers(params):
    """Map the TensorDict of a network to ``{"0.weight": ..., "0.bias": ..., ...}``."""
    return {
        ".".join(key[-2:]): value
        for key, value in params.items(True, True)
        if key[-1] in ("weight", "bias")
    }


@pytest.fixture
def make_plain():
    def make(bounds="unit", *, dtype=torch.float64, **kwargs):
        return Plain(*BOUNDS[bounds], dtype, **kwargs)

    return make


def make_rows(plain, count=BATCH):
    """Transitions of which a quarter are terminal and a quarter are time-outs."""
    rows, like = torch.arange(count)[:, None], plain.low
    return TensorDict(
        {
            "observation": torch.randn(count, OBS).to(like),
            "action": plain.low + (plain.high - plain.low) * torch.rand(count, ACT).to(like),
            "next": {
                "observation": torch.randn(count, OBS).to(like),
                "reward": torch.randn(count, 1).to(like),
                "done": rows % 2 == 0,
                "terminated": rows % 4 == 0,
            },
        },
        [count],
    )


def columns(batch):
    """Convert a batch to the tuple that the plain implementation expects."""
    end = batch["next", "terminated"][:, 0].to(batch["action"])
    s, a, r = batch["observation"], batch["action"], batch["next", "reward"][:, 0]
    return s, a, r, batch["next", "observation"], end


@pytest.fixture
def draws(monkeypatch):
    """Record the noise of the last call of ``draw_noise``."""
    recorded, draw_noise = {}, POGOLoss.draw_noise

    def recording(*args, **kwargs):
        noise = draw_noise(*args, **kwargs)
        recorded.clear()
        recorded.update({name: z.clone() for name, z in noise.items()})
        return noise

    monkeypatch.setattr(POGOLoss, "draw_noise", recording)
    return recorded


def noise_of_qvalue_loss(draws):
    """``z'`` and the smoothing noise of the TD target."""
    return draws["target"], draws["smoothing"]


def noise_of_actor_loss(draws, i):
    """K draws for actor i, the first also for the Q term, and K draws for its reference."""
    own = draws[f"actor_{i}"]
    return own[:, 0] if i else own, own, draws.get(f"reference_{i}")


def noise_of_update(draws):
    """All draws of an update, in the format of the plain implementation."""
    noise = {i: noise_of_actor_loss(draws, i) for i in range(len(WEIGHTS)) if f"actor_{i}" in draws}
    return {"critic": noise_of_qvalue_loss(draws), **noise}


def assert_gradients_equal(params, net, i=None):
    """Check that gradients (or slice i of stacked ones) equal those of a plain network."""
    ours, plain = layers(params), dict(net.named_parameters())
    assert ours.keys() == plain.keys()
    for name, parameter in plain.items():
        assert parameter.grad.abs().sum() > 0
        own = ours[name].grad if i is None else ours[name].grad[i]
        torch.testing.assert_close(own, parameter.grad, rtol=1e-5, atol=1e-9)


def assert_weights_equal(params, net, atol=1e-6):
    ours, plain = layers(params), dict(net.named_parameters())
    assert ours.keys() == plain.keys()
    for name, parameter in plain.items():
        torch.testing.assert_close(ours[name].data, parameter.data, rtol=0, atol=atol)


def assert_all_weights_equal(loss, plain, atol=1e-6):
    for i, net in enumerate(plain.actors):
        assert_weights_equal(getattr(loss, f"actor_network_{i}_params"), net, atol)
    for i, (net, target) in enumerate(zip(plain.critics, plain.target_critics)):
        assert_weights_equal(loss.qvalue_network_params[i], net, atol)
        assert_weights_equal(loss.target_qvalue_network_params[i], target, atol)
    if plain.args.delay_actor:
        assert_weights_equal(loss.target_actor_network_0_params, plain.target_actors[0], atol)


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
    """With the same noise, values and gradients are the same."""

    @pytest.mark.parametrize("bounds", BOUNDS)
    @pytest.mark.parametrize("delay_actor", [False, True])
    def test_qvalue_loss(self, make_plain, draws, bounds, delay_actor):
        plain = make_plain(bounds, delay_actor=delay_actor)
        loss, batch = plain.as_pogo_loss(), make_rows(plain)
        value, _ = loss.qvalue_loss(batch)
        expected = plain.qvalue_loss(columns(batch), noise_of_qvalue_loss(draws))
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
        value.backward()
        expected.backward()
        for i, net in enumerate(plain.critics):
            assert_gradients_equal(loss.qvalue_network_params, net, i)
        assert all(p.grad is None for i in range(3) for p in loss.actor_params(i))

    @settings
    @pytest.mark.parametrize("index", range(len(WEIGHTS)))
    @pytest.mark.parametrize("num_samples", [1, 4])
    def test_actor_loss(
        self, make_plain, draws, bounds, q_normalization, alpha, index, num_samples
    ):
        plain = make_plain(
            bounds, q_normalization=q_normalization, alpha=alpha, num_samples=num_samples
        )
        loss, batch = plain.as_pogo_loss(), make_rows(plain)
        value, _ = loss.actor_loss(batch, index)
        expected = plain.actor_loss(columns(batch), index, noise_of_actor_loss(draws, index))
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
        value.backward()
        expected.backward()
        own = getattr(loss, f"actor_network_{index}_params")
        assert_gradients_equal(own, plain.actors[index])
        others = [p for i in range(3) if i != index for p in loss.actor_params(i)]
        assert all(p.grad is None for p in others)
        assert all(p.grad is None for p in loss.qvalue_network_params.parameters())

    @settings
    def test_metadata(self, make_plain, draws, bounds, q_normalization, alpha):
        plain = make_plain(bounds, q_normalization=q_normalization, alpha=alpha)
        loss, batch = plain.as_pogo_loss(), make_rows(plain)
        value, metadata = loss.actor_loss(batch, 2)
        z, _, _ = noise_of_actor_loss(draws, 2)
        s = batch["observation"]
        q = plain.value(plain.critics[0], s, plain.act(plain.actors[2], s, z))
        scale = alpha / q.abs().mean() if q_normalization else torch.tensor(alpha).to(q)
        torch.testing.assert_close(metadata["q_actor_2"], q.mean().detach())
        torch.testing.assert_close(metadata["lmbd_2"], scale.detach())
        torch.testing.assert_close(metadata["actor_loss_2"], value.detach())
        distance = (value + scale * q.mean()) / WEIGHTS[2]
        torch.testing.assert_close(metadata["w2_2"], distance.detach())


class TestIndependentNoise:
    """With independent noise, both implementations have the same mean and spread."""

    repeats = 150

    def assert_same_mean(self, ours, plain):
        samples = torch.stack(
            [torch.stack([f().detach() for _ in range(self.repeats)]) for f in (ours, plain)]
        ).double()
        assert (samples.std(1) > 0).all()
        error = (samples.var(1).sum() / self.repeats).sqrt()
        assert (samples[0].mean() - samples[1].mean()).abs() < 4 * error
        # the spreads agree within 4 standard errors of the logarithm of their ratio
        spread = samples.var(1).log().diff().abs()
        assert spread < 4 * (4 / (self.repeats - 1)) ** 0.5

    @pytest.mark.parametrize("delay_actor", [False, True])
    def test_qvalue_loss(self, make_plain, delay_actor):
        plain = make_plain("asymmetric", delay_actor=delay_actor)
        loss, batch = plain.as_pogo_loss(), make_rows(plain)
        self.assert_same_mean(
            lambda: loss.qvalue_loss(batch)[0], lambda: plain.qvalue_loss(columns(batch))
        )

    @pytest.mark.parametrize("index", range(len(WEIGHTS)))
    def test_actor_loss(self, make_plain, index):
        plain = make_plain("asymmetric", alpha=2.5)
        loss, batch = plain.as_pogo_loss(), make_rows(plain)
        self.assert_same_mean(
            lambda: loss.actor_loss(batch, index)[0],
            lambda: plain.actor_loss(columns(batch), index),
        )


class TestSequentialUpdate:
    """Complete updates, including the targets, give the same weights."""

    @pytest.mark.parametrize("bounds", BOUNDS)
    @pytest.mark.parametrize("policy_freq", [1, 2])
    @pytest.mark.parametrize("delay_actor", [False, True])
    def test_weights_after_three_updates(self, make_plain, draws, bounds, policy_freq, delay_actor):
        plain = make_plain(bounds, delay_actor=delay_actor, policy_freq=policy_freq)
        loss = plain.as_pogo_loss()
        stepper = POGOOptimizationStepper(loss, lr=LR, policy_freq=policy_freq)
        updater = SoftUpdate(loss, tau=TAU)
        plain.load_targets(loss)  # SoftUpdate has set them to the online networks
        trainer = SimpleNamespace(replay_buffer=None)
        for step in range(3):
            batch, with_actors = make_rows(plain), step % policy_freq == 0
            stepper.step(trainer, batch)
            updater.step()
            assert len(draws) == (7 if with_actors else 2)
            plain.update(columns(batch), noise_of_update(draws))
        assert_all_weights_equal(loss, plain)

    @pytest.mark.parametrize("policy_freq", [1, 2, 3])
    def test_actors_move_only_every_policy_freq_steps(self, make_plain, policy_freq):
        plain = make_plain()
        loss, batch = plain.as_pogo_loss(), make_rows(plain)
        stepper = POGOOptimizationStepper(loss, lr=LR, policy_freq=policy_freq)
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
            assert {"loss_qvalue", "actor_loss_0", "actor_loss_2", "w2_1"} <= set(metrics.keys())
            assert not any(v.requires_grad for v in metrics.values())


class TestTraining:
    """Training from equal weights with equal noise gives equal weights."""

    steps = 50

    def trained(self, loss, rows, **settings):
        buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(len(rows)), batch_size=BATCH)
        buffer.extend(rows)
        torch.manual_seed(1)
        trainer = POGOTrainer(
            loss, buffer, self.steps, lr=LR, tau=TAU, progress_bar=False, **settings
        )
        trainer.train()
        torch.manual_seed(1)  # lets the caller repeat the same draws
        return buffer

    @pytest.mark.parametrize("w2_backend", ["tensorized", "fast"])
    def test_the_trainer_equals_the_single_file(self, make_plain, draws, w2_backend):
        plain = make_plain()
        plain.target_critics = copy.deepcopy(plain.critics)  # the initial state of the trainer
        if w2_backend == "fast":  # starts the annealing at the diameter of the bounds
            plain.divergence.diameter = 2 * ACT**0.5
        loss = plain.as_pogo_loss(w2_backend=w2_backend)
        again = copy.deepcopy(loss)
        buffer = self.trained(loss, make_rows(plain, 64))
        for _ in range(self.steps):
            batch = buffer.sample()
            again.draw_noise(batch)
            plain.update(columns(batch), noise_of_update(draws))
        # Adam amplifies the rounding errors of gradients that are nearly 0.
        assert_all_weights_equal(loss, plain, 1e-7)

    @pytest.mark.parametrize("delay_actor", [False, True])
    def test_the_trainer_equals_a_loop_with_torch_optimizers(self, make_plain, delay_actor):
        plain = make_plain(delay_actor=delay_actor)
        loss = plain.as_pogo_loss()
        loop = copy.deepcopy(loss)
        buffer = self.trained(loss, make_rows(plain, 64))

        critics = torch.optim.Adam(loop.qvalue_params(), lr=LR)
        actors = [torch.optim.Adam(loop.actor_params(i), lr=LR) for i in range(loop.num_actors)]
        targets = SoftUpdate(loop, tau=TAU)
        for _ in range(self.steps):
            batch = buffer.sample()
            noise = loop.draw_noise(batch)
            loop.draw_noise = lambda *args, noise=noise, **kwargs: noise
            for objective, optimizer in (
                (loop.qvalue_loss, critics),
                *((lambda b, i=i: loop.actor_loss(b, i), actors[i]) for i in range(3)),
            ):
                objective(batch)[0].backward()
                optimizer.step()
                optimizer.zero_grad()
            targets.step()
            del loop.draw_noise
        found = dict(loop.state_dict())
        for name, value in loss.state_dict().items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-10)
        moved = loss.actor_params(2)[0] - copy_of(plain.actors[2])
        assert moved.abs().max() > 1e-3


def copy_of(net):
    return next(net.parameters()).data
