"""All uses of private interfaces of TorchRL, tensordict and torch.

No other module uses a name of these libraries that starts with an underscore, which a test
enforces. For each name, the list below states the TorchRL version that introduced it, why it is
needed, and which public interface could replace it. If a release lacks a name, the package warns
once and uses a fallback.

* ``Trainer._{stage}_hook`` and ``Trainer._post_optim_log``, since TorchRL 0.0.4: the optimization
  stepper and the stack of trainers run single stages. Replaceable by a public method that runs a
  stage.
* ``Trainer._optim_count``, since 0.0.4: one call of the stepper may run many updates. Replaceable
  by a public counter.
* ``LossModule._forward_value_estimator_keys``, since 0.1: ``set_keys`` calls it. Replaceable by a
  public callback.
* ``LossModule._make_vmap``, since 0.4: setting ``vmap_randomness`` calls it. Replaceable by a
  public callback.
* ``LossModule._value_estimator``, since 0.1: its public counterpart creates an estimator if there
  is none. Replaceable by a public check.
* ``LossModule._reduce_loss``, since 0.14: reduction with masks of padded steps and priority
  weights. Replaceable by a public function.
* ``LossModule._has_update_associated``, since 0.2: a wrapper of a loss shares its marks of target
  networks that have an updater. Replaceable by a public method.
* ``LossModule._loss_mask_keys``, since 0.14: keys of the masks of padded steps. Replaceable by a
  public list.
* ``ReplayBufferEnsemble._rbs``, since 0.3: hooks see rows of all buffers of an ensemble.
  Replaceable by its length.
* ``LossModule._clear_weakrefs``, since 0.6: ``torch.compile`` cannot return weak references.
  Replaceable by weak references that can be compiled.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import ReplayBuffer
from torchrl.objectives.common import LossModule

_STAGES = {
    "setup": "_setup_hook",
    "process_optim_batch": "_process_optim_batch_hook",
    "post_loss": "_post_loss_hook",
    "post_optim": "_post_optim_hook",
    "post_optim_log": "_post_optim_log",
    "post_steps": "_post_steps_hook",
    "post_steps_log": "_post_steps_log_hook",
    "shutdown": "_shutdown_hook",
}


@cache
def _warn_once(name: str, fallback: str) -> None:
    warnings.warn(
        f"the installed TorchRL has no {name}: {fallback}. See pyproject.toml for the versions "
        "that pogo_torchrl is tested with.",
        stacklevel=3,
    )


def run_stage(trainer: Any, stage: str, *args: Any) -> Any:
    """Run the hooks of one stage of a trainer, as TorchRL's loop does.

    The optimization stepper needs this for ``post_loss``, and a stack of trainers to interleave
    their loops. TorchRL only provides the loop as a whole.

    Args:
        trainer: a :class:`~pogo_torchrl.POGOTrainer`.
        stage: name of the stage as in ``register_op``.
        *args: the batch, for stages whose hooks accept one.

    Returns:
        The batch returned by the hooks, for stages whose hooks may replace it; otherwise ``None``.
    """
    runner = getattr(trainer, _STAGES[stage], None)
    if runner is not None:
        return runner(*args)
    _warn_once(f"Trainer.{_STAGES[stage]}", "its hooks are called directly, without logging")
    for hook, kwargs in trainer.stages.get(stage, ()):
        result = hook(*args, **kwargs)
        if args and isinstance(result, TensorDictBase):
            args = (result,)
    return args[0] if args else None


def count_updates(trainer: Any, count: int) -> None:
    """Add updates to the counter that TorchRL's hooks and checkpoints read.

    TorchRL's loop counts each call of the optimization stepper as one update, but a call may run
    several.

    Args:
        trainer: a :class:`~pogo_torchrl.POGOTrainer`.
        count: number of updates to add.
    """
    if hasattr(trainer, "_optim_count"):
        trainer._optim_count += count
    else:
        _warn_once("Trainer._optim_count", "TorchRL's own count of updates is too low")


def ensemble_members(replay_buffer: Any) -> list[ReplayBuffer]:
    """Return the replay buffers of an ensemble; an empty list for other objects.

    Args:
        replay_buffer: any replay buffer.
    """
    return list(getattr(replay_buffer, "_rbs", ()))


def share_update_marks(wrapper: LossModule, loss: LossModule) -> None:
    """Let a target updater of a wrapper mark the target networks of the wrapped loss as updated.

    Args:
        wrapper: a loss that contains another one.
        loss: the other one.
    """
    if hasattr(loss, "_has_update_associated"):
        wrapper._has_update_associated = loss._has_update_associated


def reduce_loss(owner: LossModule, loss: Tensor, batch: TensorDictBase) -> Tensor:
    """Reduce a loss as a loss module does, with the priority weights and masks of the batch.

    Args:
        owner: the module, whose ``reduction``, ``use_prioritized_weights`` and ``loss_mask_key``
            are used.
        loss: loss of each sample, ``[*B]``.
        batch: batch of transitions, which may contain priority weights and masks.

    Returns:
        A scalar, or ``[*B]`` if ``reduction`` is ``"none"``.
    """
    weights = None
    if owner.use_prioritized_weights in (True, "auto"):
        weights = batch.get(getattr(owner.tensor_keys, "priority_weight", "priority_weight"), None)
    reduction = getattr(owner, "reduction", "mean")
    if hasattr(owner, "_reduce_loss"):
        return owner._reduce_loss(loss, tensordict=batch, reduction=reduction, weights=weights)
    _warn_once("LossModule._reduce_loss", "masks of padded steps are ignored")
    if weights is not None:
        loss = loss * weights
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.mean() if weights is None else loss.sum() / weights.sum()


class ProtectedLossModule(LossModule):
    """Loss module with public names for private methods that TorchRL's losses call or override."""

    def keys_changed(self) -> None:
        """Read the tensordict keys again; called by :meth:`set_keys`."""
        raise NotImplementedError

    def randomness_changed(self) -> None:
        """React to a change of ``vmap_randomness``; called when it is set."""
        raise NotImplementedError

    def _forward_value_estimator_keys(self, **kwargs) -> None:
        self.keys_changed()

    def _make_vmap(self) -> None:
        self.randomness_changed()

    @property
    def has_value_estimator(self) -> bool:
        """Whether an estimator exists; reading ``value_estimator`` would create the default one."""
        return getattr(self, "_value_estimator", None) is not None

    def reduce(self, loss: Tensor, batch: TensorDictBase) -> Tensor:
        """Reduce a loss by ``reduction``; see :func:`reduce_loss`."""
        return reduce_loss(self, loss, batch)

    def valid_rows(self, batch: TensorDictBase) -> Tensor | None:
        """Return the mask with which :meth:`reduce` leaves out padded steps, if there is one."""
        keys = self._loss_mask_keys() if hasattr(self, "_loss_mask_keys") else ()
        masks = [mask for key in keys if (mask := batch.get(key, None)) is not None]
        return torch.stack(masks).all(0) if masks else None

    def release(self, *tensordicts: Any) -> None:
        """Clear weak references, which ``torch.compile`` cannot return from a compiled loss."""
        if hasattr(self, "_clear_weakrefs"):
            self._clear_weakrefs(*tensordicts)
