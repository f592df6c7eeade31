"""Adam and AdamW in plain tensor operations, which compile into one graph with the losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_REQUIRED_FLAGS = {"amsgrad": False, "maximize": False, "differentiable": False}


class FusedAdam:
    r"""The step of one ``torch.optim.Adam`` or ``AdamW``, or of a stack with equal settings.

    .. math::
        m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad
        v \leftarrow \beta_2 v + (1 - \beta_2) g^2,

    .. math::
        \theta \leftarrow \theta -
        lr \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    with the type of weight decay that the optimizer's class uses. The parameters and the moments in
    the optimizers' ``state`` are updated in place, so the optimizers can also continue with their
    own ``step()``, see :meth:`write_steps`. The step count and the bias correction are computed in
    float64. ``torch.optim.adam.adam`` uses the dtype of the parameters when it is compiled, and
    does not support a stack on a CPU in eager mode.

    Source: Kingma & Ba, *Adam: A Method for Stochastic Optimization*, 2014, arXiv:1412.6980,
    algorithm 1; Loshchilov & Hutter, *Decoupled Weight Decay Regularization*, 2017,
    arXiv:1711.05101, algorithm 2.

    Args:
        optimizers: one optimizer, or one per run of a stack of R runs.
        parameters: for each optimizer, the parameters that it holds.
        params: the same parameters as tensors to be changed in place, ``[R, ...]`` for a stack.

    Raises:
        ValueError: if :func:`unsupported_reason` rejects an optimizer, or if the settings of the
            optimizers differ.

    Example:
        >>> parameter = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = torch.optim.Adam([parameter], lr=0.1)
        >>> adam = FusedAdam([optimizer], [[parameter]], [parameter.detach()])
        >>> adam.step([torch.ones(2)], torch.tensor(0.1, dtype=torch.float64))
        >>> parameter.data
        tensor([-0.1000, -0.1000])
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        parameters: Sequence[Sequence[Tensor]],
        params: Sequence[Tensor],
    ) -> None:
        self.optimizers, self.params = list(optimizers), list(params)
        self.settings = settings = self._settings()
        self.betas, self.eps = settings["betas"], settings["eps"]
        self.weight_decay, self.decoupled = settings["weight_decay"], settings["decoupled"]
        # Indexed by parameter, then by run.
        self._states = [
            [_init_state(optimizer, p) for optimizer, p in zip(self.optimizers, runs)]
            for runs in zip(*parameters)
        ]
        self.exp_avg = [_stack_shared("exp_avg", s, p) for s, p in zip(self._states, self.params)]
        self.exp_avg_sq = [
            _stack_shared("exp_avg_sq", s, p) for s, p in zip(self._states, self.params)
        ]
        # float64, because 1 - 0.999^t loses precision in float32. A vector, because torch.compile
        # (2.13) misses the in-place change of a scalar tensor.
        count = float(self._states[0][0]["step"])
        self.steps = torch.full((1,), count, dtype=torch.float64, device=self.params[0].device)

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], lr: Tensor) -> None:
        """Update the parameters.

        Args:
            gradients: gradients in the order of the parameters.
            lr: learning rate, a float64 scalar tensor.
        """
        self.steps.add_(1)
        beta1, beta2 = self.betas
        if self.weight_decay:
            if self.decoupled:
                shrink = (1 - lr * self.weight_decay).to(self.params[0].dtype)
                for p in self.params:
                    p.mul_(shrink)
            else:
                gradients = [g + self.weight_decay * p for g, p in zip(gradients, self.params)]
        # Joined into one tensor, so that torch.compile computes both once, not per parameter.
        size, correction = (
            torch.cat([lr / (1 - beta1**self.steps), (1 - beta2**self.steps).rsqrt()])
            .to(self.params[0].dtype)
            .unbind()
        )
        for p, m, v, g in zip(self.params, self.exp_avg, self.exp_avg_sq, gradients):
            m.lerp_(g, 1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            denominator = v.sqrt().mul_(correction).add_(self.eps)
            p.sub_(m / denominator * size)

    def check(self) -> None:
        """Check that no setting has changed since it was compiled.

        Raises:
            ValueError: naming the settings that have changed.
        """
        now = self._settings()
        changed = [name for name, value in self.settings.items() if now[name] != value]
        if changed:
            raise ValueError(
                f"{', '.join(changed)} of {type(self.optimizers[0]).__name__} changed during "
                "training, but a compiled or stacked update only follows changes of the learning "
                "rate: keep the other settings constant, or use compile=False."
            )

    def memory(self) -> list[Tensor]:
        """Return the tensors, besides the parameters, that a step changes."""
        return [*self.exp_avg, *self.exp_avg_sq, self.steps]

    def write_steps(self) -> None:
        """Write the step count to the ``state`` of the optimizers."""
        for runs in self._states:
            for state in runs:
                state["step"].copy_(self.steps[0])

    def _settings(self) -> dict[str, Any]:
        found = []
        for optimizer in self.optimizers:
            reason = unsupported_reason(optimizer)
            if reason:
                raise ValueError(reason)
            group = optimizer.param_groups[0]
            found.append(
                {
                    "betas": tuple(group["betas"]),
                    "eps": group["eps"],
                    "weight_decay": group["weight_decay"],
                    "decoupled": isinstance(optimizer, torch.optim.AdamW)
                    or bool(group.get("decoupled_weight_decay")),
                }
            )
        if any(one != found[0] for one in found):
            raise ValueError(f"the optimizers of a stack must share their settings, not {found}.")
        return found[0]


def unsupported_reason(optimizer: Optimizer) -> str | None:
    """Explain why a compiled or stacked update does not support an optimizer.

    Args:
        optimizer: the optimizer to check.

    Returns:
        The reason as an error message, or ``None`` if the optimizer is supported.

    Example:
        >>> parameter = torch.nn.Parameter(torch.zeros(2))
        >>> unsupported_reason(torch.optim.AdamW([parameter], weight_decay=0.1))
        >>> unsupported_reason(torch.optim.SGD([parameter]))[:40]
        'a compiled or stacked update supports on'
    """
    name, reason = type(optimizer).__name__, ""
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        reason = f"not {name}"
    elif len(optimizer.param_groups) != 1:
        reason = f"with one parameter group, not {len(optimizer.param_groups)}"
    else:
        group = optimizer.param_groups[0]
        odd = [key for key, value in _REQUIRED_FLAGS.items() if group.get(key, value) != value]
        odd += ["tensor betas"] if any(isinstance(b, Tensor) for b in group["betas"]) else []
        reason = f"without {', '.join(odd)}" if odd else ""
    if not reason:
        return None
    return (
        "a compiled or stacked update supports only torch.optim.Adam and AdamW (with any learning "
        f"rate, weight decay, betas and eps), {reason}: use one of these, or compile=False."
    )


def _init_state(optimizer: Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """Return an optimizer's state of a parameter, initialised like the optimizer's first step."""
    state = optimizer.state[parameter]
    if not state:
        fused = optimizer.param_groups[0].get("fused")
        state["step"] = torch.zeros((), device=parameter.device if fused else None)
        state["exp_avg"] = torch.zeros_like(parameter.data)
        state["exp_avg_sq"] = torch.zeros_like(parameter.data)
    return state


def _stack_shared(name: str, states: Sequence[dict[str, Tensor]], like: Tensor) -> Tensor:
    """Stack a moment of all runs, in the shape of ``like``; the optimizers keep views of it."""
    if len(states) == 1:
        return states[0][name].view_as(like)
    moments = torch.stack([state[name] for state in states])
    for state, own in zip(states, moments):
        state[name] = own
    return moments


class TorchOptimizer:
    """Adapter for any ``torch.optim`` optimizer, which runs its own ``step()``.

    Args:
        optimizer: the optimizer.
        parameters: the parameters that it holds, in the order of the gradients.
    """

    def __init__(self, optimizer: Optimizer, parameters: Sequence[torch.nn.Parameter]) -> None:
        self.optimizer, self.parameters = optimizer, list(parameters)

    def step(self, gradients: Sequence[Tensor], lr: float) -> None:
        """Update the parameters.

        Args:
            gradients: gradients in the order of the parameters.
            lr: ignored, the optimizer uses its own learning rate.
        """
        for parameter, gradient in zip(self.parameters, gradients):
            if gradient.stride() != parameter.stride():
                # The layout that backward() produces, on which the kernels of fused=True rely.
                gradient = torch.empty_like(parameter).copy_(gradient)
            parameter.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad()

    def check(self) -> None:
        """Do nothing: changed settings take effect at the next step."""

    def write_steps(self) -> None:
        """Do nothing: the optimizer counts its own steps."""

    def memory(self) -> list[Tensor]:
        """Return no tensors: the update does not restore this optimizer."""
        return []
