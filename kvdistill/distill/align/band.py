"""A banded matrix from teacher positions to student positions, and how well it covers them.

Row ``i`` of sample ``b`` weighs the ``W`` teacher positions from ``start[b, i]`` on. Character
alignment, resampling in time and the identity are all such bands; ``targets.BandProduct``
multiplies a KV by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Band:
    """``start [B, T_s]`` long, ``weight [B, T_s, W]`` float32, ``covered [B, T_s]`` bool.

    Weights of a covered row sum to one; a row that is not covered is all zero.
    """

    start: Tensor
    weight: Tensor
    covered: Tensor

    def columns(self, num_columns: int) -> Tensor:
        """Teacher position of every weight, ``[B, T_s, W]`` long, below ``num_columns``."""
        offset = torch.arange(self.weight.shape[-1], device=self.start.device)
        return (self.start.unsqueeze(-1) + offset).clamp_max(max(num_columns - 1, 0))


def band_of(teacher: Mapping[str, Any]) -> Band:
    """The alignment that a teacher's part of a batch carries."""
    return Band(teacher["start"], teacher["weight"], teacher["covered"])


@dataclass(frozen=True)
class AlignmentQuality:
    """How well two tokenizers match, in counts of real tokens; adding two pools them."""

    student_tokens: int = 0
    covered: int = 0
    """Student tokens that at least one teacher token covers."""
    one_to_one: int = 0
    """Student tokens with exactly one teacher token, which no other student token uses."""
    teacher_tokens: int = 0
    orphans: int = 0
    """Teacher tokens that no student token uses."""

    def __add__(self, other: AlignmentQuality) -> AlignmentQuality:
        names = [field.name for field in fields(self)]
        return AlignmentQuality(*(getattr(self, name) + getattr(other, name) for name in names))

    @property
    def coverage(self) -> float:
        """Share of student tokens that are covered."""
        return self.covered / max(self.student_tokens, 1)

    @property
    def one_to_one_rate(self) -> float:
        """Share of student tokens matched one to one."""
        return self.one_to_one / max(self.student_tokens, 1)

    @property
    def orphan_rate(self) -> float:
        """Share of teacher tokens whose content is lost."""
        return self.orphans / max(self.teacher_tokens, 1)


def quality(band: Band, student_mask_BT: Tensor, teacher_mask_BT: Tensor) -> AlignmentQuality:
    """Count coverage, one-to-one matches and orphans of a batch; masks are True on real tokens."""
    num_columns = teacher_mask_BT.shape[1]
    used = band.weight > 0
    columns = band.columns(num_columns).flatten(1)
    users = used.new_zeros(used.shape[0], max(num_columns, 1), dtype=torch.long)
    users.scatter_add_(1, columns, used.flatten(1).long())
    alone = (users == 1).gather(1, columns).view(used.shape)
    one_to_one = (used.sum(-1) == 1) & (used & alone).any(-1)
    counted = (
        student_mask_BT,
        band.covered & student_mask_BT,
        one_to_one & student_mask_BT,
        teacher_mask_BT,
        teacher_mask_BT & (users[:, :num_columns] == 0),
    )
    return AlignmentQuality(*torch.stack([mask.sum() for mask in counted]).tolist())
