"""In which order samples are read: a pure function of (seed, epoch).

Shards are shuffled, then samples are shuffled inside windows of consecutive shuffled shards: as
random as memory allows while every shard is read once, in order and whole. Nothing here knows of
ranks or workers, so the global order is the same on any number of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Window:
    """Samples shuffled together: ``rows [n, 2]`` of (shard index, sample index in the shard)."""

    shards: tuple[int, ...]
    rows: NDArray[np.int64]
    first_position: int
    """Position of the first row in the epoch's global order."""


def windows(
    seed: int, epoch: int, shard_sizes: Sequence[int], window_shards: int, start: int = 0
) -> Iterator[Window]:
    """The epoch's windows, from the one that holds global position ``start``.

    Args:
        seed: the run's seed.
        epoch: epoch number, from 0.
        shard_sizes: number of samples of every shard of the plan.
        window_shards: shards per window.
        start: positions already read; windows that lie wholly before it are not produced.
    """
    order = np.random.default_rng([seed, epoch]).permutation(len(shard_sizes))
    position = 0
    for number, first in enumerate(range(0, len(order), window_shards)):
        shards = tuple(int(shard) for shard in order[first : first + window_shards])
        size = sum(shard_sizes[shard] for shard in shards)
        if position + size > start:
            rows = np.array([(s, i) for s in shards for i in range(shard_sizes[s])], np.int64)
            np.random.default_rng([seed, epoch, number]).shuffle(rows)
            yield Window(shards, rows, position)
        position += size
