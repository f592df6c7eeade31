"""Loss modules."""

from pogo_torchrl.objectives.pogo import POGOLoss

__all__ = ["POGOLoss"]
