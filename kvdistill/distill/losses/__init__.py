"""Losses: per-token maps ``[B, T]`` in float32, and the one function that reduces them."""

from kvdistill.distill.losses.distance import cosine_error, kv_error, layer_std
from kvdistill.distill.losses.reduce import reduce_tokens

__all__ = ["cosine_error", "kv_error", "layer_std", "reduce_tokens"]
