"""In which order samples are read: a pure function of (seed, epoch).

Shards are shuffled, then samples are shuffled inside windows of consecutive shuffled shards: as
random as memory allows while every shard is read once, in order and whole. Ranks and workers do not
enter, so the global order is the same on any number of them.

The order is a sequence of *units*, which are never split and which ranks take in turn. A unit is
one sample, or with length buckets one whole batch of samples of similar length.
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

Rows = NDArray[np.int64]
"""``[n, 2]``: (shard index, sample index in the shard)."""


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

    A window's samples are sorted by length and cut where the next one would exceed the budget;
    then the batches are shuffled. Which samples meet in a batch depends on length alone (and on
    chance among equals), so a larger window pads less and mixes less. No sample is truncated or
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
class Window:
    """Samples shuffled together, as units, and the shards that hold them."""

    shards: tuple[int, ...]
    units: Sequence[Rows] | Rows
    """Where every unit is one sample, a single array ``[n, 1, 2]``: no list of small arrays."""


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
        """Samples read per epoch, repetitions included; the same in all epochs."""
        return sum(self.shard_sizes) if self.mixture is None else self.mixture.num_samples

    def num_units(self, epoch: int) -> int:
        """Units of an epoch; with buckets they may differ from one epoch to the next."""
        if self.buckets is None:
            return self.num_samples
        return sum(len(window.units) for window in self.windows(epoch))

    def windows(self, epoch: int, start: int = 0) -> Iterator[Window]:
        """The epoch's windows from its unit ``start`` on; earlier units are left out."""
        counts = None if self.mixture is None else self.mixture.repeats(self.seed, epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.shard_sizes))
        shards = [int(s) for s in order]
        if counts is not None:
            ptr = self._sample_ptr
            shards = [s for s in shards if counts[ptr[s] : ptr[s + 1]].any()]
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
