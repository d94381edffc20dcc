"""Which evaluation was the best."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from kvdistill.distill.train.guards import Best, best_of


def history(*values: float, metric: str = "bits_per_character") -> list[dict[str, float]]:
    rows = [{"step": 10 * i, f"eval_{metric}": value} for i, value in enumerate(values, 1)]
    return [{"step": 5, "loss": 1.0}, *rows]


def test_less_is_better_and_the_first_of_equals_counts() -> None:
    assert best_of(history(3.0, 1.0, 2.0, 1.0), "bits_per_character") == Best(20, 1.0, 2)
    rising = history(0.1, 0.3, 0.3, metric="exact_match")
    assert best_of(rising, "exact_match") == Best(20, 0.3, 1)


def test_nothing_evaluated_is_no_best() -> None:
    assert best_of([{"step": 1, "loss": 2.0}], "bits_per_character") is None
    assert best_of(history(1.0), "exact_match") is None


@given(st.lists(st.floats(0, 9), min_size=1, max_size=9), st.integers(0, 8))
def test_a_step_that_was_evaluated_twice_counts_once(values: list[float], again: int) -> None:
    """As a resumed run logs steps anew that were logged before."""
    rows = history(*values)
    doubled = rows + rows[1 + again % len(values) :]
    found = best_of(doubled, "bits_per_character")
    assert found == best_of(rows, "bits_per_character")
    assert found is not None
    assert found.value == min(values)
    assert values[found.step // 10 - 1] == found.value
    assert found.since == len(values) - found.step // 10


def test_a_figure_that_is_no_number_is_never_the_best() -> None:
    assert best_of(history(math.nan, 2.0, math.inf), "bits_per_character") == Best(20, 2.0, 1)
