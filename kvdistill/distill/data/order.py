"""In which order samples are read: a pure function of (seed, epoch).

    shards, shuffled → cells → units, shuffled within a cell → lanes, read in turn

The order is a sequence of *units*, which are never split. A unit is one sample of a cell of one
shard, or with length buckets a batch of samples of similar length from a cell of a few shards. The
sequence of all units is cut into lanes of equal length, and unit ``t`` is the next one of lane
``t % num_lanes``: neighbours come from as many shards as there are lanes, each shard is read once,
or twice where two lanes share it, and ranks that divide lanes among them read no shard in common.
Ranks and workers do not enter, so the global order is the same on any number of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import floor
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvdistill.corpus.samples import Sample
from kvdistill.errors import ConfigError

Rows = NDArray[np.int64]
"""``[n, 2]``: (shard index, sample index in the shard)."""

ORDER_VERSION: Final = 2
"""Of the rules by which samples are ordered; a checkpoint of another version is refused."""

BUCKET_LANES: Final = 8
"""Lanes of length buckets at most: enough for eight ranks to read different shards. A larger window
makes their cells larger instead, since buckets of more shards have less padding."""


@dataclass(frozen=True, eq=False)
class Mixture:
    """Task-weighted sampling: ``group [N]`` is the index of every sample's weight in ``weights``.

    A group of ``n`` samples with weight ``w`` is read ``round(w · n)`` times per epoch: every
    sample ``floor(w)`` times, and the rest in turn, along a fixed shuffle of the group. All epochs
    have the same size, and over any number of epochs the reads of two samples of a group differ by
    at most one: weight 0.25 reads each sample in one epoch of four.
    """

    group: NDArray[np.int64]
    weights: tuple[float, ...]

    @property
    def num_samples(self) -> int:
        """Samples read per epoch."""
        sizes = np.bincount(self.group, minlength=len(self.weights)).tolist()
        return sum(round(w * n) for w, n in zip(self.weights, sizes, strict=True))

    def repeats(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """How often each sample is read in an epoch: ``[N]``."""
        counts = np.zeros(len(self.group), np.int64)
        for number, weight in enumerate(self.weights):
            members = np.flatnonzero(self.group == number)
            counts[members] = floor(weight)
            extra = round(weight * len(members)) - floor(weight) * len(members)
            turns = np.random.default_rng([seed, number]).permutation(members)
            chosen = (epoch * extra + np.arange(extra)) % max(1, len(members))
            counts[turns[chosen]] += 1
        return counts


def mixture_of(samples: Sequence[Sample], weights: Mapping[str, float]) -> Mixture | None:
    """The mixture of a corpus by task tags; samples of other tasks have weight one.

    Raises:
        ConfigError: a task that no sample has, or no sample is left to read.
    """
    if not weights:
        return None
    found = {sample.task for sample in samples if sample.task is not None}
    if unknown := sorted(weights.keys() - found):
        raise ConfigError(
            f"training.task_weights names {unknown}, but the corpus has the tasks {sorted(found)}"
        )
    names = sorted(weights)
    number: dict[str | None, int] = {name: i for i, name in enumerate(names)}
    group = [number.get(sample.task, len(names)) for sample in samples]
    mixture = Mixture(np.array(group, np.int64), (*(weights[name] for name in names), 1.0))
    if not mixture.num_samples:
        raise ConfigError(f"training.task_weights {dict(weights)} leaves no sample to read")
    return mixture


@dataclass(frozen=True, eq=False)
class Buckets:
    """Batches of samples of similar length under a token budget: less padding, even memory.

    A cell's samples are sorted by length and cut where the next one would exceed the budget; then
    the batches are shuffled. Which samples meet in a batch depends on length alone (and on chance
    among equals), so a larger cell pads less and mixes less. No sample is truncated or
    dropped. Packing several samples into one row would pad nothing, but needs block attention masks
    and alignment per row; after sorting there is too little padding left to gain.
    """

    length: NDArray[np.int64]
    """``[N]``: the student's tokens of every sample of the corpus, in its order."""
    tokens_per_batch: int
    """Token budget of one batch of one device, padding included."""

    def cut(
        self, rows: Rows, lengths: NDArray[np.int64], rng: np.random.Generator
    ) -> Sequence[Rows]:
        """Cut rows of ``lengths [n]`` into batches, in random order.

        Number of samples times the longest one is at most the budget; a sample that is longer than
        the budget is a batch of its own.
        """
        descending = np.argsort(-lengths, kind="stable")
        rows, lengths = rows[descending], lengths[descending]
        batches, start = [], 0
        while start < len(rows):
            count = max(1, self.tokens_per_batch // max(1, int(lengths[start])))
            batches.append(rows[start : start + count])
            start += count
        return [batches[i] for i in rng.permutation(len(batches))]


@dataclass(frozen=True, eq=False)
class Order:
    """What is read when, for every epoch.

    ``shard_sizes`` are numbers of samples. ``window_shards`` is half the number of shards that are
    mixed (a quarter with buckets). Without a ``mixture`` every sample is read once per epoch;
    without ``buckets`` a unit is one sample.
    """

    seed: int
    shard_sizes: tuple[int, ...]
    window_shards: int
    mixture: Mixture | None = None
    buckets: Buckets | None = None

    @property
    def num_samples(self) -> int:
        """Samples read per epoch, repetitions included; the same in all epochs."""
        return sum(self.shard_sizes) if self.mixture is None else self.mixture.num_samples

    @property
    def cell_shards(self) -> int:
        """Shards that the samples of one unit come from, at most."""
        return 1 if self.buckets is None else max(1, self.window_shards // 2)

    @property
    def num_lanes(self) -> int:
        """Cells that are read in turn."""
        mixed = 2 * self.window_shards
        return mixed if self.buckets is None else min(mixed, BUCKET_LANES)

    def num_units(self, epoch: int) -> int:
        """Units of an epoch; with buckets they may differ from one epoch to the next."""
        return self.num_samples if self.buckets is None else len(self.units(epoch))

    def units(self, epoch: int) -> Sequence[Rows] | Rows:
        """The epoch's units in order. Where each is one sample, a single array ``[n, 1, 2]``."""
        counts = None if self.mixture is None else self.mixture.repeats(self.seed, epoch)
        rng = np.random.default_rng([self.seed, epoch])
        shards = [int(s) for s in rng.permutation(len(self.shard_sizes))]
        if counts is not None:
            ptr = self._sample_ptr
            shards = [s for s in shards if counts[ptr[s] : ptr[s + 1]].any()]
        cells = []
        for number, first in enumerate(range(0, len(shards), self.cell_shards)):
            chosen = shards[first : first + self.cell_shards]
            rng = np.random.default_rng([self.seed, epoch, number])
            cells.append(self._units_of(chosen, counts, rng))
        if self.buckets is None:
            joined = np.concatenate(cells) if cells else np.zeros((0, 1, 2), np.int64)
            return joined[self._turns(len(joined))]
        batches = [batch for cell in cells for batch in cell]
        return [batches[i] for i in self._turns(len(batches))]

    def owners(self, first: int, count: int, world_size: int) -> NDArray[np.int64]:
        """The rank of each of ``count`` units from unit ``first`` on, a global batch: ``[count]``.

        All ranks get equally many, give or take one. Where their number divides ``num_lanes``, a
        lane belongs to one rank; otherwise to one or two.
        """
        lanes = (first + np.arange(count)) % self.num_lanes
        if self.num_lanes % world_size == 0:
            return lanes % world_size
        turn = np.empty(count, np.int64)
        turn[np.argsort(lanes, kind="stable")] = np.arange(count)
        return turn * world_size // count

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that the order depends on: equal ones give equal orders."""
        settings = (ORDER_VERSION, self.seed, self.shard_sizes, self.window_shards)
        digest = hashlib.sha256(repr(settings).encode())
        if self.mixture is not None:
            digest.update(b"mixture" + repr(self.mixture.weights).encode())
            digest.update(self.mixture.group.tobytes())
        if self.buckets is not None:
            digest.update(b"buckets" + repr(self.buckets.tokens_per_batch).encode())
            digest.update(self.buckets.length.tobytes())
        return digest.hexdigest()

    def _turns(self, count: int) -> NDArray[np.int64]:
        """Which of ``count`` units, cut into lanes, is the ``t``-th."""
        turn = np.arange(count)
        lane, place = turn % self.num_lanes, turn // self.num_lanes
        length, longer = divmod(count, self.num_lanes)
        return lane * length + np.minimum(lane, longer) + place

    def _units_of(
        self, shards: Sequence[int], counts: NDArray[np.int64] | None, rng: np.random.Generator
    ) -> Sequence[Rows] | Rows:
        shard = np.repeat(shards, [self.shard_sizes[s] for s in shards])
        sample = np.concatenate([np.arange(self.shard_sizes[s]) for s in shards])
        rows = np.stack([shard, sample], axis=1).astype(np.int64)
        if counts is not None:
            rows = np.repeat(rows, counts[self._corpus_index(rows)], axis=0)
        rows = rows[rng.permutation(len(rows))]
        if self.buckets is None:
            return rows[:, None]
        return self.buckets.cut(rows, self.buckets.length[self._corpus_index(rows)], rng)

    def _corpus_index(self, rows: Rows) -> NDArray[np.int64]:
        return self._sample_ptr[rows[:, 0]] + rows[:, 1]

    @cached_property
    def _sample_ptr(self) -> NDArray[np.int64]:
        """Shard ``s`` holds the corpus's samples ``ptr[s]:ptr[s + 1]``."""
        return np.concatenate([[0], np.cumsum(self.shard_sizes)]).astype(np.int64)
