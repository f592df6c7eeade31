"""Every private interface of TorchRL, tensordict and torch that the package uses.

No other module touches a name of theirs that starts with an underscore; a test checks it. Each
entry says why it is needed, since when TorchRL has it, and what would replace it. Where a release
lacks one, the package warns once and falls back to code of its own.

* ``Trainer._{stage}_hook`` and ``Trainer._post_optim_log``, since TorchRL 0.0.4: an optimization
  stepper and a stack of trainers run single stages. Replaced by a public call that runs a stage.
* ``Trainer._optim_count``, since 0.0.4: one call of our stepper makes many updates. Replaced by a
  public counter.
* ``LossModule._forward_value_estimator_keys``, since 0.1: ``set_keys`` calls it. Replaced by a
  public callback.
* ``LossModule._make_vmap``, since 0.4: setting ``vmap_randomness`` calls it. Replaced by a public
  callback.
* ``LossModule._value_estimator``, since 0.1: its public counterpart makes an estimator where there
  is none. Replaced by a public test.
* ``LossModule._reduce_loss``, since 0.14: reduction with masks of padded steps and priority
  weights. Replaced by a public function.
* ``LossModule._clear_weakrefs``, since 0.6: ``torch.compile`` cannot return weak references.
  Replaced by weak references that compile.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

from tensordict import TensorDictBase
from torch import Tensor
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
        f"the installed TorchRL has no {name}: {fallback}. Versions that pogo_torchrl is tested "
        "with are listed in its pyproject.toml.",
        stacklevel=3,
    )


def run_stage(trainer: Any, stage: str, *args: Any) -> Any:
    """Run the hooks of one stage of a trainer, as TorchRL's loop does.

    Needed by an optimization stepper, for ``post_loss``, and by a stack of trainers, which
    interleaves the loops of several. TorchRL offers the loop as a whole only.

    Args:
        trainer: a :class:`~pogo_torchrl.POGOTrainer`.
        stage: the stage, as ``register_op`` names it.
        *args: the batch, for stages whose hooks take one.

    Returns:
        The batch as the hooks leave it, for stages whose hooks may replace it; else ``None``.
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

    Its loop counts one for each call of the optimization stepper, which may make several updates.
    """
    if hasattr(trainer, "_optim_count"):
        trainer._optim_count += count
    else:
        _warn_once("Trainer._optim_count", "TorchRL's own count of updates is too low")


class ProtectedLossModule(LossModule):
    """A loss module with public names for what TorchRL's losses call and override in private."""

    def keys_changed(self) -> None:
        """Called by :meth:`set_keys`: read the tensordict keys again."""
        raise NotImplementedError

    def randomness_changed(self) -> None:
        """Called where ``vmap_randomness`` is set."""
        raise NotImplementedError

    def _forward_value_estimator_keys(self, **kwargs) -> None:
        self.keys_changed()

    def _make_vmap(self) -> None:
        self.randomness_changed()

    @property
    def has_value_estimator(self) -> bool:
        """Whether an estimator has been made; reading ``value_estimator`` makes the default one."""
        return getattr(self, "_value_estimator", None) is not None

    def reduce(self, loss: Tensor, batch: TensorDictBase) -> Tensor:
        """Reduce a loss ``[*B]`` by ``reduction``, with the batch's priority weights and masks."""
        weights = None
        if self.use_prioritized_weights in (True, "auto"):
            weights = batch.get(self.tensor_keys.priority_weight, None)
        if hasattr(self, "_reduce_loss"):
            return self._reduce_loss(loss, tensordict=batch, weights=weights)
        _warn_once("LossModule._reduce_loss", "masks of padded steps are ignored")
        if weights is not None:
            loss = loss * weights
        if self.reduction == "none":
            return loss
        if self.reduction == "sum":
            return loss.sum()
        return loss.mean() if weights is None else loss.sum() / weights.sum()

    def release(self, *tensordicts: Any) -> None:
        """Drop weak references, which ``torch.compile`` cannot return from a compiled loss."""
        if hasattr(self, "_clear_weakrefs"):
            self._clear_weakrefs(*tensordicts)
