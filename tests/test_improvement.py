r"""The chain improves: on a problem with a known answer, every actor takes its proximal step.

**The problem.** States s are spread over [-1, 1], actions have d = 4 dimensions, and

    Q(s, a) = V(s) - k/2 |a - p(s)|^2.

The actions of the data are b(s) plus small noise, off the peak p(s). Every transition is terminal
and has the reward Q(s, a). The critic computes Q itself and has a learning rate of 0, so that the
answer does not depend on how well a critic is fitted: only the actors learn, through the trainer.

**The closed form.** At the minimum of an actor's loss, the gradient with respect to its action a is
0. All terms draw T(s, z) to one point per state, so that the actors come to ignore z (their spread
is about 0.01), and D_i is half the squared distance to the previous actor's action a_{i - 1}. With
lambda = alpha / mean|Q|,

    actor 0:  lambda k (a - p) + (2 w_0 / d) (a - b)  = 0
    actor i:  lambda k (a - p) + w_i (a - a_{i - 1})  = 0

Step sizes h are defined by 2 w_0 / d = w_i = alpha / (h d), which makes both the same equation: an
actor whose reference is at the distance g from the peak stops at the distance g / (1 + r), where
r = h d k / mean|Q|. Here mean|Q| is that of the actor itself, thus a function of g / (1 + r), and
the equation is solved by iteration. The distances of all states shrink by the same factor.

**The tolerance.** The displacement of an actor is the mean over states and dimensions of the
squared distance from its reference (``step_mse_i`` in the logs). It is quadratic in the length of
the step: 20 % of the displacement are 10 % of the length.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from itertools import pairwise

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torchrl.data import Bounded, LazyTensorStorage, TensorDictReplayBuffer

from pogo_torchrl import POGOLoss, POGOTrainer, functional, make_actor, make_qvalue
from pogo_torchrl.modules import QValueOperator
from pogo_torchrl.objectives import distances
from pogo_torchrl.trainers import TrainerStack

DIM, NUM_ACTORS = 4, 3
STEP_SIZE, ALPHA, CURVATURE = 0.35, 0.3, 1.0
ROWS, BATCH, UPDATES = 512, 32, 120
TOLERANCE = 0.2

STATES = torch.linspace(-1, 1, ROWS).unsqueeze(-1)


def peak(state):
    """p(s), the best action."""
    return 0.5 + 0.1 * state * torch.tensor([1.0, -1.0, 0.5, 0.0])


def data_mean(state):
    """b(s), the mean action of the data."""
    return -0.5 + 0.1 * state * torch.tensor([0.0, 1.0, -1.0, 2.0])


class KnownQ(nn.Module):
    """Q(s, a) of the problem; the parameter is what the optimizer of the critics holds."""

    def __init__(self):
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(1))

    def forward(self, state, action):
        # Of both signs, but not on average: mean|Q| differs from |mean Q| and from 1.
        value = torch.where(state > -0.5, 5.0, -2.0)
        gap = (action - peak(state)).square().sum(-1, keepdim=True)
        return value - CURVATURE / 2 * gap + self.offset


def make_buffer(state, action, reward, next_state, done, terminated):
    """Return a replay buffer of the given transitions."""
    rows = TensorDict(
        {
            "observation": state,
            "action": action,
            "next": {
                "observation": next_state,
                "reward": reward,
                "done": done,
                "terminated": terminated,
            },
        },
        [len(state)],
    )
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(len(rows)), batch_size=BATCH)
    buffer.extend(rows)
    return buffer


def make_trainer(seed, *, w2_backend):
    """Return the trainer of one chain, with its own data noise and initial weights."""
    torch.manual_seed(seed)
    qvalue = QValueOperator(KnownQ(), in_keys=["observation", "action"])
    action = data_mean(STATES) + 0.05 * torch.randn(ROWS, DIM)
    reward, ends = qvalue(STATES, action).detach(), torch.ones(ROWS, 1, dtype=torch.bool)
    loss = POGOLoss(
        make_actor(1, Bounded(low=-torch.ones(DIM), high=torch.ones(DIM)), (16,)),
        qvalue,
        step_sizes=[STEP_SIZE] * NUM_ACTORS,
        alpha=ALPHA,
        num_qvalue_nets=1,
        num_samples=2,
        w2_backend=w2_backend,
    )
    return POGOTrainer(
        loss,
        make_buffer(STATES, action, reward, STATES, ends, ends),
        UPDATES,
        lr=0.04,
        qvalue_optimizer=partial(torch.optim.Adam, lr=0.0),
        actor_lr_scheduler=partial(CosineAnnealingLR, T_max=UPDATES),
        progress_bar=False,
    )


def expected_displacements():
    """Return the displacement of every actor in the closed form."""
    qvalue, gap = KnownQ(), peak(STATES) - data_mean(STATES)
    left, displacements = 1.0, []  # the fraction of the data's gap that the reference leaves
    for _ in range(NUM_ACTORS):
        ends = left
        for _ in range(100):
            q = qvalue(STATES, peak(STATES) - ends * gap).abs().mean().item()
            ends = left / (1 + STEP_SIZE * DIM * CURVATURE / q)
        displacements.append(((left - ends) * gap).square().mean().item())
        left = ends
    return displacements


@torch.no_grad()
def violations(loss):
    """Return what a trained chain violates: the ranks of the returns, the size of its steps."""
    zero = torch.zeros(ROWS, DIM)
    actions = [data_mean(STATES)]
    actions += [loss.actor(i)(observation=STATES, noise=zero) for i in range(NUM_ACTORS)]
    returns = [KnownQ()(STATES, action).mean().item() for action in actions]
    found = []
    if any(later <= earlier for earlier, later in pairwise(returns)):
        found.append(f"the returns of the data and the actors do not rise: {returns}")
    for i, expected in enumerate(expected_displacements()):
        displacement = (actions[i + 1] - actions[i]).square().mean().item()
        if not abs(displacement / expected - 1) < TOLERANCE:
            found.append(f"actor {i} is displaced by {displacement:.4f} instead of {expected:.4f}")
    return found


def train(seed):
    """Train a single chain; the exact W_2^2/2 takes half the time of the Sinkhorn divergence."""
    trainer = make_trainer(seed, w2_backend="exact")
    trainer.train()
    return trainer.loss_module


def test_every_actor_of_twenty_chains_takes_its_step_and_improves():
    trainers = [make_trainer(seed, w2_backend="fast") for seed in range(20)]
    assert TrainerStack(trainers, lambda index: nullcontext()).train() == [None] * 20
    found = {seed: violations(trainer.loss_module) for seed, trainer in enumerate(trainers)}
    assert {seed: each for seed, each in found.items() if each} == {}


# ------------------------------------------------------------------ mutants of the objective

JKO_TERMS, DIVERGENCE = POGOLoss.jko_terms, distances.sinkhorn_divergence


def loss_is(formula):
    def jko_loss(q, distance, *, scale, weight):
        return formula(q, distance, scale, weight)

    return functional, "jko_loss", jko_loss


def scale_is(formula):
    return functional, "q_scale", lambda q, alpha, q_normalization: formula(q, alpha)


def reference_is(choose):
    def jko_terms(self, actor, batch, noise, reference, *args, index):
        reference = choose(self, index, actor, reference)
        return JKO_TERMS(self, actor, batch, noise, reference, *args, index=index)

    return POGOLoss, "jko_terms", jko_terms


def initial(loss, index, actor, reference):
    """Return the parameters that the previous actor had at the first update."""
    return vars(loss).setdefault(f"initial_{index}", {k: v.clone() for k, v in reference.items()})


def terms_with_the_data_as_reference(self, actor, batch, noise, reference, *args, index):
    action = self._act(actor, batch, noise[f"actor_{index}"][:, 0])
    distance = (action - batch["action"]).square().sum(-1) / 2
    return self._objective(action, distance, batch, *args, index=index)


def terms_with_the_first_weight(self, actor, batch, noise, reference, q, weight, alpha, *, index):
    weight = self.w2_weights[0]
    return JKO_TERMS(self, actor, batch, noise, reference, q, weight, alpha, index=index)


MUTANTS = {
    "descends Q": loss_is(lambda q, d, scale, w: w * d + scale * q),
    "ascends the distance": loss_is(lambda q, d, scale, w: -w * d - scale * q),
    "ignores the weights": loss_is(lambda q, d, scale, w: d - scale * q),
    "uses the weight of actor 0": (POGOLoss, "jko_terms", terms_with_the_first_weight),
    "lambda = alpha": scale_is(lambda q, alpha: alpha * q.new_ones(())),
    "lambda = 1 / mean|Q|": scale_is(lambda q, alpha: 1 / q.detach().abs().mean()),
    "lambda = alpha mean|Q|": scale_is(lambda q, alpha: alpha * q.detach().abs().mean()),
    "lambda = alpha / |mean Q|": scale_is(lambda q, alpha: alpha / q.detach().mean().abs()),
    "lambda with a gradient": scale_is(lambda q, alpha: alpha / q.abs().mean()),
    "D_0 is a sum": (functional, "l2_distance", lambda a, b: (a - b).square().sum(-1)),
    "D_i is not halved": (
        distances,
        "sinkhorn_divergence",
        lambda *a, **k: 2 * DIVERGENCE(*a, **k),
    ),
    "D_i is a mean": (distances, "sinkhorn_divergence", lambda *a, **k: DIVERGENCE(*a, **k) / DIM),
    "reference: the data": (POGOLoss, "jko_terms", terms_with_the_data_as_reference),
    "reference: the actor itself": reference_is(lambda loss, i, actor, reference: actor),
    "reference: actor i - 2": reference_is(
        lambda loss, i, actor, reference: loss.params(f"actor_network_{max(i - 2, 0)}")
    ),
    "reference: the previous actor before training": reference_is(initial),
}


def test_the_check_accepts_the_objective():
    assert violations(train(seed=0)) == []


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_check_rejects_wrong_objectives(mutant, monkeypatch):
    monkeypatch.setattr(*MUTANTS[mutant])
    assert violations(train(seed=0)) != []


# ------------------------------------------------------------------ the critics


def test_the_critics_learn_the_values_of_actor_0():
    r"""The critics of a Markov chain of four states against Q of actor 0, which is fixed.

    State 0 is followed by 1, which is followed by itself, with a time-out at every step; 2 is
    followed by 3, which is terminal. Rewards are r(x, a) = 1 + x/2 + a/2, so that with the mean
    action m(x) of actor 0, V = r(x, m(x)) + gamma P V and Q(x, a) = r(x, a) + gamma (P V)(x).
    """
    gamma, updates, rows = 0.8, 400, torch.arange(ROWS).unsqueeze(-1)
    x, action = rows % 4, 2 * torch.rand(ROWS, 1) - 1
    following = torch.tensor([1, 1, 3, 3])[x]
    spec = Bounded(low=-torch.ones(1), high=torch.ones(1))
    loss = POGOLoss(make_actor(1, spec, (16,)), make_qvalue(1, 1, (64, 64)), w2_weights=(1.0,))
    trainer = POGOTrainer(
        loss.make_value_estimator(gamma=gamma),
        make_buffer(
            state=x - 1.5,
            action=action,
            reward=1 + x / 2 + action / 2,
            next_state=following - 1.5,
            done=following == x,
            terminated=x == 3,
        ),
        updates,
        lr=5e-3,
        tau=0.1,
        qvalue_lr_scheduler=partial(CosineAnnealingLR, T_max=updates),
        actor_optimizer=partial(torch.optim.Adam, lr=0.0),
        progress_bar=False,
    )
    trainer.train()

    states = torch.arange(4.0)
    observation = (states - 1.5).unsqueeze(-1)
    z = torch.randn(1000, 4, 1)
    mean = loss.actor(0)(observation=observation.expand_as(z), noise=z).mean(0).squeeze(-1)
    moves = torch.tensor([[0.0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]])
    values = torch.linalg.solve(torch.eye(4) - gamma * moves, 1 + states / 2 + mean / 2)
    for params in loss.qvalue_network_params.unbind(0):
        with params.to_module(loss.qvalue_network):
            for a in (-0.8, 0.0, 0.8):
                q = loss.qvalue_network(observation=observation, action=torch.full((4, 1), a))
                expected = 1 + states / 2 + a / 2 + gamma * moves @ values
                torch.testing.assert_close(q.squeeze(-1), expected, rtol=0.05, atol=0)
