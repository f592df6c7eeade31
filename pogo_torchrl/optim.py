"""Adam over stacked networks, of which one is stepped at a time, in plain tensor operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class StackedAdam:
    r"""Adam, for parameters that several networks of one architecture share as ``[N, ...]`` stacks.

    .. math::
        m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad
        v \leftarrow \beta_2 v + (1 - \beta_2) g^2,

    .. math::
        \theta \leftarrow \theta -
        lr \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    Each network has its own moments and its own count :math:`t`: as many optimizers as networks.
    ``torch.optim.Adam`` gives the same numbers; it cannot be traced together with the losses into
    one graph where its parameters are slices of the tensors that the losses read.

    Source: Kingma and Ba (2015), algorithm 1.

    Args:
        params: stacks, each ``[N, ...]``, updated in place.
        lr: learning rate.
        betas: decay rates of the moments. Defaults to ``(0.9, 0.999)``.
        eps: :math:`\epsilon`. Defaults to ``1e-8``.

    Example:
        >>> params = [torch.zeros(2, 3)]
        >>> StackedAdam(params, lr=0.1).step([torch.ones(2, 3)], index=1)
        >>> params[0]
        tensor([[ 0.0000,  0.0000,  0.0000],
                [-0.1000, -0.1000, -0.1000]])
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.params = list(params)
        self.lr, self.betas, self.eps = lr, betas, eps
        self.exp_avg = [torch.zeros_like(p.data) for p in self.params]
        self.exp_avg_sq = [torch.zeros_like(p.data) for p in self.params]
        # float64: 1 - 0.999^t loses digits in float32
        self.steps = torch.zeros(len(self.params[0]), dtype=torch.float64, device=params[0].device)

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], index: int | None = None) -> None:
        """Move the networks, or the one at ``index``, by gradients of the stacks."""
        part = slice(None) if index is None else slice(index, index + 1)
        gradients = [g[part] for g in gradients]
        moments = [m[part] for m in self.exp_avg]
        squares = [v[part] for v in self.exp_avg_sq]
        steps = self.steps[part].add_(1)
        beta1, beta2 = self.betas
        torch._foreach_lerp_(moments, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        size = self.lr / (1 - beta1**steps)
        correction = (1 - beta2**steps).sqrt()
        for parameter, m, v in zip(self.params, moments, squares):
            shape = (-1, *[1] * (m.ndim - 1))
            denominator = v.sqrt().div_(correction.to(v.dtype).view(shape)).add_(self.eps)
            parameter.data[part].sub_(m / denominator * size.to(m.dtype).view(shape))

    def state_dict(self) -> dict[str, Any]:
        """Moments and counts."""
        return {
            "steps": self.steps,
            "exp_avg": list(self.exp_avg),
            "exp_avg_sq": list(self.exp_avg_sq),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.steps.copy_(state_dict["steps"])
        for name in ("exp_avg", "exp_avg_sq"):
            for mine, theirs in zip(getattr(self, name), state_dict[name], strict=True):
                mine.copy_(theirs)
