"""Optimizers and learning-rate schedules: one of each for the critics and for every actor."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler

from pogo_torchrl.objectives import POGOLoss
from pogo_torchrl.trainers.fused.update import trained_parameters

MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]
"""Makes an optimizer of parameters: ``torch.optim.AdamW``, ``partial(torch.optim.SGD, lr=0.1)``."""

MakeScheduler = Callable[[Optimizer], LRScheduler]
"""Makes a scheduler of an optimizer: ``partial(CosineAnnealingLR, T_max=1000)``."""

LR_SCHEDULES = ("constant", "linear", "cosine")
"""Accepted names of :func:`lr_scheduler`."""


def lr_scheduler(
    name: Literal["constant", "linear", "cosine"], total_steps: int
) -> MakeScheduler | None:
    r"""A schedule of the learning rate over a training, by name.

    .. math::
        \mathrm{linear}: lr_t = lr_0 (1 - t / T), \qquad
        \mathrm{cosine}: lr_t = lr_0 (1 + \cos(\pi t / T)) / 2

    Args:
        name: ``"constant"``, ``"linear"`` or ``"cosine"``.
        total_steps: T, in updates.

    Returns:
        What :class:`~pogo_torchrl.POGOTrainer` takes; ``None`` for ``"constant"``.

    Raises:
        ValueError: for another name.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> scheduler = lr_scheduler("linear", total_steps=4)(optimizer)
        >>> optimizer.step(), scheduler.step(), optimizer.param_groups[0]["lr"]
        (None, None, 0.75)
    """
    if name == "constant":
        return None
    if name == "linear":
        return partial(LinearLR, start_factor=1.0, end_factor=0.0, total_iters=total_steps)
    if name == "cosine":
        return partial(CosineAnnealingLR, T_max=total_steps)
    raise ValueError(f"lr_schedule={name!r} is unknown; choose one of {list(LR_SCHEDULES)}.")


class ChainOptimizers:
    """The optimizers of a loss and their schedulers, made when they are first needed.

    By then the loss is on its device and has its dtype, so that moments are made there.

    Args:
        loss: whose critics and actors.
        qvalue: the optimizer of the critics, or what makes it.
        actor: a sequence of one optimizer for each actor, or what makes each.
        qvalue_scheduler: makes the scheduler of the critics' learning rate; ``None``: constant.
        actor_scheduler: makes that of each actor.
    """

    def __init__(
        self,
        loss: POGOLoss,
        qvalue: Optimizer | MakeOptimizer,
        actor: Sequence[Optimizer] | MakeOptimizer,
        qvalue_scheduler: MakeScheduler | None = None,
        actor_scheduler: MakeScheduler | None = None,
    ) -> None:
        self.loss = loss
        if not isinstance(qvalue, Optimizer) and not callable(qvalue):
            raise ValueError(_UNUSABLE.format("qvalue_optimizer", "an optimizer", qvalue))
        actors = actor if callable(actor) else list(actor)
        if isinstance(actors, list):
            if not all(isinstance(one, Optimizer) for one in actors):
                raise ValueError(_UNUSABLE.format("actor_optimizer", "a list of them", actor))
            if len(actors) != loss.num_actors:
                raise ValueError(
                    f"actor_optimizer holds {len(actors)} optimizers for {loss.num_actors} actors: "
                    "give one for each, made from loss.actor_params(i), or what makes them."
                )
        self._given = {"qvalue": qvalue}
        self._schedules = {"qvalue": qvalue_scheduler}
        for i in range(loss.num_actors):
            self._given[f"actor_{i}"] = actors[i] if isinstance(actors, list) else actors
            self._schedules[f"actor_{i}"] = actor_scheduler
        self._made: dict[str, Optimizer] | None = None
        self._schedulers: dict[str, LRScheduler] = {}

    @property
    def by_name(self) -> dict[str, Optimizer]:
        """The optimizers: ``qvalue``, ``actor_0``, ``actor_1``, ..."""
        if self._made is None:
            self._made = {name: self._make(name) for name in self._given}
            self._schedulers = {
                name: make(self._made[name])
                for name, make in self._schedules.items()
                if make is not None
            }
        return self._made

    def _make(self, name: str) -> Optimizer:
        given = self._given[name]
        if isinstance(given, Optimizer):
            return given
        made = given(trained_parameters(self.loss, name))
        if not isinstance(made, Optimizer):
            option = "qvalue_optimizer" if name == "qvalue" else "actor_optimizer"
            raise ValueError(_UNUSABLE.format(option, "an optimizer", made))
        return made

    def step_schedulers(self) -> None:
        """Move the learning rates on by one update."""
        for scheduler in self._schedulers.values():
            if scheduler.last_epoch > 0:
                scheduler.step()
                continue
            with warnings.catch_warnings():
                # It looks for a call of optimizer.step(), which a compiled update does not make.
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
                scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """Moments, counts, learning rates and schedules."""
        optimizers = {name: optimizer.state_dict() for name, optimizer in self.by_name.items()}
        schedulers = {name: one.state_dict() for name, one in self._schedulers.items()}
        return {"optimizers": _copied(optimizers), "schedulers": schedulers}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore them from a checkpoint."""
        for name, optimizer in self.by_name.items():
            optimizer.load_state_dict(state_dict["optimizers"][name])
        for name, scheduler in self._schedulers.items():
            scheduler.load_state_dict(state_dict["schedulers"][name])


_UNUSABLE = (
    "{0} must be a torch.optim class, a function of parameters that returns an optimizer (e.g. "
    "functools.partial(torch.optim.AdamW, lr=3e-4)), or {1}, not {2!r}."
)


def _copied(state: Any) -> Any:
    """Of tensors that are part of a stack, a file would take the whole stack."""
    if isinstance(state, torch.Tensor):
        return state.clone()
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    return [_copied(value) for value in state] if isinstance(state, list) else state


def adam(lr: float, weight_decay: float = 0.0, *, device: torch.device) -> MakeOptimizer:
    """What makes the default optimizer: Adam, or AdamW where there is weight decay.

    Args:
        lr: learning rate.
        weight_decay: decoupled from the gradient, as in AdamW. Defaults to ``0.0``: none.
        device: where the parameters will be; torch has a kernel for the whole step on some.
    """
    fused = device.type in ("cpu", "cuda")
    if weight_decay:
        return partial(torch.optim.AdamW, lr=lr, weight_decay=weight_decay, fused=fused)
    return partial(torch.optim.Adam, lr=lr, fused=fused)
