"""In which order samples are read: a pure function of (seed, epoch).

Shards are shuffled, then samples are shuffled inside windows of consecutive shuffled shards: as
random as memory allows while every shard is read once, in order and whole. Nothing here knows of
ranks or workers, so the global order is the same on any number of them.

The order is a sequence of *units*: what is never torn apart, and what ranks take turns at. A unit
is one sample, or with length buckets one whole batch of samples of like length.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from kvdistill.distill.data.buckets import Buckets, bucketed
from kvdistill.distill.data.mixture import Mixture, repeats

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
