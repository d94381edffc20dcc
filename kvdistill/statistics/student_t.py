"""Student's t distribution for whole degrees of freedom, as finite sums; no scipy needed."""

from __future__ import annotations

import math


def two_sided(t: float, freedom: int) -> float:
    """``P(|T| >= |t|)``, accurate to about 1e-15 in absolute terms.

    Abramowitz and Stegun, *Handbook of Mathematical Functions*, 26.7.3 (odd) and 26.7.4 (even
    degrees of freedom), with ``θ = atan(t / sqrt(m))``.
    """
    theta = math.atan2(abs(t), math.sqrt(freedom))
    sine, square = math.sin(theta), math.cos(theta) ** 2
    odd = freedom % 2
    term = math.cos(theta) if odd else 1.0
    total = 0.0
    for k in range(freedom // 2):
        total += term
        term *= square * (2 * k + 1 + odd) / (2 * k + 2 + odd)
    inside = 2 / math.pi * (theta + sine * total) if odd else sine * total
    return min(1.0, max(0.0, 1.0 - inside))


def quantile(level: float, freedom: int) -> float:
    """The ``t`` with ``P(|T| < t) = level``, by bisection."""
    low, high = 0.0, 1.0
    while two_sided(high, freedom) > 1 - level:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided(middle, freedom) > 1 - level else (low, middle)
    return high
