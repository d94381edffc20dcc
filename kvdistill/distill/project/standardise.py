"""Teacher KV in units of its own spread: zero mean, unit variance per layer, head and channel.

Raw KV is lopsided: a few channels carry most of the energy, layers differ by orders of magnitude,
and an MSE on it learns those and nothing else. Statistics come from the store, over the whole
corpus, so they are the same for every batch, rank and run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

MIN_RELATIVE_STD = 1e-2
"""A channel's std counts as at least this share of its layer's mean std: dividing a nearly dead
channel by its own spread would make its quantisation noise a target like any other."""


@dataclass(frozen=True)
class TargetStatistics:
    """Mean and variance per layer, head and channel of one teacher and kind: ``[L, H, D]``."""

    mean_LHD: Tensor
    variance_LHD: Tensor


class Standardise(nn.Module):
    """``(x − mean) / std`` with fixed statistics of layer-mapped teacher KV."""

    mean_LHD: Tensor
    scale_LHD: Tensor

    def __init__(self, statistics: TargetStatistics) -> None:
        super().__init__()
        std = statistics.variance_LHD.float().clamp_min(0).sqrt()
        floor = MIN_RELATIVE_STD * std.mean(dim=(-2, -1), keepdim=True)
        safe = torch.maximum(std, floor)
        scale = torch.where(safe > 0, 1 / safe.clamp_min(torch.finfo(torch.float32).tiny), 0.0)
        self.register_buffer("mean_LHD", statistics.mean_LHD.float())
        self.register_buffer("scale_LHD", scale)

    def forward(self, x_BLHTD: Tensor) -> Tensor:
        """``[B, L, H, T, D]`` to the same, standardised; a constant layer becomes zero."""
        return (x_BLHTD - self.mean_LHD[:, :, None]) * self.scale_LHD[:, :, None]

    def layer(self, x_BHTD: Tensor, row: int) -> Tensor:
        """One of the layers alone, ``[B, H, T, D]``."""
        return (x_BHTD - self.mean_LHD[row, :, None]) * self.scale_LHD[row, :, None]
