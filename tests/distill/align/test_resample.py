"""Resampling: no index leaves its range, no segment reads another."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvdistill.distill.align.character_iou import Spans
from kvdistill.distill.align.resample import align_global, align_segments
from tests.distill.dense import place


def masks(*lengths, total=None):
    total = max(lengths) if total is None else total
    return torch.arange(total).expand(len(lengths), total) < torch.tensor(lengths)[:, None]


def of_segments(*samples):
    """Spans whose segment ids are given, one string of digits per sample; '-' is masked."""
    longest = max(map(len, samples))
    rows = [[-1 if c == "-" else int(c) for c in s.ljust(longest, "-")] for s in samples]
    segment = torch.tensor(rows, dtype=torch.long).reshape(len(samples), longest)
    zero = torch.zeros_like(segment)
    return Spans(zero, zero, segment, segment >= 0)


def positions(band):
    """The real-valued teacher position of every student position, -1 where not covered."""
    at = band.start.unsqueeze(-1) + torch.arange(band.weight.shape[-1])
    return (at * band.weight).sum(-1).masked_fill(~band.covered, -1)


@pytest.mark.parametrize(("teacher", "student"), [(80, 50), (81, 80), (50, 80), (7, 7), (2, 2)])
def test_first_meets_first_and_last_meets_last(teacher, student):
    got = positions(align_global(masks(student), masks(teacher)))[0]
    torch.testing.assert_close(got, torch.linspace(0, teacher - 1, student), atol=1e-4, rtol=0)


def test_integrates_by_linear_interpolation():
    x = torch.arange(80.0).square().view(1, 1, 1, 80, 1)
    out = place(align_global(masks(50), masks(80)), x).flatten()
    line = torch.nn.functional.interpolate(
        x.view(1, 1, 80), size=50, mode="linear", align_corners=True
    )
    torch.testing.assert_close(out, line.flatten(), rtol=1e-4, atol=1e-2)


def test_one_token():
    assert positions(align_global(masks(5), masks(1)))[0].tolist() == [0.0] * 5
    assert positions(align_global(masks(1), masks(5)))[0].tolist() == [4.0]


def test_no_token():
    none = align_global(masks(5), masks(0, total=0))
    assert not none.covered.any()
    assert not place(none, torch.ones(1, 2, 3, 0, 4)).any()
    assert not align_global(masks(5), masks(0, total=3)).covered.any()
    assert align_global(masks(0, total=0), masks(5)).start.shape == (1, 0)


@given(
    st.lists(st.tuples(st.integers(0, 90), st.integers(0, 90)), min_size=1, max_size=4),
    st.integers(0, 3),
)
def test_no_length_leaves_its_range(lengths, padding):
    student = masks(*(s for s, _ in lengths), total=max(s for s, _ in lengths) + padding)
    teacher = masks(*(t for _, t in lengths), total=max(t for _, t in lengths) + padding)
    band = align_global(student, teacher)
    assert band.start.dtype == torch.long
    assert bool((band.start >= 0).all())
    used = band.weight > 0
    last = band.start.unsqueeze(-1) + torch.arange(band.weight.shape[-1])
    limit = teacher.sum(1)[:, None, None]
    assert not (used & (last >= limit)).any()
    expected = student & (teacher.sum(1, keepdim=True) > 0)
    assert torch.equal(band.covered, expected)
    torch.testing.assert_close(band.weight.sum(-1), expected.float())
    at = positions(band)
    rising = at[:, 1:] >= at[:, :-1]
    assert bool((rising | ~band.covered[:, 1:]).all())


segment_strings = st.lists(st.sampled_from("0123-"), max_size=12).map("".join)


@given(st.lists(st.tuples(segment_strings, segment_strings), min_size=1, max_size=3))
def test_segments_never_mix(pairs):
    student = of_segments(*(s for s, _ in pairs))
    teacher = of_segments(*(t for _, t in pairs))
    band = align_segments(student, teacher)
    columns = teacher.mask.shape[1]
    for row, (mine, theirs) in enumerate(pairs):
        for i, segment in enumerate(mine):
            read = {
                theirs[int(band.start[row, i]) + w]
                for w in range(band.weight.shape[-1])
                if band.weight[row, i, w] > 0
            }
            assert read <= {segment}
            assert bool(band.covered[row, i]) == (segment != "-" and segment in theirs)
    if columns:
        torch.testing.assert_close(band.weight.sum(-1), band.covered.float())


def test_each_segment_is_resampled_on_its_own():
    student = of_segments("112222-3")
    teacher = of_segments("-1112-2")
    got = positions(align_segments(student, teacher))[0]
    expected = torch.tensor([1, 3, 4, 4 + 2 / 3, 4 + 4 / 3, 6, -1, -1])
    torch.testing.assert_close(got, expected)
