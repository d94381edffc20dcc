"""One linear map per layer between whole layers of two models, heads and channels mixed freely."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kvdistill.distill.projection.initial import grouped_mean, identity, orthogonal
from kvdistill.distill.projection.shapes import HeadShape, check_kv


def layerwise(x_BLHTD: Tensor, weight_LIO: Tensor, bias_LO: Tensor, target: HeadShape) -> Tensor:
    """``[B, L, H, T, D]`` to ``[B, L, H', T, D']`` by ``weight [L, H·D, H'·D']`` and a bias."""
    b, num_layers, num_heads, t, dim = x_BLHTD.shape
    flat = x_BLHTD.permute(1, 0, 3, 2, 4).reshape(num_layers, b * t, num_heads * dim)
    out = torch.baddbmm(bias_LO.unsqueeze(1), flat, weight_LIO)
    return out.view(num_layers, b, t, *target).permute(1, 0, 3, 2, 4)


def uniform_weights(num_layers: int, source: HeadShape, target: HeadShape) -> nn.Parameter:
    """``[L, I, O]`` from U(−1/√I, 1/√I), as ``nn.Linear`` draws its own."""
    bound = 1 / math.sqrt(source.width)
    return nn.Parameter(torch.empty(num_layers, source.width, target.width).uniform_(-bound, bound))


class FullProjection(nn.Module):
    """Teacher space to student space by one joint map of ``H_t·D_t → H_s·D_s`` per layer.

    The richest linear map, and the largest: ``L·H_t·D_t·H_s·D_s`` numbers per teacher and kind.
    Starts as the same map as ``LinearProjection`` does.
    """

    def __init__(
        self, num_layers: int, source: HeadShape, target: HeadShape, init: str = "grouped_mean"
    ) -> None:
        super().__init__()
        self.num_layers, self.source, self.target = num_layers, source, target
        if init == "orthogonal":
            maps = [orthogonal(source.width, target.width) for _ in range(num_layers)]
        else:
            heads = grouped_mean(source.num_heads, target.num_heads)
            maps = [torch.kron(heads, identity(source.head_dim, target.head_dim))] * num_layers
        self.weight_LIO = nn.Parameter(torch.stack(maps))
        self.bias_LO = nn.Parameter(torch.zeros(num_layers, target.width))

    def forward(self, x_BLHTD: Tensor) -> Tensor:
        """``[B, L, H_t, T, D_t]`` to ``[B, L, H_s, T, D_s]``.

        Raises:
            GeometryError: layers, heads or dim are not the declared ones.
        """
        check_kv(x_BLHTD, self.num_layers, self.source, "full projection")
        return layerwise(x_BLHTD, self.weight_LIO, self.bias_LO, self.target)
