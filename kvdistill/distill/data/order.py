"""Some texts more often than others: how many times an epoch reads each sample.

A group of ``n`` samples with weight ``w`` is read ``round(w · n)`` times per epoch: every sample
``floor(w)`` times, and the rest by turns, going round and round a fixed shuffle of the group. So
an epoch has the same size whatever its number, and over any number of epochs two samples of a
group are never read more than one time apart: weight 0.25 reads each sample in one epoch of four.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import floor

import numpy as np
from numpy.typing import NDArray

from kvdistill.corpus.samples import Sample
from kvdistill.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Mixture:
    """``group [N]``: which of the ``weights`` a sample of the corpus has."""

    group: NDArray[np.int64]
    weights: tuple[float, ...]

    @property
    def num_samples(self) -> int:
        """Samples read per epoch."""
        sizes = np.bincount(self.group, minlength=len(self.weights)).tolist()
        return sum(round(w * n) for w, n in zip(self.weights, sizes, strict=True))


def mixture_of(samples: Sequence[Sample], weights: Mapping[str, float]) -> Mixture | None:
    """The mixture of a corpus by task tags; samples of other tasks have weight one.

    Raises:
        ConfigError: a task that no sample has, or nothing is left to read.
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


def repeats(mixture: Mixture, seed: int, epoch: int) -> NDArray[np.int64]:
    """How often each sample is read in an epoch: ``[N]``."""
    counts = np.zeros(len(mixture.group), np.int64)
    for number, weight in enumerate(mixture.weights):
        members = np.flatnonzero(mixture.group == number)
        counts[members] = floor(weight)
        extra = round(weight * len(members)) - floor(weight) * len(members)
        turns = np.random.default_rng([seed, number]).permutation(members)
        chosen = (epoch * extra + np.arange(extra)) % max(1, len(members))
        counts[turns[chosen]] += 1
    return counts


@dataclass(frozen=True, eq=False)
class Buckets:
    """``length [N]``: the student's tokens of every sample of the corpus, in its order."""

    length: NDArray[np.int64]
    tokens_per_batch: int
    """Most tokens of one batch of one device, padding included."""


def bucketed(
    rows: NDArray[np.int64],
    lengths: NDArray[np.int64],
    tokens_per_batch: int,
    rng: np.random.Generator,
) -> Sequence[NDArray[np.int64]]:
    """Cut rows ``[n, 2]`` of ``lengths [n]`` into batches, in random order.

    Within a batch, samples times the longest one is at most the budget; a sample that is longer
    than the budget is a batch of its own.
    """
    descending = np.argsort(-lengths, kind="stable")
    rows, lengths = rows[descending], lengths[descending]
    batches, start = [], 0
    while start < len(rows):
        count = max(1, tokens_per_batch // max(1, int(lengths[start])))
        batches.append(rows[start : start + count])
        start += count
    return [batches[i] for i in rng.permutation(len(batches))]


Rows = NDArray[np.int64]
"""``[n, 2]``: (shard index, sample index in the shard)."""


@dataclass(frozen=True, eq=False)
class Window:
    """Samples shuffled together, as units, and the shards that hold them."""

    shards: tuple[int, ...]
    units: Sequence[Rows] | Rows
    """Where every unit is one sample, one array ``[n, 1, 2]``: rows without a list of them."""


@dataclass(frozen=True, eq=False)
class Order:
    """What is read when, for every epoch.

    ``shard_sizes`` are numbers of samples, ``window_shards`` shards per window. Without a
    ``mixture`` every sample is read once per epoch; without ``buckets`` a unit is one sample.
    """

    seed: int
    shard_sizes: tuple[int, ...]
    window_shards: int
    mixture: Mixture | None = None
    buckets: Buckets | None = None

    @property
    def num_samples(self) -> int:
        """Samples read per epoch, repeated ones as often as they are; the same in all epochs."""
        return sum(self.shard_sizes) if self.mixture is None else self.mixture.num_samples

    def num_units(self, epoch: int) -> int:
        """Units of an epoch; with buckets they may differ from one epoch to the next."""
        if self.buckets is None:
            return self.num_samples
        return sum(len(window.units) for window in self.windows(epoch))

    def windows(self, epoch: int, start: int = 0) -> Iterator[Window]:
        """The epoch's windows from its unit ``start`` on; earlier units are left out."""
        counts = None if self.mixture is None else repeats(self.mixture, self.seed, epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.shard_sizes))
        shards = [int(s) for s in order if counts is None or counts[self._samples(int(s))].any()]
        position = 0
        for number, first in enumerate(range(0, len(shards), self.window_shards)):
            chosen = tuple(shards[first : first + self.window_shards])
            rng = np.random.default_rng([self.seed, epoch, number])
            units = self._units(chosen, counts, rng)
            if position + len(units) > start:
                yield Window(chosen, units[max(0, start - position) :])
            position += len(units)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that the order depends on: equal ones give equal orders."""
        digest = hashlib.sha256(repr((self.seed, self.shard_sizes, self.window_shards)).encode())
        if self.mixture is not None:
            digest.update(b"mixture" + repr(self.mixture.weights).encode())
            digest.update(self.mixture.group.tobytes())
        if self.buckets is not None:
            digest.update(b"buckets" + repr(self.buckets.tokens_per_batch).encode())
            digest.update(self.buckets.length.tobytes())
        return digest.hexdigest()

    def _units(
        self, shards: Sequence[int], counts: NDArray[np.int64] | None, rng: np.random.Generator
    ) -> Sequence[Rows] | Rows:
        shard = np.repeat(shards, [self.shard_sizes[s] for s in shards])
        sample = np.concatenate([np.arange(self.shard_sizes[s]) for s in shards])
        rows = np.stack([shard, sample], axis=1).astype(np.int64)
        if counts is not None:
            rows = np.repeat(rows, counts[self._flat(rows)], axis=0)
        rows = rows[rng.permutation(len(rows))]
        if self.buckets is None:
            return rows[:, None]
        lengths = self.buckets.length[self._flat(rows)]
        return bucketed(rows, lengths, self.buckets.tokens_per_batch, rng)

    def _flat(self, rows: Rows) -> NDArray[np.int64]:
        """Positions in the whole corpus."""
        return self._ptr[rows[:, 0]] + rows[:, 1]

    def _samples(self, shard: int) -> slice:
        return slice(int(self._ptr[shard]), int(self._ptr[shard + 1]))

    @cached_property
    def _ptr(self) -> NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum(self.shard_sizes)]).astype(np.int64)


# MERGED-DOC distill.data.buckets
# Batches of samples of like length, under a token budget: less padding, even memory.
#
# A window's samples are sorted by length and cut where the next one would break the budget; then
# the batches are shuffled. Which samples meet in a batch is decided by length alone (and by chance
# among equals), so a larger window pads less and mixes less. No sample is cut or left out.
#
# Packing several samples into one row would pad nothing at all, but needs attention masks by block
# in every student and teacher alignment by row; after sorting there is too little left to gain.


# MERGED-DOC distill.data.order
# In which order samples are read: a pure function of (seed, epoch).
#
# Shards are shuffled, then samples are shuffled inside windows of consecutive shuffled shards: as
# random as memory allows while every shard is read once, in order and whole. Nothing here knows of
# ranks or workers, so the global order is the same on any number of them.
#
# The order is a sequence of *units*: what is never torn apart, and what ranks take turns at. A unit
# is one sample, or with length buckets one whole batch of samples of like length.
