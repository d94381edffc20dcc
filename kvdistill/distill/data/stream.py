"""Batches of all teachers, aligned sample by sample; can be stopped and resumed anywhere.

The epoch's global order (``order.py``) is cut into global batches, and each rank takes its share
of every one. State is one number, the global position; a run that stopped on two ranks goes on
with three at the same sample. Shards of the next windows are read ahead by a bounded number of
threads, as stored codes; only the mapped layers are read.

    order → shards → read ahead → items → collate → batch
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import ceil
from typing import Any

from torch.utils.data import IterableDataset

from kvdistill.corpus import Sample
from kvdistill.distill.data.collate import Batch, Collate, Item, without_weight
from kvdistill.distill.data.order import Window, windows
from kvdistill.errors import IncompleteStore, StoreMismatch
from kvdistill.store.reader import KVStore
from kvdistill.store.shard import EncodedShard


@dataclass(frozen=True)
class Rank:
    """This process among those that train together."""

    rank: int = 0
    world_size: int = 1


@dataclass(frozen=True, eq=False)
class LoadedShard:
    """A shard of the corpus with every teacher's codes for it."""

    samples: tuple[Sample, ...]
    teachers: Mapping[str, EncodedShard]

    def item(self, sample_idx: int) -> Item:
        """One sample and where its KV lies."""
        shards = {name: (shard, sample_idx) for name, shard in self.teachers.items()}
        return Item(self.samples[sample_idx], shards)


@dataclass(frozen=True, eq=False)
class StoreSource:
    """Loads shards of a store: which layers of which teachers."""

    store: KVStore
    layers: Mapping[str, Sequence[int]]
    """Per teacher, the layers that the student's layer map needs."""

    def __post_init__(self) -> None:
        for teacher in self.layers:
            missing = self.store.missing(teacher)
            if missing:
                raise IncompleteStore(
                    f"{self.store.paths.root}: teacher {teacher!r} lacks {len(missing)} of "
                    f"{len(self.store.shard_ids)} shards (first: {missing[0]}); "
                    "run `kvdistill extract` with this config to complete it"
                )

    @property
    def sizes(self) -> list[int]:
        """Number of samples of every shard of the plan."""
        return [plan.num_samples for plan in self.store.manifest.shards]

    def load(self, shard_idx: int) -> LoadedShard:
        """Read one shard: its samples, and every teacher's codes of the needed layers."""
        shard_id = self.store.shard_ids[shard_idx]
        samples = self.store.samples(shard_id)
        teachers = {}
        for name, layers in self.layers.items():
            teachers[name] = self.store.read_shard(name, shard_id, layers=layers)
            stored = teachers[name].tokens.sample_ids
            if stored != tuple(sample.sample_id for sample in samples):
                raise StoreMismatch(
                    f"{self.store.paths.root}: shard {shard_id} of teacher {name!r} holds other "
                    "samples than the corpus; run `kvdistill verify`"
                )
        return LoadedShard(samples, teachers)


class KVStream(IterableDataset[Batch]):
    """One rank's batches, epoch after epoch; ``state_dict`` restores it at any batch."""

    def __init__(
        self,
        source: StoreSource,
        collate: Collate,
        *,
        batch_size: int,
        seed: int,
        window_shards: int,
        read_ahead: int,
        rank: Rank | None = None,
    ) -> None:
        self.source, self.collate = source, collate
        self.batch_size, self.seed = batch_size, seed
        self.window_shards, self.read_ahead = window_shards, read_ahead
        self.rank = rank or Rank()
        self.sizes = source.sizes
        self.num_samples = sum(self.sizes)
        self.epoch = 0
        self.position = 0
        self._skip = 0

    @property
    def global_batch(self) -> int:
        """Samples that all ranks take together per batch."""
        return self.batch_size * self.rank.world_size

    def __len__(self) -> int:
        """Batches per epoch; the last may be smaller."""
        return ceil(self.num_samples / self.global_batch)

    @property
    def batches_done(self) -> int:
        """Batches of this epoch that count as done, so that done + left = ``len(self)``."""
        return len(self) - ceil((self.num_samples - self.position) / self.global_batch)

    def state_dict(self) -> dict[str, int]:
        """Where the stream is: the epoch, and the samples that all ranks have taken of it."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "seed": self.seed,
            "num_samples": self.num_samples,
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue from a state, on this or another number of ranks.

        The next iteration first yields ``batches_done`` empty batches, because the trainer that
        resumes discards as many; they cost nothing.

        Raises:
            StoreMismatch: the state belongs to another corpus or seed.
        """
        here = {"seed": self.seed, "num_samples": self.num_samples}
        there = {name: state[name] for name in here}
        if here != there:
            raise StoreMismatch(
                f"the checkpoint was written with {there}, this run has {here}; "
                "resume with the same seed and store, or start anew"
            )
        self.epoch, self.position = state["epoch"], state["position"]
        self._skip = self.batches_done

    def __iter__(self) -> Iterator[Batch]:
        """This rank's batches from the current position to the epoch's end."""
        for _ in range(self._skip):
            yield {}
        self._skip = 0
        for items, taken in self._global_batches():
            batch = self._batch(items)
            self.position += taken
            if self.position >= self.num_samples:
                self.epoch, self.position = self.epoch + 1, 0
            yield batch

    def _batch(self, items: list[tuple[LoadedShard, int]]) -> Batch:
        """This rank's part of a global batch: every ``world_size``-th sample."""
        mine = items[self.rank.rank :: self.rank.world_size]
        batch = self.collate([shard.item(idx) for shard, idx in mine or items[:1]])
        return batch if mine else without_weight(batch)

    def _global_batches(self) -> Iterator[tuple[list[tuple[LoadedShard, int]], int]]:
        pending: list[tuple[LoadedShard, int]] = []
        for row in self._rows(self.epoch, self.position):
            pending.append(row)
            if len(pending) == self.global_batch:
                yield pending, len(pending)
                pending = []
        if pending:
            yield pending, len(pending)

    def _rows(self, epoch: int, start: int) -> Iterator[tuple[LoadedShard, int]]:
        """(shard, sample) in global order from position ``start`` on."""
        plan = windows(self.seed, epoch, self.sizes, self.window_shards, start)
        for window, shards in self._loaded(plan):
            for shard_idx, sample_idx in window.rows[max(0, start - window.first_position) :]:
                yield shards[int(shard_idx)], int(sample_idx)

    def _loaded(self, plan: Iterator[Window]) -> Iterator[tuple[Window, dict[int, LoadedShard]]]:
        """Windows with their shards, the next one being read while this one is used."""
        with ThreadPoolExecutor(self.read_ahead, "kvdistill-read") as pool:
            queue: deque[tuple[Window, dict[int, Future[LoadedShard]]]] = deque()
            try:
                for window in plan:
                    futures = {i: pool.submit(self.source.load, i) for i in window.shards}
                    queue.append((window, futures))
                    if len(queue) > 1:
                        yield _ready(*queue.popleft())
                while queue:
                    yield _ready(*queue.popleft())
            finally:
                for _, futures in queue:
                    for future in futures.values():
                        future.cancel()


def _ready(
    window: Window, futures: dict[int, Future[Any]]
) -> tuple[Window, dict[int, LoadedShard]]:
    return window, {shard_idx: future.result() for shard_idx, future in futures.items()}
