"""Merged moments equal those of all data, in any split, from numpy and torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvdistill.errors import GeometryError
from kvdistill.store.channel_statistics import ChannelStatistics, merge_moments
from tests.store.made import statistics_of


def _channel_moments(x_LNC: Any) -> tuple[int, Any, Any]:
    mean = x_LNC.sum(1) / max(x_LNC.shape[1], 1)
    return x_LNC.shape[1], mean, ((x_LNC - mean[:, None]) ** 2).sum(1)


def _joint_moments(x_LNC: torch.Tensor, num_first: int) -> tuple[int, Any, Any]:
    count, mean, _ = _channel_moments(x_LNC)
    centred = x_LNC - mean[:, None]
    return count, mean, centred[..., :num_first].mT @ centred


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6), seed=st.integers(0, 999))
def test_parts_merge_to_the_moments_of_all_data(lengths: list[int], seed: int) -> None:
    parts = [
        np.random.default_rng((seed, i)).normal(5, 2, (2, n, 3)) for i, n in enumerate(lengths)
    ]
    whole = _channel_moments(np.concatenate(parts, axis=1))
    by_numpy = merge_moments(*map(_channel_moments, parts))
    by_torch = merge_moments(*(_channel_moments(torch.from_numpy(x)) for x in parts))
    assert by_numpy[0] == by_torch[0] == sum(lengths)
    for merged in (by_numpy, by_torch):
        np.testing.assert_allclose(merged[1], whole[1], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(merged[2], whole[2], rtol=1e-12, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6), seed=st.integers(0, 999))
def test_products_of_deviations_merge_too(lengths: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(2, n, 5, generator=generator, dtype=torch.float64) + 3 for n in lengths]
    merged = merge_moments(*(_joint_moments(x, 3) for x in parts))
    whole = _joint_moments(torch.cat(parts, dim=1), 3)
    torch.testing.assert_close(merged[2], whole[2], rtol=1e-12, atol=1e-12)
    assert merged[2].shape == (2, 3, 5)


@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6))
def test_shards_merge_to_the_statistics_of_all_tokens(lengths: list[int]) -> None:
    generator = np.random.default_rng(0)
    shards = [generator.normal(5, 2, (3, 2, n, 4)) for n in lengths]
    first, *others = [statistics_of([shard]) for shard in shards]
    merged, whole = first.merge(*others), statistics_of(shards)
    assert merged.count == whole.count
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(merged.variance, whole.variance, rtol=1e-12, atol=1e-12)
    back = ChannelStatistics.from_array(merged.to_array())
    assert back.count == merged.count
    np.testing.assert_array_equal(back.m2, merged.m2)


def test_nothing_counted_is_neutral() -> None:
    empty, some = (
        ChannelStatistics(0, *np.zeros((2, 3, 2, 4))),
        statistics_of([np.ones((3, 2, 5, 4))]),
    )
    assert empty.merge(empty).count == 0
    assert not empty.variance.any()
    for merged in (empty.merge(some), some.merge(empty)):
        np.testing.assert_array_equal(merged.to_array(), some.to_array())


def test_statistics_of_other_shapes_are_refused() -> None:
    one, other = (ChannelStatistics(0, *np.zeros((2, 3, heads, 4))) for heads in (2, 4))
    with pytest.raises(GeometryError, match=r"shapes \(3, 2, 4\).* of shapes \(3, 4, 4\)"):
        one.merge(other)
