"""Evaluation of chains: reproducible, comparable and without side effects."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from copy import deepcopy

import gymnasium
import numpy as np
import pytest
import torch
from torch import nn

from pogo_torchrl import TransportActor, make_actor
from pogo_torchrl.envs import make_env, score
from pogo_torchrl.evaluation import (
    _STREAM,
    MODES,
    Evaluation,
    EvaluationInterrupted,
    Evaluator,
    format_evaluation,
)

TASK = "hopper-medium-v2"
EPISODES = 2


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    return Evaluator(TASK, episodes=EPISODES)


@pytest.fixture
def chain(evaluator) -> list[TransportActor]:
    return [make_actor(11, evaluator.action_spec, (8,)) for _ in range(2)]


def equal(first: list[Evaluation], second: list[Evaluation]) -> bool:
    return len(first) == len(second) and all(
        (a.actor, a.mode) == (b.actor, b.mode)
        and np.array_equal(a.returns, b.returns)
        and np.array_equal(a.lengths, b.lengths)
        for a, b in zip(first, second)
    )


def test_evaluations_are_bitwise_reproducible(evaluator, chain):
    first = evaluator(chain)
    assert equal(first, evaluator(chain))
    assert equal(first, Evaluator(TASK, episodes=EPISODES)(chain))
    assert not equal(first, Evaluator(TASK, episodes=EPISODES, seed=1)(chain))


def test_the_global_random_state_is_neither_read_nor_changed(evaluator, chain):
    results, untouched = [], []
    for seed in (1, 2):
        torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)  # noqa: NPY002
        before = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
        results.append(evaluator(chain))
        untouched += [
            torch.equal(torch.get_rng_state(), before[0]),
            np.array_equal(np.random.get_state()[1], before[1][1]),  # noqa: NPY002
            np.random.get_state()[2] == before[1][2],  # noqa: NPY002
            random.getstate() == before[2],
        ]
    assert equal(*results)
    assert all(untouched)


def test_order_of_actors_and_modes(evaluator, chain):
    evaluations = evaluator(chain)
    assert [(e.actor, e.mode) for e in evaluations] == [
        (0, "deterministic"),
        (0, "stochastic"),
        (1, "deterministic"),
        (1, "stochastic"),
    ]
    for e in evaluations:
        assert e.returns.shape == e.lengths.shape == (EPISODES,)
        np.testing.assert_allclose(e.scores, score(TASK, e.returns))
    # actors do not influence each other, whatever their position in the chain
    swapped = evaluator(chain[::-1])
    for i in range(4):
        np.testing.assert_allclose(swapped[(i + 2) % 4].returns, evaluations[i].returns)


def test_deterministic_mode_equals_a_plain_loop(evaluator, chain):
    """One environment, one observation at a time, z = 0."""
    env = make_env(TASK)
    for actor, evaluation in zip(chain, evaluator(chain)[::2]):
        for episode in range(EPISODES):
            start = np.random.SeedSequence(0, spawn_key=(_STREAM, episode)).spawn(2)[0]
            observation, _ = env.reset(seed=int(start.generate_state(1)[0]))
            total, steps, over = 0.0, 0, False
            while not over:
                with torch.no_grad():
                    row = torch.as_tensor(observation, dtype=torch.float32)
                    action = actor(observation=row, noise=torch.zeros(3))
                observation, reward, terminated, truncated, _ = env.step(action.numpy())
                total, steps, over = total + reward, steps + 1, terminated or truncated
            assert steps == evaluation.lengths[episode]
            assert total == pytest.approx(evaluation.returns[episode], rel=1e-4)


class Noise(nn.Module):
    """f(s, z) = gain z."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = gain

    def forward(self, observation, noise):
        return self.gain * noise


def test_the_stochastic_mode_passes_noise(evaluator):
    spec = evaluator.action_spec
    uses, ignores = (TransportActor(Noise(gain), spec) for gain in (1.0, 0.0))
    deterministic, stochastic = evaluator([uses])
    assert not np.array_equal(deterministic.returns, stochastic.returns)
    assert len(set(stochastic.returns)) == EPISODES
    deterministic, stochastic = evaluator([ignores])
    assert np.array_equal(deterministic.returns, stochastic.returns)
    # the same actor twice has the same start states and the same noise
    twins = evaluator([uses, uses])
    assert [(e.actor, e.mode) for e in twins] == [(i, m) for i in (0, 1) for m in MODES]
    copy = evaluator([uses, deepcopy(uses)])
    for e, other in zip(twins, copy):
        assert np.array_equal(e.returns, other.returns)
        assert np.array_equal(e.scores, other.scores)


def test_an_actor_that_occurs_twice_is_evaluated_once(chain):
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1

    small = Evaluator(TASK, episodes=EPISODES)
    first, second = chain
    alone = small(chain)
    first.register_forward_hook(count)
    result = small([first, second, first])
    steps = max(e.lengths.max() for e in alone)
    assert calls == steps
    assert equal(result[:4], alone)
    assert [e.actor for e in result] == [0, 0, 1, 1, 2, 2]
    assert np.array_equal(result[5].returns, alone[1].returns)


def test_the_first_episodes_do_not_depend_on_the_number_of_episodes(evaluator, chain):
    for few, many in zip(evaluator(chain[:1]), Evaluator(TASK, episodes=EPISODES + 1)(chain[:1])):
        np.testing.assert_allclose(many.returns[:EPISODES], few.returns, rtol=1e-4)


def test_longer_chains_after_shorter_ones(evaluator, chain):
    alone = evaluator(chain[:1])
    assert equal(evaluator(chain)[:2], alone)
    assert equal(evaluator(chain[:1]), alone)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_results_do_not_depend_on_the_number_of_processes(chain, threads, monkeypatch):
    """Bitwise; the number of PyTorch threads is restored."""
    results = []
    for count in (1, 2, 3):
        monkeypatch.setattr("pogo_torchrl.evaluation._ENVS_PER_PROCESS", 2)
        threads(count)
        evaluator = Evaluator(TASK, episodes=EPISODES)
        results += [evaluator(chain), evaluator(chain)]
        assert torch.get_num_threads() == count
    assert all(equal(results[0], other) for other in results[1:])


def test_antmaze_in_several_processes_equals_one(threads):
    def short() -> gymnasium.Env:
        return gymnasium.wrappers.TimeLimit(make_env("antmaze-umaze-v2").unwrapped, 20)

    evaluator, results = Evaluator("antmaze-umaze-v2", env_fn=short), []
    actor = make_actor(evaluator.observation_dim, evaluator.action_spec, (8,))
    for count in (1, 2):
        threads(count)
        assert evaluator._processes(20) == count
        results.append(evaluator([actor]))
    assert equal(*results)
    assert results[0][1].lengths.tolist() == [20] * 10


def test_a_process_that_uses_cuda_is_not_forked(threads, monkeypatch):
    threads(2)
    evaluator = Evaluator(TASK)
    assert evaluator._processes(20) == 2
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert evaluator._processes(20) == 1


def test_a_signal_interrupts_an_evaluation(threads, monkeypatch):
    monkeypatch.setattr("pogo_torchrl.evaluation._ENVS_PER_PROCESS", 1)
    threads(3)
    evaluator = Evaluator("halfcheetah-medium-v2", episodes=4)
    chain = [make_actor(evaluator.observation_dim, evaluator.action_spec)]
    before = signal.signal(signal.SIGALRM, lambda *_: evaluator.interrupt())
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(EvaluationInterrupted):
            evaluator(chain)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not multiprocessing.active_children()
    assert torch.get_num_threads() == 3


def test_other_environments_are_stepped_in_the_current_process(threads, monkeypatch):
    """They may hold resources that do not survive a fork, or state that would be lost in it."""
    monkeypatch.setattr("pogo_torchrl.evaluation._ENVS_PER_PROCESS", 1)
    threads(2)
    pids = []

    class Recorder(gymnasium.Wrapper):
        def step(self, action):
            pids.append(os.getpid())
            return super().step(action)

    evaluator = Evaluator(TASK, episodes=EPISODES, env_fn=lambda: Recorder(make_env(TASK)))
    results = evaluator([make_actor(11, evaluator.action_spec, (8,))])
    assert pids == [os.getpid()] * sum(e.lengths.sum() for e in results)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_actions_raise(evaluator, chain, value):
    for parameter in chain[1].parameters():
        nn.init.constant_(parameter, value)
    with pytest.raises(FloatingPointError, match="actor 1"):
        evaluator(chain)


@pytest.mark.parametrize(
    ("task", "episodes", "message"),
    [(TASK, 0, "eval_episodes=0"), ("hopper-easy-v2", 1, "hopper-easy-v2")],
)
def test_settings_out_of_range(task, episodes, message):
    with pytest.raises(ValueError, match=message):
        Evaluator(task, episodes=episodes)


def test_format_evaluation():
    def evaluation(actor: int, mode: str, mean: float, points: float) -> Evaluation:
        spread = np.linspace(-1, 1, 10)
        return Evaluation(actor, mode, mean + spread, np.full(10, 9), points + spread)

    assert format_evaluation(
        [
            evaluation(0, "deterministic", 1992.1, 61.8),
            evaluation(0, "stochastic", 1871.0, 58.1),
            evaluation(1, "deterministic", -3.04, -0.26),
        ]
    ) == (
        "Evaluation over 10 episodes:\n"
        "  Actor 0 - Deterministic: 1992.1, D4RL score: 61.8\n"
        "  Actor 0 - Stochastic: 1871.0, D4RL score: 58.1\n"
        "  Actor 1 - Deterministic: -3.0, D4RL score: -0.3"
    )
