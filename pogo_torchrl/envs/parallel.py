"""Step environments in parallel, in this process and in forked workers."""

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
"""Observations ``[n, k]``, rewards ``[n]``, and whether the episodes have ended ``[n]``."""


@contextmanager
def step_in_parallel(
    envs: Sequence[gymnasium.Env], processes: int
) -> Iterator[Callable[[NDArray[np.int_], NDArray[np.float32]], Steps]]:
    """Distribute environments over this process and forked workers.

    Threads would be slower: a step releases Python's global interpreter lock for only some
    twenty microseconds, and contention for it makes two threads slower than one. A forked worker
    inherits the environments in their current state: nothing is pickled, imported or rebuilt. Its
    steps are lost when the context exits, so reset the environments before using them again.

    Args:
        envs: environments that have been reset. They must not own threads, connections or GPU
            memory, which do not survive a fork.
        processes: number of processes, including this one; fewer are used if the system cannot
            create them.

    Returns:
        A context manager that yields a function ``step(index, actions)``. It steps the environments
        with the given indices ``[n]`` with actions ``[n, d]`` and returns :data:`Steps`.

    Raises:
        RuntimeError: by ``step``, when a worker was killed. Exceptions of an environment are raised
            unchanged.

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
    if "fork" not in multiprocessing.get_all_start_methods() or not hasattr(
        signal, "pthread_sigmask"
    ):
        processes = 1  # as on Windows
    workers: list[BaseProcess] = []
    pipes: list[Connection] = []

    def step(index: NDArray[np.int_], actions: NDArray[np.float32]) -> Steps:
        owner = index % (len(pipes) + 1)
        for i, pipe in enumerate(pipes, 1):
            with suppress(OSError):  # a killed worker is detected in _receive()
                pipe.send((index[owner == i], actions[owner == i]))
        shares = [_step(envs, index[owner == 0], actions[owner == 0]), *map(_receive, pipes)]
        # Restore the order of the indices.
        order = np.argsort(np.argsort(owner, kind="stable"))
        observations, rewards, over = (np.concatenate(parts)[order] for parts in zip(*shares))
        return observations, rewards, over

    try:
        for _ in range(processes - 1):
            context = multiprocessing.get_context("fork")
            ours, theirs = context.Pipe()
            worker: BaseProcess = context.Process(
                target=_run_worker, args=(envs, ours, theirs), daemon=True
            )
            # Only this process handles signals; workers exit when it closes the pipe.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            try:
                with warnings.catch_warnings():
                    # Python 3.12 warns about locks held by other threads; workers use none of them.
                    warnings.filterwarnings("ignore", ".*multi-threaded", DeprecationWarning)
                    worker.start()
            except OSError:  # out of memory or processes: continue with the existing workers
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
            "an environment worker was killed, possibly because the machine ran out of memory"
        ) from None
    if isinstance(reply, Exception):
        raise reply
    return reply


def _run_worker(envs: Sequence[gymnasium.Env], theirs: Connection, ours: Connection) -> None:
    """Step environments on request until the other end of the pipe is closed."""
    theirs.close()  # otherwise this worker would keep the parent's end of the pipe open
    gc.freeze()  # do not collect garbage inherited from the parent, such as GPU memory
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
