"""A tokenizer aligned with itself is the identity, on whatever text and of whatever kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvdistill.attention.prompt_template import SEGMENTS
from kvdistill.config.extraction import TeacherConfig
from kvdistill.corpus.samples import Sample
from kvdistill.distill.align.character_iou import Spans, align_tokens
from kvdistill.distill.data.collate import StudentTokens, tokenize
from kvdistill.distill.student.build import load_student_tokenizer
from kvdistill.extract.loading import load_teacher_tokenizer
from kvdistill.extract.tokenise import PromptTokenizer, TokenisedSample
from kvdistill.types import TokenMethod
from tests.extract.tokenizers_of_every_kind import BYTE_LEVEL, EVERY_KIND, save_tokenizer

PIECES = [
    "def f(x):\n",
    "    return x\n",
    "\n\n\t\tif  a:\r\n",
    " ",
    "   ",
    "\u00a0\u3000",
    "猫が好き",
    "中文",
    "🙂",
    "👨\u200d👩\u200d👧",
    "e\u0301é",
    "ﬁn ㎏",
    "!\n\n",
    "hello",
    "\x00\u200b",
]
TEXT = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=6)), max_size=8).map("".join)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: save_tokenizer(root / str(i), kind) for i, kind in enumerate(EVERY_KIND)}


@pytest.fixture(scope="module", params=EVERY_KIND)
def pair(request: pytest.FixtureRequest, folders: dict[str, Path]) -> tuple[str, Any, Any]:
    """A kind, and its tokenizer as a teacher's and as the student's."""
    path = str(folders[request.param])
    teacher = load_teacher_tokenizer("t", TeacherConfig(model=path))
    return request.param, teacher, load_student_tokenizer(path)


def spans(tokens: TokenisedSample | StudentTokens) -> Spans:
    columns = (tokens.char_start, tokens.char_end, tokens.segment)
    start, end, segment = (torch.tensor(column)[None].long() for column in columns)
    return Spans(start, end, segment, segment >= 0)


def dense(student: Spans, teacher: Spans, method: TokenMethod, causal: bool) -> torch.Tensor:
    band = align_tokens(student, teacher, method, causal)
    width = band.weight.shape[-1]
    out = torch.zeros(*band.start.shape, teacher.mask.shape[1] + width)
    out.scatter_add_(2, band.start[..., None] + torch.arange(width), band.weight)
    return out[0, :, : teacher.mask.shape[1]]


def check(tokenizers: tuple[Any, Any], sample: Sample, kind: str = "") -> None:
    (teacher,) = PromptTokenizer(tokenizers[0], SEGMENTS).tokenise([sample])
    (student,) = tokenize(tokenizers[1], [sample], 10_000)
    for rows in (teacher, student):
        identity = torch.diag(torch.tensor(rows.segment >= 0).float())
        for method in get_args(TokenMethod):
            for causal in (False, True):
                assert torch.equal(dense(spans(rows), spans(rows), method, causal), identity)
    assert teacher.token_ids[teacher.segment >= 0].tolist() == (
        student.input_ids[student.segment >= 0].tolist()
    )
    text_to_text = dense(spans(student), spans(teacher), "iou", False)
    text_to_text = text_to_text[student.segment >= 0][:, teacher.segment >= 0]
    assert torch.equal(text_to_text, torch.eye(len(text_to_text)))
    if kind in BYTE_LEVEL and "NFC" not in kind:
        ranges = zip(teacher.char_start.tolist(), teacher.char_end.tolist(), strict=True)
        covered = {position for start, end in ranges for position in range(start, end)}
        assert len(covered) == len(sample.text)


@settings(max_examples=12, deadline=None)
@given(st.tuples(TEXT, TEXT, TEXT))
def test_of_every_kind(pair: tuple[str, Any, Any], texts: tuple[str, str, str]) -> None:
    prompt, rationale, answer = texts
    segments = (("prompt", prompt), ("rationale", rationale), ("answer", answer))
    check(pair[1:], Sample("a", segments), pair[0])


@pytest.mark.parametrize("kind", BYTE_LEVEL)
def test_indentation_is_text(kind: str, folders: dict[str, Path]) -> None:
    text = "def f(x):\r\n        if x:\n\n\n\t\t    return  x\n"
    tokenizer = load_teacher_tokenizer("t", TeacherConfig(model=str(folders[kind])))
    (tokens,) = PromptTokenizer(tokenizer).tokenise([Sample("a", (("text", text),))])
    white = [t for t, s in zip(tokens.token_ids, tokens.segment, strict=True) if s >= 0]
    decoded = tokenizer.convert_ids_to_tokens(white)
    assert sum(not set(token) - set("ĠĊĉč") for token in decoded) > 3
    added = len(tokenizer("").input_ids)
    assert len(white) == tokens.num_tokens - added


@pytest.mark.real_model
@pytest.mark.parametrize("name", ["smollm2", "gemma3", "minilm"])
def test_of_real_tokenizers(real_models: Path, name: str) -> None:
    path = str(real_models / name)
    teacher = load_teacher_tokenizer("t", TeacherConfig(model=path))
    pair = (teacher, load_student_tokenizer(path))
    for text in ("".join(PIECES), "    " * 9, Path(__file__).read_text(encoding="utf-8")):
        check(pair, Sample("a", (("prompt", text), ("answer", "\n 7"))))
