"""Loss modules."""

from pogo_torchrl.objectives.averages import ActorAverages
from pogo_torchrl.objectives.jko_chain import JKOChain
from pogo_torchrl.objectives.pogo import POGOLoss
from pogo_torchrl.objectives.rebrac import ReBRACLoss

__all__ = ["ActorAverages", "JKOChain", "POGOLoss", "ReBRACLoss"]
