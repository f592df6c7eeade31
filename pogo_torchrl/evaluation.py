"""Bitwise reproducible evaluation of all actors of a chain at once."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box
from gymnasium.wrappers import TimeLimit
from tensordict import TensorDict
from torchrl.data import Bounded

from pogo_torchrl.envs import make_env, score
from pogo_torchrl.envs.parallel import step_in_parallel
from pogo_torchrl.envs.selfcheck import ENVIRONMENTS
from pogo_torchrl.modules import TransportActor, noise_reader
from pogo_torchrl.trainers.hooks import Evaluation, EvaluationInterrupted

MODES = ("deterministic", "stochastic")
"""Evaluation modes: z = 0 (deterministic) or z ~ N(0, I) (stochastic)."""

# Separates the random streams of evaluations from other uses of the same seed.
_STREAM = 0xE7A1

# For fewer environments per process, communication takes longer than stepping.
_ENVS_PER_PROCESS = 8


class Evaluator:
    """Evaluate chains of actors on a task.

    All actors are evaluated in both modes on the same ``episodes`` episodes. The start state of
    episode e and its noise in the stochastic mode depend on ``seed`` and e only. Evaluations of the
    same weights are therefore identical, actors are compared under equal conditions, and the global
    random state is neither read nor changed. The episodes of an actor are evaluated as one batch,
    and only once if it occurs several times in the chain.
    The package's own environments are stepped in as many processes as PyTorch has threads, other
    environments in the current process; the results are the same.

    Args:
        task: name of a D4RL task.
        episodes: number of episodes per actor and mode. Defaults to ``10``.
        seed: seed of the start states and the noise. Defaults to ``0``.
        env_fn: function that creates an environment, whose returns are normalised with the
            reference returns of ``task``. Defaults to :func:`~pogo_torchrl.envs.make_env` with
            ``task``.

    Raises:
        ValueError: if the task is unknown, ``episodes`` is less than 1, or the observations or
            actions of the environment are not vectors.

    Example:
        >>> import torch
        >>> from pogo_torchrl import make_actor
        >>> evaluator = Evaluator("hopper-medium-v2", episodes=2)
        >>> chain = [make_actor(evaluator.observation_dim, evaluator.action_spec)]
        >>> [(e.actor, e.mode, e.returns.shape) for e in evaluator(chain)]
        [(0, 'deterministic', (2,)), (0, 'stochastic', (2,))]
    """

    def __init__(
        self,
        task: str,
        *,
        episodes: int = 10,
        seed: int = 0,
        env_fn: Callable[[], gymnasium.Env] | None = None,
    ) -> None:
        if episodes < 1:
            raise ValueError(f"eval_episodes={episodes} must be an integer >= 1.")
        self.task = task
        self.episodes = episodes
        self.seed = seed
        self._interrupted = False
        self._make_env = env_fn or partial(make_env, task)
        self._envs = [self._make_env()]
        observations, actions = self._envs[0].observation_space, self._envs[0].action_space
        for name, space in (("observations", observations), ("actions", actions)):
            if not isinstance(space, Box) or len(space.shape) != 1:
                raise ValueError(
                    f"{self._envs[0]} has {name} in {space}, but vectors (a one-dimensional Box) "
                    "are required: choose another task or env.id."
                )
        assert isinstance(observations, Box)
        assert isinstance(actions, Box)
        self._action_space = actions
        self.observation_dim: int = observations.shape[0]
        self.action_dim: int = actions.shape[0]

    @property
    def action_spec(self) -> Bounded:
        """The task's action space as a TorchRL spec of shape ``[d]``."""
        return Bounded(
            low=torch.as_tensor(self._action_space.low),
            high=torch.as_tensor(self._action_space.high),
            dtype=torch.float32,
        )

    @torch.no_grad()
    def __call__(self, actors: Sequence[TransportActor]) -> list[Evaluation]:
        """Roll out a chain of actors.

        Args:
            actors: actors on raw observations, see
                :func:`~pogo_torchrl.export.on_raw_observations`.

        Returns:
            One :class:`~pogo_torchrl.trainers.hooks.Evaluation` per actor and mode: actor 0
            deterministic, actor 0 stochastic, actor 1 deterministic, and so on.

        Raises:
            ValueError: if an actor reads anything else than one observation and its noise.
            FloatingPointError: if an actor returns an action that is not finite.
            EvaluationInterrupted: after a call of :meth:`interrupt`.
        """
        originals = [next(i for i, first in enumerate(actors) if first is x) for x in actors]
        distinct = sorted(set(originals))
        for i in distinct:
            _check_inputs(i, actors[i])
        returns, lengths = self._roll_out({i: actors[i] for i in distinct})
        results = {i: (returns[k], lengths[k]) for k, i in enumerate(distinct)}
        return [
            Evaluation(i, mode, r, n, score(self.task, r))
            for i, original in enumerate(originals)
            for mode, r, n in zip(MODES, *results[original])
        ]

    def _roll_out(self, actors: Mapping[int, TransportActor]) -> tuple[np.ndarray, np.ndarray]:
        """Return the returns and lengths ``[actors, modes, episodes]`` of actors, by index."""
        shape = (len(actors), len(MODES), self.episodes)
        slots = list(np.ndindex(shape))
        while len(self._envs) < len(slots):
            self._envs.append(self._make_env())
        seeds = [self._seeds(episode) for episode in range(self.episodes)]
        starts = [start for start, _ in seeds]
        noise_streams = [np.random.default_rng(noise) for _, noise in seeds]

        observations = np.zeros((len(slots), self.observation_dim), dtype=np.float32)
        for i, (_, _, episode) in enumerate(slots):
            observations[i], _ = self._envs[i].reset(seed=starts[episode])
        returns, lengths = np.zeros(len(slots)), np.zeros(len(slots), dtype=int)
        running = np.arange(len(slots))
        noise = np.zeros((len(MODES), self.episodes, self.action_dim), dtype=np.float32)
        processes = self._processes(len(slots))
        with _one_torch_thread(), step_in_parallel(self._envs, processes) as step:
            while len(running):
                if self._interrupted:
                    raise EvaluationInterrupted
                noise[1] = [stream.standard_normal(self.action_dim) for stream in noise_streams]
                actions = self._act(actors, observations.reshape(*shape, -1), noise)
                actions = actions.reshape(len(slots), -1)[running]
                observations[running], rewards, over = step(running, actions)
                returns[running] += rewards
                lengths[running] += 1
                running = running[~over]
        return returns.reshape(shape), lengths.reshape(shape)

    def start_seed(self, episode: int) -> int:
        """Return the seed with which the environment is reset for an episode."""
        return self._seeds(episode)[0]

    def _seeds(self, episode: int) -> tuple[int, np.random.SeedSequence]:
        """Return the seeds of the start state and of the noise of an episode."""
        start, noise = np.random.SeedSequence(self.seed, spawn_key=(_STREAM, episode)).spawn(2)
        return int(start.generate_state(1)[0]), noise

    def interrupt(self) -> None:
        """Stop the current evaluation at its next step, and all later ones.

        May be called from a signal handler.
        """
        self._interrupted = True

    def _processes(self, envs: int) -> int:
        """Return the number of processes for stepping, at most the number of PyTorch threads.

        Only the package's own environments are stepped in parallel. Other environments and
        wrappers may hold resources that do not survive a fork, or state that would be lost in it.
        """
        env = self._envs[0]
        if (
            type(env) is not TimeLimit
            or type(env.env) not in ENVIRONMENTS.values()
            or not sys.platform.startswith("linux")
            or torch.cuda.is_initialized()  # CUDA does not survive a fork
            or multiprocessing.current_process().daemon  # daemonic processes cannot have children
        ):
            return 1
        return max(1, min(torch.get_num_threads(), envs // _ENVS_PER_PROCESS))

    @staticmethod
    def _act(
        actors: Mapping[int, TransportActor], observations: np.ndarray, noise: np.ndarray
    ) -> np.ndarray:
        actions = []
        for k, (i, actor) in enumerate(actors.items()):
            reader = noise_reader(actor)
            assert isinstance(reader, TransportActor)  # checked before
            device = reader.action_scale.device
            inputs = TensorDict(
                {
                    actor.in_keys[0]: torch.from_numpy(observations[k]).to(device),
                    reader.noise_key: torch.from_numpy(noise).to(device),
                },
                noise.shape[:2],
            )
            action = actor(inputs)[reader.out_keys[0]].cpu().numpy()
            if not np.isfinite(action).all():
                raise FloatingPointError(
                    f"actor {i} returned an action that is not finite: training has diverged. "
                    "Try larger w2_weights, a smaller alpha or a smaller lr."
                )
            actions.append(action)
        return np.stack(actions)


def _check_inputs(index: int, actor: TransportActor) -> None:
    """Check that an actor reads one observation and its noise, and nothing else."""
    if not isinstance(noise_reader(actor), TransportActor) or len(actor.in_keys) != 1:
        raise ValueError(
            f"actor {index} reads in_keys={list(actor.in_keys)}, but an evaluation gives a "
            "transport map the environment's observation under one key: pass a TransportActor that "
            "reads one key, or roll out the actor in a TorchRL environment (env.rollout)."
        )


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Use one thread: batches are small, and idle PyTorch threads would slow the environments."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def format_evaluation(evaluations: Sequence[Evaluation]) -> str:
    """Format the mean return and D4RL score of each actor and mode for the console.

    Args:
        evaluations: the result of an :class:`Evaluator`.

    Example:
        >>> import numpy as np
        >>> e = Evaluation(0, "deterministic", np.full(10, 1992.1), np.full(10, 1000),
        ...                np.full(10, 61.83))
        >>> print(format_evaluation([e]))
        Evaluation over 10 episodes:
          Actor 0 - Deterministic: 1992.1, D4RL score: 61.8
    """
    lines = [f"Evaluation over {len(evaluations[0].returns)} episodes:"]
    lines += [
        f"  Actor {e.actor} - {e.mode.capitalize()}: {e.returns.mean():.1f}, "
        f"D4RL score: {e.scores.mean():.1f}"
        for e in evaluations
    ]
    return "\n".join(lines)
