"""POGO (policy optimization as a gradient flow in offline RL) as a TorchRL plugin."""

from pogo_torchrl.export import load_actors
from pogo_torchrl.modules import TransportActor, make_actor, make_qvalue
from pogo_torchrl.objectives import JKOChain, POGOLoss, ReBRACLoss
from pogo_torchrl.ot import sinkhorn_divergence
from pogo_torchrl.trainers import POGOTrainer

__all__ = [
    "JKOChain",
    "POGOLoss",
    "POGOTrainer",
    "ReBRACLoss",
    "TransportActor",
    "load_actors",
    "make_actor",
    "make_qvalue",
    "sinkhorn_divergence",
]
