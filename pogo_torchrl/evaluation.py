"""Bitwise reproducible evaluation of all actors of a chain at once."""

from __future__ import annotations

import logging
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

from pogo_torchrl.envs import Measure, make_env
from pogo_torchrl.envs.parallel import step_in_parallel
from pogo_torchrl.envs.probe import check_spaces, env_name, probe
from pogo_torchrl.envs.selfcheck import ENVIRONMENTS
from pogo_torchrl.machine import physical_memory
from pogo_torchrl.modules import TransportActor, noise_reader
from pogo_torchrl.trainers.hooks import Evaluation, EvaluationInterrupted

MODES = ("deterministic", "stochastic")
"""Evaluation modes: z = 0 (deterministic) or z ~ N(0, I) (stochastic)."""

# Separates the random streams of evaluations from other uses of the same seed.
_STREAM = 0xE7A1

# For fewer environments per process, communication takes longer than stepping.
_ENVS_PER_PROCESS = 8

# Packages whose environments may exist many times in a process, and the memory of one in bytes, of
# which all may use a quarter of the machine's.
_LIGHT = {"pogo_torchrl": 2e6, "gymnasium": 20e6, "gymnasium_robotics": 50e6}

_LOGGER = logging.getLogger(__name__)


class Evaluator:
    """Evaluate chains of actors on a task.

    All actors are evaluated in both modes on the same ``episodes`` episodes. The start state of
    episode e and its noise in the stochastic mode depend on ``seed`` and e only. Evaluations of the
    same weights are therefore identical, actors are compared under equal conditions, and the global
    random state is neither read nor changed. The episodes of an actor are evaluated as one batch,
    and only once if it occurs several times in the chain.
    The package's own environments are stepped in as many processes as PyTorch has threads, other
    environments in the current process; the results are the same. Environments are kept for the
    next evaluation; :meth:`close` closes them.

    Args:
        task: name of a D4RL task or, with ``env_fn``, of a task of one's own.
        episodes: number of episodes per actor and mode. Defaults to ``10``.
        seed: seed of the start states and the noise. Defaults to ``0``.
        env_fn: function that creates an environment. Defaults to
            :func:`~pogo_torchrl.envs.make_env` with ``task``.
        reference_scores: returns with the scores 0 and 100. Defaults to D4RL's for its tasks; other
            tasks then have no scores.
        eval_envs: largest number of environments that exist at once. Fewer batch fewer episodes,
            which changes results by rounding only. Defaults to all episodes at once, as the memory
            of the machine allows, for the environments of this package and of Gymnasium, and to 1
            for others, of which only one may be able to exist.

    Raises:
        ValueError: if the task is unknown, ``episodes`` or ``eval_envs`` is less than 1, or the
            observations or actions of the environment are not vectors.

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
        reference_scores: Sequence[float] | None = None,
        eval_envs: int | None = None,
    ) -> None:
        for option, number in (("eval_episodes", episodes), ("eval_envs", eval_envs)):
            if number is not None and number < 1:
                raise ValueError(f"{option}={number} must be an integer >= 1.")
        self.task = task
        self.episodes = episodes
        self.seed = seed
        self.measure = Measure.of(task, reference_scores)
        self._interrupted = False
        self._make_env = env_fn or partial(make_env, task)
        env = self._make_env()
        self._envs = [env]
        try:
            check_spaces(env)
        except ValueError:
            self.close()
            raise
        assert isinstance(env.observation_space, Box)
        assert isinstance(env.action_space, Box)
        self._action_space = env.action_space
        self.eval_envs = eval_envs or _most_envs(env)
        self.observation_space = env.observation_space
        self.dict_space = getattr(env, "dict_space", None)
        self.observation_dim: int = env.observation_space.shape[0]
        self.action_dim: int = env.action_space.shape[0]
        self.max_episode_steps = env.spec.max_episode_steps if env.spec else None

    def check(self) -> None:
        """Reset and step an environment once, so that its mistakes show before training.

        Raises:
            ValueError: if it does not follow Gymnasium's interface, or returns values that are not
                finite; see :func:`~pogo_torchrl.envs.probe.probe`.
        """
        self._open(1)
        probe(self._envs[0])

    def close(self) -> None:
        """Close the environments; another evaluation creates new ones."""
        while self._envs:
            env = self._envs.pop()
            try:
                env.close()
            except Exception as error:  # the results are not affected
                _LOGGER.warning("Closing %s failed: %s", env, error)

    def _open(self, number: int) -> None:
        while len(self._envs) < number:
            self._envs.append(self._make_env())

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
            RuntimeError: if the environment returns an observation or reward that is not.
            EvaluationInterrupted: after a call of :meth:`interrupt`.
        """
        originals = [next(i for i, first in enumerate(actors) if first is x) for x in actors]
        distinct = sorted(set(originals))
        for i in distinct:
            _check_inputs(i, actors[i])
        returns, lengths = self._roll_out({i: actors[i] for i in distinct})
        results = {i: (returns[k], lengths[k]) for k, i in enumerate(distinct)}
        return [
            Evaluation(i, mode, r, n, self.measure.scores(r))
            for i, original in enumerate(originals)
            for mode, r, n in zip(MODES, *results[original])
        ]

    def _roll_out(self, actors: Mapping[int, TransportActor]) -> tuple[np.ndarray, np.ndarray]:
        """Return the returns and lengths ``[actors, modes, episodes]`` of actors, by index."""
        shape = (len(actors), len(MODES), self.episodes)
        slots = np.array(list(np.ndindex(shape)))
        returns, lengths = np.zeros(len(slots)), np.zeros(len(slots), dtype=int)
        for start in range(0, len(slots), self.eval_envs):
            batch = slice(start, start + self.eval_envs)
            returns[batch], lengths[batch] = self._play(list(actors.items()), slots[batch])
        return returns.reshape(shape), lengths.reshape(shape)

    def _play(
        self, actors: Sequence[tuple[int, TransportActor]], slots: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Play some episodes at once, ``[n, 3]``: actor, mode and episode, ordered by actor."""
        self._open(len(slots))
        modes, (episodes, own) = slots[:, 1], np.unique(slots[:, 2], return_inverse=True)
        seeds = [self._seeds(episode) for episode in episodes.tolist()]
        streams = [np.random.default_rng(noise) for _, noise in seeds]
        batches = [(*actors[k], np.flatnonzero(slots[:, 0] == k)) for k in np.unique(slots[:, 0])]

        observations = np.zeros((len(slots), self.observation_dim), dtype=np.float32)
        for i, env in enumerate(self._envs[: len(slots)]):
            observations[i], _ = env.reset(seed=seeds[own[i]][0])
        returns, lengths = np.zeros(len(slots)), np.zeros(len(slots), dtype=int)
        running = np.arange(len(slots))
        actions = np.zeros((len(slots), self.action_dim), dtype=np.float32)
        noise = np.zeros_like(actions)
        stochastic = modes == MODES.index("stochastic")
        envs, processes = self._envs[: len(slots)], self._processes(len(slots))
        with _one_torch_thread(), step_in_parallel(envs, processes) as step:
            while len(running):
                if self._interrupted:
                    raise EvaluationInterrupted
                draws = np.stack([stream.standard_normal(self.action_dim) for stream in streams])
                noise[stochastic] = draws[own[stochastic]]
                for index, actor, rows in batches:
                    actions[rows] = self._act(index, actor, observations[rows], noise[rows])
                observations[running], rewards, over = step(running, actions[running])
                returns[running] += rewards
                lengths[running] += 1
                self._check_finite(rewards, observations[running[~over]], int(lengths.max()))
                running = running[~over]
        return returns, lengths

    def _check_finite(self, rewards: np.ndarray, observations: np.ndarray, step: int) -> None:
        """Tell a broken environment from diverged actors; final observations are not used."""
        for what, values in (("a reward", rewards), ("an observation", observations)):
            if not np.isfinite(values).all():
                bad = values[~np.isfinite(values)][0]
                raise RuntimeError(
                    f"{env_name(self._envs[0])} returned {what} of {bad} in step {step} of an "
                    "episode, for finite actions: the environment is at fault, not the training"
                )

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
        index: int, actor: TransportActor, observations: np.ndarray, noise: np.ndarray
    ) -> np.ndarray:
        reader = noise_reader(actor)
        assert isinstance(reader, TransportActor)  # checked before
        device = reader.action_scale.device
        inputs = TensorDict(
            {
                actor.in_keys[0]: torch.from_numpy(observations).to(device),
                reader.noise_key: torch.from_numpy(noise).to(device),
            },
            noise.shape[:1],
        )
        action = actor(inputs)[reader.out_keys[0]].cpu().numpy()
        if not np.isfinite(action).all():
            raise FloatingPointError(
                f"actor {index} returned an action that is not finite: training has diverged. "
                "Try larger w2_weights, a smaller alpha or a smaller lr."
            )
        return action


def _most_envs(env: gymnasium.Env) -> int:
    """Number of environments that may exist at once, see :class:`Evaluator`."""
    size = _LIGHT.get(type(env.unwrapped).__module__.partition(".")[0])
    return 1 if size is None else max(1, int(physical_memory() / 4 / size))


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


def format_evaluation(evaluations: Sequence[Evaluation], measure: str = "D4RL score") -> str:
    """Format the mean return and score of each actor and mode for the console.

    Args:
        evaluations: the result of an :class:`Evaluator`.
        measure: name of the scores, if there are any. Defaults to ``"D4RL score"``.

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
        f"  Actor {e.actor} - {e.mode.capitalize()}: {e.returns.mean():.1f}"
        + ("" if e.scores is None else f", {measure}: {e.scores.mean():.1f}")
        for e in evaluations
    ]
    return "\n".join(lines)
