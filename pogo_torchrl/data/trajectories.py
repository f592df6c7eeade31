"""What the rows of a dataset have from the trajectories that they belong to."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor


def continues(rows: TensorDictBase) -> Tensor:
    """Whether each row but the last is continued by the row after it.

    Args:
        rows: transitions ``[N]`` in the order of the dataset, with raw observations.

    Returns:
        Booleans of shape ``[N - 1]``, ``False`` after terminal states, time-outs and cuts.
    """
    same = (rows["next", "observation"][:-1] == rows["observation"][1:]).all(-1)
    return same & ~rows["next", "done"][:-1].squeeze(-1)


def next_actions(rows: TensorDictBase) -> Tensor:
    """The dataset's actions in the next states, NaN where a trajectory ends.

    Args:
        rows: transitions ``[N]`` in the order of the dataset, with raw observations.
    """
    actions, follows = torch.full(rows["action"].shape, torch.nan), continues(rows)
    actions[:-1][follows] = rows["action"][1:][follows]
    return actions


def trajectory_returns(rows: TensorDictBase) -> Tensor:
    """Undiscounted return of the trajectory of each row.

    Args:
        rows: transitions ``[N]`` in the order of the dataset, with raw observations and rewards.

    Returns:
        Returns of shape ``[N]``, in double precision.
    """
    starts = torch.cat([torch.zeros(1, dtype=torch.bool), ~continues(rows)])
    trajectory = starts.long().cumsum(0)
    rewards = rows["next", "reward"].squeeze(-1).double()
    returns = rewards.new_zeros(int(trajectory[-1]) + 1).index_add_(0, trajectory, rewards)
    return returns[trajectory]


def trajectory_weights(returns: Tensor, temperature: float) -> Tensor:
    r"""Weights of rows that prefer trajectories of high return.

    .. math::
        w_j = \frac{e^{g_j / \beta}}{\mathrm{mean}_k\, e^{g_k / \beta}}, \qquad
        g_j = \frac{G_j - \min G}{\max G - \min G}

    In a mixture of good and bad behaviour, or of several gaits, the return of a whole trajectory
    tells the behaviours apart, which the advantage of a single action does not.

    Source: Hong et al., *Harnessing Mixed Offline Reinforcement Learning Datasets via Trajectory
    Weighting*, 2023, arXiv:2306.13085, whose default is :math:`\beta = 0.1`.

    Args:
        returns: :math:`G_j`, the return of the trajectory of row j, of shape ``[N]``.
        temperature: :math:`\beta > 0`; the smaller, the more the weights differ.

    Returns:
        The weights, of shape ``[N]``, with mean 1; all 1 if all returns are equal.

    Example:
        >>> from math import log
        >>> trajectory_weights(torch.tensor([10.0, 20.0]), temperature=1 / log(3))
        tensor([0.5000, 1.5000])
    """
    span = returns.max() - returns.min()
    normalized = (returns - returns.max()) / span.clamp_min(torch.finfo(returns.dtype).tiny)
    return len(returns) * (normalized / temperature).softmax(0)
