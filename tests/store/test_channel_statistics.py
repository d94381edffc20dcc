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


def test_statistics_of_numpy_and_torch_samples_are_equal() -> None:
    generator = np.random.default_rng(0)
    samples = [generator.normal(size=(3, 2, n, 4)).astype(np.float32) for n in (70, 0, 5)]
    by_numpy = ChannelStatistics.from_samples(samples, (3, 2, 4))
    by_torch = ChannelStatistics.from_samples(map(torch.from_numpy, samples), (3, 2, 4))
    whole = np.concatenate(samples, axis=2).astype(np.float64)
    for statistics in (by_numpy, by_torch):
        assert statistics.count == 75
        np.testing.assert_allclose(statistics.mean, whole.mean(axis=2), rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(statistics.std, whole.std(axis=2), rtol=1e-12)
    back = ChannelStatistics.from_array(by_numpy.to_array())
    assert back.count == 75
    np.testing.assert_array_equal(back.m2, by_numpy.m2)


def test_nothing_counted_is_neutral() -> None:
    empty = ChannelStatistics.empty((3, 2, 4))
    some = ChannelStatistics.from_samples([np.ones((3, 2, 5, 4))], (3, 2, 4))
    assert empty.merge(empty).count == 0
    assert not empty.variance.any()
    for merged in (empty.merge(some), some.merge(empty)):
        np.testing.assert_array_equal(merged.to_array(), some.to_array())


def test_statistics_of_other_shapes_are_refused() -> None:
    with pytest.raises(GeometryError, match=r"shapes \(3, 2, 4\).* of shapes \(3, 4, 4\)"):
        ChannelStatistics.empty((3, 2, 4)).merge(ChannelStatistics.empty((3, 4, 4)))
