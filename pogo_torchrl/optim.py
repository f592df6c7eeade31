"""Adam in plain tensor operations, which torch.compile traces into one graph with the losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class Adam:
    r"""Adam over plain tensors, to be called within a traced update.

    .. math::
        m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad
        v \leftarrow \beta_2 v + (1 - \beta_2) g^2,

    .. math::
        \theta \leftarrow \theta -
        lr \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    ``torch.optim.Adam`` gives the same numbers; it cannot be traced together with the losses into
    one graph. Being elementwise, it serves a stack of networks as it serves one.

    Source: Kingma and Ba (2015), algorithm 1.

    Args:
        params: updated in place.
        lr: learning rate.
        betas: decay rates of the moments. Defaults to ``(0.9, 0.999)``.
        eps: :math:`\epsilon`. Defaults to ``1e-8``.

    Example:
        >>> params = [torch.zeros(2)]
        >>> Adam(params, lr=0.1).step((torch.ones(2),))
        >>> params[0]
        tensor([-0.1000, -0.1000])
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
        self.exp_avg = [torch.zeros_like(p) for p in self.params]
        self.exp_avg_sq = [torch.zeros_like(p) for p in self.params]
        # float64: 1 - 0.999^t loses digits in float32. A vector: of one number alone torch.compile
        # (2.13) misses the change in place.
        self.steps = torch.zeros(1, dtype=torch.float64, device=self.params[0].device)

    @torch.no_grad()
    def step(self, gradients: tuple[Tensor, ...]) -> None:
        """Move the parameters by their gradients."""
        self.steps.add_(1)
        beta1, beta2 = self.betas
        torch._foreach_lerp_(self.exp_avg, gradients, 1 - beta1)
        torch._foreach_mul_(self.exp_avg_sq, beta2)
        torch._foreach_addcmul_(self.exp_avg_sq, gradients, gradients, 1 - beta2)
        # Joined, two numbers in memory: torch.compile would work them out anew at each parameter.
        size, correction = (
            torch.cat([self.lr / (1 - beta1**self.steps), (1 - beta2**self.steps).rsqrt()])
            .to(self.params[0].dtype)
            .unbind()
        )
        for parameter, m, v in zip(self.params, self.exp_avg, self.exp_avg_sq):
            denominator = v.sqrt().mul_(correction).add_(self.eps)
            parameter.sub_(m / denominator * size)

    def state_dict(self, part: int | None = None) -> dict[str, Any]:
        """Moments and count; of stacked networks, those of the one at ``part``."""
        # Copies: a file would take the whole stack with a part of it.
        moments = {name: [m.clone() for m in _of(getattr(self, name), part)] for name in _MOMENTS}
        return {"steps": self.steps.clone(), **moments}

    def load_state_dict(self, state_dict: Mapping[str, Any], part: int | None = None) -> None:
        """Go on from a checkpoint."""
        self.steps.copy_(state_dict["steps"])
        for name in _MOMENTS:
            mine = _of(getattr(self, name), part)
            for values, theirs in zip(mine, state_dict[name], strict=True):
                values.copy_(theirs)


_MOMENTS = ("exp_avg", "exp_avg_sq")


def _of(stacks: list[Tensor], part: int | None) -> list[Tensor]:
    return stacks if part is None else [stack[part] for stack in stacks]
