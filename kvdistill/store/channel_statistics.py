"""Channel statistics: count, mean and variance of every (layer, head, channel) of a teacher.

Each shard carries those of its own tokens, in float64 and of the values before quantisation. They
are merged without a second pass over the data (Chan, Golub and LeVeque, Updating Formulae and a
Pairwise Algorithm for Computing Sample Variances, 1979).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kvdistill.errors import GeometryError

if TYPE_CHECKING:
    from typing import TypeVar

    import torch

    Array = TypeVar("Array", NDArray[np.float64], torch.Tensor)


def merge_moments(*parts: tuple[int, Array, Array]) -> tuple[int, Array, Array]:
    """Moments of all parts together, pairwise from the first to the last; numpy or torch, float64.

    For two sets with counts ``n``, means ``m`` and sums of squared deviations ``M2``,

        m = m_a + (m_b − m_a) · n_b / n        M2 = M2_a + M2_b + (m_b − m_a)² · n_a · n_b / n

    Args:
        parts: at least one ``(count, mean [..., C], m2)``. ``m2`` is ``[..., C]``, or
            ``[..., I, C]`` with products of the first ``I`` channels' deviations with all.

    Raises:
        GeometryError: the shapes differ.
    """
    count, mean, m2 = parts[0]
    for other_count, other_mean, other_m2 in parts[1:]:
        if mean.shape != other_mean.shape or m2.shape != other_m2.shape:
            raise GeometryError(
                f"cannot merge moments of shapes {tuple(mean.shape)}, {tuple(m2.shape)} with those "
                f"of shapes {tuple(other_mean.shape)}, {tuple(other_m2.shape)}"
            )
        total = count + other_count
        if total == 0:
            continue
        delta = other_mean - mean
        if m2.ndim == mean.ndim:
            products = delta**2
        else:
            products = delta[..., : m2.shape[-2], None] * delta[..., None, :]
        mean = mean + delta * (other_count / total)
        m2 = m2 + other_m2 + products * (count * other_count / total)
        count = total
    return count, mean, m2


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

    def merge(self, *others: ChannelStatistics) -> ChannelStatistics:
        """Statistics of all sets together, see ``merge_moments``.

        Raises:
            GeometryError: the shapes differ.
        """
        parts = [(part.count, part.mean, part.m2) for part in (self, *others)]
        return ChannelStatistics(*merge_moments(*parts))

    def to_array(self) -> NDArray[np.float64]:
        """The stored form: float64 ``[3, L, H, D]`` of count, mean and M2."""
        return np.stack([np.full_like(self.mean, self.count), self.mean, self.m2])

    @staticmethod
    def from_array(array: NDArray[np.float64]) -> ChannelStatistics:
        """The inverse of ``to_array``."""
        count = int(array[0].flat[0]) if array[0].size else 0
        return ChannelStatistics(count, array[1], array[2])


def merged_statistics(
    shard_ids: Sequence[str], read: Callable[[str], Mapping[str, ChannelStatistics]]
) -> dict[str, ChannelStatistics]:
    """Statistics of several shards together; ``read`` returns one shard's by array name."""
    merged: dict[str, ChannelStatistics] = {}
    for shard_id in shard_ids:
        for name, part in read(shard_id).items():
            merged[name] = merged[name].merge(part) if name in merged else part
    return merged
