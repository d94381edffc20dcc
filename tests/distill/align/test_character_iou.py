"""Token alignment against exact fractions, over tokenizers made up by Hypothesis."""

from fractions import Fraction
from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvdistill.distill.align.character_iou import Spans, align_tokens

PAD = (0, 0, -1, False)


def spans(*samples):
    """Padded spans of samples, each a list of (start, end) or of (start, end, segment, mask)."""
    rows = [[(*token, 0, True) if len(token) == 2 else token for token in s] for s in samples]
    longest = max(map(len, rows))
    rows = [row + [PAD] * (longest - len(row)) for row in rows]
    columns = [torch.tensor([[token[i] for token in row] for row in rows]) for i in range(4)]
    start, end, segment, mask = (c.reshape(len(rows), longest) for c in columns)
    return Spans(start.long(), end.long(), segment.long(), mask.bool())


@st.composite
def tokenization(draw, length):
    """Tokens of a text: cuts anywhere, gaps, split characters, overlaps, specials, empty ones."""
    cuts = sorted(draw(st.sets(st.integers(1, max(1, length - 1)), max_size=8)) | {0, length})
    tokens = []
    for start, end in pairwise(cuts):
        kind = draw(st.integers(0, 9))
        if kind == 0:
            continue
        if kind == 1:
            tokens += [(start, end)] * draw(st.integers(2, 4))
        elif kind == 2 and end - start > 1:
            tokens += [(start, end - 1), (end - 2, end)]
        elif kind == 3:
            tokens += [(0, 0, -1, False), (start, end)]
        elif kind == 4:
            tokens += [(start, start), (start, end)]
        else:
            tokens.append((start, end))
    return tokens


@st.composite
def two_tokenizers(draw):
    lengths = draw(st.lists(st.integers(1, 24), min_size=1, max_size=3))
    return tuple(spans(*(draw(tokenization(length)) for length in lengths)) for _ in range(2))


def exact_fractions(spans, row):
    """The tokens of one sample as (lower, upper) in fractions of characters, None if not real."""
    tokens = list(
        zip(*(x[row].tolist() for x in (spans.char_start, spans.char_end, spans.real)), strict=True)
    )
    out = []
    for i, (start, end, real) in enumerate(tokens):
        if not real:
            out.append(None)
            continue
        on_first = [j for j, (s, e, r) in enumerate(tokens) if r and s <= start < e]
        on_last = [j for j, (s, e, r) in enumerate(tokens) if r and s < end <= e]
        until, since = tokens[on_first[0]][1], tokens[on_last[-1]][0]
        lower = start + (until - start) * Fraction(on_first.index(i), len(on_first))
        upper = since + (end - since) * Fraction(on_last.index(i) + 1, len(on_last))
        out.append((lower, upper))
    return out


def dense(student, teacher, row, method, causal):
    """The whole matrix of one sample, token by token."""
    rows, columns = exact_fractions(student, row), exact_fractions(teacher, row)
    matrix = torch.zeros(len(rows), len(columns), dtype=torch.float64)
    for i, mine in enumerate(rows):
        scores = {}
        for j, theirs in enumerate(columns):
            if mine is None or theirs is None or (causal and theirs[1] > mine[1]):
                continue
            shared = min(mine[1], theirs[1]) - max(mine[0], theirs[0])
            either = max(mine[1], theirs[1]) - min(mine[0], theirs[0])
            if shared > 0:
                scores[j] = shared if method == "overlap" else shared / either
        if scores and method == "nearest":
            best = max(scores.values())
            scores = {max(j for j, score in scores.items() if score == best): Fraction(1)}
        for j, score in scores.items():
            matrix[i, j] = float(score / sum(scores.values()))
    return matrix


def as_dense(band, num_columns):
    b, num_rows, width = band.weight.shape
    out = torch.zeros(b, num_rows, num_columns + width, dtype=torch.float64)
    index = band.start.unsqueeze(-1) + torch.arange(width)
    out.scatter_add_(2, index, band.weight.double())
    return out[..., :num_columns]


@given(two_tokenizers(), st.sampled_from(["iou", "overlap"]), st.booleans())
def test_equals_the_dense_matrix(pair, method, causal):
    student, teacher = pair
    band = align_tokens(student, teacher, method, causal)
    got = as_dense(band, teacher.mask.shape[1])
    for row in range(got.shape[0]):
        torch.testing.assert_close(
            got[row], dense(student, teacher, row, method, causal), atol=1e-5, rtol=1e-5
        )


@given(two_tokenizers(), st.booleans())
def test_nearest_takes_one_of_the_largest(pair, causal):
    student, teacher = pair
    band = align_tokens(student, teacher, "nearest", causal)
    got = as_dense(band, teacher.mask.shape[1])
    for row in range(got.shape[0]):
        iou = dense(student, teacher, row, "iou", causal)
        picked = (got[row] * iou).sum(-1)
        torch.testing.assert_close(
            picked, iou.max(-1).values if iou.numel() else picked, atol=1e-5, rtol=1e-5
        )
        assert set(got[row].sum(-1).tolist()) <= {0.0, 1.0}


@given(two_tokenizers(), st.sampled_from(["iou", "overlap", "nearest"]), st.booleans())
def test_rows_sum_to_one_or_are_masked_and_runs_move_forward(pair, method, causal):
    student, teacher = pair
    band = align_tokens(student, teacher, method, causal)
    total = band.weight.sum(-1)
    torch.testing.assert_close(total, band.covered.float())
    assert not (band.covered & ~student.real).any()
    matrix = as_dense(band, teacher.mask.shape[1])
    torch.testing.assert_close(matrix.sum(-1), band.covered.double())  # nothing beyond the end
    assert not matrix.masked_fill(teacher.real.unsqueeze(1), 0).any()
    for row in range(matrix.shape[0]):
        runs = [r.nonzero().flatten() for r in matrix[row] if r.any()]
        for earlier, later in pairwise(runs):
            assert earlier[0] <= later[0]
            assert earlier[-1] <= later[-1]


@given(st.integers(1, 24).flatmap(tokenization), st.booleans())
def test_a_tokenizer_aligns_with_itself_exactly(tokens, causal):
    same = spans(tokens, [])
    for method in ("iou", "overlap", "nearest"):
        band = align_tokens(same, same, method, causal)
        expected = torch.diag_embed(same.real.double())
        assert torch.equal(as_dense(band, same.mask.shape[1]), expected)


def test_a_teacher_of_no_tokens_covers_nothing():
    student, teacher = spans([(0, 3), (3, 5)]), spans([])
    band = align_tokens(student, teacher)
    assert not band.covered.any()
    assert not band.weight.any()
    assert align_tokens(teacher, student).weight.shape[:2] == (1, 0)


def test_causal_keeps_only_what_the_student_has_read():
    student = spans([(0, 2), (2, 8), (8, 12)])
    teacher = spans([(0, 12)])
    assert align_tokens(student, teacher).covered.tolist() == [[True, True, True]]
    assert align_tokens(student, teacher, causal=True).covered.tolist() == [[False, False, True]]


def test_known_weights():
    band = align_tokens(spans([(0, 4)]), spans([(0, 2), (2, 6)]))
    torch.testing.assert_close(band.weight, torch.tensor([[[3 / 5, 2 / 5]]]))  # 2/4 and 2/6
    band = align_tokens(spans([(0, 4)]), spans([(0, 1), (1, 6)]), "overlap")
    torch.testing.assert_close(band.weight, torch.tensor([[[1 / 4, 3 / 4]]]))


def test_offsets_of_a_million_characters_stay_exact():
    far = 10_000_000
    tokens = [(far, far + 3), (far + 3, far + 4), (far + 4, far + 9)]
    band = align_tokens(spans(tokens), spans(tokens))
    assert torch.equal(as_dense(band, 3)[0], torch.eye(3, dtype=torch.float64))


@settings(max_examples=10)
@given(two_tokenizers())
def test_padding_changes_nothing(pair):
    student, teacher = pair
    band = align_tokens(student, teacher)
    wider = Spans(*(torch.nn.functional.pad(x, (0, 3)) for x in vars(teacher).values()))
    again = align_tokens(student, wider)
    torch.testing.assert_close(
        as_dense(again, wider.mask.shape[1])[..., :-3], as_dense(band, teacher.mask.shape[1])
    )
