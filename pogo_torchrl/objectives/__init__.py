"""Loss modules."""

from pogo_torchrl.objectives.averages import ActorAverages
from pogo_torchrl.objectives.fqe import FQELoss
from pogo_torchrl.objectives.gaussian_pogo import GaussianPOGOLoss
from pogo_torchrl.objectives.jko_chain import JKOChain
from pogo_torchrl.objectives.pogo import POGOLoss
from pogo_torchrl.objectives.rebrac import ReBRACLoss

__all__ = ["ActorAverages", "FQELoss", "GaussianPOGOLoss", "JKOChain", "POGOLoss", "ReBRACLoss"]
