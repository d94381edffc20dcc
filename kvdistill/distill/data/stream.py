"""From the store to batches of all teachers, aligned by sample; resumable at any batch.

    order → shards, prefetched → items → batches, collated ahead of the step

The epoch's global order (``order.py``) is cut into global batches, and each rank takes its share
of every one. The state is one number, the global position: a run that stopped on two ranks resumes
on three at the same sample. Shards of the next window are prefetched as stored codes, only the
mapped layers of them; one thread collates a few batches ahead of the step.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from math import ceil
from typing import Any, Protocol

from torch.utils.data import IterableDataset

from kvdistill.config.training import TrainingConfig
from kvdistill.corpus.samples import Sample
from kvdistill.distill.data.collate import Batch, Collate, Item, token_counts
from kvdistill.distill.data.order import Buckets, Order, mixture_of
from kvdistill.errors import IncompleteStore, StoreMismatch
from kvdistill.store.prefetch import ShardRequest, prefetch, prefetch_items
from kvdistill.store.reader import KVStore
from kvdistill.store.shard import EncodedShard


@dataclass(frozen=True, eq=False)
class LoadedShard:
    """A shard of the corpus with every teacher's codes for it."""

    samples: tuple[Sample, ...]
    teachers: Mapping[str, EncodedShard]

    def item(self, sample_idx: int) -> Item:
        """One sample and where its KV is."""
        shards = {name: (shard, sample_idx) for name, shard in self.teachers.items()}
        return Item(self.samples[sample_idx], shards)


class Source(Protocol):
    """Gives a stream its shards: a store, live teachers, or a placebo."""

    @property
    def sizes(self) -> list[int]:
        """Number of samples of every shard of the plan."""

    def load(self, shard_idx: int) -> LoadedShard:
        """One shard: its samples, and every teacher's codes of the needed layers."""

    def load_all(
        self, shard_idx: Iterable[int], *, threads: int, num_ahead: int
    ) -> Generator[LoadedShard, None, None]:
        """Shards in the order given, at most ``num_ahead`` read and not yet yielded."""


@dataclass(frozen=True, eq=False)
class StoreSource:
    """Shards of a store, with some layers of some teachers.

    Raises:
        IncompleteStore: a teacher lacks a shard.
    """

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
        """Shards in order, prefetched by ``threads`` threads."""
        if not self.layers:
            yield from (self.load(i) for i in shard_idx)
            return
        requests = (
            ShardRequest(name, self.store.shard_ids[i], layers)
            for i in shard_idx
            for name, layers in self.layers.items()
        )
        depth = num_ahead * len(self.layers)
        with closing(prefetch(self.store, requests, threads=threads, depth=depth)) as reads:
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


@dataclass(frozen=True)
class Rank:
    """This process among those that train together."""

    rank: int = 0
    world_size: int = 1


class KVStream(IterableDataset[Batch]):
    """One rank's batches, epoch after epoch; ``state_dict`` restores it at any batch.

    A batch of a rank is ``batch_size`` samples, or with length buckets one bucket.
    """

    def __init__(
        self,
        source: Source,
        collate: Collate,
        order: Order,
        *,
        batch_size: int,
        read_threads: int,
        batches_ahead: int,
        rank: Rank,
    ) -> None:
        self.source, self.collate, self.order = source, collate, order
        self.read_threads, self.batches_ahead = read_threads, batches_ahead
        self.rank = rank
        self.epoch = 0
        self.position = 0
        units_per_batch = batch_size if order.buckets is None else 1
        self._global_batch = units_per_batch * self.rank.world_size
        self._num_units: dict[int, int] = {}
        self._resumed = 0, 0, 0  # the epoch that was restored, its batches done and left

    def __len__(self) -> int:
        """Batches of the present epoch; the last may be smaller."""
        return self.num_batches(self.epoch)

    def num_batches(self, epoch: int) -> int:
        """Batches of an epoch; of the resumed one, those that count as done and those left."""
        resumed, done, left = self._resumed
        if done and epoch == resumed:
            return done + left
        return ceil(self._units(epoch) / self._global_batch)

    @property
    def batches_done(self) -> int:
        """Batches of the present epoch that counted as done when the stream was restored."""
        resumed, done, _ = self._resumed
        return done if self.epoch == resumed else 0

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is: the epoch, and the units that all ranks have consumed of it.

        Counts batches that were yielded, not those that are collated ahead.
        """
        return {
            "epoch": self.epoch,
            "position": self.position,
            "seed": self.order.seed,
            "num_samples": self.order.num_samples,
            "order": self.order.fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, Any], *, batches_per_step: int = 1) -> None:
        """Continue from a state, on this or another number of ranks.

        ``batches_done`` counts the epoch's batches before the state. On another number of ranks it
        is a substitute: whole steps of ``batches_per_step``, so that accumulation starts afresh.

        Raises:
            StoreMismatch: the state belongs to another corpus, seed or way of batching.
        """
        here = self.state_dict()
        del here["epoch"], here["position"]
        there = {name: state.get(name) for name in here}
        if here != there:
            raise StoreMismatch(
                f"the checkpoint was written with {there}, this run has {here}; resume with the "
                "same seed, store, window, batching and task weights, or start anew"
            )
        self.epoch, self.position = state["epoch"], state["position"]
        left = ceil((self._units(self.epoch) - self.position) / self._global_batch)
        done = ceil(self._units(self.epoch) / self._global_batch) - left
        if self.position:
            done = batches_per_step * max(1, ceil(done / batches_per_step))
        self._resumed = self.epoch, done, left

    def __iter__(self) -> Iterator[Batch]:
        """This rank's batches from the current position to the epoch's end."""
        num_units = self._units(self.epoch)
        for batch, taken in prefetch_items(self._batches(), self.batches_ahead):
            self.position += taken
            if self.position >= num_units:
                self.epoch, self.position = self.epoch + 1, 0
            yield batch

    def _units(self, epoch: int) -> int:
        if epoch not in self._num_units:
            self._num_units[epoch] = self.order.num_units(epoch)
        return self._num_units[epoch]

    def _batches(self) -> Generator[tuple[Batch, int], None, None]:
        """This rank's part of every global batch, and the units all ranks took for it."""
        pending: list[list[Item]] = []
        with closing(self._items(self.epoch, self.position)) as units:
            for unit in units:
                pending.append(unit)
                if len(pending) == self._global_batch:
                    yield self._batch(pending), len(pending)
                    pending = []
        if pending:
            yield self._batch(pending), len(pending)

    def _batch(self, units: Sequence[list[Item]]) -> Batch:
        """Every ``world_size``-th unit of a global batch."""
        mine = [item for unit in units[self.rank.rank :: self.rank.world_size] for item in unit]
        batch = self.collate(mine or units[0][:1])
        batch["sample_ids"] = [item.sample.sample_id for item in mine]  # named in errors
        return batch if mine else self.collate.without_weight(batch)

    def _items(self, epoch: int, start: int) -> Generator[list[Item], None, None]:
        """Units in global order from unit ``start`` on."""
        wanted = (i for window in self.order.windows(epoch, start) for i in window.shards)
        reads = self.source.load_all(
            wanted, threads=self.read_threads, num_ahead=self.order.window_shards
        )
        shards: dict[int, LoadedShard] = {}
        with closing(reads) as loaded:
            for window in self.order.windows(epoch, start):
                shards.clear()  # before the next ones arrive, or three windows would be in memory
                shards.update(zip(window.shards, loaded, strict=False))
                for unit in window.units:
                    yield [shards[int(shard)].item(int(sample)) for shard, sample in unit]


def open_stream(
    source: Source,
    collate: Collate,
    samples: Sequence[Sample],
    training: TrainingConfig,
    *,
    seed: int,
    rank: Rank,
) -> KVStream:
    """The stream of one rank, at its beginning; ``samples`` are the whole corpus in its order.

    Raises:
        ConfigError: weights of tasks that the corpus does not have.
    """
    buckets = None
    if training.batching == "bucketed":
        lengths = token_counts(collate.tokenizer, samples, training.max_length)
        budget = training.tokens_per_batch or training.batch_size * training.max_length
        buckets = Buckets(lengths, budget)
    order = Order(
        seed,
        tuple(source.sizes),
        training.window_shards,
        mixture_of(samples, training.task_weights),
        buckets,
    )
    return KVStream(
        source,
        collate,
        order,
        batch_size=training.batch_size,
        read_threads=training.prefetch_threads,
        # The trainer takes all batches of a step at once.
        batches_ahead=training.prefetch_steps * training.gradient_accumulation_steps,
        rank=rank,
    )


# Epochs need not have equally many batches: length buckets are cut anew in every epoch, and a run
# resumed on other ranks did its first steps with batches of another size. Steps are therefore
# counted epoch by epoch, from the stream's position.


def steps_in(stream: KVStream, epoch: int, batches_per_step: int) -> int:
    """Optimizer steps of one epoch; the last may have fewer batches."""
    return max(1, ceil(stream.num_batches(epoch) / batches_per_step))


def steps_left(stream: KVStream, epochs: float, batches_per_step: int) -> int:
    """Optimizer steps from the stream's position to the end of ``epochs`` epochs in all."""
    whole = int(epochs)
    steps = -(stream.batches_done // batches_per_step)
    for epoch in range(stream.epoch, whole):
        steps += steps_in(stream, epoch, batches_per_step)
    if stream.epoch <= whole < epochs:
        steps += ceil((epochs - whole) * steps_in(stream, whole, batches_per_step))
    return max(0, steps)


def epochs_for(stream: KVStream, steps: int, batches_per_step: int) -> int:
    """Epochs in all that ``steps`` more steps need, the last one started included."""
    if steps <= 0:
        return 0
    epoch, steps = stream.epoch, steps + stream.batches_done // batches_per_step
    while steps > 0:
        steps -= steps_in(stream, epoch, batches_per_step)
        epoch += 1
    return epoch
