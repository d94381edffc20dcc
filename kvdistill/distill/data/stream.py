"""Batches of all teachers, aligned sample by sample; can be stopped and resumed anywhere.

The epoch's global order (``order.py``) is cut into global batches, and each rank takes its share
of every one. State is one number, the global position; a run that stopped on two ranks goes on
with three at the same sample. A thread collates a few batches ahead of the step; shards of the
next window are read ahead of that, as stored codes; only the mapped layers are read.

    order → shards → read ahead → items → collate ahead → batch
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from math import ceil
from typing import Any, Final

from torch.utils.data import IterableDataset

from kvdistill.config.training import TrainingConfig
from kvdistill.corpus.samples import Sample
from kvdistill.distill.data.collate import Batch, Collate, Item
from kvdistill.distill.data.order import Buckets, Order, mixture_of
from kvdistill.distill.data.source import LoadedShard, Source
from kvdistill.distill.data.student_tokens import token_counts
from kvdistill.errors import StoreMismatch
from kvdistill.store.prefetch import prefetch_items

PLACE: Final = ("epoch", "position")
"""What of a stream's state changes while it is read."""


@dataclass(frozen=True)
class Rank:
    """This process among those that train together."""

    rank: int = 0
    world_size: int = 1


@dataclass(frozen=True)
class _Resumed:
    """What a restored stream says of the epoch that it goes on with."""

    epoch: int
    batches_done: int
    batches_left: int


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
        rank: Rank | None = None,
    ) -> None:
        self.source, self.collate, self.order = source, collate, order
        self.read_threads, self.batches_ahead = read_threads, batches_ahead
        self.rank = rank or Rank()
        self.epoch = 0
        self.position = 0
        self._units_per_batch = batch_size if order.buckets is None else 1
        self._num_units: dict[int, int] = {}
        self._resumed = _Resumed(0, 0, 0)
        self._skip = 0

    @property
    def global_batch(self) -> int:
        """Units of the order that all ranks take together per batch."""
        return self._units_per_batch * self.rank.world_size

    def __len__(self) -> int:
        """Batches of the present epoch; the last may be smaller."""
        return self.num_batches(self.epoch)

    def num_batches(self, epoch: int) -> int:
        """Batches of an epoch; of the one that was resumed, those that count as done and left."""
        resumed = self._resumed
        if resumed.batches_done and epoch == resumed.epoch:
            return resumed.batches_done + resumed.batches_left
        return ceil(self._units(epoch) / self.global_batch)

    @property
    def batches_done(self) -> int:
        """Batches of the present epoch that counted as done when the stream was restored."""
        return self._resumed.batches_done if self.epoch == self._resumed.epoch else 0

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is: the epoch, and the units that all ranks have taken of it.

        Of batches that were handed out; those that are ready ahead of need do not count.
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

        The next iteration first yields ``batches_done`` empty batches, because the trainer that
        resumes discards as many; they cost nothing. On another number of ranks that number is
        made up: whole steps of ``batches_per_step``, so that accumulation starts afresh.

        Raises:
            StoreMismatch: the state belongs to another corpus, seed or way of batching.
        """
        here = {name: value for name, value in self.state_dict().items() if name not in PLACE}
        there = {name: state.get(name) for name in here}
        if here != there:
            raise StoreMismatch(
                f"the checkpoint was written with {there}, this run has {here}; resume with the "
                "same seed, store, window, batching and task weights, or start anew"
            )
        self.epoch, self.position = state["epoch"], state["position"]
        left = ceil((self._units(self.epoch) - self.position) / self.global_batch)
        done = ceil(self._units(self.epoch) / self.global_batch) - left
        if self.position:
            done = batches_per_step * max(1, ceil(done / batches_per_step))
        self._resumed = _Resumed(self.epoch, done, left)
        self._skip = done

    def __iter__(self) -> Iterator[Batch]:
        """This rank's batches from the current position to the epoch's end."""
        for _ in range(self._skip):
            yield {}
        self._skip = 0
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
                if len(pending) == self.global_batch:
                    yield self._batch(pending), len(pending)
                    pending = []
        if pending:
            yield self._batch(pending), len(pending)

    def _batch(self, units: Sequence[list[Item]]) -> Batch:
        """Every ``world_size``-th unit of a global batch."""
        mine = [item for unit in units[self.rank.rank :: self.rank.world_size] for item in unit]
        batch = self.collate(mine or units[0][:1])
        batch["sample_ids"] = [item.sample.sample_id for item in mine]  # for errors to name
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
                shards.clear()  # before the next ones come, or three windows would be in memory
                shards.update(zip(window.shards, loaded, strict=False))
                for unit in window.units:
                    yield [shards[int(shard)].item(int(sample)) for shard, sample in unit]


def steps_in(stream: KVStream, epoch: int, batches_per_step: int) -> int:
    """Optimizer steps of one epoch; the last may have fewer batches."""
    return max(1, ceil(stream.num_batches(epoch) / batches_per_step))


def steps_left(stream: KVStream, epochs: float, batches_per_step: int) -> int:
    """Optimizer steps from the stream's place to the end of ``epochs`` epochs since the first."""
    whole = int(epochs)
    steps = -(stream.batches_done // batches_per_step)
    for epoch in range(stream.epoch, whole):
        steps += steps_in(stream, epoch, batches_per_step)
    if stream.epoch <= whole < epochs:
        steps += ceil((epochs - whole) * steps_in(stream, whole, batches_per_step))
    return max(0, steps)


def epochs_for(stream: KVStream, steps: int, batches_per_step: int) -> int:
    """Epochs since the first that ``steps`` more steps need, the last one begun included."""
    if steps <= 0:
        return 0
    epoch, steps = stream.epoch, steps + stream.batches_done // batches_per_step
    while steps > 0:
        steps -= steps_in(stream, epoch, batches_per_step)
        epoch += 1
    return epoch


def open_stream(
    source: Source,
    collate: Collate,
    samples: Sequence[Sample],
    training: TrainingConfig,
    *,
    seed: int,
    rank: Rank,
) -> KVStream:
    """The stream of one rank, at its beginning.

    Args:
        source: the shards.
        collate: makes batches; its tokenizer measures lengths.
        samples: the corpus that the shards were cut from, in its order.
        training: batch size, batching, weights and windows.
        seed: of the order.
        rank: this process among those that train together.

    Raises:
        ConfigError: weights of tasks that the corpus does not have.
    """
    order = Order(
        seed,
        tuple(source.sizes),
        training.window_shards,
        mixture_of(samples, training.task_weights),
        _buckets(collate, samples, training),
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


def _buckets(
    collate: Collate, samples: Sequence[Sample], training: TrainingConfig
) -> Buckets | None:
    if training.batching == "plain":
        return None
    lengths = token_counts(collate.tokenizer, samples, training.max_length)
    budget = training.tokens_per_batch or training.batch_size * training.max_length
    return Buckets(lengths, budget)


# MERGED-DOC distill.data.schedule
# How many optimizer steps lie ahead: epochs need not have equally many batches.
#
# Length buckets cut every epoch anew, and a run that goes on with other ranks has done its first
# steps with batches of another size. So steps are counted epoch by epoch, from where the stream is.


# MERGED-DOC distill.data.reading
# A run's stream, from its settings: in which order, in what batches, how often each text.
