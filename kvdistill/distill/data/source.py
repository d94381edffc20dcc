"""Where shards come from: a store, or whatever else gives the same shards."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

from kvdistill.corpus.samples import Sample
from kvdistill.distill.data.collate import Item
from kvdistill.errors import IncompleteStore, StoreMismatch
from kvdistill.store.prefetch import ShardRequest, prefetch
from kvdistill.store.reader import KVStore
from kvdistill.store.shard import EncodedShard


@dataclass(frozen=True, eq=False)
class LoadedShard:
    """A shard of the corpus with every teacher's codes for it."""

    samples: tuple[Sample, ...]
    teachers: Mapping[str, EncodedShard]

    def item(self, sample_idx: int) -> Item:
        """One sample and where its KV lies."""
        shards = {name: (shard, sample_idx) for name, shard in self.teachers.items()}
        return Item(self.samples[sample_idx], shards)


class Source(Protocol):
    """What a stream needs of whoever gives it shards."""

    @property
    def sizes(self) -> list[int]:
        """Number of samples of every shard of the plan."""

    def load(self, shard_idx: int) -> LoadedShard:
        """One shard: its samples, and every teacher's codes of the needed layers."""

    def load_all(
        self, shard_idx: Iterable[int], *, threads: int, num_ahead: int
    ) -> Generator[LoadedShard, None, None]:
        """Shards in the order asked for, at most ``num_ahead`` read and not yet handed out."""


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
        """Read one shard, now and in this thread."""
        shard_id = self.store.shard_ids[shard_idx]
        read = self.store.read_shard
        teachers = {name: read(name, shard_id, layers) for name, layers in self.layers.items()}
        return self._loaded(shard_id, teachers)

    def load_all(
        self, shard_idx: Iterable[int], *, threads: int, num_ahead: int
    ) -> Generator[LoadedShard, None, None]:
        """Shards in order, read and decoded ahead of need by some threads."""
        if not self.layers:
            yield from (self.load(i) for i in shard_idx)
            return
        requests = (
            ShardRequest(name, self.store.shard_ids[i], layers)
            for i in shard_idx
            for name, layers in self.layers.items()
        )
        depth = num_ahead * len(self.layers)
        with closing(prefetch(self.store, requests, threads=threads, ahead=depth)) as reads:
            for teachers in zip(*[reads] * len(self.layers), strict=True):
                found = {request.teacher: shard for request, shard in teachers}
                yield self._loaded(teachers[0][0].shard_id, found)

    def _loaded(self, shard_id: str, teachers: Mapping[str, EncodedShard]) -> LoadedShard:
        samples = self.store.samples(shard_id)
        ids = tuple(sample.sample_id for sample in samples)
        for name, shard in teachers.items():
            if shard.tokens.sample_ids != ids:
                raise StoreMismatch(
                    f"{self.store.paths.root}: shard {shard_id} of teacher {name!r} holds other "
                    "samples than the corpus; run `kvdistill verify`"
                )
        return LoadedShard(samples, teachers)
