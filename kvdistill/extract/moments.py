"""Channel statistics of a shard, gathered sample by sample as batches come out of order.

Each sample's count, mean and sum of squared deviations are kept apart and merged at the end in
the order of the samples, so the result does not depend on how samples were batched.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kvdistill.store.statistics import ChannelStatistics
from kvdistill.types import KINDS, Kind, LayerGroup

Moments = tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]
"""Per sample: count ``[B]``, mean and M2 ``[B, H, D]``."""


def moments(x_BHTD: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and M2 over the tokens under the mask: ``[B, H, D]`` each, on the device.

    Two passes in float32 within a sample, as products with the mask, which is what a processor
    does best; samples are then merged in float64. A NaN or infinity anywhere in a sample, masked
    or not, makes its mean NaN.
    """
    num_samples, num_heads, num_tokens, head_dim = x_BHTD.shape
    flat = x_BHTD.transpose(1, 2).reshape(num_samples, num_tokens, num_heads * head_dim).float()
    weight_B1T = mask_BT[:, None].float()
    mean = weight_B1T @ flat / weight_B1T.sum(dim=2, keepdim=True).clamp_min(1)
    m2 = weight_B1T @ (flat - mean).square_()
    shape = (num_samples, num_heads, head_dim)
    return mean.reshape(shape), m2.reshape(shape)


class SampleMoments:
    """Per group, kind and sample: count, mean and M2 of every (layer, head, channel)."""

    def __init__(self, groups: Sequence[LayerGroup], num_samples: int) -> None:
        self._count = np.zeros(num_samples, np.int64)
        shapes = {
            (group_idx, kind): (
                num_samples,
                len(group.layers),
                group.num_key_value_heads,
                group.head_dim(kind),
            )
            for group_idx, group in enumerate(groups)
            for kind in KINDS
        }
        self._mean = {key: np.zeros(shape) for key, shape in shapes.items()}
        self._m2 = {key: np.zeros(shape) for key, shape in shapes.items()}

    def put(
        self, group_idx: int, row: int, kind: Kind, sample_idx: list[int], found: Moments
    ) -> None:
        """Keep the moments of a batch's samples, of one layer (``row`` of its group)."""
        count, mean, m2 = found
        self._count[sample_idx] = count
        self._mean[group_idx, kind][sample_idx, row] = mean
        self._m2[group_idx, kind][sample_idx, row] = m2

    def merged(self, group_idx: int, kind: Kind) -> ChannelStatistics:
        """All samples together: Chan's formula for any number of parts at once."""
        mean, m2 = self._mean[group_idx, kind], self._m2[group_idx, kind]
        total = int(self._count.sum())
        if total == 0:
            return ChannelStatistics(0, np.zeros(mean.shape[1:]), np.zeros(m2.shape[1:]))
        weight = self._count[:, None, None, None]
        grand = (mean * weight).sum(axis=0) / total
        spread = m2.sum(axis=0) + ((mean - grand) ** 2 * weight).sum(axis=0)
        return ChannelStatistics(total, grand, spread)
