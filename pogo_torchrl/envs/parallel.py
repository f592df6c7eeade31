"""Environments that step side by side, in this process and in forks of it."""

from __future__ import annotations

import gc
import multiprocessing
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import TypeAlias

import gymnasium
import numpy as np
from numpy.typing import NDArray

Steps: TypeAlias = tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.bool_]]
"""Observations [n, k], rewards [n], and whether the episodes are over [n]."""


@contextmanager
def step_in_parallel(
    envs: Sequence[gymnasium.Env], processes: int
) -> Iterator[Callable[[NDArray[np.int_], NDArray[np.float32]], Steps]]:
    """Share environments, which have been reset, between this process and forks of it.

    Threads would not do: a step releases Python's lock for some twenty microseconds only, and what
    they then wait for it makes two threads slower than one. A fork has the environments as they
    are: nothing is pickled, imported or built again. It ends with the context, and its steps are
    lost: reset the environments before they are used again.

    Args:
        envs: environments without threads, connections or GPU memory, which do not survive a fork.
        processes: how many step, this one included; fewer do where the system grants no more.

    Returns:
        A context of a function that steps the environments of the given indices [n] with actions
        [n, d]. What an environment raises, it raises.

    Example:
        >>> from pogo_torchrl.envs import make_env
        >>> envs = [make_env("hopper-medium-v2") for _ in range(3)]
        >>> for env in envs:
        ...     _ = env.reset(seed=0)
        >>> with step_in_parallel(envs, processes=2) as step:
        ...     observations, rewards, over = step(np.array([0, 2]), np.zeros((2, 3), np.float32))
        >>> observations.shape, rewards.shape, over.tolist()
        ((2, 11), (2,), [False, False])
    """
    workers: list[BaseProcess] = []
    pipes: list[Connection] = []

    def step(index: NDArray[np.int_], actions: NDArray[np.float32]) -> Steps:
        owner = index % (len(pipes) + 1)
        for i, pipe in enumerate(pipes, 1):
            with suppress(OSError):  # of a killed process, which shows when it does not answer
                pipe.send((index[owner == i], actions[owner == i]))
        shares = [_step(envs, index[owner == 0], actions[owner == 0]), *map(_receive, pipes)]
        # Back from the owners' order to that of the indices.
        place = np.argsort(np.argsort(owner, kind="stable"))
        observations, rewards, over = (np.concatenate(parts)[place] for parts in zip(*shares))
        return observations, rewards, over

    try:
        for _ in range(processes - 1):
            context = multiprocessing.get_context("fork")
            ours, theirs = context.Pipe()
            worker: BaseProcess = context.Process(
                target=_serve, args=(envs, ours, theirs), daemon=True
            )
            # Signals are this process's business; whatever it does about them closes the pipe.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            try:
                with warnings.catch_warnings():
                    # Python 3.12 warns of the locks of other threads: this fork needs none of them.
                    warnings.filterwarnings("ignore", ".*multi-threaded", DeprecationWarning)
                    worker.start()
            except OSError:  # no memory, no processes: those there are do the work
                ours.close()
                break
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
                theirs.close()
            workers.append(worker)
            pipes.append(ours)
        yield step
    finally:
        for pipe in pipes:
            pipe.close()
        for worker in workers:
            worker.join()


def _step(envs: Sequence[gymnasium.Env], index: NDArray[np.int_], actions: NDArray) -> Steps:
    shape = envs[0].observation_space.shape
    assert shape is not None
    observations = np.empty((len(index), *shape), dtype=np.float32)
    rewards, over = np.empty(len(index)), np.empty(len(index), dtype=bool)
    for row, (i, action) in enumerate(zip(index.tolist(), actions)):
        observations[row], rewards[row], terminated, truncated, _ = envs[i].step(action)
        over[row] = terminated or truncated
    return observations, rewards, over


def _receive(pipe: Connection) -> Steps:
    try:
        reply = pipe.recv()
    except (EOFError, OSError):
        raise RuntimeError(
            "a process that steps environments was killed, perhaps for want of memory"
        ) from None
    if isinstance(reply, Exception):
        raise reply
    return reply


def _serve(envs: Sequence[gymnasium.Env], theirs: Connection, ours: Connection) -> None:
    """Step environments until the other end of the pipe is closed, or its process is gone."""
    theirs.close()  # or this process would hold open what it waits to see closed
    gc.freeze()  # garbage of the parent, such as GPU memory, is not this process's to collect
    while True:
        try:
            request = ours.recv()
        except (EOFError, OSError):
            return
        try:
            reply: Steps | Exception = _step(envs, *request)
        except Exception as error:
            reply = error
        try:
            ours.send(reply)
        except OSError:
            return
