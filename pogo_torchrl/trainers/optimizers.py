"""Optimizers and learning-rate schedules of the critics and the actors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler

from pogo_torchrl.objectives import POGOLoss
from pogo_torchrl.trainers.checkpoints import plain
from pogo_torchrl.trainers.fused.update import trained_parameters

MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]
"""Maps parameters to an optimizer: ``torch.optim.AdamW``, ``partial(torch.optim.SGD, lr=0.1)``."""

MakeScheduler = Callable[[Optimizer], LRScheduler]
"""Maps an optimizer to its scheduler: ``partial(CosineAnnealingLR, T_max=1000)``."""

LR_SCHEDULES = ("constant", "linear", "cosine")
"""Schedule names that :func:`lr_scheduler` accepts."""


def lr_scheduler(
    name: Literal["constant", "linear", "cosine"], total_steps: int
) -> MakeScheduler | None:
    r"""Look up a learning-rate schedule by name.

    .. math::
        \mathrm{linear}: lr_t = lr_0 (1 - t / T), \qquad
        \mathrm{cosine}: lr_t = lr_0 (1 + \cos(\pi t / T)) / 2

    Args:
        name: ``"constant"``, ``"linear"`` or ``"cosine"``.
        total_steps: length T of the schedule, in updates.

    Returns:
        A function from an optimizer to its scheduler, as accepted by
        :class:`~pogo_torchrl.POGOTrainer`; ``None`` for ``"constant"``.

    Raises:
        ValueError: if ``name`` is unknown.

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
    """The optimizers of a loss and their schedulers, created on first use.

    By then the loss has been moved to its device and dtype, so that the moments are created there.

    Args:
        loss: objective whose critics and actors are optimised.
        qvalue: optimizer of the critics, or a function from parameters to an optimizer.
        actor: sequence with one optimizer per actor, or a function that is called for each actor.
        qvalue_scheduler: function from the critics' optimizer to its scheduler. Defaults to
            ``None``: a constant learning rate.
        actor_scheduler: the same for the optimizer of each actor. Defaults to ``None``.

    Raises:
        ValueError: if an argument is neither an optimizer nor a function, or if the number of
            optimizers does not match the number of actors.
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
            raise ValueError(_INVALID_OPTIMIZER.format("qvalue_optimizer", "an optimizer", qvalue))
        actors = actor if callable(actor) else list(actor)
        if isinstance(actors, list):
            if not all(isinstance(one, Optimizer) for one in actors):
                raise ValueError(
                    _INVALID_OPTIMIZER.format("actor_optimizer", "a list of optimizers", actor)
                )
            if len(actors) != loss.num_actors:
                raise ValueError(
                    f"actor_optimizer holds {len(actors)} optimizers for {loss.num_actors} actors: "
                    "pass one per actor, created from loss.actor_params(i), or a function that "
                    "creates them."
                )
        self._optimizer_specs = {"qvalue": qvalue}
        self._scheduler_factories = {"qvalue": qvalue_scheduler}
        for i in range(loss.num_actors):
            self._optimizer_specs[f"actor_{i}"] = actors[i] if isinstance(actors, list) else actors
            self._scheduler_factories[f"actor_{i}"] = actor_scheduler
        self._optimizers: dict[str, Optimizer] | None = None
        self._schedulers: dict[str, LRScheduler] = {}

    @property
    def by_name(self) -> dict[str, Optimizer]:
        """The optimizers by name: ``qvalue``, ``actor_0``, ``actor_1``, ..."""
        if self._optimizers is None:
            self._optimizers = {name: self._create(name) for name in self._optimizer_specs}
            self._schedulers = {
                name: make(self._optimizers[name])
                for name, make in self._scheduler_factories.items()
                if make is not None
            }
        return self._optimizers

    def _create(self, name: str) -> Optimizer:
        given = self._optimizer_specs[name]
        if isinstance(given, Optimizer):
            return given
        made = given(trained_parameters(self.loss, name))
        if not isinstance(made, Optimizer):
            option = "qvalue_optimizer" if name == "qvalue" else "actor_optimizer"
            raise ValueError(_INVALID_OPTIMIZER.format(option, "an optimizer", made))
        return made

    @property
    def schedulers(self) -> dict[str, LRScheduler]:
        """The learning-rate schedules by name, of the optimizers that have one."""
        return self._schedulers if self.by_name else {}

    def step_schedulers(self) -> None:
        """Advance all learning-rate schedules by one update."""
        step_schedulers(self._schedulers.values())

    def state_dict(self) -> dict[str, Any]:
        """Return the moments, step counts, learning rates and schedules."""
        optimizers = {name: optimizer.state_dict() for name, optimizer in self.by_name.items()}
        schedulers = {name: one.state_dict() for name, one in self._schedulers.items()}
        return {"optimizers": _clone_tensors(optimizers), "schedulers": schedulers}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the state returned by :meth:`state_dict`."""
        for name, optimizer in self.by_name.items():
            optimizer.load_state_dict(state_dict["optimizers"][name])
        for name, scheduler in self._schedulers.items():
            scheduler.load_state_dict(state_dict["schedulers"][name])


def step_schedulers(schedulers: Iterable[LRScheduler]) -> None:
    """Advance learning-rate schedules by one update."""
    for scheduler in schedulers:
        if scheduler.last_epoch > 0:
            scheduler.step()
            continue
        with warnings.catch_warnings():
            # It expects a call of optimizer.step(), which a compiled update does not make, and
            # neither does an update without the actors.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            scheduler.step()


# Arguments of optimizers that choose an implementation, which may differ between devices.
_IMPLEMENTATION = ("fused", "foreach", "capturable", "differentiable")


def optimizer_settings(
    name: str, optimizer: Optimizer, scheduler: LRScheduler | None
) -> dict[str, Any]:
    """Return the settings of an optimizer that a run must share with a checkpoint.

    Args:
        name: name of the optimizer.
        optimizer: the optimizer, before its first step.
        scheduler: its learning-rate schedule, if there is one.

    Example:
        >>> sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
        >>> found = optimizer_settings("qvalue", sgd, None)
        >>> found["qvalue_optimizer"], found["qvalue_optimizer.momentum"]
        ('SGD(lr=0.1)', 0.9)
    """
    group = dict(optimizer.param_groups[0])
    lr = group.pop("lr")
    lr = plain(float(group.pop("initial_lr", lr)))  # the former with a schedule
    others = {k: v for k, v in group.items() if k not in ("params", *_IMPLEMENTATION)}
    return {
        f"{name}_optimizer": f"{type(optimizer).__name__}(lr={lr})",
        f"{name}_lr_scheduler": None if scheduler is None else type(scheduler).__name__,
        **{f"{name}_optimizer.{key}": value for key, value in others.items()},
    }


_INVALID_OPTIMIZER = (
    "{0} must be a torch.optim class, a function of parameters that returns an optimizer (e.g. "
    "functools.partial(torch.optim.AdamW, lr=3e-4)), or {1}, not {2!r}."
)


def _clone_tensors(state: Any) -> Any:
    """Clone all tensors: saving a view of a stack would write the whole stack."""
    if isinstance(state, torch.Tensor):
        return state.clone()
    if isinstance(state, dict):
        return {key: _clone_tensors(value) for key, value in state.items()}
    return [_clone_tensors(value) for value in state] if isinstance(state, list) else state


def adam(lr: float, weight_decay: float = 0.0, *, device: torch.device) -> MakeOptimizer:
    """Build a factory of the default optimizer: Adam, or AdamW if there is weight decay.

    Args:
        lr: learning rate.
        weight_decay: decoupled weight decay, as in AdamW. Defaults to ``0.0``.
        device: device of the parameters; on CPU and CUDA the fused implementation is used.

    Returns:
        A function from parameters to an optimizer.
    """
    fused = device.type in ("cpu", "cuda")
    if weight_decay:
        return partial(torch.optim.AdamW, lr=lr, weight_decay=weight_decay, fused=fused)
    return partial(torch.optim.Adam, lr=lr, fused=fused)
