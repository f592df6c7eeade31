"""TorchRL's trainer hooks on POGOTrainer: those without effect are refused."""

from __future__ import annotations

from typing import Any

from torchrl.trainers import (
    LRSchedulerHook,
    ReplayBufferTrainer,
    SelectKeys,
    TargetNetUpdaterHook,
    UTDRHook,
    ValueEstimatorHook,
)
from torchrl.trainers.algorithms.offline_to_online import (
    OfflineToOnlineAnnealHook,
    OfflineToOnlineReplayBufferHook,
)
from torchrl.trainers.trainers import OptimizationStepper

# Stages whose hooks receive the batch of TorchRL's loop.
BATCH_STAGES = {
    "batch_process",
    "pre_steps_log",
    "pre_epoch_log",
    "pre_epoch",
    "post_epoch_log",
    "post_steps_log",
}

# Stages between the loss and the optimizer step, which are fused here. With an
# OptimizationStepper, TorchRL's own trainer silently skips them.
_UNSUPPORTED_STAGES = {
    "process_loss": "change the loss itself (subclass POGOLoss)",
    "optimizer": "give POGOTrainer the optimizers (qvalue_optimizer, actor_optimizer)",
}

_OFFLINE_BUFFER = (
    "POGOTrainer samples from the replay buffer that it was created with and collects no data: "
    "fill the buffer first, and give it to POGOTrainer(loss, replay_buffer, ...)"
)

# Hooks that would not affect the training, or that need a collector.
_REFUSED: dict[type, str] = {
    ReplayBufferTrainer: _OFFLINE_BUFFER,
    OfflineToOnlineReplayBufferHook: f"{_OFFLINE_BUFFER}, e.g. buffer.offline_buffer",
    OfflineToOnlineAnnealHook: (
        "POGOTrainer collects no online data to anneal to: train on buffer.offline_buffer, then "
        "continue online with TorchRL's OfflineToOnlineTrainer"
    ),
    OptimizationStepper: (
        "POGOTrainer has its own optimization stepper, which updates critics and actors in the "
        "order of the chain: choose qvalue_optimizer, actor_optimizer, clip_grad_norm and bf16, or "
        "write your own loop (examples/pogo_in_torchrl.py)"
    ),
    UTDRHook: (
        "POGOTrainer collects no data, so that there is no ratio of updates to new data: "
        "CountFramesLog logs the number of updates"
    ),
    ValueEstimatorHook: (
        "POGOLoss computes its own targets for each sampled batch: choose the estimator by "
        "loss.make_value_estimator(...)"
    ),
}


def check_hook(trainer: Any, hook: Any, stage: str | None = None) -> None:
    """Refuse a hook that would not affect the training, or that cannot run.

    Args:
        trainer: the :class:`~pogo_torchrl.POGOTrainer`.
        hook: an operation, or a module of the trainer.
        stage: stage of the operation. Defaults to ``None``: ``hook`` is a module.

    Raises:
        ValueError: that states why, and what to use instead.
    """
    if stage in _UNSUPPORTED_STAGES:
        raise ValueError(
            f"POGOTrainer has no {stage!r} stage, because it fuses losses and optimizer steps: "
            f"{_UNSUPPORTED_STAGES[stage]}, or write your own loop "
            "(examples/pogo_in_torchrl.py)."
        )
    hook = getattr(hook, "__self__", hook)  # of a bound method
    reason = next((text for kind, text in _REFUSED.items() if isinstance(hook, kind)), None)
    if hook is trainer.optimization_stepper:
        reason = None
    elif isinstance(hook, SelectKeys) and stage == "batch_process":
        reason = (
            "the data are in the replay buffer already: select keys when you fill it, or in each "
            "sampled batch by trainer.register_op('process_optim_batch', hook)"
        )
    elif isinstance(hook, LRSchedulerHook):
        optimizers = trainer.optimization_stepper.optimizers.values()
        if not any(hook.scheduler.optimizer is one for one in optimizers):
            reason = (
                "its scheduler changes an optimizer that POGOTrainer does not use: create the "
                "scheduler from one of trainer.optimization_stepper.optimizers, or use "
                "qvalue_lr_scheduler and actor_lr_scheduler"
            )
    elif (
        isinstance(hook, TargetNetUpdaterHook)
        and hook.target_params_updater.loss_module is trainer.loss_module
    ):
        reason = (
            "POGOTrainer updates the targets of its loss already, which would be updated twice: "
            "choose tau, or POGOTrainer(..., target_net_updater=updater)"
        )
    if reason is not None:
        raise ValueError(f"{type(hook).__name__} cannot be registered: {reason}.")
