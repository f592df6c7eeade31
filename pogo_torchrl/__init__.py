"""POGO: policy optimization as a gradient flow in offline RL, as a TorchRL-native plugin."""

from pogo_torchrl.modules import TransportActor, make_actor, make_qvalue
from pogo_torchrl.objectives import POGOLoss
from pogo_torchrl.policies import load_actors
from pogo_torchrl.trainers import POGOTrainer
from pogo_torchrl.transport import sinkhorn_divergence

__all__ = [
    "POGOLoss",
    "POGOTrainer",
    "TransportActor",
    "load_actors",
    "make_actor",
    "make_qvalue",
    "sinkhorn_divergence",
]
