"""Optimal transport between small point clouds of actions, with one solver per module."""

from pogo_torchrl.ot.exact import MAX_POINTS
from pogo_torchrl.ot.sinkhorn import BACKENDS, sinkhorn_divergence

__all__ = ["BACKENDS", "MAX_POINTS", "sinkhorn_divergence"]
