"""A banded matrix from teacher positions to student positions, and its product with a KV.

Row ``i`` of sample ``b`` weighs the ``W`` teacher positions from ``start[b, i]`` on. Character
alignment, resampling in time and the identity are all such bands, so one product serves them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
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

    Every (sample, layer, head, student position) is a bag of ``W`` rows of ``x``, so this is one
    weighted ``embedding_bag``: ``x`` is read where it lies, and neither a dense ``T_s × T_t``
    matrix nor ``W`` gathered copies are made (``benchmarks/align.py``).

    Args:
        band: alignment of the batch.
        x_BLHTD: teacher keys or values ``[B, L, H, T_t, D]``, floating and finite (padding too).

    Returns:
        ``[B, L, H, T_s, D]`` in ``x``'s dtype; zeros where a row is not covered.

    Raises:
        GeometryError: the batch sizes differ.
    """
    if x_BLHTD.dim() != 5 or x_BLHTD.shape[0] != band.start.shape[0]:
        raise GeometryError(
            f"alignment: expected a KV [B, L, H, T, D] with B = {band.start.shape[0]}, "
            f"got {tuple(x_BLHTD.shape)}"
        )
    b, num_layers, num_heads, num_columns, dim = x_BLHTD.shape
    num_rows, width = band.weight.shape[1:]
    shape = (b, num_layers, num_heads, num_rows, dim)
    if 0 in x_BLHTD.shape or num_rows == 0:
        return x_BLHTD.new_zeros(shape)
    columns = (band.start.unsqueeze(-1) + torch.arange(width, device=band.start.device)).clamp_max(
        num_columns - 1
    )
    first_row = num_columns * torch.arange(b * num_layers * num_heads, device=columns.device)
    index = columns.unsqueeze(1) + first_row.view(b, -1, 1, 1)
    weight = band.weight.to(x_BLHTD.dtype).unsqueeze(1).expand(index.shape)
    out = F.embedding_bag(
        index.reshape(-1, width),
        x_BLHTD.reshape(-1, dim),
        per_sample_weights=weight.reshape(-1, width),
        mode="sum",
    )
    return out.view(shape)
