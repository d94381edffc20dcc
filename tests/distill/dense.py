"""The product of a band with a KV as a dense matrix product, to test the banded one against."""

from __future__ import annotations

import torch
from torch import Tensor

from kvdistill.distill.align.band import Band


def dense_matrix(band: Band, num_columns: int) -> Tensor:
    """``[B, T_s, T_t]`` float64; weights beyond the last column are left out."""
    b, num_rows, width = band.weight.shape
    matrix = torch.zeros(b, num_rows, num_columns + width, dtype=torch.float64)
    columns = band.start.unsqueeze(-1) + torch.arange(width)
    matrix.scatter_add_(2, columns, band.weight.double())
    return matrix[..., :num_columns]


def place(band: Band, x_BLHTD: Tensor) -> Tensor:
    """``[B, L, H, T_t, D]`` to ``[B, L, H, T_s, D]`` in the dtype of ``x``."""
    matrix = dense_matrix(band, x_BLHTD.shape[3])
    return torch.einsum("bst,blhtd->blhsd", matrix, x_BLHTD.double()).to(x_BLHTD.dtype)
