"""p-values that assume nothing but the pairing, and their correction for many arms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import t as student_t

from kvdistill.errors import GeometryError, NonFiniteError

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


REPLICATES: Final = 10_000


BOOTSTRAP_CHUNK: Final = 1000


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
    for start in range(0, REPLICATES, BOOTSTRAP_CHUNK):
        seeds_RS = _shares(generator, found.shape[0], level if stretched else None)
        texts_RN = _shares(generator, found.shape[1], level if stretched else None)
        sums = np.einsum("rn,rn->r", seeds_RS @ found, texts_RN)
        replicates[start : start + BOOTSTRAP_CHUNK] = sums / (texts_RN @ weights)
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
        return np.ones((BOOTSTRAP_CHUNK, 1))
    drawn = (
        generator.multinomial(num_units, np.full(num_units, 1 / num_units), BOOTSTRAP_CHUNK)
        / num_units
    )
    factor = 1.0 if level is None else stretch(num_units, level)
    shares: NDArray[np.float64] = (1 + factor * (drawn * num_units - 1)) / num_units
    return shares


def cohens_d(differences: ArrayLike) -> float:
    """Cohen's d of paired differences (d_z): their mean over their standard deviation.

    NaN for fewer than two; infinite where the differences are all the same and not zero.
    The standard deviation is that of the differences, not of an arm: "how many times its own
    variation is the gain" (Lakens, *Calculating and reporting effect sizes*, Frontiers in
    Psychology 4:863, 2013, equation 6).
    """
    found = finite(differences)
    if found.size < 2:
        return math.nan
    mean, deviation = float(found.mean()), float(found.std(ddof=1))
    if deviation <= 1e-12 * abs(mean):
        return math.copysign(math.inf, mean) if mean else math.nan
    return mean / deviation


def hedges_g(differences: ArrayLike) -> float:
    """Cohen's d_z without its upward bias in small samples; NaN for fewer than three.

    ``g = J(n - 1) · d`` with ``J(m) = Γ(m/2) / (sqrt(m/2) · Γ((m - 1)/2))`` (Hedges,
    *Distribution theory for Glass's estimator of effect size*, Journal of Educational Statistics
    6, 1981): 0.73 for four differences, 0.80 for five, 0.99 for a hundred.
    """
    freedom = np.size(differences) - 1
    if freedom < 2:
        return math.nan
    log_ratio = math.lgamma(freedom / 2) - math.lgamma((freedom - 1) / 2)
    return cohens_d(differences) * math.exp(log_ratio) / math.sqrt(freedom / 2)


@dataclass(frozen=True)
class CrossedTest:
    """A mean difference, its standard error over seeds and texts, and how likely by chance."""

    estimate: float
    standard_error: float
    freedom: int
    p: float


def crossed_test(differences_SN: ArrayLike, weights_N: ArrayLike | None = None) -> CrossedTest:
    """Test ``Σ differences / (S · Σ weights)`` against 0, seeds and texts both random.

    With mean squares of seeds, texts and their interaction (each difference, with its text's
    weight taken off in proportion, as for any ratio of sums),

        variance = (MS_int + (MS_seed - MS_int)+ + (MS_text - MS_int)+) / (S · N)

    and ``t = estimate / sqrt(variance)``: Clark's quasi-F with variance components below zero set
    to zero. It has S - 1 degrees of freedom here, not Satterthwaite's: with three seeds those
    called 4 % of arms that were the same different at p < 0.01. Where seeds matter more than texts
    this is the paired t-test over seeds and its p-values are uniform; elsewhere they are too large.

    Args:
        differences_SN: ``[S, N]``, at least two seeds and two texts.
        weights_N: what a text counts (characters, tokens), ``[N]``; 1 each if not given.

    Raises:
        NonFiniteError: no differences, or some that are not finite.
        GeometryError: fewer than two seeds or texts, or weights that do not fit.
    """
    found = finite(differences_SN)
    if found.ndim != 2 or min(found.shape) < 2:
        raise GeometryError(f"expected at least 2 seeds and 2 texts, got shape {found.shape}")
    num_seeds, num_texts = found.shape
    weights = np.ones(num_texts) if weights_N is None else finite(weights_N)
    if weights.shape != (num_texts,):
        raise GeometryError(f"expected {num_texts} weights, one per text, got {weights.shape}")
    estimate = found.sum() / (num_seeds * weights.sum())
    left = (found - estimate * weights) / weights.mean()
    of_seed, of_text = left.mean(1, keepdims=True), left.mean(0, keepdims=True)
    freedom = np.array([num_seeds - 1, num_texts - 1, (num_seeds - 1) * (num_texts - 1)])
    seed, text, interaction = (
        np.array(
            [
                num_texts * np.square(of_seed).sum(),
                num_seeds * np.square(of_text).sum(),
                np.square(left - of_seed - of_text).sum(),
            ]
        )
        / freedom
    )
    by_seed, by_text = float(seed > interaction), float(text > interaction)
    total = seed * by_seed + text * by_text + interaction * (1 - by_seed - by_text)
    error = math.sqrt(max(total, 0.0) / found.size)
    if error <= 1e-12 * abs(estimate):
        return CrossedTest(float(estimate), error, num_seeds - 1, 0.0 if estimate else 1.0)
    p = 2 * float(student_t.sf(abs(float(estimate)) / error, num_seeds - 1))
    return CrossedTest(float(estimate), error, num_seeds - 1, p)


# MERGED-DOC statistics.bootstrap
# Bootstrap intervals, over one kind of unit or over seeds and texts at once.
#
# A bootstrap of n units is too narrow by ``sqrt((n - 1) / n)`` and knows nothing of t's heavier
# tails: with five seeds its "95 %" interval holds the truth 83 % of the time. Deviations from the
# mean are therefore stretched by ``sqrt(n / (n - 1)) · t / z`` (Hesterberg, *What Teachers Should
# Know about the Bootstrap*, arXiv 1411.5279, section 4), after which the interval of a mean of
# normal values has the width of Student's; with many units nothing changes.


# MERGED-DOC statistics.effect
# How large a paired difference is, in units of how much it varies.


# MERGED-DOC statistics.crossed
# Seeds and texts as random effects: one test that speaks of other seeds and other texts.
#
# A test over texts alone takes the trained students as given. Two students of one recipe and two
# seeds differ for good, on all texts alike, so with enough texts it calls any arm different from
# itself. That is the language-as-fixed-effect fallacy with seeds in the place of words (Clark,
# Journal of Verbal Learning and Verbal Behavior 12, 1973), and the variance between seeds is what
# many published gains were (Bouthillier et al., arXiv 2103.03098).
