"""Seeds and texts as random effects: one test that speaks of other seeds and other texts.

A test over texts alone takes the trained students as given. Two students of one recipe and two
seeds differ for good, on all texts alike, so with enough texts it calls any arm different from
itself. That is the language-as-fixed-effect fallacy with seeds in the place of words (Clark,
Journal of Verbal Learning and Verbal Behavior 12, 1973), and the variance between seeds is what
many published gains were (Bouthillier et al., arXiv 2103.03098).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import t as student_t

from kvdistill.errors import GeometryError
from kvdistill.statistics.permutation import finite


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
