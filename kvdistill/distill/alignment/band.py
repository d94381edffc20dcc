"""A banded matrix from teacher positions to student positions, and its product with a KV.

Row ``i`` of sample ``b`` weighs the ``W`` teacher positions from ``start[b, i]`` on. Character
alignment, resampling in time and the identity are all such bands, so one product serves them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvdistill.errors import GeometryError


@dataclass(frozen=True)
class Band:
    """``start [B, T_s]`` long, ``weight [B, T_s, W]`` float32, ``covered [B, T_s]`` bool.

    Weights of a covered row sum to one; a row that is not covered is all zero.
    """

    start: Tensor
    weight: Tensor
    covered: Tensor

    def to(self, device: torch.device | str) -> Band:
        """The same band on another device."""
        return Band(self.start.to(device), self.weight.to(device), self.covered.to(device))


def apply_band(band: Band, x_BLHTD: Tensor) -> Tensor:
    """Weighted teacher positions for every student position.

    Args:
        band: alignment of the batch.
        x_BLHTD: teacher keys or values ``[B, L, H, T_t, D]``, floating.

    Returns:
        ``[B, L, H, T_s, D]`` in ``x``'s dtype; zeros where a row is not covered. Positions that
        no covered row weighs may hold anything, NaN included, without being read into it.

    Raises:
        GeometryError: the batch sizes differ.
    """
    if x_BLHTD.dim() != 5 or x_BLHTD.shape[0] != band.start.shape[0]:
        raise GeometryError(
            f"alignment: expected a KV [B, L, H, T, D] with B = {band.start.shape[0]}, "
            f"got {tuple(x_BLHTD.shape)}"
        )
    b, num_layers, num_heads, num_columns, dim = x_BLHTD.shape
    num_rows = band.start.shape[1]
    shape = (b, num_layers, num_heads, num_rows, dim)
    out = x_BLHTD.new_zeros(shape)
    if num_columns == 0:
        return out
    for offset in range(band.weight.shape[-1]):
        index = (band.start + offset).clamp_max(num_columns - 1)
        part = x_BLHTD.gather(3, index[:, None, None, :, None].expand(shape))
        weight = band.weight[..., offset].to(x_BLHTD.dtype)[:, None, None, :, None]
        out = out + torch.where(weight != 0, part * weight, 0.0)
    return out
