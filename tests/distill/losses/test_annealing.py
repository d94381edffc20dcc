"""Losses against teachers fall linearly to zero, and stay there."""

from __future__ import annotations

import pytest

from kvdistill.distill.losses.weighting import annealed_scale


def test_weights_are_kept_where_nothing_is_annealed():
    assert [annealed_scale(step, 10, None) for step in (0, 5, 10)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("anneal_by", "expected"),
    [(1.0, [1, 0.75, 0.5, 0.25, 0]), (0.5, [1, 0.5, 0, 0, 0]), (0.25, [1, 0, 0, 0, 0])],
)
def test_weights_fall_linearly_to_zero_by_the_share_of_steps(anneal_by, expected):
    scales = [annealed_scale(step, 8, anneal_by) for step in (0, 2, 4, 6, 8)]
    assert scales == pytest.approx(expected)
