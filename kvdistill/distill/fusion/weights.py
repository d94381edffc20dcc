"""Fusion weights ``alpha``: one number per teacher, and per sample, layer and token if need be.

``alpha`` is ``[N, B, L, T]``, where B, L and T may be 1 for "the same everywhere".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvdistill.errors import ConfigError, GeometryError


def fixed_weights(weights: Sequence[float]) -> Tensor:
    """Given weights, scaled to sum to one: ``[N, 1, 1, 1]`` float32.

    Raises:
        ConfigError: no teacher, a negative or infinite weight, or nothing but zeros.
    """
    alpha = torch.tensor(weights, dtype=torch.float32)
    if not len(weights) or not torch.isfinite(alpha).all() or (alpha < 0).any() or not alpha.any():
        raise ConfigError(
            f"fusion.weights: expected finite weights >= 0, not all of them 0, got {list(weights)}"
        )
    return (alpha / alpha.sum()).view(-1, 1, 1, 1)


def renormalise(alpha_NBLT: Tensor, covered_NBT: Tensor) -> Tensor:
    """Share the weight of teachers that do not cover a token among those that do.

    Args:
        alpha_NBLT: weights ≥ 0; B, L, T may be 1.
        covered_NBT: True where teacher ``n`` has something to say about a token.

    Returns:
        ``[N, B, L, T]`` (L may be 1): sums to one over teachers, or is all zero where no teacher
        with any weight covers the token.

    Raises:
        GeometryError: the numbers of teachers differ.
    """
    if alpha_NBLT.shape[0] != covered_NBT.shape[0]:
        raise GeometryError(
            f"fusion: {alpha_NBLT.shape[0]} weights for {covered_NBT.shape[0]} teachers"
        )
    present = torch.where(covered_NBT.unsqueeze(2), alpha_NBLT, 0.0)
    total = present.sum(0, keepdim=True)
    return present / torch.where(total > 0, total, 1.0)


def mean_weights(alpha_NBLT: Tensor) -> Tensor:
    """Mean weight of each teacher over tokens that any covers: ``[N]``, without gradient."""
    alpha = alpha_NBLT.detach()
    covered = alpha.sum(0) > 0
    return alpha.sum(dim=(1, 2, 3)) / covered.sum().clamp_min(1)
