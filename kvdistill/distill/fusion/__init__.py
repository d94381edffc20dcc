"""Fusion: how much each teacher counts, and their weighted sum."""

from kvdistill.distill.fusion.combine import fuse
from kvdistill.distill.fusion.regularise import drop_teachers, entropy
from kvdistill.distill.fusion.router import NO_TASK, Router
from kvdistill.distill.fusion.similarity import similarity_weights
from kvdistill.distill.fusion.weights import fixed_weights, mean_weights, renormalise

__all__ = [
    "NO_TASK",
    "Router",
    "drop_teachers",
    "entropy",
    "fixed_weights",
    "fuse",
    "mean_weights",
    "renormalise",
    "similarity_weights",
]
