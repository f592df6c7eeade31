"""Trainer of POGO, built on TorchRL's Trainer."""

from pogo_torchrl.trainers.chain_trainer import ChainTrainer
from pogo_torchrl.trainers.optimizers import LR_SCHEDULES, lr_scheduler
from pogo_torchrl.trainers.stack import TrainerStack
from pogo_torchrl.trainers.stepper import POGOOptimizationStepper
from pogo_torchrl.trainers.trainer import POGOTrainer

__all__ = [
    "LR_SCHEDULES",
    "ChainTrainer",
    "POGOOptimizationStepper",
    "POGOTrainer",
    "TrainerStack",
    "lr_scheduler",
]
