"""Optimal transport between small clouds of actions: one signature, one solver a file."""

from pogo_torchrl.ot.exact import MAX_POINTS
from pogo_torchrl.ot.sinkhorn import BACKENDS, sinkhorn_divergence

__all__ = ["BACKENDS", "MAX_POINTS", "sinkhorn_divergence"]
