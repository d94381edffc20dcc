"""Tests and intervals against enumeration, cases worked by hand, and simulations under the null."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from kvdistill.errors import GeometryError, NonFiniteError
from kvdistill.studies.statistics import (
    bootstrap,
    crossed_test,
    hedges_g,
    holm,
    sign_flip,
    smallest_p,
)


def draw(
    seed: int, num_seeds: int, num_texts: int, of_seed: float, of_text: float = 0.0
) -> NDArray[np.float64]:
    """Differences of two arms that are the same: effects of seed and text around zero."""
    generator = np.random.default_rng(seed)
    by_seed = of_seed * generator.normal(size=(num_seeds, 1))
    by_text = of_text * generator.normal(size=(1, num_texts))
    return by_seed + by_text + generator.normal(size=(num_seeds, num_texts))


def test_sign_flip_by_hand() -> None:
    # |±1 ±2 ±3| >= 6 for 2 of 8 assignments; >= 4 for 4 of them.
    assert sign_flip([1, 2, 3]) == 2 / 8
    assert sign_flip([-1, 2, 3]) == 4 / 8
    assert sign_flip([1.0] * 5) == smallest_p(5) == 0.0625
    assert sign_flip([0.0, 0.0]) == 1.0


@pytest.mark.parametrize("seed", range(3))
def test_sign_flip_enumerates_every_assignment(seed: int) -> None:
    differences = np.random.default_rng(seed).normal(0.3, 1, 11)
    signs = np.array(list(itertools.product((1, -1), repeat=11)))
    expected = np.mean(np.abs(signs @ differences) >= abs(differences.sum()) * (1 - 1e-12))
    assert sign_flip(differences) == expected


def test_assignments_that_tie_count_whatever_the_order_of_additions() -> None:
    thirds = np.random.default_rng(0).integers(-3, 4, 14) / 3
    assert sign_flip(thirds) == sign_flip(3 * thirds) == sign_flip(thirds[::-1])


def test_random_sign_flips_agree_with_the_exact_ones_and_never_give_zero() -> None:
    differences = np.random.default_rng(3).normal(0.35, 1, 16)
    padded = np.concatenate([differences, [0.0]])  # one more pair that says nothing: 17, so random
    assert sign_flip(padded, draws=20_000) == pytest.approx(sign_flip(differences), abs=0.01)
    assert sign_flip(np.ones(50), draws=999) == 1 / 1000
    assert sign_flip(padded, seed=1) == sign_flip(padded, seed=1)


def test_holm_by_hand() -> None:
    given = {"a": 0.04, "b": 0.01, "c": 0.03}
    assert holm(given) == pytest.approx({"a": 0.06, "b": 0.03, "c": 0.06})
    assert list(holm(given)) == ["a", "b", "c"]
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_effect_sizes_by_hand() -> None:
    differences = [1.0, 2.0, 3.0, 4.0, 5.0]
    exact = math.gamma(2) / (math.sqrt(2) * math.gamma(1.5))
    assert hedges_g(differences) == pytest.approx(exact * 3 / math.sqrt(2.5))
    many = np.tile(differences, 100)  # where the correction for few hardly matters
    assert hedges_g(many) == pytest.approx(many.mean() / many.std(ddof=1), rel=2e-3)
    assert math.isnan(hedges_g([1.0, 2.0]))
    assert hedges_g([-2.0, -2.0, -2.0]) == -math.inf
    assert math.isnan(hedges_g([0.0, 0.0, 0.0]))


def test_plain_bootstrap_has_the_quantiles_of_all_resamples() -> None:
    values = [1.0, 2.0, 4.0, 8.0, 16.0]
    means = [np.mean(resample) for resample in itertools.product(values, repeat=5)]
    low, high = np.quantile(means, [0.025, 0.975])
    found = bootstrap(values, stretched=False)
    assert found is not None
    assert found.low == pytest.approx(low, abs=0.2)
    assert found.high == pytest.approx(high, abs=0.2)
    assert bootstrap(values) == bootstrap(values)


def test_stretched_bootstrap_of_few_normal_values_is_students_interval() -> None:
    values = stats.norm.ppf((np.arange(8) + 0.5) / 8)
    found = bootstrap(values)
    assert found is not None
    half = stats.t.ppf(0.975, 7) * stats.sem(values)
    assert found.high == pytest.approx(half, rel=0.08)
    assert found.low == pytest.approx(-half, rel=0.08)


def test_an_axis_of_one_is_kept_and_one_value_has_no_interval() -> None:
    texts = np.random.default_rng(0).normal(size=50)
    across, along = bootstrap(texts[None]), bootstrap(texts)
    assert across is not None
    assert along is not None
    assert across.low == pytest.approx(along.low, abs=0.02)
    assert bootstrap([1.0]) is None


def test_bootstrap_weighs_texts_by_their_length() -> None:
    differences = np.array([[1.0, 300.0], [1.0, 300.0]])
    found = bootstrap(differences, [1.0, 100.0], stretched=False)
    assert found is not None
    assert found.low == pytest.approx(1.0)  # the first text twice
    assert found.high == pytest.approx(3.0)  # the second text twice


def test_crossed_test_without_effects_of_text_is_the_paired_t_test_over_seeds() -> None:
    of_seed = np.array([0.3, 0.5, 0.1, 0.6])
    wobble = np.tile([0.01, -0.01], 10)
    differences = of_seed[:, None] + wobble * np.array([1, -1, 1, -1])[:, None]
    found = crossed_test(differences)
    expected = stats.ttest_1samp(of_seed, 0)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-3)
    assert found.freedom == 3
    assert found.estimate == pytest.approx(0.375)


def test_crossed_test_counts_texts_as_well() -> None:
    differences = draw(0, 5, 40, of_seed=0.1, of_text=2.0) + 0.5
    over_seeds = stats.ttest_1samp(differences.mean(1), 0).pvalue
    assert crossed_test(differences).p > 2 * over_seeds


def test_crossed_test_takes_weights_as_a_ratio_of_sums() -> None:
    lengths = np.array([10.0, 20.0, 30.0, 40.0])
    rates = np.array([[0.2], [0.3], [0.4]])
    found = crossed_test(rates * lengths, lengths)  # no text differs from another in its rate
    assert found.estimate == pytest.approx(0.3)
    assert found.p == pytest.approx(stats.ttest_1samp(rates[:, 0], 0).pvalue, rel=0.3)


@pytest.mark.parametrize("wrong", [[], [1.0, math.nan], [math.inf]])
def test_what_is_not_finite_is_refused(wrong: list[float]) -> None:
    for function in (sign_flip, bootstrap, hedges_g):
        with pytest.raises(NonFiniteError, match="expected finite values"):
            function(wrong)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(GeometryError, match="at least 2 seeds"):
        crossed_test(np.ones((1, 9)))
    with pytest.raises(GeometryError, match="expected 9 weights"):
        crossed_test(np.ones((2, 9)), np.ones(8))
    with pytest.raises(GeometryError, match="expected 9 weights"):
        bootstrap(np.ones((2, 9)), np.ones(8))


# The same arm twice, under other seeds: nothing is different, and p-values must say so.


def test_p_over_both_is_uniform_for_an_arm_against_itself() -> None:
    found = [crossed_test(draw(k, 5, 40, of_seed=0.5)).p for k in range(600)]
    assert stats.kstest(found, "uniform").pvalue > 0.01
    assert np.mean(np.array(found) < 0.05) < 0.08


def test_p_over_seeds_is_uniform_for_an_arm_against_itself() -> None:
    found = [sign_flip(draw(k, 12, 10, of_seed=0.5).mean(1)) for k in range(600)]
    assert stats.kstest(found, "uniform").pvalue > 0.01


def test_p_over_texts_is_uniform_where_seeds_do_not_matter_and_only_there() -> None:
    def share_below_5_percent(of_seed: float) -> tuple[float, float]:
        found = [sign_flip(draw(k, 5, 40, of_seed).mean(0), draws=499, seed=k) for k in range(400)]
        uniform: float = stats.kstest(found, "uniform").pvalue
        return uniform, float(np.mean(np.array(found) < 0.05))

    uniform, false_alarms = share_below_5_percent(of_seed=0.0)
    assert uniform > 0.01
    assert false_alarms < 0.09
    # The trap: students that differ by seed alone "differ" on texts, an arm from itself.
    assert share_below_5_percent(of_seed=0.5)[1] > 0.4


def test_holm_keeps_the_chance_of_any_false_alarm_at_its_level() -> None:
    """Seven arms against one baseline that they share, all the same: fewer than 5 % alarms."""
    alarms, uncorrected = [], []
    for k in range(400):
        baseline = draw(k, 5, 20, of_seed=0.5)
        arms = {f"{arm}": draw(10_000 + 7 * k + arm, 5, 20, of_seed=0.5) for arm in range(7)}
        found = {name: crossed_test(arm - baseline).p for name, arm in arms.items()}
        uncorrected.append(min(found.values()) < 0.05)
        alarms.append(min(holm(found).values()) < 0.05)
    four_errors = 4 * math.sqrt(0.05 * 0.95 / 400)
    assert np.mean(alarms) < 0.05 + four_errors < np.mean(uncorrected)


def test_intervals_over_both_hold_the_truth_as_often_as_they_say() -> None:
    held = []
    for k in range(60):
        found = bootstrap(draw(k, 5, 30, of_seed=0.5), seed=k)
        assert found is not None
        held.append(found.low <= 0 <= found.high)
    assert np.mean(held) > 0.87
