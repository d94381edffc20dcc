"""Fusion: how much each teacher counts, and their weighted sum."""

from kvdistill.distill.fusion.combine import fuse
from kvdistill.distill.fusion.weights import fixed_weights, renormalise

__all__ = ["fixed_weights", "fuse", "renormalise"]
