"""Loss modules."""

from pogo_torchrl.objectives.averages import ActorAverages
from pogo_torchrl.objectives.pogo import POGOLoss

__all__ = ["ActorAverages", "POGOLoss"]
