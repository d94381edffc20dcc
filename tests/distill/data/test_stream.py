"""The stream: every sample once, on any number of ranks, stopped and resumed at any batch."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Generator, Iterable, Sequence
from math import ceil
from typing import Any

import numpy as np
import pytest
import torch

from kvdistill.corpus.samples import Sample
from kvdistill.distill.data.collate import Item
from kvdistill.distill.data.order import Buckets, Mixture, Order
from kvdistill.distill.data.stream import KVStream, LoadedShard, Rank, epochs_for, steps_left
from kvdistill.errors import StoreMismatch

SIZES = (3, 5, 1, 4, 2, 6)
EVERYTHING = sorted(f"{s}.{i}" for s, size in enumerate(SIZES) for i in range(size))
LENGTHS = np.random.default_rng(0).integers(1, 20, len(EVERYTHING))
ORDERS = {
    "plain": Order(5, SIZES, 2),
    "buckets": Order(5, SIZES, 4, buckets=Buckets(LENGTHS, 16)),
    "mixture": Order(5, SIZES, 2, Mixture(np.arange(len(EVERYTHING)) % 2, (1.0, 2.0))),
}


class FakeSource:
    """Shards whose samples are named by their place; counts what is loaded."""

    def __init__(self) -> None:
        self.loaded: list[int] = []

    def load(self, shard_idx: int) -> LoadedShard:
        self.loaded.append(shard_idx)
        names = [f"{shard_idx}.{i}" for i in range(SIZES[shard_idx])]
        return LoadedShard(tuple(Sample(name, (("text", name),)) for name in names), {})

    def load_all(
        self, shard_idx: Iterable[int], *, threads: int, num_ahead: int
    ) -> Generator[LoadedShard, None, None]:
        yield from map(self.load, shard_idx)


class CountingSource(FakeSource):
    """Shards of given sizes; counts those that are read, and those in memory."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.sizes, self.num_open, self.most_open = sizes, 0, 0

    def load(self, shard_idx: int) -> LoadedShard:
        self.loaded.append(shard_idx)
        names = [f"{shard_idx}.{i}" for i in range(self.sizes[shard_idx])]
        shard = LoadedShard(tuple(Sample(name, (("text", name),)) for name in names), {})
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        weakref.finalize(shard, self.close)
        return shard

    def close(self) -> None:
        self.num_open -= 1


class FakeCollate:
    """Batches of names; counts the calls, and fails at one of them."""

    def __init__(self, fails_at: int = -1) -> None:
        self.calls, self.fails_at = 0, fails_at

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        self.calls += 1
        if self.calls == self.fails_at:
            raise OSError("shard is unreadable")
        names = [item.sample.sample_id for item in items]
        return {"ids": names, "labels": torch.zeros(len(names), 1, dtype=torch.long)}

    def without_weight(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {**batch, "labels": torch.full_like(batch["labels"], -100)}


def stream(
    rank: int = 0, world_size: int = 1, batch_size: int = 2, order: str = "plain"
) -> KVStream:
    source: Any = FakeSource()
    make: Any = FakeCollate()
    return KVStream(
        source, make, ORDERS[order], batch_size=batch_size, read_threads=2, batches_ahead=3,
        rank=Rank(rank, world_size),
    )  # fmt: skip


def counted(batches: Sequence[dict[str, Any]]) -> list[str]:
    return [name for b in batches if (b["labels"] != -100).any() for name in b["ids"]]


def global_order(world_size: int, batch_size: int = 2, order: str = "plain") -> list[list[str]]:
    """Sets of samples per global batch, over all ranks."""
    ranks = [list(stream(r, world_size, batch_size, order)) for r in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    return [sorted(counted([batches[i] for batches in ranks])) for i in range(len(ranks[0]))]


def test_an_epoch_is_every_sample_once_and_epochs_differ() -> None:
    one = stream()
    first, second = counted(list(one)), counted(list(one))
    assert sorted(first) == sorted(second) == EVERYTHING
    assert first != second
    assert len(one) == 11
    assert one.state_dict()["epoch"] == 2


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_the_global_order_does_not_depend_on_the_ranks(world_size: int) -> None:
    alone = counted(list(stream(batch_size=1)))
    shared = global_order(world_size)
    size = 2 * world_size
    assert shared == [sorted(alone[i : i + size]) for i in range(0, len(alone), size)]


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_share_buckets_that_are_the_same_for_any_number(world_size: int) -> None:
    buckets = [batch["ids"] for batch in stream(order="buckets")]
    assert len({len(bucket) for bucket in buckets}) > 1
    ranks = [list(stream(r, world_size, order="buckets")) for r in range(world_size)]
    for number, start in enumerate(range(0, len(buckets), world_size)):
        step = [batches[number] for batches in ranks]
        found = [batch["ids"] for batch in step if counted([batch])]
        assert sorted(found) == sorted(buckets[start : start + world_size])


@pytest.mark.parametrize("batching", ["plain", "buckets"])
@pytest.mark.parametrize("world_size", [2, 4, 8])
@pytest.mark.parametrize("num_shards", [16, 64])
def test_a_rank_reads_little_more_than_its_share(
    num_shards: int, world_size: int, batching: str
) -> None:
    rng = np.random.default_rng(1)
    sizes = (8,) * 16 if num_shards == 16 else tuple(rng.integers(8, 24, num_shards).tolist())
    # A bucket for each sample of the small shards, which then have equally many.
    budget = 20 if num_shards == 16 else 64
    buckets = Buckets(rng.integers(11, 20, sum(sizes)), budget) if batching == "buckets" else None
    order = Order(5, sizes, 4, buckets=buckets)
    for rank in range(world_size):
        source: Any = CountingSource(sizes)
        make: Any = FakeCollate()
        one = KVStream(
            source, make, order, batch_size=3, read_threads=1, batches_ahead=1,
            rank=Rank(rank, world_size),
        )  # fmt: skip
        seen = sum(len(b["ids"]) for b in one if (b["labels"] != -100).any())
        assert seen == pytest.approx(sum(sizes) / world_size, rel=0.3)
        assert len(source.loaded) <= 1.3 * num_shards / world_size
        assert source.most_open <= order.cell_shards * order.num_lanes // world_size + 2


def test_a_rank_without_samples_still_gets_a_batch_that_counts_nothing() -> None:
    ranks = [list(stream(r, 8, 2)) for r in range(8)]  # 21 samples: 16, then 5 for 8 ranks
    assert all(len(batches) == 2 for batches in ranks)
    assert sum(bool(counted(batches[1:])) for batches in ranks) == 5


@pytest.mark.parametrize("order", ORDERS)
def test_stopping_at_every_batch_and_restoring_gives_the_tail(order: str) -> None:
    whole = [batch["ids"] for batch in stream(order=order)]
    for stop in range(len(whole)):
        first = stream(order=order)
        batches = iter(first)
        for _ in range(stop):
            next(batches)
        second = stream(order=order)
        second.load_state_dict(first.state_dict())
        assert second.batches_done == stop
        assert [batch["ids"] for batch in second] == whole[stop:]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("ranks", [(1, 2, 3), (3, 2, 1), (2, 4, 1)])
def test_other_numbers_of_ranks_go_on_with_what_is_left(ranks: tuple[int, ...], order: str) -> None:
    wanted = sorted(name for batch in stream(order=order) for name in batch["ids"])
    state: dict[str, Any] | None = None
    done: list[str] = []
    for world_size in ranks:
        streams = [stream(r, world_size, 1, order) for r in range(world_size)]
        for one in streams:
            if state is not None:
                one.load_state_dict(state)
        running = [iter(one) for one in streams]
        for _ in range(2):
            done += [name for batches in running for name in counted([next(batches)])]
        (state,) = {str(one.state_dict()): one.state_dict() for one in streams}.values()
    rest = stream(order=order)
    assert state is not None
    rest.load_state_dict(state)
    assert sorted(done + counted(list(rest))) == wanted


def test_the_state_counts_yielded_batches_not_prefetched_ones() -> None:
    one = stream(batch_size=1)
    batches = iter(one)
    for number in range(1, 8):
        next(batches)
        assert one.state_dict()["position"] == number


def test_few_shards_are_held_and_a_restored_stream_skips_what_it_does_not_need() -> None:
    one = stream()
    batches = iter(one)
    next(batches)
    source: Any = one.source
    near = {int(unit[0, 0]) for unit in ORDERS["plain"].units(0)[:10]}
    assert set(source.loaded) <= near < set(range(len(SIZES)))  # one batch, and three ahead
    late = stream()
    late.load_state_dict({**late.state_dict(), "position": 20})
    assert len(counted(list(late))) == 1
    late_source: Any = late.source
    assert len(late_source.loaded) <= 2


@pytest.mark.parametrize("other", ["buckets", "mixture"])
def test_a_state_of_another_run_is_refused(other: str) -> None:
    with pytest.raises(StoreMismatch, match="same seed, store, window, batching"):
        stream().load_state_dict(stream(order=other).state_dict())
    with pytest.raises(StoreMismatch, match="'seed': 6"):
        stream().load_state_dict({**stream().state_dict(), "seed": 6})


def test_a_state_of_the_order_before_lanes_is_refused_in_words() -> None:
    old = stream().state_dict()
    del old["order_version"]
    with pytest.raises(StoreMismatch, match="samples in another order; finish this run with"):
        stream().load_state_dict(old)


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("kvdistill")]


def test_an_error_while_collating_ahead_comes_at_its_turn_and_ends_the_thread() -> None:
    one = stream()
    one.collate = FakeCollate(fails_at=3)  # type: ignore[assignment]
    batches = iter(one)
    next(batches)
    next(batches)
    with pytest.raises(OSError, match="shard is unreadable"):
        next(batches)
    assert threads() == []
    assert one.state_dict()["position"] == 4
    with pytest.raises(StopIteration):
        next(batches)


def test_an_error_while_reading_reaches_the_reader() -> None:
    one = stream()

    def broken(shard_idx: int) -> LoadedShard:
        raise OSError(f"shard {shard_idx} is gone")

    one.source.load = broken  # type: ignore[method-assign]
    with pytest.raises(OSError, match="is gone"):
        list(one)
    assert threads() == []


def test_dropping_a_stream_midway_ends_its_threads() -> None:
    batches = iter(stream())
    next(batches)
    assert threads() == ["kvdistill-collate_0"]
    del batches
    gc.collect()
    assert threads() == []


def test_steps_are_counted_epoch_by_epoch_and_from_where_the_stream_is() -> None:
    one = stream(order="buckets")
    batches = [len(list(stream_at(epoch))) for epoch in range(4)]
    assert len(set(batches)) > 1  # epochs are cut differently
    in_steps = [ceil(n / 2) for n in batches]
    assert steps_left(one, 3, 2) == sum(in_steps[:3])
    assert steps_left(one, 1.5, 2) == in_steps[0] + ceil(in_steps[1] / 2)
    assert epochs_for(one, sum(in_steps[:3]), 2) == 3
    assert epochs_for(one, sum(in_steps[:3]) + 1, 2) == 4
    for epoch, steps in ((0, 3), (1, 2)):
        state = {**one.state_dict(), "epoch": epoch, "position": 2 * steps}
        resumed = stream_at(epoch, state)
        done = sum(in_steps[:epoch]) + steps
        assert steps_left(resumed, 3, 2) == sum(in_steps[:3]) - done
        assert epochs_for(resumed, sum(in_steps[:3]) - done, 2) == 3


def stream_at(epoch: int, state: dict[str, Any] | None = None) -> KVStream:
    one = stream(order="buckets")
    place = {**one.state_dict(), "epoch": epoch}
    one.load_state_dict(state or place, batches_per_step=2)
    return one


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_step_of_several_batches_starts_afresh_on_other_ranks(world_size: int) -> None:
    state = {**stream().state_dict(), "position": 10}
    resumed = stream(0, world_size)
    resumed.load_state_dict(state, batches_per_step=3)
    done = resumed.batches_done
    assert done % 3 == 0
    assert len(list(resumed)) == ceil(11 / (2 * world_size)) == resumed.num_batches(0) - done
