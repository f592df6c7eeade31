"""Hooks of POGOTrainer that change the size of the proximal steps during training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torchrl.trainers import TrainerHookBase

from pogo_torchrl.objectives import POGOLoss
from pogo_torchrl.objectives.settings import check_integer, check_positive, plain_number
from pogo_torchrl.trainers.stepper import RunningMean


class StepControl(TrainerHookBase):
    r"""Base class of trainer hooks that change ``alpha`` of the loss every ``interval`` updates.

    Every step size of the chain is proportional to :math:`\alpha`:
    :math:`h_0 = \alpha / (2 w_0)` and :math:`h_i = \alpha / (w_i d)`, so that all actors follow.
    The current :math:`\alpha` is part of the trainer's checkpoints. Register the hook before those
    that may save a checkpoint, such as :class:`~pogo_torchrl.trainers.hooks.Evaluate`.

    Args:
        interval: number of updates between two changes. Defaults to ``100``.

    Raises:
        ValueError: if ``interval`` is less than 1.
    """

    def __init__(self, interval: int = 100) -> None:
        self.interval = plain_number(interval)
        check_integer("interval", self.interval)

    def register(self, trainer: Any, name: str = "step_control") -> None:
        """Register the hook with a trainer.

        Args:
            trainer: the :class:`~pogo_torchrl.POGOTrainer`.
            name: name of the hook's state in checkpoints.
        """
        self.trainer = trainer
        self.loss: POGOLoss = trainer.loss_module
        self.initial_alpha = float(self.loss.alpha)
        trainer.add_interval(self.interval)
        trainer.register_op("post_steps", self._run)
        trainer.register_module(name, self)

    def _run(self) -> None:
        if self.trainer.collected_frames % self.interval == 0:
            self.loss.alpha = self.next_alpha()

    def next_alpha(self) -> float:
        r"""Return :math:`\alpha` of the next ``interval`` updates."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        r"""Return the current :math:`\alpha`."""
        return {"alpha": self.loss.alpha}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        r"""Restore :math:`\alpha`."""
        self.loss.alpha = state_dict["alpha"]


class HoldDisplacement(StepControl):
    r"""Trainer hook that holds actor 0's mean squared displacement from the data at a target.

    Every ``interval`` updates it takes :math:`\hat D_0`, the mean of :math:`D_0` (``bc_mse``, the
    mean squared distance from the data's actions on [-1, 1], per action dimension) over these
    updates, and sets

    .. math::
        \alpha \leftarrow \alpha\, \mathrm{clip}\big((D_{target} / \hat D_0)^{\rho},
        1 / L, L\big), \qquad
        \alpha \in [\alpha_0 / M, M \alpha_0].

    **The rate** :math:`\rho`. If Q is linear in the actions, actor 0 moves from the mean action of
    the data by a distance proportional to :math:`h_0 \propto \alpha`. Hence
    :math:`D_0 = c \alpha^2 + \sigma^2` with the residual variance :math:`\sigma^2` of the data,
    the mean variance of an action given its state. If the actor followed at once,
    :math:`\log D_0` would approach its target by the factor
    :math:`1 - 2 \rho\, c \alpha^2 / D_0` per change: stable for all :math:`\rho < 1`, without
    overshoot for :math:`\rho \le 1/2`, and in one step for :math:`\rho = 1/2` and
    :math:`\sigma = 0`. But the actor follows with a lag of :math:`\tau` updates. To first order,
    :math:`\tau \ddot u + \dot u + (2 \rho / n) u = 0` for the error :math:`u` of :math:`\log D_0`
    and the interval n, which is damped for every :math:`\rho`, and free of oscillation for
    :math:`\rho \le n / (8 \tau)`. The default, 1/8, is that for a lag of one interval.

    **The residual variance**. :math:`\alpha` cannot lower :math:`D_0` below :math:`\sigma^2`,
    the ``bc_mse`` of behaviour cloning. With a target below, :math:`\alpha` falls to its lower
    bound, and the actor clones the data; with a target just above, actor 0 barely moves. Choose
    the target above the ``bc_mse`` that a run with a very small :math:`\alpha` reaches. The bounds
    on :math:`\alpha` also limit its fall at the start of a run, while :math:`D_0` is large because
    the actor is untrained. Once actor 0 is frozen (``freeze_critics_at``), :math:`\alpha` is kept.

    Adapting the weight of the policy constraint during training helps across datasets: Jing et al.,
    *Adaptive Scaling of Policy Constraints for Offline Reinforcement Learning* (ASPC), 2025,
    arXiv:2508.19900, by another rule.

    Args:
        target: :math:`D_{target}`, e.g. ``0.06``.

    Keyword Args:
        interval: n, the number of updates between two changes. Defaults to ``100``.
        rate: :math:`\rho`, in (0, 1). Defaults to ``0.125``.
        limit: L, the largest factor of one change, at least 1. Defaults to ``1.25``.
        bound: M, the largest factor between :math:`\alpha` and its initial value, at least 1.
            Defaults to ``100.0``.

    Raises:
        ValueError: if a setting is out of range.

    Example:
        >>> hook = HoldDisplacement(0.06)
        >>> round(hook.adapted(1.0, 0.03), 3)  # half the target: alpha grows
        1.091
        >>> hook.adapted(1.0, 6.0)
        0.8
    """

    def __init__(
        self,
        target: float,
        *,
        interval: int = 100,
        rate: float = 0.125,
        limit: float = 1.25,
        bound: float = 100.0,
    ) -> None:
        super().__init__(interval)
        check_positive("displacement", target)
        if not 0 < rate < 1:
            raise ValueError(f"rate={rate!r} must be in (0, 1), e.g. 0.125.")
        for name, factor in {"limit": limit, "bound": bound}.items():
            if not 1 <= factor < math.inf:
                raise ValueError(f"{name}={factor!r} must be a finite number >= 1.")
        self.target, self.rate, self.limit, self.bound = map(
            plain_number, (target, rate, limit, bound)
        )

    def register(self, trainer: Any, name: str = "step_control") -> None:
        """Register the hook with a trainer.

        Args:
            trainer: the :class:`~pogo_torchrl.POGOTrainer`.
            name: name of the hook's state in checkpoints.

        Raises:
            ValueError: if actor 0 has no distance term.
        """
        if not trainer.loss_module.w2_weights[0]:
            raise ValueError(
                "displacement needs w2_weights[0] > 0: without a distance term, alpha does not "
                "determine how far actor 0 moves from the data."
            )
        super().register(trainer, name)
        self.means: RunningMean = trainer.optimization_stepper.track()

    def adapted(self, alpha: float, measured: float) -> float:
        r"""Return :math:`\alpha` adapted to a measured displacement, without its bounds.

        Args:
            alpha: the current :math:`\alpha`.
            measured: :math:`\hat D_0`.
        """
        factor = (self.target / max(measured, 1e-12)) ** self.rate
        return alpha * min(max(factor, 1 / self.limit), self.limit)

    def next_alpha(self) -> float:
        r"""Return :math:`\alpha` adapted to the updates since the last change, within bounds."""
        measured = self.means()["bc_mse"]
        self.means.reset()
        frozen = self.trainer.optimization_stepper.frozen  # then alpha no longer affects actor 0
        if frozen or not math.isfinite(measured):  # or training has diverged
            return self.loss.alpha
        alpha = self.adapted(self.loss.alpha, measured)
        low, high = self.initial_alpha / self.bound, self.initial_alpha * self.bound
        return min(max(alpha, low), high)


class GrowSteps(StepControl):
    r"""Trainer hook that lets the step sizes grow (or shrink) over the training.

    .. math::
        \alpha_t = \alpha_0\, g^{t / T}

    with the number t of completed updates, rounded down to a multiple of ``interval``, and the
    total T. Steps are small while the critics know little, and as a scale, :math:`\alpha` grows by
    equal factors in equal times.

    Source of the observation that policy constraints whose weight changes during training
    outperform constant ones: Jing et al., *Adaptive Scaling of Policy Constraints for Offline
    Reinforcement Learning* (ASPC), 2025, arXiv:2508.19900.

    Args:
        growth: g, the factor between the final and the initial :math:`\alpha`.

    Keyword Args:
        interval: number of updates between two changes. Defaults to ``100``.

    Raises:
        ValueError: if a setting is out of range.

    Example:
        >>> hook = GrowSteps(4.0)
        >>> [hook.factor(step, 1000) for step in (0, 500, 1000)]
        [1.0, 2.0, 4.0]
    """

    def __init__(self, growth: float, *, interval: int = 100) -> None:
        super().__init__(interval)
        check_positive("alpha_growth", growth)
        self.growth = plain_number(growth)

    def factor(self, step: int, total: int) -> float:
        r"""Return :math:`\alpha_t / \alpha_0`.

        Args:
            step: number t of completed updates.
            total: total number T of updates.
        """
        return self.growth ** (step / total)

    def next_alpha(self) -> float:
        r"""Return :math:`\alpha_t`."""
        trainer = self.trainer
        return self.initial_alpha * self.factor(trainer.collected_frames, trainer.total_frames)
