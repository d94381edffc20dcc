"""Resampling in time: student positions as real-valued teacher positions.

For texts that share no characters (a teacher that generated its own rationale), positions are
matched by how far along they are:

    position(i) = i · (n_t − 1) / (n_s − 1),   i = 0 … n_s − 1

inside each segment separately, so that a rationale never bleeds into a prompt, or over the whole
text. The division is in integers: quotient and remainder are exact, so no index can leave
``[0, n_t − 1]`` whatever the lengths. First maps to first and last to last; a single student
position maps to the last teacher position, which has read the most.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvdistill.distill.align.band import Band
from kvdistill.distill.align.character_iou import Spans
from kvdistill.types import SEGMENT_IDS

NUM_SEGMENTS = len(SEGMENT_IDS)


def align_segments(student: Spans, teacher: Spans) -> Band:
    """Linear interpolation inside each segment; ``[B, T_s]`` against ``[B, T_t]``.

    A segment that the teacher lacks leaves the student's tokens of it not covered.
    """
    return _resample(student.segment, student.mask, teacher.segment, teacher.mask)


def align_global(student_mask: Tensor, teacher_mask: Tensor) -> Band:
    """Linear interpolation over all positions that count; masks ``[B, T_s]`` and ``[B, T_t]``."""
    one_s = torch.zeros_like(student_mask, dtype=torch.long)
    one_t = torch.zeros_like(teacher_mask, dtype=torch.long)
    return _resample(one_s, student_mask, one_t, teacher_mask)


def _resample(
    student_segment: Tensor, student_mask: Tensor, teacher_segment: Tensor, teacher_mask: Tensor
) -> Band:
    rows = _one_hot(student_segment, student_mask)
    columns = _one_hot(teacher_segment, teacher_mask)
    segment = student_segment.clamp(0, NUM_SEGMENTS - 1)
    rank = (rows.cumsum(1) - 1).gather(2, segment.unsqueeze(-1)).squeeze(-1)
    num_rows = rows.sum(1).gather(1, segment)
    counts = columns.sum(1)
    num_columns = counts.gather(1, segment)
    covered = rows.sum(-1).bool() & (num_columns > 0)
    if teacher_mask.shape[1] == 0:
        return Band(torch.zeros_like(rank), rank.new_zeros(*rank.shape, 1).float(), covered)

    single = num_rows <= 1
    numerator = torch.where(single, num_columns - 1, rank * (num_columns - 1))
    denominator = torch.where(single, 1, num_rows - 1)
    lower = torch.div(numerator, denominator, rounding_mode="floor")
    fraction = (numerator - lower * denominator).float() / denominator
    # Teacher positions sorted by segment, and where each segment begins in that order.
    absent = ~columns.any(-1)
    order = columns.argmax(-1).masked_fill(absent, NUM_SEGMENTS).argsort(dim=1, stable=True)
    base = (counts.cumsum(1) - counts).gather(1, segment)
    last = order.shape[1] - 1
    start = order.gather(1, (base + lower).clamp(0, last))
    upper = torch.minimum(lower + 1, num_columns - 1)
    gap = order.gather(1, (base + upper).clamp(0, last)) - start
    start, gap = torch.where(covered, start, 0), torch.where(covered, gap, 0)
    width = 1 + int(gap.max()) if gap.numel() else 1
    weight = F.one_hot(gap, width) * fraction.unsqueeze(-1)
    weight[..., 0] += 1 - fraction
    return Band(start, weight * covered.unsqueeze(-1), covered)


def _one_hot(segment: Tensor, mask: Tensor) -> Tensor:
    """``[B, T, NUM_SEGMENTS]`` long; zero where a token does not count."""
    counts = mask & (segment >= 0) & (segment < NUM_SEGMENTS)
    return F.one_hot(segment.clamp(0, NUM_SEGMENTS - 1), NUM_SEGMENTS) * counts.unsqueeze(-1)
