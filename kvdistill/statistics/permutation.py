"""p-values that assume nothing but the pairing, and their correction for many arms."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvdistill.errors import NonFiniteError

EXACT_UNITS: Final = 16
"""Up to so many differences all ``2**n`` assignments are enumerated."""
CHUNK: Final = 1000
ROUNDING: Final = 1e-9
"""Sums that differ by less, relative to the largest possible, count as equal."""


def sign_flip(differences: ArrayLike, *, draws: int = 20_000, seed: int = 0) -> float:
    """Two-sided p-value of paired differences: how often chance signs give as large a mean.

    If the two arms of a pair are exchangeable, every difference could as well have had the other
    sign. ``p`` is the share of the ``2**n`` sign assignments ``s`` with
    ``|Σ s_i d_i| >= |Σ d_i|``: exact for n <= 16; else of random ones, counting the observed
    among them, ``(b + 1) / (draws + 1)``, so that p is never 0 and never too small
    (Phipson and Smyth, *Permutation P-values should never be zero*, arXiv 1603.05766).

    Args:
        differences: ``[n]``, one per seed, or one per text.
        draws: random assignments where n > 16.
        seed: of these.

    Raises:
        NonFiniteError: no differences, or some that are not finite.
    """
    found = finite(differences)
    limit = abs(found.sum()) - ROUNDING * np.abs(found).sum()
    if found.size <= EXACT_UNITS:
        return float(np.mean(np.abs(_all_signs(found.size) @ found) >= limit))
    generator = np.random.default_rng(seed)
    as_large = 0
    for start in range(0, draws, CHUNK):
        shape = (min(CHUNK, draws - start), found.size)
        signs = generator.integers(0, 2, shape, dtype=np.int8).astype(np.float64) * 2 - 1
        as_large += int(np.sum(np.abs(signs @ found) >= limit))
    return (as_large + 1) / (draws + 1)


def smallest_p(num_units: int) -> float:
    """The least two-sided p-value that n paired differences can have: ``2 / 2**n``."""
    return min(1.0, 2.0 ** (1 - num_units))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values corrected for their number, by Holm's step-down method.

    Of ``m`` p-values in ascending order, the i-th (from 0) is multiplied by ``m - i``, and never
    falls below one before it. The chance of even one false "p < α" among all arms is at most α,
    whatever their dependence (Holm, *A simple sequentially rejective multiple test procedure*,
    Scandinavian Journal of Statistics 6, 1979).
    """
    corrected: dict[str, float] = {}
    floor = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[name]))
        corrected[name] = floor
    return {name: corrected[name] for name in p_values}


def finite(values: ArrayLike) -> NDArray[np.float64]:
    """Values as float64; refuses none, NaN and infinity, which would poison every figure."""
    found = np.asarray(values, dtype=np.float64)
    if found.size == 0 or not np.isfinite(found).all():
        raise NonFiniteError(
            f"expected finite values to compare, got {found.size} of which "
            f"{int((~np.isfinite(found)).sum())} are not finite; leave those runs out"
        )
    return found


@lru_cache(maxsize=EXACT_UNITS + 1)
def _all_signs(num_units: int) -> NDArray[np.float64]:
    """Every assignment of ±1: ``[2**n, n]``."""
    numbers = np.arange(2**num_units)[:, None]
    return np.where(numbers >> np.arange(num_units) & 1, 1.0, -1.0)
