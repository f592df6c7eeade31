"""Evaluation environments with the physics of D4RL's version 2 tasks, and D4RL's scores.

Importing this package registers every task in ``TASKS`` with Gymnasium as ``pogo_torchrl/{task}``.
"""

from pogo_torchrl.envs.antmaze import MAZES
from pogo_torchrl.envs.registration import BACKENDS, make_env
from pogo_torchrl.envs.scores import (
    REFERENCE_RETURNS,
    TASKS,
    max_episode_steps,
    score,
    split_task,
)
from pogo_torchrl.envs.selfcheck import check_physics
from pogo_torchrl.envs.transitions import replay_errors

__all__ = [
    "BACKENDS",
    "MAZES",
    "REFERENCE_RETURNS",
    "TASKS",
    "check_physics",
    "make_env",
    "max_episode_steps",
    "replay_errors",
    "score",
    "split_task",
]
