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


def units(order: Order, epoch: int) -> list[Unit]:
    return [[(int(shard), int(sample)) for shard, sample in unit] for unit in order.units(epoch)]


def lanes(order: Order, epoch: int) -> list[list[Unit]]:
    found = units(order, epoch)
    return [found[lane :: order.num_lanes] for lane in range(order.num_lanes)]


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


@given(order=orders(), epoch=st.integers(0, 2))
def test_a_lane_reads_whole_cells_one_after_the_other(order: Order, epoch: int) -> None:
    """So few shards are open at once."""
    for lane in lanes(order, epoch):
        used = [{shard for shard, _ in unit} for unit in lane]
        for shard in set().union(*used):
            places = [i for i, shards in enumerate(used) if shard in shards]
            between = set().union(*used[places[0] : places[-1] + 1])
            assert len(between) <= order.cell_shards
    sizes = [len(lane) for lane in lanes(order, epoch)]
    assert max(sizes) - min(sizes) <= 1


def test_neighbours_come_from_as_many_shards_as_there_are_lanes() -> None:
    order = Order(3, (20,) * 24, 4)
    found = [unit[0][0] for unit in units(order, 0)]
    for start in range(len(found) - 7):
        assert len(set(found[start : start + 8])) >= 7  # 8 but where lanes go on to the next shard


@given(order=orders().filter(lambda order: order.buckets is not None), epoch=st.integers(0, 2))
def test_a_bucket_keeps_to_its_budget_and_holds_neighbours_in_length(
    order: Order, epoch: int
) -> None:
    assert order.buckets is not None
    first = np.concatenate([[0], np.cumsum(order.shard_sizes)])
    spans: dict[int, list[tuple[int, int]]] = {}
    for unit in units(order, epoch):
        lengths = [int(order.buckets.length[first[s] + i]) for s, i in unit]
        assert len(unit) == 1 or max(lengths) * len(unit) <= order.buckets.tokens_per_batch
        assert len({s for s, _ in unit}) <= order.cell_shards
        if order.cell_shards == 1:
            spans.setdefault(unit[0][0], []).append((min(lengths), max(lengths)))
    for found in spans.values():
        assert all(a[1] <= b[0] for a, b in pairwise(sorted(found)))


def test_buckets_pad_less_than_batches_as_they_come() -> None:
    lengths = np.random.default_rng(0).integers(10, 500, 400)
    order = Order(0, (100,) * 4, 16, buckets=Buckets(lengths, 4096))

    def padding(batches: list[list[int]]) -> float:
        return 1 - sum(map(sum, batches)) / sum(max(b) * len(b) for b in batches)

    flat = [[int(lengths[100 * s + i]) for s, i in unit] for unit in units(order, 0)]
    plain = Order(0, (100,) * 4, 4)
    rows = [int(lengths[100 * s + i]) for unit in units(plain, 0) for s, i in unit]
    assert padding(flat) < 0.1
    assert padding([rows[i : i + 8] for i in range(0, 400, 8)]) > 0.3


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 8])
def test_ranks_get_equal_parts_of_any_batch_and_keep_their_lanes(world_size: int) -> None:
    order = Order(0, (9,) * 9, 4)
    for first, per_rank in ((0, 1), (5, 3), (24, 8)):
        owners = order.owners(first, per_rank * world_size, world_size)
        assert np.bincount(owners).tolist() == [per_rank] * world_size
        if 8 % world_size == 0:
            lane = (first + np.arange(len(owners))) % 8
            assert all(len(set(owners[lane == i])) <= 1 for i in range(8))


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
