"""Losses: per-token maps ``[B, T]`` in float32, and the one function that reduces them."""

from kvdistill.distill.losses.absorption import (
    AbsorptionMonitor,
    explained_variance,
    gradient_share,
    target_variance,
)
from kvdistill.distill.losses.attention import attention_kl
from kvdistill.distill.losses.codi import hidden_error
from kvdistill.distill.losses.distance import cosine_error, kv_error, layer_std
from kvdistill.distill.losses.fading import kv_scale
from kvdistill.distill.losses.reduce import reduce_tokens
from kvdistill.distill.losses.regression import Regression, regression_error
from kvdistill.distill.losses.relation import relation_error

__all__ = [
    "AbsorptionMonitor",
    "Regression",
    "attention_kl",
    "cosine_error",
    "explained_variance",
    "gradient_share",
    "hidden_error",
    "kv_error",
    "kv_scale",
    "layer_std",
    "reduce_tokens",
    "regression_error",
    "relation_error",
    "target_variance",
]
