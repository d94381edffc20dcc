"""Student tokens and teacher tokens of the same text, matched by the characters they share.

    A[i, j] = |span_i ∩ span_j| / |span_i ∪ span_j|,   rows normalised

Both tokenizers read the same text from left to right, so a student token touches one contiguous
run of teacher tokens and ``A`` is a band: two ``searchsorted`` find where a run starts and ends,
and the ``[T_s, T_t]`` matrix is never built. Offsets are the tokenizers' own; nothing searches
for strings. ``causal`` drops teacher tokens that end after the student's token: they carry text
that the student has not read, so keeping them asks it to guess.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvdistill.distill.alignment.band import Band
from kvdistill.distill.alignment.spans import Spans, exact
from kvdistill.errors import GeometryError
from kvdistill.types import TokenMethod


def align_tokens(
    student: Spans, teacher: Spans, method: TokenMethod = "iou", causal: bool = False
) -> Band:
    """Weights of teacher tokens for every student token, as a band ``[B, T_s, W]``.

    Args:
        student: spans ``[B, T_s]``.
        teacher: spans ``[B, T_t]`` of the same samples.
        method: ``iou``: characters shared over characters in either. ``overlap``: characters
            shared. ``nearest``: the one teacher token of largest IoU, the later one of equals.
        causal: keep only teacher tokens that end no later than the student's token.

    Returns:
        A band whose rows sum to one, or are all zero and not ``covered``. Build it where the
        offsets are (on the CPU, while collating): its width is read back from the device once.

    Raises:
        GeometryError: the batches differ in their number of samples.
    """
    if student.mask.shape[0] != teacher.mask.shape[0]:
        raise GeometryError(
            f"token alignment: {student.mask.shape[0]} student samples, but "
            f"{teacher.mask.shape[0]} teacher samples; both must be the same batch"
        )
    start, score = _scores(student, teacher, overlap=method == "overlap", causal=causal)
    if method == "nearest":
        start, score = _keep_largest(start, score)
    total = score.sum(-1)
    covered = total > 0
    weight = score / total.masked_fill(~covered, 1.0).unsqueeze(-1)
    return Band(start, weight, covered)


def _scores(
    student: Spans, teacher: Spans, *, overlap: bool, causal: bool
) -> tuple[Tensor, Tensor]:
    """First teacher token of every student token's run, and unnormalised weights ``[B,T_s,W]``."""
    rows, columns = exact(student), exact(teacher)
    start = torch.searchsorted(columns.sorted_upper, rows.lower.contiguous(), right=True)
    stop = torch.searchsorted(columns.sorted_lower, rows.upper.contiguous(), right=False)
    width = (stop - start).clamp_min(0) * rows.real
    num_columns = teacher.mask.shape[1]
    band_width = max(1, int(width.max())) if width.numel() else 1
    if num_columns == 0:
        return torch.zeros_like(start), rows.lower.new_zeros(*start.shape, band_width)
    offset = torch.arange(band_width, device=start.device)
    index = (start.unsqueeze(-1) + offset).clamp_max(num_columns - 1)
    lower, upper, real = (
        x.gather(1, index.flatten(1)).view(index.shape)
        for x in (columns.lower, columns.upper, columns.real)
    )
    row_lower, row_upper = rows.lower.unsqueeze(-1), rows.upper.unsqueeze(-1)
    shared = torch.minimum(upper, row_upper) - torch.maximum(lower, row_lower)
    keep = (offset < width.unsqueeze(-1)) & real & (shared > 0)
    if causal:
        keep &= upper <= row_upper
    either = torch.maximum(upper, row_upper) - torch.minimum(lower, row_lower)
    score = shared if overlap else shared / either
    return start.clamp_max(num_columns - 1), torch.where(keep, score, 0.0)


def _keep_largest(start: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    last = score.shape[-1] - 1
    best = (last - score.flip(-1).argmax(-1)) * score.any(-1)
    return start + best, score.gather(-1, best.unsqueeze(-1)).sign()
