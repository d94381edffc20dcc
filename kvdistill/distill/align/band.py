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
    bags = bags_of(band, num_layers * num_heads, num_columns)
    out = bags.sum(x_BLHTD.reshape(b, num_layers * num_heads, num_columns, dim))
    return out.view(b, num_layers, num_heads, -1, dim)


@dataclass(frozen=True)
class Bags:
    """A band laid out for one weighted ``embedding_bag``; made once for all layers of a teacher."""

    shape: tuple[int, int, int]
    """B, heads, T_s."""
    index: Tensor
    """``[B·heads·T_s, W]``: rows of ``x`` as a table of vectors."""
    weight: Tensor

    def sum(self, x_BHTD: Tensor) -> Tensor:
        """The product with one layer: ``[B, H, T_t, D]`` to ``[B, H, T_s, D]``."""
        dim = x_BHTD.shape[-1]
        if 0 in x_BHTD.shape or 0 in self.shape:
            return x_BHTD.new_zeros(*self.shape, dim)
        weight = self.weight.to(x_BHTD.dtype)
        table = x_BHTD.reshape(-1, dim)
        out = F.embedding_bag(self.index, table, per_sample_weights=weight, mode="sum")
        return out.view(*self.shape, dim)


def bags_of(band: Band, num_heads: int, num_columns: int) -> Bags:
    """Lay a band out for a KV of ``num_heads`` heads and ``num_columns`` teacher positions."""
    b, num_rows, width = band.weight.shape
    columns = band.start.unsqueeze(-1) + torch.arange(width, device=band.start.device)
    columns = columns.clamp_max(max(num_columns - 1, 0))
    first_row = num_columns * torch.arange(b * num_heads, device=columns.device)
    index = columns.unsqueeze(1) + first_row.view(b, num_heads, 1, 1)
    weight = band.weight.unsqueeze(1).expand(index.shape)
    return Bags((b, num_heads, num_rows), index.reshape(-1, width), weight.reshape(-1, width))


@dataclass(frozen=True)
class AlignmentQuality:
    """Counts over real tokens; add two to pool them."""

    student_tokens: int = 0
    covered: int = 0
    """Student tokens that at least one teacher token covers."""
    one_to_one: int = 0
    """Student tokens with exactly one teacher token, which no other student token uses."""
    teacher_tokens: int = 0
    orphans: int = 0
    """Teacher tokens that no student token uses."""

    def __add__(self, other: AlignmentQuality) -> AlignmentQuality:
        return AlignmentQuality(
            self.student_tokens + other.student_tokens,
            self.covered + other.covered,
            self.one_to_one + other.one_to_one,
            self.teacher_tokens + other.teacher_tokens,
            self.orphans + other.orphans,
        )

    @property
    def coverage(self) -> float:
        """Share of student tokens that are covered."""
        return self.covered / max(self.student_tokens, 1)

    @property
    def one_to_one_rate(self) -> float:
        """Share of student tokens that meet one teacher token, alone."""
        return self.one_to_one / max(self.student_tokens, 1)

    @property
    def orphan_rate(self) -> float:
        """Share of teacher tokens whose content is lost."""
        return self.orphans / max(self.teacher_tokens, 1)


def quality(band: Band, student_mask: Tensor, teacher_mask: Tensor) -> AlignmentQuality:
    """Count coverage, one-to-one matches and orphans of a batch.

    Args:
        band: alignment of the batch.
        student_mask: real student tokens ``[B, T_s]`` bool.
        teacher_mask: real teacher tokens ``[B, T_t]`` bool.
    """
    num_columns = teacher_mask.shape[1]
    used = band.weight > 0
    width = band.weight.shape[-1]
    columns = band.start.unsqueeze(-1) + torch.arange(width, device=band.start.device)
    columns = columns.clamp_max(max(num_columns - 1, 0))
    users = used.new_zeros(used.shape[0], max(num_columns, 1), dtype=torch.long)
    users.scatter_add_(1, columns.flatten(1), used.flatten(1).long())
    alone = (users == 1).gather(1, columns.flatten(1)).view(used.shape)
    one_to_one = (used.sum(-1) == 1) & (used & alone).any(-1)
    unused = teacher_mask & (users[:, :num_columns] == 0)
    counts = torch.stack(
        [
            x.sum()
            for x in (
                student_mask,
                band.covered & student_mask,
                one_to_one & student_mask,
                teacher_mask,
                unused,
            )
        ]
    )
    return AlignmentQuality(*counts.tolist())


# MERGED-DOC distill.alignment.quality
# How well two tokenizers meet, in counts that add up over batches.
