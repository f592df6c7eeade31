r"""Exact optimal transport between small clouds of equal size: the optimal assignment.

Held and Karp's recursion over subsets, vectorised: :math:`V(S)` is the least cost of assigning the
first :math:`|S|` points of x to the subset S of y,

.. math:: V(S) = \min_{j \in S} V(S \setminus \{j\}) + c_{|S|, j}.

It takes :math:`K 2^{K-1}` additions for each pair of clouds and no host synchronisation.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

MAX_POINTS = 10
"""Largest K of ``backend="exact"``: 5120 additions a pair; one point more doubles it."""


def assignment_cost(x: Tensor, y: Tensor) -> Tensor:
    """``min over permutations p of mean_k |x_k - y_p(k)|^2 / 2`` for ``[*B, K, d]``; [*B].

    The gradient is that of the cost at the best permutation (envelope theorem).
    """
    with torch.no_grad():
        partners = _assign(x.detach(), y.detach())
    matched = y.gather(-2, partners[..., None].expand_as(y))
    return (x - matched).square().sum(-1).mean(-1) / 2


def _assign(x: Tensor, y: Tensor) -> Tensor:
    """Partner in y of each point of x, ``[*B, K]``."""
    # Under torch.compile K may be a symbol; a comparison makes it a number.
    k = next(k for k in range(1, MAX_POINTS + 1) if k == x.shape[-2])
    cost = (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1).movedim((-2, -1), (0, 1))
    best = cost.new_zeros(1, *cost.shape[2:])
    choices = []
    for size in range(1, k + 1):
        last, rest = (torch.tensor(table, device=x.device) for table in _tables(k, size))
        best, choice = (best[rest] + cost[size - 1][last]).min(1)
        choices.append(choice)
    # Walk back from the full set; `where` is the set's place among those of its size.
    where = torch.zeros_like(choices[-1])
    partners = []
    for size in range(k, 0, -1):
        last, rest = (torch.tensor(table, device=x.device) for table in _tables(k, size))
        choice = choices[size - 1].gather(0, where)
        partners.append(last[where, choice])
        where = rest[where, choice]
    return torch.cat(partners[::-1]).movedim(0, -1)


@torch.compiler.assume_constant_result
def _tables(k: int, size: int) -> tuple[list[list[int]], list[list[int]]]:
    """For each subset of ``size`` of k: its members, and the place of it without each of them."""
    smaller = {s: i for i, s in enumerate(itertools.combinations(range(k), size - 1))}
    subsets = list(itertools.combinations(range(k), size))
    rest = [[smaller[s[:i] + s[i + 1 :]] for i in range(size)] for s in subsets]
    return [list(s) for s in subsets], rest
