"""How well a band covers: counts of small cases that can be done by hand."""

import torch

from kvdistill.distill.align.band import AlignmentQuality, quality
from kvdistill.distill.align.character_iou import Spans, align_tokens


def spans(tokens, length):
    start, end = (
        torch.tensor([[t[i] for t in tokens] + [0] * (length - len(tokens))]) for i in (0, 1)
    )
    mask = torch.arange(length) < len(tokens)
    return Spans(start, end, torch.zeros_like(start), mask[None])


def test_counts_by_hand():
    student = spans([(0, 2), (2, 4), (4, 6), (8, 9), (9, 12)], 6)
    teacher = spans([(0, 2), (2, 6), (6, 8), (9, 10), (10, 12)], 7)
    # (0,2) alone; (2,4) and (4,6) share a teacher token; (8,9) has none; (9,12) has two.
    got = quality(align_tokens(student, teacher), student.mask, teacher.mask)
    assert got == AlignmentQuality(5, 4, 1, 5, 1)
    assert (got.coverage, got.one_to_one_rate, got.orphan_rate) == (0.8, 0.2, 0.2)
    assert (got + got).coverage == 0.8
    assert got + got == AlignmentQuality(10, 8, 2, 10, 2)


def test_an_empty_batch_divides_nothing_by_zero():
    student, teacher = spans([], 3), spans([], 0)
    got = quality(align_tokens(student, teacher), student.mask, teacher.mask)
    assert got == AlignmentQuality()
    assert got.coverage == 0.0
