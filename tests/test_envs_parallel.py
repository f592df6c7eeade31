"""Tests of forked environment workers: same steps, errors, and no leftover processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import warnings

import gymnasium
import numpy as np
import pytest

from pogo_torchrl.envs import make_env
from pogo_torchrl.envs.parallel import step_in_parallel

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks are used on Linux only")


@pytest.fixture(autouse=True)
def no_leftover_processes():
    yield
    assert not multiprocessing.active_children()


def reset_envs(count: int) -> list[gymnasium.Env]:
    envs = [make_env("walker2d-medium-v2") for _ in range(count)]
    for i, env in enumerate(envs):
        env.reset(seed=i)
    return envs


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_steps_match_sequential_stepping(processes):
    rng = np.random.default_rng(0)
    sequential = reset_envs(5)
    with step_in_parallel(reset_envs(5), processes) as step:
        for index in ([0, 1, 2, 3, 4], [4, 2], [0, 1, 3], [2]):
            actions = rng.uniform(-1, 1, (len(index), 6)).astype(np.float32)
            observations, rewards, over = step(np.array(index), actions)
            expected = [sequential[i].step(action) for i, action in zip(index, actions)]
            np.testing.assert_array_equal(
                observations, np.array([e[0] for e in expected], dtype=np.float32)
            )
            assert rewards.tolist() == [e[1] for e in expected]
            assert over.tolist() == [e[2] or e[3] for e in expected]


@pytest.mark.parametrize("faulty", [0, 1])  # in this process, and in a worker
def test_exceptions_of_environments_are_raised(faulty, monkeypatch):
    envs = reset_envs(2)

    def step(action):
        raise ArithmeticError("no such step")

    monkeypatch.setattr(envs[faulty], "step", step)
    with (
        pytest.raises(ArithmeticError, match="no such step"),
        step_in_parallel(envs, 2) as step_all,
    ):
        step_all(np.arange(2), np.zeros((2, 6), dtype=np.float32))


def test_killed_worker_raises():
    with step_in_parallel(reset_envs(2), 2) as step:
        [worker] = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGTERM)  # ignored: only the parent handles signals
        step(np.arange(2), np.zeros((2, 6), dtype=np.float32))
        worker.kill()
        worker.join()
        with pytest.raises(RuntimeError, match="was killed"):
            step(np.arange(2), np.zeros((2, 6), dtype=np.float32))


def test_no_warning_about_threads():
    """Python 3.12 would warn at each fork."""
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    thread.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with step_in_parallel(reset_envs(2), 2):
                assert len(multiprocessing.active_children()) == 1
    finally:
        over.set()
        thread.join()


def test_single_process_if_forking_fails(monkeypatch):
    def fork():
        raise BlockingIOError("Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", fork)
    with step_in_parallel(reset_envs(2), 2) as step:
        assert len(step(np.arange(2), np.zeros((2, 6), dtype=np.float32))[0]) == 2
