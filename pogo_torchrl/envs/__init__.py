"""Evaluation environments with the physics of D4RL's version 2 tasks, and D4RL's scores.

Importing this package registers every task in ``TASKS`` with Gymnasium as ``pogo_torchrl/{task}``.
"""

from pogo_torchrl.envs.antmaze import MAZES
from pogo_torchrl.envs.registration import BACKENDS, make_env, make_gymnasium_env
from pogo_torchrl.envs.scores import (
    REFERENCE_RETURNS,
    TASKS,
    Measure,
    is_d4rl_task,
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
    "Measure",
    "check_physics",
    "is_d4rl_task",
    "make_env",
    "make_gymnasium_env",
    "max_episode_steps",
    "replay_errors",
    "score",
    "split_task",
]
