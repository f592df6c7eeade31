"""Hook of POGOTrainer that trains the critics first and lets the later actors flow afterwards."""

from __future__ import annotations

import math
from typing import Any

import torch
from torchrl.data.replay_buffers.samplers import PrioritizedSampler
from torchrl.trainers import TrainerHookBase

from pogo_torchrl.objectives import JKOChain, POGOLoss


class FreezeThenFlow(TrainerHookBase):
    r"""Trainer hook that splits the training: first the critics and actor 0, then the later actors.

    Until update :math:`t^*`, only the critics and actor 0 are trained; the later actors are copies
    of actor 0. Then the critics, their targets and actor 0 are frozen, and the later actors are
    trained in the order of the chain, each from its predecessor, at every update. Their optimizers
    start fresh. With ``average_actors``, actor 0 is frozen at its average. Learning-rate schedules
    count all updates. The metrics of networks that are not being trained repeat their last values
    (0 if there are none yet).

    Source: *Policy Optimization as a Gradient Flow in Offline Reinforcement Learning*, algorithm 2.
    There, the critics are frozen after half of the updates, and policies are Gaussian.

    A chain of a single actor is trained throughout, since nothing would be left to train.

    Args:
        at: :math:`t^*`, an integer >= 1, or its fraction of all updates, in (0, 1). A count does
            not depend on the length of the run, so that a finished run can be extended.

    Raises:
        ValueError: if ``at`` is neither.

    Example:
        >>> FreezeThenFlow(0.5).switch(total_steps=1001), FreezeThenFlow(800).switch(1001)
        (500, 800)
    """

    def __init__(self, at: float) -> None:
        if not (0 < at < 1 or (1 <= at < math.inf and at == round(at))):
            raise ValueError(
                f"freeze_critics_at={at!r} must be a fraction of total_steps in (0, 1), e.g. 0.5, "
                "or a number of updates, an integer >= 1."
            )
        self.at = at

    def switch(self, total_steps: int) -> int:
        r"""Return the update :math:`t^*` after which the later actors are trained.

        A fraction leaves at least one update before and after the switch.

        Args:
            total_steps: total number of updates. The switch is not reached if there is only one, or
                fewer than a count.
        """
        if self.at >= 1:
            return round(self.at)
        return max(1, min(round(self.at * total_steps), total_steps - 1))

    def register(self, trainer: Any, name: str = "freeze_then_flow") -> None:
        """Register the hook with a trainer.

        Args:
            trainer: the :class:`~pogo_torchrl.POGOTrainer`.
            name: unused, part of TorchRL's interface.

        Raises:
            ValueError: if the replay buffer is prioritised.
        """
        self.trainer, self.loss = trainer, trainer.loss_module
        step = self.switch(trainer.total_frames)
        if self.loss.num_actors == 1:
            return
        if isinstance(getattr(trainer.dataset, "sampler", None), PrioritizedSampler):
            raise ValueError(
                f"freeze_critics_at={self.at} does not support a prioritised replay buffer, "
                "because frozen critics have no TD errors: use a uniform sampler."
            )
        trainer.optimization_stepper.freeze_at = self.step = step
        trainer.add_stop(step)
        trainer.register_op("post_steps", self._run)

    def _run(self) -> None:
        if isinstance(self.loss, JKOChain):
            if self.trainer.collected_frames <= self.step:
                self.loss.restart()
            return
        step, has_averages = self.trainer.collected_frames, self.loss.average_actors is not None
        if step == self.step and has_averages:
            copy_weights(self.loss, "average_actor_network_0", "actor_network_0")
        if step <= self.step:
            for i in range(1, self.loss.num_actors):
                copy_weights(self.loss, "actor_network_0", f"actor_network_{i}")
                if has_averages:
                    copy_weights(self.loss, "average_actor_network_0", f"average_actor_network_{i}")


@torch.no_grad()
def copy_weights(loss: POGOLoss, source: str, target: str) -> None:
    """Copy the weights of a network to another one.

    Args:
        loss: the objective; its tensors are changed in place.
        source: name of a network, see :meth:`POGOLoss.params`.
        target: name of the network that receives the weights.
    """
    weights = loss.params(source)
    for name, values in loss.params(target).items():
        values.copy_(weights[name])
