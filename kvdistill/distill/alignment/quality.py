"""How well two tokenizers meet, in counts that add up over batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvdistill.distill.alignment.band import Band


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
