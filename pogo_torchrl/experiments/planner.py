"""What a run will take, from a short measurement on data of noise."""

from __future__ import annotations

import time
from functools import partial
from typing import NamedTuple

import gymnasium
import numpy as np
import torch
from omegaconf import DictConfig
from tensordict import TensorDict

from pogo_torchrl.data.replay_buffer import Normalization, OfflineReplayBuffer
from pogo_torchrl.envs import max_episode_steps
from pogo_torchrl.evaluation import Evaluator
from pogo_torchrl.experiments.run import (
    check_memory,
    choose_device,
    env_fn,
    make_loss,
    optimizer_settings,
)
from pogo_torchrl.objectives import POGOLoss
from pogo_torchrl.objectives.chain_loss import Params
from pogo_torchrl.trainers import POGOTrainer
from pogo_torchrl.trainers.hooks import LogMetrics

# Checkpoints that a trainer keeps; bytes of a row of metrics.csv, and of the figure, the logs and
# what a checkpoint holds beside the networks.
_CHECKPOINTS = 2
_ROW = 400
_REST = 200_000

# Steps of the episodes that are timed; few policies fall before. No more of them than this.
_STEPS = 20
_EPISODES = 10


class Cost(NamedTuple):
    """What one run of a kind takes."""

    update: float
    """Seconds of an update, not compiled."""
    evaluation: float
    """Seconds of an evaluation whose episodes all last to the horizon."""
    checkpoint: int
    """Bytes of a checkpoint."""
    policy: int
    """Bytes of the trained chain."""

    def disk(self, cfg: DictConfig) -> int:
        """Bytes that a finished run leaves behind."""
        rows = cfg.total_steps // cfg.log_interval
        return _CHECKPOINTS * self.checkpoint + cfg.save_model * self.policy + _ROW * rows + _REST


def measure(cfg: DictConfig, seconds: float = 0.5) -> Cost:
    """Measure a run of this configuration on this machine, in about three times ``seconds``.

    Updates are those of training, on noise of the task's dimensions; evaluations those of the
    task's environment, cut short.

    Raises:
        ValueError: for settings that the run would refuse, too.
    """
    make_env = env_fn(cfg.task, cfg.env)
    evaluator = Evaluator(
        cfg.task,
        episodes=min(cfg.eval_episodes, _EPISODES),
        env_fn=lambda: gymnasium.wrappers.TimeLimit(make_env(), _STEPS),
    )
    check_memory(cfg, evaluator)
    loss = make_loss(cfg, evaluator, choose_device(cfg.device))
    update = _time_updates(loss, cfg, evaluator, seconds)

    chain = [loss.actor(i) for i in range(loss.num_actors)]
    evaluator(chain)  # makes the environments
    begun = time.perf_counter()
    steps = max(int(e.lengths.max()) for e in evaluator(chain))
    elapsed = time.perf_counter() - begun
    horizon = cfg.env.max_episode_steps or max_episode_steps(cfg.task)
    evaluation = elapsed * horizon / steps * cfg.eval_episodes / evaluator.episodes

    first = _bytes(loss.params("actor_network_0"))
    policy = loss.num_actors * first
    trained = policy + _bytes(loss.params("qvalue_network"))
    # TorchRL's checkpoints hold the loss's actor_network once more, as the policy.
    others = _bytes(loss.params("target_qvalue_network")) + first
    others += first if cfg.delay_actor else 0
    return Cost(update, evaluation, 3 * trained + others, policy)  # Adam keeps two moments


def _time_updates(loss: POGOLoss, cfg: DictConfig, evaluator: Evaluator, seconds: float) -> float:
    rows, spec = 4 * cfg.batch_size, evaluator.action_spec
    observation = torch.randn(rows, evaluator.observation_dim)
    flags = torch.zeros(rows, 1, dtype=torch.bool)
    ends = {"observation": observation, "reward": torch.randn(rows, 1), "done": flags}
    noise = TensorDict(
        {
            "observation": observation,
            "action": spec.rand([rows]),
            "next": {**ends, "terminated": flags},
        },
        [rows],
    )
    train = partial(
        POGOTrainer,
        loss,
        OfflineReplayBuffer(
            noise.to(next(loss.parameters()).device),
            normalization=Normalization.identity(observation),
            episode_returns=np.zeros(1),
            batch_size=cfg.batch_size,
        ),
        **optimizer_settings(cfg, next(loss.parameters()).device),
        policy_freq=cfg.policy_freq,
        tau=cfg.tau,
        bf16=cfg.bf16,
        progress_bar=False,
    )
    steps, elapsed = 2, 0.0
    while elapsed < seconds / 2:  # until it is long enough to be told from the start-up
        steps = min(2 * steps, int(steps * seconds / elapsed) + 1) if elapsed else steps
        trainer = train(total_steps=steps, hooks=[LogMetrics([], steps)])
        begun = time.perf_counter()
        trainer.train()  # its metrics are read at the end: a GPU has finished by then
        elapsed = time.perf_counter() - begun
    return elapsed / steps


def _bytes(parameters: Params) -> int:
    return sum(value.numel() * value.element_size() for value in parameters.values())
