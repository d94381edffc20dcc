"""Some texts more often than others: how many times an epoch reads each sample.

A group of ``n`` samples with weight ``w`` is read ``round(w · n)`` times per epoch: every sample
``floor(w)`` times, and the rest by turns, going round and round a fixed shuffle of the group. So
an epoch has the same size whatever its number, and over any number of epochs two samples of a
group are never read more than one time apart: weight 0.25 reads each sample in one epoch of four.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor

import numpy as np
from numpy.typing import NDArray

from kvdistill.corpus import Sample
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
