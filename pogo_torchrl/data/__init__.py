"""Offline datasets as TorchRL replay buffers."""

from pogo_torchrl.data.convert import convert
from pogo_torchrl.data.d4rl import D4RLReplay
from pogo_torchrl.data.hdf5 import read_hdf5
from pogo_torchrl.data.replay_buffer import (
    SOURCES,
    Normalization,
    OfflineReplayBuffer,
    make_replay_buffer,
)
from pogo_torchrl.data.rollouts import behaviour_dataset

__all__ = [
    "SOURCES",
    "D4RLReplay",
    "Normalization",
    "OfflineReplayBuffer",
    "behaviour_dataset",
    "convert",
    "make_replay_buffer",
    "read_hdf5",
]
