"""Losses: per-token maps ``[B, T]`` in float32, and the one function that reduces them."""

from kvdistill.distill.losses.attention import attention_kl
from kvdistill.distill.losses.codi import hidden_error
from kvdistill.distill.losses.distance import cosine_error, kv_error, layer_std
from kvdistill.distill.losses.reduce import reduce_tokens
from kvdistill.distill.losses.relation import relation_error

__all__ = [
    "attention_kl",
    "cosine_error",
    "hidden_error",
    "kv_error",
    "layer_std",
    "reduce_tokens",
    "relation_error",
]
