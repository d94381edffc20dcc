"""Second moments of aligned teacher and student KV over a pilot of the store.

Everything that a closed-form projection needs (whitened PCA of the teacher, ridge regression to
the student) follows from counts, means and centred products, so a pilot is read once and never
held in memory. Batches are merged by Chan's formula in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvdistill.errors import ConfigError


class PilotMoments:
    """Joint moments per layer of source ``x`` (width I) and target ``y`` (width O).

    ``mean_x [L, I]``, ``mean_y [L, O]``, ``xx [L, I, I]`` and ``xy [L, I, O]`` (centred sums).
    """

    def __init__(self, num_layers: int, width_x: int, width_y: int) -> None:
        self.count = 0
        self.mean_x = torch.zeros(num_layers, width_x, dtype=torch.float64)
        self.mean_y = torch.zeros(num_layers, width_y, dtype=torch.float64)
        self.xx = torch.zeros(num_layers, width_x, width_x, dtype=torch.float64)
        self.xy = torch.zeros(num_layers, width_x, width_y, dtype=torch.float64)

    def add(self, x_BLHTD: Tensor, y_BLHTD: Tensor, mask_BT: Tensor) -> None:
        """Count the tokens of a batch where ``mask_BT`` is True; the two KVs must be aligned."""
        x, y = _tokens(x_BLHTD, mask_BT), _tokens(y_BLHTD, mask_BT)
        new = x.shape[1]
        if new == 0:
            return
        mean_x, mean_y = x.mean(1), y.mean(1)
        x, y = x - mean_x.unsqueeze(1), y - mean_y.unsqueeze(1)
        total = self.count + new
        step_x, step_y = mean_x - self.mean_x, mean_y - self.mean_y
        between = self.count * new / total
        self.xx += x.mT @ x + between * step_x.unsqueeze(2) * step_x.unsqueeze(1)
        self.xy += x.mT @ y + between * step_x.unsqueeze(2) * step_y.unsqueeze(1)
        self.mean_x += step_x * (new / total)
        self.mean_y += step_y * (new / total)
        self.count = total

    def covariance(self) -> Tensor:
        """Covariance of the source, ``[L, I, I]`` float64.

        Raises:
            ConfigError: no token has been counted.
        """
        self.check()
        return self.xx / self.count

    def check(self) -> None:
        """Refuse an empty pilot."""
        if self.count == 0:
            raise ConfigError("projection.init: the pilot has no aligned token; enlarge the pilot")


def _tokens(x_BLHTD: Tensor, mask_BT: Tensor) -> Tensor:
    """``[L, N, H·D]`` float64 on the CPU."""
    flat = x_BLHTD.detach().permute(0, 3, 1, 2, 4).flatten(3)[mask_BT]
    return flat.transpose(0, 1).double().cpu()
