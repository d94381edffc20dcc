"""Channel statistics of a shard, gathered sample by sample as batches come out of order.

Each sample's count, mean and sum of squared deviations are kept apart and merged at the end in
the order of the samples, so the result does not depend on how samples were batched.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvdistill.store.statistics import ChannelStatistics
from kvdistill.types import KINDS, Kind, LayerGroup

Moments = tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]
"""Per sample: count ``[B]``, mean and M2 ``[B, H, D]``."""


def moments(x_BHTD: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and M2 over the tokens under the mask: float64 ``[B, H, D]`` each.

    Sums run in float64 over float32 differences, on the device.
    """
    mask = mask_BT[:, None, :, None]
    divisor = mask_BT.sum(dim=1).clamp_min(1).double()[:, None, None]
    x = x_BHTD.float().where(mask, 0.0)
    mean_BHD = x.sum(dim=2, dtype=torch.float64) / divisor
    rounded = mean_BHD.float()
    m2_BHD = (x - rounded[:, :, None]).where(mask, 0.0).square().sum(dim=2, dtype=torch.float64)
    # The mean was rounded to float32 before it was subtracted; this takes that out again.
    drift = (mean_BHD - rounded).square() * divisor
    return mean_BHD, (m2_BHD - drift).clamp_min(0)


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
