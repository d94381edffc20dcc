"""From the store to batches of all teachers, aligned by sample; resumable at any batch.

    order → shards, prefetched → items → batches, collated ahead of the step

The epoch's global order (``order.py``) is cut into global batches, and each rank takes its share
of every one, from lanes of its own, so that it reads only the shards whose samples it uses. The
state is one number, the global position: a run that stopped on two ranks resumes on three at the
same sample. Shards are prefetched as stored codes, only the mapped layers of them, and released
after their last sample; one thread collates a few batches ahead of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from math import ceil
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import IterableDataset

from kvdistill.config.training import TrainingConfig
from kvdistill.corpus.samples import Sample
from kvdistill.distill.data.collate import Batch, Collate, Item, token_counts
from kvdistill.distill.data.order import ORDER_VERSION, Buckets, Order, Rows, mixture_of
from kvdistill.errors import IncompleteStore, StoreMismatch
from kvdistill.store.prefetch import ShardRequest, prefetch, prefetch_items
from kvdistill.store.reader import KVStore
from kvdistill.store.shard import EncodedShard
from kvdistill.types import KINDS, Kind


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
    kinds: Sequence[Kind] = KINDS

    def __post_init__(self) -> None:
        for teacher in self.layers:
            missing = self.store.missing(teacher)
            if missing:
                raise IncompleteStore(
                    f"{self.store.where}: teacher {teacher!r} lacks {len(missing)} of "
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
        teachers = {
            name: self.store.read_shard(name, shard_id, layers, kinds=self.kinds)
            for name, layers in self.layers.items()
        }
        return self._loaded(shard_id, teachers)

    def load_all(
        self, shard_idx: Iterable[int], *, threads: int, num_ahead: int
    ) -> Generator[LoadedShard, None, None]:
        """Shards in order, prefetched by ``threads`` threads."""
        if not self.layers:
            yield from (self.load(i) for i in shard_idx)
            return
        requests = (
            ShardRequest(name, self.store.shard_ids[i], layers, kinds=self.kinds)
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
                    f"{self.store.where}: shard {shard_id} of teacher {name!r} holds other "
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
        self.stage: Callable[[Batch], Batch] = dict  # what the trainer prepares a transfer with
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
            "order_version": ORDER_VERSION,
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
        if state.get("order_version", 1) != ORDER_VERSION:
            raise StoreMismatch(
                "the checkpoint was written by a version of kvdistill that read samples in another "
                "order; finish this run with that version, or start it anew under another name"
            )
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
        planned = list(self._plan(self.epoch, self.position))
        # A lane returns after at most as many batches as there are lanes.
        hold = 4 * self.order.num_lanes
        first, last, shard = _reads([rows[:, 0] for rows, _, _ in planned], hold)
        reads = self.source.load_all(
            shard.tolist(), threads=self.read_threads, num_ahead=self._num_ahead
        )
        held: dict[int, LoadedShard] = {}
        ends: dict[int, int] = {}
        with closing(reads) as loaded:
            arriving = iter(zip(first.tolist(), last.tolist(), shard.tolist(), strict=True))
            coming = next(arriving, None)
            for number, (rows, counts, taken) in enumerate(planned):
                while coming is not None and coming[0] == number:
                    _, ends[coming[2]], name = coming
                    held[name] = next(loaded)
                    coming = next(arriving, None)
                items = [held[shard_idx].item(sample) for shard_idx, sample in rows.tolist()]
                batch = self._batch(items, counts=counts)
                del items  # or the shards that end here would stay in memory
                for done in [name for name in held if ends[name] == number]:
                    del held[done]
                yield batch, taken

    def _plan(self, epoch: int, start: int) -> Iterator[tuple[Rows, bool, int]]:
        """Per global batch from unit ``start`` on: this rank's samples, whether they count, and the
        number of units that all ranks take.

        A rank without a unit takes part with a sample that it has at hand, which does not count.
        """
        units = self.order.units(epoch)
        spare: Rows | None = None
        for first in range(start, len(units), self._global_batch):
            count = min(self._global_batch, len(units) - first)
            owners = self.order.owners(first, count, self.rank.world_size)
            mine = [units[first + int(i)] for i in np.flatnonzero(owners == self.rank.rank)]
            rows = np.concatenate(mine) if mine else units[first][:1] if spare is None else spare
            spare = rows[-1:]
            yield rows, bool(mine), count

    @property
    def _num_ahead(self) -> int:
        """Shards read in advance: this rank's share of half a window."""
        return max(1, self.order.window_shards // (2 * self.rank.world_size))

    def _batch(self, items: list[Item], *, counts: bool) -> Batch:
        batch = self.collate(items)
        named = items if counts else []
        batch["sample_ids"] = [item.sample.sample_id for item in named]  # named in errors
        return self.stage(batch if counts else self.collate.without_weight(batch))


def _reads(shards: Sequence[NDArray[np.int64]], hold: int) -> tuple[NDArray[np.int64], ...]:
    """Which shards to read, given those of every batch: first batch, last batch, shard ``[R]``.

    In the order of first use. A shard is kept if it is used again within ``hold`` batches, else
    read again: one that two lanes share may be used at the start and at the end of an epoch.
    """
    shard = np.concatenate([np.zeros(0, np.int64), *shards])
    batch = np.repeat(np.arange(len(shards)), [len(s) for s in shards])
    by = np.lexsort((batch, shard))
    shard, batch = shard[by], batch[by]
    starts = np.flatnonzero((np.diff(shard, prepend=-1) != 0) | (np.diff(batch, prepend=0) > hold))
    ends = np.append(starts[1:], len(shard))[: len(starts)] - 1
    in_turn = np.argsort(batch[starts], kind="stable")
    return tuple(x[in_turn] for x in (batch[starts], batch[ends], shard[starts]))


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
