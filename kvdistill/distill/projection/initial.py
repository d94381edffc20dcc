"""Closed-form first weights of a projection: where it stands before anything is learned."""

from __future__ import annotations

import torch
from torch import Tensor


def grouped_mean(num_from: int, num_to: int) -> Tensor:
    """Head weights ``[num_from, num_to]``: every new head is the mean of the heads it stands for.

    Heads are laid on one line, both ways of cutting it, and overlap gives the weight. Where
    ``num_to`` divides ``num_from`` that is the mean of each group (as grouped-query attention
    pools heads, arXiv 2305.13245); the other way round it repeats; otherwise a head that lies
    across a cut is shared. Columns sum to one.
    """
    old = torch.linspace(0, 1, num_from + 1, dtype=torch.float64)
    new = torch.linspace(0, 1, num_to + 1, dtype=torch.float64)
    upper = torch.minimum(old[1:, None], new[None, 1:])
    lower = torch.maximum(old[:-1, None], new[None, :-1])
    overlap = (upper - lower).clamp_min(0)
    overlap[overlap < 1e-12] = 0
    return (overlap / overlap.sum(0)).float()


def identity(dim_from: int, dim_to: int) -> Tensor:
    """Dim weights ``[dim_from, dim_to]``: the identity, cut off or padded with zeros."""
    return torch.eye(dim_from, dim_to)


def orthogonal(dim_from: int, dim_to: int) -> Tensor:
    """Random ``[dim_from, dim_to]`` with orthonormal rows or columns, whichever are fewer."""
    return torch.nn.init.orthogonal_(torch.empty(dim_from, dim_to))


def joined(heads: Tensor, dims: Tensor) -> Tensor:
    """One map ``[H·D, H'·D']`` that equals applying ``dims [D, D']`` and then ``heads [H, H']``."""
    return torch.kron(heads, dims)
