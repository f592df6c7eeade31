"""Optimal transport between small clouds of actions: one signature, one solver a file."""

from pogo_torchrl.transport.divergence import BACKENDS, sinkhorn_divergence
from pogo_torchrl.transport.exact import MAX_POINTS

__all__ = ["BACKENDS", "MAX_POINTS", "sinkhorn_divergence"]
