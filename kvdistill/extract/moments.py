"""Channel statistics of a shard, gathered sample by sample as batches come out of order.

Each sample's count, mean and sum of squared deviations are kept apart and merged at the end in
the order of the samples, so the result does not depend on how samples were batched.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvdistill.store.statistics import ChannelStatistics
from kvdistill.types import KINDS, Kind, LayerGroup


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

    def add(
        self,
        group_idx: int,
        row: int,
        kind: Kind,
        *,
        sample_idx: Sequence[int],
        x_BHTD: Tensor,
        mask_BT: Tensor,
    ) -> None:
        """Count the tokens under ``mask_BT`` of one layer (``row`` of its group)."""
        mask = mask_BT[:, None, :, None]
        count_B = mask_BT.sum(dim=1)
        divisor = count_B.clamp_min(1).double()[:, None, None]
        x = x_BHTD.float() * mask
        mean_BHD = x.sum(dim=2, dtype=torch.float64) / divisor
        centred = (x - mean_BHD.float()[:, :, None]) * mask
        # The mean was rounded to float32 before it was subtracted; this takes that out again.
        drift = (mean_BHD - mean_BHD.float()) ** 2 * divisor
        m2_BHD = (centred**2).sum(dim=2, dtype=torch.float64) - drift
        index = list(sample_idx)
        self._count[index] = count_B.cpu().numpy()
        self._mean[group_idx, kind][index, row] = mean_BHD.cpu().numpy()
        self._m2[group_idx, kind][index, row] = m2_BHD.clamp_min(0).cpu().numpy()

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
