"""The reading order: every sample once, pure in (seed, epoch), restorable anywhere."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvdistill.corpus.samples import Sample
from kvdistill.distill.data.order import Buckets, Mixture, Order, mixture_of
from kvdistill.errors import ConfigError

SIZES = st.lists(st.integers(1, 7), min_size=1, max_size=9)
Unit = list[tuple[int, int]]


def units(order: Order, epoch: int, start: int = 0) -> list[Unit]:
    return [
        [(int(shard), int(sample)) for shard, sample in unit]
        for window in order.windows(epoch, start)
        for unit in window.units
    ]


@st.composite
def orders(draw: st.DrawFn) -> Order:
    sizes = tuple(draw(SIZES))
    total = sum(sizes)
    buckets = mixture = None
    if draw(st.booleans()):
        lengths = draw(st.lists(st.integers(0, 30), min_size=total, max_size=total))
        buckets = Buckets(np.array(lengths), draw(st.integers(1, 80)))
    if draw(st.booleans()):
        group = draw(st.lists(st.integers(0, 2), min_size=total, max_size=total))
        weights = draw(st.tuples(*[st.floats(0, 3)] * 3))
        mixture = Mixture(np.array(group), weights)
    return Order(draw(st.integers(0, 9)), sizes, draw(st.integers(1, 4)), mixture, buckets)


@given(order=orders(), epoch=st.integers(0, 3))
def test_an_epoch_is_every_sample_as_often_as_it_should_be(order: Order, epoch: int) -> None:
    found = units(order, epoch)
    assert found == units(order, epoch)
    assert order.num_units(epoch) == len(found)
    places = [(s, i) for s, size in enumerate(order.shard_sizes) for i in range(size)]
    counts = Counter(row for unit in found for row in unit)
    if order.mixture is None:
        assert counts == dict.fromkeys(places, 1)
    else:
        asked = order.mixture.repeats(order.seed, epoch)
        wanted = dict(zip(places, asked.tolist(), strict=True))
        assert counts == {row: count for row, count in wanted.items() if count}
    assert counts.total() == order.num_samples


@given(order=orders(), epoch=st.integers(0, 2), data=st.data())
def test_starting_at_any_unit_gives_the_tail(order: Order, epoch: int, data: st.DataObject) -> None:
    whole = units(order, epoch)
    start = data.draw(st.integers(0, len(whole)))
    assert units(order, epoch, start) == whole[start:]


@given(order=orders(), epoch=st.integers(0, 2))
def test_windows_hold_few_shards_and_each_shard_is_in_one(order: Order, epoch: int) -> None:
    found = list(order.windows(epoch))
    assert all(len(window.shards) <= order.window_shards for window in found)
    shards = [shard for window in found for shard in window.shards]
    assert len(shards) == len(set(shards))
    for window in found:
        used = {int(shard) for unit in window.units for shard, _ in unit}
        assert used == set(window.shards)  # nothing is read for nothing


@given(order=orders().filter(lambda order: order.buckets is not None), epoch=st.integers(0, 2))
def test_a_bucket_keeps_to_its_budget_and_holds_neighbours_in_length(
    order: Order, epoch: int
) -> None:
    assert order.buckets is not None
    first = np.concatenate([[0], np.cumsum(order.shard_sizes)])
    for window in order.windows(epoch):
        spans = []
        for unit in window.units:
            lengths = [int(order.buckets.length[first[s] + i]) for s, i in unit]
            assert len(unit) == 1 or max(lengths) * len(unit) <= order.buckets.tokens_per_batch
            spans.append((min(lengths), max(lengths)))
        spans.sort()
        assert all(a[1] <= b[0] for a, b in pairwise(spans))


def test_buckets_pad_less_than_batches_as_they_come() -> None:
    lengths = np.random.default_rng(0).integers(10, 500, 400)
    order = Order(0, (100,) * 4, 4, buckets=Buckets(lengths, 4096))

    def padding(batches: list[list[int]]) -> float:
        return 1 - sum(map(sum, batches)) / sum(max(b) * len(b) for b in batches)

    flat = [[int(lengths[100 * s + i]) for s, i in unit] for unit in units(order, 0)]
    plain = Order(0, (100,) * 4, 4)
    rows = [int(lengths[100 * s + i]) for unit in units(plain, 0) for s, i in unit]
    assert padding(flat) < 0.1
    assert padding([rows[i : i + 8] for i in range(0, 400, 8)]) > 0.3


def test_epochs_and_seeds_differ() -> None:
    orders = [units(Order(seed, (5,) * 8, 3), epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({str(order) for order in orders}) == 4


def test_everything_that_changes_the_order_changes_its_fingerprint() -> None:
    lengths = np.arange(6)
    group = np.array([0, 0, 1, 1, 1, 1])
    made = [
        Order(0, (3, 3), 2),
        Order(1, (3, 3), 2),
        Order(0, (2, 4), 2),
        Order(0, (3, 3), 1),
        Order(0, (3, 3), 2, buckets=Buckets(lengths, 10)),
        Order(0, (3, 3), 2, buckets=Buckets(lengths, 11)),
        Order(0, (3, 3), 2, buckets=Buckets(lengths + 1, 10)),
        Order(0, (3, 3), 2, Mixture(group, (2.0, 1.0))),
        Order(0, (3, 3), 2, Mixture(group, (3.0, 1.0))),
        Order(0, (3, 3), 2, Mixture(group[::-1], (2.0, 1.0))),
    ]
    assert len({order.fingerprint for order in made}) == len(made)
    assert made[0].fingerprint == Order(0, (3, 3), 2).fingerprint


@given(
    size=st.integers(1, 30),
    weight=st.floats(0, 4),
    epochs=st.integers(1, 12),
    seed=st.integers(0, 5),
)
def test_no_sample_of_a_group_gets_ahead_of_another(
    size: int, weight: float, epochs: int, seed: int
) -> None:
    mixture = Mixture(np.zeros(size, np.int64), (weight,))
    by_epoch = [mixture.repeats(seed, epoch) for epoch in range(epochs)]
    assert {int(counts.sum()) for counts in by_epoch} == {round(weight * size)}
    total = np.sum(by_epoch, axis=0)
    assert total.max() - total.min() <= 1


def sample(number: int, task: str | None) -> Sample:
    return Sample(str(number), (("text", "x"),), task)


def test_weights_go_by_task_and_others_count_once() -> None:
    samples = [sample(i, task) for i, task in enumerate(["a", "a", "b", None])]
    mixture = mixture_of(samples, {"a": 3, "b": 0})
    assert mixture is not None
    assert mixture.repeats(0, 0).tolist() == [3, 3, 0, 1]
    assert mixture_of(samples, {}) is None


def test_weights_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"names \['c'\].*has the tasks \['a'\]"):
        mixture_of([sample(0, "a"), sample(1, None)], {"c": 1})
    with pytest.raises(ConfigError, match="no sample to read"):
        mixture_of([sample(0, "a")], {"a": 0})
