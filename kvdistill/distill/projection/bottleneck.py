"""Teacher space to student space through a narrower, non-linear middle.

    inner = round( mlp_ratio · √(H_t·D_t · H_s·D_s) )

"Elastic": the middle follows from the widths of both models, so one ratio serves every pair of
a teacher and a student.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvdistill.distill.projection.initial import orthogonal
from kvdistill.distill.projection.layerwise import layerwise
from kvdistill.distill.projection.shapes import HeadShape, check_kv
from kvdistill.errors import ConfigError


class BottleneckProjection(nn.Module):
    """Linear, GELU, linear per layer; both linear maps start orthogonal."""

    def __init__(
        self, num_layers: int, source: HeadShape, target: HeadShape, mlp_ratio: float = 0.5
    ) -> None:
        super().__init__()
        if mlp_ratio <= 0:
            raise ConfigError(f"projection.mlp_ratio: expected > 0, got {mlp_ratio}")
        self.num_layers, self.source, self.target = num_layers, source, target
        width = max(1, round(mlp_ratio * math.sqrt(source.width * target.width)))
        self.inner = HeadShape(1, width)
        layers = range(num_layers)
        self.down_LIO = nn.Parameter(torch.stack([orthogonal(source.width, width) for _ in layers]))
        self.up_LIO = nn.Parameter(torch.stack([orthogonal(width, target.width) for _ in layers]))
        self.down_bias_LO = nn.Parameter(torch.zeros(num_layers, width))
        self.up_bias_LO = nn.Parameter(torch.zeros(num_layers, target.width))

    def forward(self, x_BLHTD: Tensor) -> Tensor:
        """``[B, L, H_t, T, D_t]`` to ``[B, L, H_s, T, D_s]``.

        Raises:
            GeometryError: layers, heads or dim are not the declared ones.
        """
        check_kv(x_BLHTD, self.num_layers, self.source, "bottleneck projection")
        inner = F.gelu(layerwise(x_BLHTD, self.down_LIO, self.down_bias_LO, self.inner))
        return layerwise(inner, self.up_LIO, self.up_bias_LO, self.target)
