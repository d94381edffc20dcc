"""Batches of samples of like length, under a token budget: less padding, even memory.

A window's samples are sorted by length and cut where the next one would break the budget; then
the batches are shuffled. Which samples meet in a batch is decided by length alone (and by chance
among equals), so a larger window pads less and mixes less. No sample is cut or left out.

Packing several samples into one row would pad nothing at all, but needs attention masks by block
in every student and teacher alignment by row; after sorting there is too little left to gain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


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
