r"""Exact optimal transport between small point clouds of equal size: the optimal assignment.

A vectorised Held-Karp recursion over subsets, where :math:`V(S)` is the minimal cost of assigning
the first :math:`|S|` points of x to the subset S of y:

.. math:: V(S) = \min_{j \in S} V(S \setminus \{j\}) + c_{|S|, j}.

It needs :math:`K 2^{K-1}` additions per pair of clouds and no host synchronisation.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

MAX_POINTS = 10
"""Largest K of ``backend="exact"``: 5120 additions per pair, doubling with every further point."""


def assignment_cost(x: Tensor, y: Tensor) -> Tensor:
    r"""Return :math:`\min_p \mathrm{mean}_k \tfrac12 |x_k - y_{p(k)}|^2` over permutations p.

    By the envelope theorem, the gradient is that of the cost at the optimal permutation.

    Args:
        x: clouds of shape ``[*B, K, d]``, with K up to :data:`MAX_POINTS`.
        y: clouds of the same shape.

    Returns:
        The costs, of shape ``[*B]``.
    """
    with torch.no_grad():
        partners = _assign(x.detach(), y.detach())
    matched = y.gather(-2, partners[..., None].expand_as(y))
    return (x - matched).square().sum(-1).mean(-1) / 2


def _assign(x: Tensor, y: Tensor) -> Tensor:
    """Index in y of the point assigned to each point of x, shape ``[*B, K]``."""
    # torch.compile may treat K as symbolic; the comparison specialises it.
    k = next(k for k in range(1, MAX_POINTS + 1) if k == x.shape[-2])
    cost = (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1).movedim((-2, -1), (0, 1))
    best = cost.new_zeros(1, *cost.shape[2:])
    choices = []
    for size in range(1, k + 1):
        last, rest = (torch.tensor(table, device=x.device) for table in _tables(k, size))
        best, choice = (best[rest] + cost[size - 1][last]).min(1)
        choices.append(choice)
    # Backtrack from the full set; `position` indexes the current set among those of its size.
    position = torch.zeros_like(choices[-1])
    partners = []
    for size in range(k, 0, -1):
        last, rest = (torch.tensor(table, device=x.device) for table in _tables(k, size))
        choice = choices[size - 1].gather(0, position)
        partners.append(last[position, choice])
        position = rest[position, choice]
    return torch.cat(partners[::-1]).movedim(0, -1)


@torch.compiler.assume_constant_result
def _tables(k: int, size: int) -> tuple[list[list[int]], list[list[int]]]:
    """Members of each subset of size ``size``, and its index after removing each of them."""
    smaller = {s: i for i, s in enumerate(itertools.combinations(range(k), size - 1))}
    subsets = list(itertools.combinations(range(k), size))
    rest = [[smaller[s[:i] + s[i + 1 :]] for i in range(size)] for s in subsets]
    return [list(s) for s in subsets], rest
