"""The student's tokens: spans, segments, special tokens, cutting."""

from __future__ import annotations

from typing import Any

import pytest

from kvdistill.config.training import StudentConfig
from kvdistill.corpus.samples import Sample
from kvdistill.distill.data.collate import student_batch, token_counts, tokenize
from kvdistill.distill.student.build import (
    build_student,
    check_student,
    load_student_tokenizer,
    prompt_ids,
    train_tokenizer,
)
from kvdistill.errors import StudentError
from tests.extract.models import BASE, tiny_tokenizer

TEXTS = ["How many clips did she sell?", "48 + 24 = 72 clips.", "Überraschung: 猫 and 🙂!"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(TEXTS, 300)


def test_spans_and_segments_follow_the_text(tokenizer: Any) -> None:
    sample = Sample("a", (("prompt", "How many?"), ("rationale", ""), ("answer", "\n72")))
    (tokens,) = tokenize(tokenizer, [sample], 100)
    pieces = [sample.text[a:b] for a, b in zip(tokens.char_start, tokens.char_end, strict=True)]
    assert "".join(pieces) == sample.text
    assert tokens.segment[0] == tokens.segment[-1] == -1
    for start, segment in zip(tokens.char_start[1:-1], tokens.segment[1:-1], strict=True):
        assert segment == (1 if start < 9 else 3)


def test_a_cut_text_loses_its_end_token(tokenizer: Any) -> None:
    (whole,) = tokenize(tokenizer, [Sample("a", (("text", TEXTS[0]),))], 100)
    (cut,) = tokenize(tokenizer, [Sample("a", (("text", TEXTS[0]),))], 4)
    assert whole.input_ids[-1] == tokenizer.eos_token_id
    assert len(cut.input_ids) == 4
    assert cut.input_ids[-1] != tokenizer.eos_token_id


def test_empty_and_ragged_texts_make_a_batch(tokenizer: Any) -> None:
    samples = [Sample(str(i), (("text", text),)) for i, text in enumerate(["", *TEXTS])]
    batch = student_batch(tokenize(tokenizer, samples, 64), tokenizer.pad_token_id)
    assert batch["attention_mask"].sum(1).tolist() == [
        len(tokens.input_ids) for tokens in tokenize(tokenizer, samples, 64)
    ]
    assert not batch["text_mask"][0].any()
    assert (batch["labels"] == -100).sum() == (batch["attention_mask"] == 0).sum()


def test_a_row_without_any_token_still_attends_to_one() -> None:
    class Bare:
        bos_token_id = eos_token_id = None

        def __call__(self, texts: list[str], **_: Any) -> dict[str, Any]:
            return {"input_ids": [[] for _ in texts], "offset_mapping": [[] for _ in texts]}

    batch = student_batch(tokenize(Bare(), [Sample("a", (("text", ""),))], 8), 0)
    assert batch["attention_mask"].tolist() == [[1]]
    assert batch["labels"].tolist() == [[-100]]


def test_a_tokenizer_without_offsets_is_refused(tmp_path: Any) -> None:
    from transformers import ByT5Tokenizer

    ByT5Tokenizer().save_pretrained(tmp_path)
    with pytest.raises(StudentError, match="no character offsets"):
        load_student_tokenizer(str(tmp_path))


def test_a_missing_tokenizer_is_one_line(tmp_path: Any) -> None:
    with pytest.raises(StudentError, match="cannot load the tokenizer") as caught:
        load_student_tokenizer(str(tmp_path / "none"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["Two?", "<s>Two?", "Two?</s>", "<s>Two?</s>"])
def test_special_tokens_in_the_text_are_not_added_again(text: str) -> None:
    own = tiny_tokenizer()
    sample = Sample("a", (("prompt", text), ("rationale", ""), ("answer", "")))
    (tokens,) = tokenize(own, [sample], 100)
    expected = [1, *own("Two?").input_ids, 2]
    assert tokens.input_ids.tolist() == expected
    assert token_counts(own, [sample], 100).tolist() == [len(expected)]
    assert prompt_ids(own, [text]) == [expected if text.endswith("</s>") else expected[:-1]]
    assert (tokens.segment[0] >= 0) == text.startswith("<s>")


def test_padding_without_an_embedding_is_replaced(tmp_path: Any) -> None:
    own = tiny_tokenizer()
    architecture = {"model_type": "llama", **BASE, "vocab_size": len(own)}
    own.add_special_tokens({"pad_token": "[PAD]"})
    config = StudentConfig(architecture=architecture, tokenizer="unused")
    student = build_student(config, own, seed=0)
    assert own.pad_token_id < student.get_input_embeddings().num_embeddings
    batch = student_batch(
        tokenize(own, [Sample("a", (("text", "Two?"),))] * 2, 8), own.pad_token_id
    )
    assert student(input_ids=batch["input_ids"]).logits.isfinite().all()


def test_a_token_without_an_embedding_is_refused_before_training() -> None:
    own = tiny_tokenizer()
    architecture = {"model_type": "llama", **BASE, "vocab_size": len(own)}
    own.add_tokens(["extra"])
    config = StudentConfig(architecture=architecture, tokenizer="unused")
    for build in (lambda: build_student(config, own, seed=0), lambda: check_student(config, own)):
        with pytest.raises(StudentError, match=r"'extra' has none; set student\.tokenizer"):
            build()
