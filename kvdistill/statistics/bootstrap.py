"""Bootstrap intervals, over one kind of unit or over seeds and texts at once.

A bootstrap of n units is too narrow by ``sqrt((n - 1) / n)`` and knows nothing of t's heavier
tails: with five seeds its "95 %" interval holds the truth 83 % of the time. Deviations from the
mean are therefore stretched by ``sqrt(n / (n - 1)) · t / z`` (Hesterberg, *What Teachers Should
Know about the Bootstrap*, arXiv 1411.5279, section 4), after which the interval of a mean of
normal values has the width of Student's; with many units nothing changes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import t as student_t

from kvdistill.errors import GeometryError
from kvdistill.statistics.permutation import finite

REPLICATES: Final = 10_000
CHUNK: Final = 1000


@dataclass(frozen=True)
class Interval:
    """Bounds of a figure; equal to it, and no statement, where there was one unit alone."""

    low: float
    high: float


def bootstrap(
    values: ArrayLike, *, level: float = 0.95, seed: int = 0, stretched: bool = True
) -> Interval | None:
    """Percentile interval of the mean of ``[n]`` values; None for a single one.

    Args:
        values: one per seed, or one per text.
        level: of the interval.
        seed: of the resampling.
        stretched: correct for few units; without it, the plain percentile bootstrap.

    Raises:
        NonFiniteError: no values, or some that are not finite.
    """
    found = finite(values)
    return crossed_bootstrap(found[:, None], level=level, seed=seed, stretched=stretched)


def crossed_bootstrap(
    values_SN: ArrayLike,
    weights_N: ArrayLike | None = None,
    *,
    level: float = 0.95,
    seed: int = 0,
    stretched: bool = True,
) -> Interval | None:
    """Percentile interval of ``Σ values / (S · Σ weights)``, seeds and texts both drawn anew.

    Each replicate draws S seeds and, independently, N texts with replacement: the pigeonhole
    bootstrap, which errs towards wide where seed and text interact (Owen, arXiv 0712.1111). An
    axis of length one is kept as it is: with one seed this is a bootstrap over texts.

    Args:
        values_SN: paired differences, ``[S, N]``.
        weights_N: what a text counts (characters, tokens), ``[N]``; 1 each if not given.
        level: of the interval.
        seed: of the resampling.
        stretched: correct for few units.

    Raises:
        NonFiniteError: no values, or some that are not finite.
        GeometryError: weights that do not fit the texts.
    """
    found = finite(values_SN)
    weights = np.ones(found.shape[1]) if weights_N is None else finite(weights_N)
    if weights.shape != found.shape[1:]:
        raise GeometryError(f"expected {found.shape[1]} weights, one per text, got {weights.shape}")
    if found.size == 1:
        return None
    generator = np.random.default_rng(seed)
    replicates = np.empty(REPLICATES)
    for start in range(0, REPLICATES, CHUNK):
        seeds_RS = _shares(generator, found.shape[0], level if stretched else None)
        texts_RN = _shares(generator, found.shape[1], level if stretched else None)
        sums = np.einsum("rn,rn->r", seeds_RS @ found, texts_RN)
        replicates[start : start + CHUNK] = sums / (texts_RN @ weights)
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def stretch(num_units: int, level: float) -> float:
    """How much a bootstrap of few units must be widened to be a t interval for normal values."""
    student = float(student_t.ppf((1 + level) / 2, num_units - 1))
    normal = NormalDist().inv_cdf((1 + level) / 2)
    return math.sqrt(num_units / (num_units - 1)) * student / normal


def _shares(
    generator: np.random.Generator, num_units: int, level: float | None
) -> NDArray[np.float64]:
    """Shares of the units in CHUNK replicates, ``[R, n]``; the mean share is ``1 / n``."""
    if num_units == 1:
        return np.ones((CHUNK, 1))
    drawn = generator.multinomial(num_units, np.full(num_units, 1 / num_units), CHUNK) / num_units
    factor = 1.0 if level is None else stretch(num_units, level)
    shares: NDArray[np.float64] = (1 + factor * (drawn * num_units - 1)) / num_units
    return shares
