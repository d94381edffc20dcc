"""Teacher space to student space in two linear steps: head dim, then heads.

    [B, L, H_t, T, D_t] → [B, L, H_t, T, D_s] → [B, L, H_s, T, D_s]

Two small matrices per layer instead of one of ``H_t·D_t × H_s·D_s``: it cannot mix channels of
different heads, but every pair of shapes fits, and its first weights mean something
(grouped means of heads, a truncated identity of dims).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kvdistill.distill.projection.initial import grouped_mean, identity, orthogonal
from kvdistill.distill.projection.shapes import HeadShape, check_kv
from kvdistill.types import ProjectionInit


class LinearProjection(nn.Module):
    """Per-layer head-dim and head matrices; one module per teacher and kind."""

    def __init__(
        self,
        num_layers: int,
        source: HeadShape,
        target: HeadShape,
        init: ProjectionInit = "grouped_mean",
    ) -> None:
        super().__init__()
        self.num_layers, self.source, self.target = num_layers, source, target
        heads = grouped_mean(source.num_heads, target.num_heads)
        dims = [
            orthogonal(source.head_dim, target.head_dim)
            if init == "orthogonal"
            else identity(source.head_dim, target.head_dim)
            for _ in range(num_layers)
        ]
        self.dim_LDE = nn.Parameter(torch.stack(dims))
        self.head_LHG = nn.Parameter(heads.repeat(num_layers, 1, 1))
        self.bias_LGE = nn.Parameter(torch.zeros(num_layers, *target))

    def forward(self, x_BLHTD: Tensor) -> Tensor:
        """``[B, L, H_t, T, D_t]`` to ``[B, L, H_s, T, D_s]``.

        Raises:
            GeometryError: layers, heads or dim are not the declared ones.
        """
        check_kv(x_BLHTD, self.num_layers, self.source, "projection")
        b, num_layers, num_heads, t, dim = x_BLHTD.shape
        # Both products read the heads where they lie; an einsum would first reorder all of x.
        rows = x_BLHTD.reshape(b, num_layers, num_heads * t, dim) @ self.dim_LDE
        columns = rows.view(b, num_layers, num_heads, t * self.target.head_dim)
        mixed = (self.head_LHG.mT @ columns).view(b, num_layers, -1, t, self.target.head_dim)
        return mixed + self.bias_LGE[:, :, None]
