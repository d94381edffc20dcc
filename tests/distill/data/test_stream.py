"""The stream: every sample once, on any number of ranks, stopped and resumed at any batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from kvdistill.corpus import Sample
from kvdistill.distill.data.collate import Item
from kvdistill.distill.data.stream import KVStream, LoadedShard, Rank
from kvdistill.errors import StoreMismatch

SIZES = [3, 5, 1, 4, 2, 6]


class FakeSource:
    """Shards whose samples are named by their place; counts what is loaded."""

    sizes = SIZES

    def __init__(self) -> None:
        self.loaded: list[int] = []

    def load(self, shard_idx: int) -> LoadedShard:
        self.loaded.append(shard_idx)
        names = [f"{shard_idx}.{i}" for i in range(SIZES[shard_idx])]
        return LoadedShard(tuple(Sample(name, (("text", name),)) for name in names), {})


def collate(items: Sequence[Item]) -> dict[str, Any]:
    labels = torch.zeros(len(items), 1, dtype=torch.long)
    return {
        "ids": [item.sample.sample_id for item in items],
        "labels": labels,
        "inject_labels": labels,
        "teachers": {},
    }


def stream(rank: int = 0, world_size: int = 1, batch_size: int = 2) -> KVStream:
    source: Any = FakeSource()
    make: Any = collate
    return KVStream(
        source, make, batch_size=batch_size, seed=5, window_shards=2, read_ahead=2,
        rank=Rank(rank, world_size),
    )  # fmt: skip


def counted(batches: Sequence[dict[str, Any]]) -> list[str]:
    return [name for b in batches if b and (b["labels"] != -100).any() for name in b["ids"]]


def global_order(world_size: int, batch_size: int = 2) -> list[list[str]]:
    """Sets of samples per global batch, over all ranks."""
    ranks = [list(stream(r, world_size, batch_size)) for r in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    return [sorted(counted([batches[i] for batches in ranks])) for i in range(len(ranks[0]))]


def test_an_epoch_is_every_sample_once_and_epochs_differ() -> None:
    one = stream()
    first, second = counted(list(one)), counted(list(one))
    everything = sorted(f"{s}.{i}" for s, size in enumerate(SIZES) for i in range(size))
    assert sorted(first) == sorted(second) == everything
    assert first != second
    assert len(one) == 11
    assert one.state_dict()["epoch"] == 2


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_the_global_order_does_not_depend_on_the_ranks(world_size: int) -> None:
    alone = counted(list(stream(batch_size=1)))
    shared = global_order(world_size)
    size = 2 * world_size
    assert shared == [sorted(alone[i : i + size]) for i in range(0, len(alone), size)]


def test_a_rank_without_samples_still_gets_a_batch_that_counts_nothing() -> None:
    ranks = [list(stream(r, 8, 2)) for r in range(8)]  # 21 samples: 16, then 5 for 8 ranks
    assert all(len(batches) == 2 for batches in ranks)
    assert sum(bool(counted(batches[1:])) for batches in ranks) == 5


def test_stopping_at_every_batch_and_restoring_gives_the_tail() -> None:
    whole = [batch["ids"] for batch in stream()]
    for stop in range(len(whole)):
        first = stream()
        batches = iter(first)
        for _ in range(stop):
            next(batches)
        second = stream()
        second.load_state_dict(first.state_dict())
        skipped = second.batches_done
        rest = list(second)
        assert skipped == stop  # as many empty batches first as the trainer throws away
        assert rest[:skipped] == [{}] * skipped
        assert [batch["ids"] for batch in rest[skipped:]] == whole[stop:]


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 3), (3, 1)])
def test_restoring_on_another_number_of_ranks_repeats_and_loses_nothing(
    before: int, after: int
) -> None:
    first = [stream(r, before) for r in range(before)]
    running = [iter(one) for one in first]
    done = [name for _ in range(2) for batches in running for name in counted([next(batches)])]
    second = [stream(r, after) for r in range(after)]
    for one in second:
        one.load_state_dict(first[0].state_dict())
    rest = [name for one in second for name in counted(list(one))]
    everything = sorted(f"{s}.{i}" for s, size in enumerate(SIZES) for i in range(size))
    assert sorted(done + rest) == everything


def test_few_shards_are_held_and_a_restored_stream_skips_what_it_does_not_need() -> None:
    one = stream()
    batches = iter(one)
    next(batches)
    source: Any = one.source
    assert len(source.loaded) <= 4  # this window and the next
    late = stream()
    late.load_state_dict({"epoch": 0, "position": 20, "seed": 5, "num_samples": 21})
    assert len(counted(list(late))) == 1
    late_source: Any = late.source
    assert len(late_source.loaded) <= 2


def test_a_state_of_another_run_is_refused() -> None:
    with pytest.raises(StoreMismatch, match="seed"):
        stream().load_state_dict({"epoch": 0, "position": 2, "seed": 6, "num_samples": 21})


def test_an_error_while_reading_ahead_reaches_the_reader() -> None:
    one = stream()

    def broken(shard_idx: int) -> LoadedShard:
        raise OSError(f"shard {shard_idx} is gone")

    one.source.load = broken  # type: ignore[method-assign]
    with pytest.raises(OSError, match="is gone"):
        list(one)
