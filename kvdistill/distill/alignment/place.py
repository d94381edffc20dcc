"""A teacher's KV at the student's positions and layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kvdistill.distill.alignment.band import Band, apply_band
from kvdistill.distill.alignment.layers import LayerMap


def place(x_BLHTD: Tensor, band: Band, mapping: LayerMap, read_layers: Sequence[int]) -> Tensor:
    """Apply a band and a layer map: ``[B, L_read, H, T_t, D]`` to ``[B, L_s, H, T_s, D]``.

    Both are linear and act on different axes, so their order is free: whichever leaves less to
    do for the other goes first.

    Raises:
        GeometryError: batches differ, or a needed layer was not read.
    """
    if len(read_layers) < len(mapping.lower):
        return mapping.apply(apply_band(band, x_BLHTD), read_layers)
    return apply_band(band, mapping.apply(x_BLHTD, read_layers))
