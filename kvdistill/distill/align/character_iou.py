"""Student tokens and teacher tokens of the same text, matched by the characters they share.

    A[i, j] = |span_i ∩ span_j| / |span_i ∪ span_j|,   rows normalised

Both tokenizers read the text from left to right, so a student token touches one contiguous run of
teacher tokens and ``A`` is a band: two ``searchsorted`` find where a run starts and ends, and no
``[T_s, T_t]`` matrix is built. Offsets are the tokenizers' own; no string is searched for.

Offsets alone are not exact. A byte-level tokenizer may split ``é`` into two tokens that both report
the whole character; such spans overlap, and no tokenizer would align with itself. Tokens that share
a stretch of text therefore divide it, in order, into ``[i, i + 1/2)`` and ``[i + 1/2, i + 1)``:
spans of one text are then disjoint and ordered, as ``searchsorted`` requires.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvdistill.distill.align.band import Band
from kvdistill.types import TokenMethod


@dataclass(frozen=True)
class Spans:
    """Characters that the tokens of a padded batch stand for; all tensors are ``[B, T]``.

    ``char_start``, ``char_end`` (long) index the sample's text, ``segment`` (long) is a segment
    id of ``types.py``, ``mask`` (bool) is True for a token that stands for text. Special tokens,
    templates and padding are False, and their offsets are ignored.
    """

    char_start: Tensor
    char_end: Tensor
    segment: Tensor
    mask: Tensor

    @property
    def real(self) -> Tensor:
        """Tokens that stand for at least one character, ``[B, T]`` bool."""
        return self.mask & (self.char_end > self.char_start)


def align_tokens(
    student: Spans, teacher: Spans, method: TokenMethod = "iou", causal: bool = False
) -> Band:
    """Weights of teacher tokens for every student token, as a band ``[B, T_s, W]``.

    Args:
        student: spans ``[B, T_s]``.
        teacher: spans ``[B, T_t]`` of the same samples.
        method: ``iou``: characters shared over characters in either. ``overlap``: characters
            shared. ``nearest``: the one teacher token of largest IoU, the later one of equals.
        causal: keep only teacher tokens that end no later than the student's token. Others carry
            text that the student has not read and can only guess.

    Returns:
        A band whose rows sum to one, or are all zero and not ``covered``. Build it where the
        offsets are (on the CPU, while collating): its width is synchronised once.
    """
    start, score = _scores(student, teacher, overlap=method == "overlap", causal=causal)
    if method == "nearest":
        last = score.shape[-1] - 1
        best = (last - score.flip(-1).argmax(-1)) * score.any(-1)
        start, score = start + best, score.gather(-1, best.unsqueeze(-1)).sign()
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


@dataclass(frozen=True)
class ExactSpans:
    """Disjoint spans in float32, ``[B, T]``; see ``exact``.

    ``sorted_lower`` and ``sorted_upper`` equal ``lower`` and ``upper`` on real tokens and are
    filled in between so that both rise along T and no search finds a masked token.
    """

    lower: Tensor
    upper: Tensor
    real: Tensor
    sorted_lower: Tensor
    sorted_upper: Tensor


def exact(spans: Spans) -> ExactSpans:
    """Split every shared stretch of text evenly between the tokens that share it, in order.

    float32 represents offsets exactly up to 16.7 million characters; thirds of a character lose
    precision beyond a hundred thousand, but stay ordered.
    """
    real = spans.real
    starts, ends = _rising(spans.char_start, spans.char_end, real)
    rank = real.long().cumsum(1)
    begin = spans.char_start.masked_fill(~real, 0)
    final = (spans.char_end - 1).masked_fill(~real, 0)
    end = final + 1

    earlier, sharing, first, _ = _sharing(begin, starts, ends, rank)
    shared_until = ends.gather(1, first)
    lower = begin + (shared_until - begin) * ((rank - 1 - earlier).float() / sharing)

    earlier, sharing, _, last = _sharing(final, starts, ends, rank)
    shared_from = starts.gather(1, last)
    upper = shared_from + (end - shared_from) * ((rank - earlier).float() / sharing)

    sorted_lower, _ = _rising(lower, upper, real)
    following = F.pad(sorted_lower[:, 1:], (0, 1), value=torch.inf)
    upper = torch.minimum(upper, following)
    _, sorted_upper = _rising(lower, upper, real)
    return ExactSpans(lower, upper, real, sorted_lower, sorted_upper)


def _rising(lower: Tensor, upper: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Fill masked tokens: starts with the next real start, ends with the previous real end."""
    beyond = torch.inf if lower.is_floating_point() else torch.iinfo(lower.dtype).max
    starts = lower.masked_fill(~real, beyond).flip(1).cummin(1).values.flip(1)
    ends = upper.masked_fill(~real, -1).cummax(1).values
    return starts.contiguous(), ends.contiguous()


def _sharing(
    char: Tensor, starts: Tensor, ends: Tensor, rank: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per character: real tokens that end before it, tokens that cover it, the first, the last."""
    counts = F.pad(rank, (1, 0))
    first = torch.searchsorted(ends, char, right=True)
    after = torch.searchsorted(starts, char, right=True)
    earlier = counts.gather(1, first)
    sharing = (counts.gather(1, after) - earlier).clamp_min(1)
    top = max(char.shape[1] - 1, 0)
    return earlier, sharing, first.clamp_max(top), (after - 1).clamp(0, top)
