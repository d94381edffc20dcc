"""Mean and variance of every channel, kept with each shard and merged without a second pass.

Updating Formulae and a Pairwise Algorithm for Computing Sample Variances (Chan, Golub, LeVeque,
1979): for two sets with counts ``n``, means ``m`` and sums of squared deviations ``M2``,

    m = m_a + (m_b − m_a) · n_b / n        M2 = M2_a + M2_b + (m_b − m_a)² · n_a · n_b / n

Everything is float64, and shards are merged in the order of the plan, so the result does not
depend on which shard was finished first.
"""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvdistill.errors import GeometryError
from kvdistill.store.format import COMMIT


@dataclass(frozen=True, eq=False)
class ChannelStatistics:
    """Count of tokens, and per (layer, head, channel) their mean and ``M2``.

    ``mean`` and ``m2`` are float64 ``[L, H, D]``, of the values *before* quantisation.
    """

    count: int
    mean: NDArray[np.float64]
    m2: NDArray[np.float64]

    @property
    def variance(self) -> NDArray[np.float64]:
        """Population variance ``[L, H, D]``; zero where nothing was counted."""
        return np.asarray(self.m2 / max(self.count, 1))

    @property
    def std(self) -> NDArray[np.float64]:
        """Population standard deviation ``[L, H, D]``."""
        return np.sqrt(self.variance)

    def merge(self, other: ChannelStatistics) -> ChannelStatistics:
        """Statistics of both sets together (Chan's formula).

        Raises:
            GeometryError: the shapes differ.
        """
        if self.mean.shape != other.mean.shape:
            raise GeometryError(
                f"cannot merge statistics of shapes {self.mean.shape} and {other.mean.shape}"
            )
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        m2 = self.m2 + other.m2 + delta**2 * (self.count * other.count / count)
        return ChannelStatistics(count, mean, m2)

    def to_array(self) -> NDArray[np.float64]:
        """The stored form: float64 ``[3, L, H, D]`` of count, mean and M2."""
        return np.stack([np.full_like(self.mean, self.count), self.mean, self.m2])

    @staticmethod
    def from_array(array: NDArray[np.float64]) -> ChannelStatistics:
        """Read what ``to_array`` wrote."""
        count = int(array[0].flat[0]) if array[0].size else 0
        return ChannelStatistics(count, array[1], array[2])

    @staticmethod
    def empty(shape: tuple[int, int, int]) -> ChannelStatistics:
        """Nothing counted yet: ``merge`` with it changes nothing. ``shape`` is ``(L, H, D)``."""
        return ChannelStatistics(0, np.zeros(shape), np.zeros(shape))

    @staticmethod
    def from_samples(samples: Iterable[Any], shape: tuple[int, int, int]) -> ChannelStatistics:
        """Statistics over samples ``[L, H, T, D]`` (numpy or torch, any device or float dtype).

        Each sample is reduced in float64 where it lies; pass only the tokens to be counted.
        """
        total = ChannelStatistics.empty(shape)
        for sample in samples:
            total = total.merge(_of_sample(sample))
        return total


def _of_sample(sample_LHTD: Any) -> ChannelStatistics:
    if isinstance(sample_LHTD, np.ndarray):
        x = sample_LHTD.astype(np.float64)
        num_tokens = x.shape[2]
        mean = x.sum(axis=2) / max(num_tokens, 1)
        return ChannelStatistics(num_tokens, mean, ((x - mean[:, :, None]) ** 2).sum(axis=2))
    x = sample_LHTD.double()
    num_tokens = int(x.shape[2])
    mean = x.sum(dim=2) / max(num_tokens, 1)
    m2 = ((x - mean[:, :, None]) ** 2).sum(dim=2)
    return ChannelStatistics(num_tokens, mean.cpu().numpy(), m2.cpu().numpy())


def cache_file(teacher: Path, shard_ids: Sequence[str]) -> Path:
    """Where the merged statistics of exactly these commits belong."""
    digest = xxhash.xxh3_64()
    for shard_id in shard_ids:
        commit = teacher / "shards" / shard_id / COMMIT
        digest.update(f"{shard_id} {commit.stat().st_mtime_ns}\n".encode())
    return teacher / f"statistics.{digest.hexdigest()}.npz"


def load_cached_statistics(path: Path) -> dict[str, ChannelStatistics] | None:
    """Read a cached file; None if there is none, or it is damaged and must be made again."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {
                name.replace(".", "/"): ChannelStatistics.from_array(arrays[name])
                for name in arrays.files
            }
    except (FileNotFoundError, zipfile.BadZipFile, ValueError):
        return None


def save_cached_statistics(path: Path, statistics: Mapping[str, ChannelStatistics]) -> None:
    """Write the cache in one step and drop older ones. A read-only store stays without."""
    temporary = path.with_name(f".{uuid4().hex}.npz")
    arrays = {name.replace("/", "."): part.to_array() for name, part in statistics.items()}
    with contextlib.suppress(OSError):
        np.savez(temporary, allow_pickle=False, **arrays)
        for old in path.parent.glob("statistics.*.npz"):
            old.unlink(missing_ok=True)
        temporary.replace(path)
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)


# MERGED-DOC store.statistics_cache
# Merged statistics of the committed shards, kept so that they are merged once.
#
# The file's name says which shards went in (and when they were committed), so it is never stale;
# losing it costs only the time to merge again.
