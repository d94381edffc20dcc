"""Where predictions of two tokenizers are of the same thing, and which of their tokens are one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import decoders

from kvdistill.distill.align.character_iou import Spans
from kvdistill.distill.align.vocabulary import starts_together, vocabulary_between
from kvdistill.distill.student.build import load_student_tokenizer
from tests.extract.tokenizers_of_every_kind import EVERY_KIND, TEXTS, save_tokenizer

PAIRS = [
    ("byte-level", "metaspace BPE"),
    ("metaspace BPE", "this package's"),
    ("unigram", "byte-level, prefix space, trimmed"),
    ("WordPiece", "Llama 3's"),
    ("this package's", "unigram"),
    ("characters", "RoBERTa's"),
]


DECODERS = {
    "unigram": decoders.Metaspace(),
    "WordPiece": decoders.WordPiece(),
    "characters": None,
    "metaspace BPE": decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    ),
}


def loaded(folder: Path, kind: str) -> Any:
    tokenizer = load_student_tokenizer(str(save_tokenizer(folder / kind.replace(" ", "_"), kind)))
    if tokenizer.backend_tokenizer.decoder is None:
        tokenizer.backend_tokenizer.decoder = DECODERS.get(kind, decoders.ByteLevel())
    return tokenizer


def spans(tokenizer: Any, texts: list[str]) -> Spans:
    """Right-padded spans of texts; special tokens stand for nothing."""
    found = [tokenizer(text, return_offsets_mapping=True)["offset_mapping"] for text in texts]
    length = max(map(len, found))
    rows = torch.tensor([[*row, *[(0, 0)] * (length - len(row))] for row in found])
    mask = rows[..., 1] > rows[..., 0]
    return Spans(rows[..., 0], rows[..., 1], mask.long() - 1, mask)


@pytest.mark.parametrize("kinds", PAIRS, ids="; ".join)
def test_paired_tokens_stand_for_the_same_text(tmp_path: Path, kinds: tuple[str, str]) -> None:
    teacher, student = (loaded(tmp_path, kind) for kind in kinds)
    found = vocabulary_between(teacher, student)
    assert not found.is_shared
    ids = found.student_id_V
    paired = [(i, int(ids[i])) for i in (ids >= 0).nonzero().flatten().tolist()]
    assert len(paired) >= 15  # letters at the least
    assert len({student_id for _, student_id in paired}) == len(paired)
    for teacher_id, student_id in paired:
        (theirs,), (ours,) = (
            tokenizer.encode("a", add_special_tokens=False)[-1:] for tokenizer in (teacher, student)
        )
        texts = [
            tokenizer.decode([anchor, idx])[len(tokenizer.decode([anchor])) :]
            for tokenizer, anchor, idx in (
                (teacher, theirs, teacher_id),
                (student, ours, student_id),
            )
        ]
        assert texts[0] == texts[1] != ""


def test_one_vocabulary_is_shared_whole(tmp_path: Path) -> None:
    tokenizer = loaded(tmp_path, "byte-level")
    found = vocabulary_between(tokenizer, tokenizer)
    assert found.is_shared
    assert found.student_id_V.tolist() == list(range(len(tokenizer)))


@pytest.mark.parametrize("kinds", PAIRS, ids="; ".join)
def test_tokens_start_together_where_whole_characters_end(
    tmp_path: Path, kinds: tuple[str, str]
) -> None:
    texts = [*TEXTS, "a", ""]
    teacher, student = (spans(loaded(tmp_path, kind), texts) for kind in kinds)
    index, mask = starts_together(student, teacher)
    for row in range(len(texts)):
        for token in mask[row].nonzero().flatten().tolist():
            there = int(index[row, token])
            assert teacher.mask[row, there]
            assert teacher.char_start[row, there] == student.char_start[row, token]
        paired = student.char_start[row][mask[row]].tolist()
        assert clean_starts(teacher, row) & clean_starts(student, row) <= set(paired)


def clean_starts(own: Spans, row: int) -> set[int]:
    """Characters at which one token starts, and which no other token touches."""
    real = own.mask[row]
    starts, ends = own.char_start[row][real].tolist(), own.char_end[row][real].tolist()
    return {
        start
        for start in starts
        if sum(a <= start < b for a, b in zip(starts, ends, strict=True)) == 1
    }


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_a_tokenizer_starts_with_itself(tmp_path: Path, kind: str) -> None:
    own = spans(loaded(tmp_path, kind), TEXTS)
    index, mask = starts_together(own, own)
    assert torch.equal(mask, own.mask)
    assert torch.equal(index[mask], torch.arange(mask.shape[1]).expand_as(index)[mask])


def test_a_teacher_of_no_tokens_starts_nothing(tmp_path: Path) -> None:
    own = spans(loaded(tmp_path, "byte-level"), TEXTS)
    none = Spans(*(x[:, :0] for x in (own.char_start, own.char_end, own.segment, own.mask)))
    assert not starts_together(own, none)[1].any()


def test_a_byte_gives_way_to_the_token_that_a_tokenizer_writes(tmp_path: Path) -> None:
    teacher, student = (loaded(tmp_path, kind) for kind in ("metaspace BPE", "byte-level"))
    found = vocabulary_between(teacher, student).student_id_V
    for character in "afd":
        byte = teacher.convert_tokens_to_ids(f"<0x{ord(character):02X}>")
        assert found[byte] == -1
        assert found[teacher.convert_tokens_to_ids(character)] >= 0
    control = teacher.convert_tokens_to_ids("<0x01>")  # in no text, so it has no other token
    assert found[control] == student.convert_tokens_to_ids("ā")
