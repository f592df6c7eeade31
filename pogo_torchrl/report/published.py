"""Published scores on D4RL's version 2 datasets, with their sources."""

from __future__ import annotations

from typing import NamedTuple

from pogo_torchrl.report.intervals import Spread

ALGORITHMS = ("TD3+BC", "IQL", "ReBRAC")

PER_TASK_SOURCE = (
    "Tarasov et al. 2023, Revisiting the Minimalist Approach to Offline Reinforcement Learning "
    "(ReBRAC), arXiv:2305.09836, tables 2 and 3: last checkpoint, mean ± standard deviation over "
    "10 seeds, disjoint from the seeds that all three algorithms were tuned on"
)

_PER_TASK = {
    "halfcheetah-medium-v2": ((54.7, 0.9), (50.0, 0.2), (65.6, 1.0)),
    "halfcheetah-medium-replay-v2": ((45.0, 1.1), (42.1, 3.6), (51.0, 0.8)),
    "halfcheetah-medium-expert-v2": ((89.1, 5.6), (92.7, 2.8), (101.1, 5.2)),
    "hopper-medium-v2": ((60.9, 7.6), (65.2, 4.2), (102.0, 1.0)),
    "hopper-medium-replay-v2": ((55.1, 31.7), (89.6, 13.2), (98.1, 5.3)),
    "hopper-medium-expert-v2": ((87.8, 10.5), (85.5, 29.7), (107.0, 6.4)),
    "walker2d-medium-v2": ((77.7, 2.9), (80.7, 3.4), (82.5, 3.6)),
    "walker2d-medium-replay-v2": ((68.0, 19.2), (75.4, 9.3), (77.3, 7.9)),
    "walker2d-medium-expert-v2": ((110.4, 0.6), (112.1, 0.5), (111.6, 0.3)),
    "antmaze-umaze-v2": ((66.3, 6.2), (83.3, 4.5), (97.8, 1.0)),
    "antmaze-umaze-diverse-v2": ((53.8, 8.5), (70.6, 3.7), (88.3, 13.0)),
    "antmaze-medium-play-v2": ((26.5, 18.4), (64.6, 4.9), (84.0, 4.2)),
    "antmaze-medium-diverse-v2": ((25.9, 15.3), (61.7, 6.1), (76.3, 13.5)),
    "antmaze-large-play-v2": ((0.0, 0.0), (42.5, 6.5), (60.4, 26.1)),
    "antmaze-large-diverse-v2": ((0.0, 0.0), (27.6, 7.8), (54.4, 25.1)),
}

PER_TASK = {
    task: {name: Spread(*values) for name, values in zip(ALGORITHMS, row)}
    for task, row in _PER_TASK.items()
}
"""Score of each algorithm on each task: mean and standard deviation over seeds."""

TASKS = tuple(PER_TASK)
"""The nine locomotion and six antmaze tasks, in the order used by the papers."""


class GroupMeans(NamedTuple):
    """Mean scores of an algorithm over the nine locomotion and the six antmaze tasks."""

    algorithm: str
    locomotion: float | None
    antmaze: float | None
    source: str


# Only POGO's means have not been compared with the text of the paper.
_POGO = "POGO's paper, its Gaussian variant, which is not this algorithm; not verified"
_REBRAC = "ReBRAC's paper, means of tables 2 and 3"
_IQL = "Kostrikov et al. 2022 (IQL), arXiv:2110.06169, table 1"

GROUP_MEANS = (
    GroupMeans("POGO", 83.2, 45.3, _POGO),
    GroupMeans("TD3+BC", 75.3, None, _IQL),
    GroupMeans("TD3+BC, tuned", 72.1, 28.7, _REBRAC),
    GroupMeans("IQL", 76.9, None, _IQL),
    GroupMeans("IQL, tuned", 77.0, 58.3, _REBRAC),
    GroupMeans("ReBRAC", 88.5, 76.8, _REBRAC),
)
