"""POGO in TorchRL's Hydra config groups: an alias of :mod:`pogo_torchrl.experiments.config`."""

from pogo_torchrl.experiments.config import *  # noqa: F403
