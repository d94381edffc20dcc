"""The fast Walsh–Hadamard transform: orthonormal, symmetric, its own inverse.

log2(D) rounds of additions and subtractions in a fixed order, so numpy and torch agree in every
bit, which a matrix product would not. Where D is not a power of two, it is applied to blocks of
the largest power of two that divides D.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from kvdistill.store.codecs.arrays import concatenate

if TYPE_CHECKING:
    from kvdistill.store.codecs.arrays import Array


def rotate(x: Array) -> Array:
    """``x · H / sqrt(n)`` over the last axis, float32 ``[..., D]``; ``rotate(rotate(x)) ≈ x``."""
    lead, dim = x.shape[:-1], x.shape[-1]
    order = dim & -dim
    width = 1
    while width < order:
        pairs = x.reshape(*lead, dim // (2 * width), 2, width)
        even, odd = pairs[..., 0, :], pairs[..., 1, :]
        x = concatenate([(even + odd)[..., None, :], (even - odd)[..., None, :]], axis=-2)
        width *= 2
    scale = np.float32(1 / math.sqrt(order)).item()
    return x.reshape(*lead, dim) * scale
