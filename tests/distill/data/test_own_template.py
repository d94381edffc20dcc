"""A student that reads prompts and answers in its tokenizer's chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from kvdistill.config.distill import AlignmentConfig, LossConfig
from kvdistill.config.training import StudentConfig
from kvdistill.corpus.readers import conversation
from kvdistill.corpus.samples import Sample
from kvdistill.distill.data.collate import Collate, Item, token_counts, tokenize
from kvdistill.distill.student.build import (
    load_student_tokenizer,
    question_ids,
    tokenizer_of,
    train_tokenizer,
)
from kvdistill.errors import StudentError

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Two and two?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And three?"},
    {"role": "assistant", "content": "Seven."},
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT = Sample("a", conversation(TURNS), chat=True)
PAIR = Sample("b", (("prompt", "Two and two?"), ("answer", "\nFour.")))
PLAIN = Sample("c", (("text", "Two and two is four."),))


def saved(folder: Path, template: str | None = CHATML) -> StudentConfig:
    made = train_tokenizer([turn["content"] for turn in TURNS], 300)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = template
    made.save_pretrained(folder)
    return StudentConfig(model=str(folder), chat_template="own")


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    """As a trained student's folder has it."""
    tokenizer_of(saved(tmp_path / "base")).save_pretrained(tmp_path / "student")
    return load_student_tokenizer(str(tmp_path / "student"))


def test_it_reads_what_its_template_prints(tokenizer: Any) -> None:
    tokens = tokenize(tokenizer, [CHAT, PAIR, PLAIN], 200)
    for found, turns in zip(tokens[:2], (TURNS, TURNS[1:3]), strict=True):
        expected = tokenizer.apply_chat_template(turns, return_dict=False)
        assert found.input_ids.tolist() == expected
    assert tokenizer.decode(tokens[2].input_ids[1:-1]) == PLAIN.text
    for sample, found in zip((CHAT, PAIR), tokens, strict=False):
        spans = zip(found.input_ids, found.char_start, found.char_end, found.segment, strict=True)
        for token, start, end, segment in spans:
            assert (segment >= 0) == (start < end)
            assert segment < 0 or tokenizer.decode(token) == sample.text[start:end]
    assert token_counts(tokenizer, [CHAT, PLAIN], 200).tolist() == [
        len(tokens[0].input_ids),
        len(tokens[2].input_ids),
    ]


def test_it_learns_the_assistants_turns_and_to_end_them(tokenizer: Any) -> None:
    collate = Collate(tokenizer, 200, AlignmentConfig(), LossConfig(), (), {})
    batch = collate([Item(CHAT, {}), Item(PAIR, {})])
    learned = [tokenizer.decode(row[row >= 0]) for row in batch["labels"]]
    assert learned[0] == "Four.<|im_end|>Seven.<|im_end|>"
    assert learned[1] == "Two and two?Four.<|im_end|>"  # losses.cross_entropy_prompt
    assert batch["text_mask"].sum(1).tolist() == [
        sum(map(len, tokenizer([turn["content"] for turn in turns])["input_ids"]))
        for turns in (TURNS, TURNS[1:3])
    ]


def test_it_is_asked_as_its_template_asks(tokenizer: Any) -> None:
    for sample, turns in ((CHAT, TURNS[:4]), (PAIR, TURNS[1:2])):
        expected = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_dict=False
        )
        assert question_ids(tokenizer, [sample]) == [expected]


def test_the_next_run_decides_anew(tokenizer: Any, tmp_path: Path) -> None:
    again = tokenizer_of(StudentConfig(model=str(tmp_path / "student")))
    (tokens,) = tokenize(again, [CHAT], 200)
    assert again.decode(tokens.input_ids[1:-1]) == CHAT.text


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "has no chat template; set student.chat_template to corpus"),
        ("{{ messages[0].content }}", "does not render each turn exactly once; set student"),
        (CHATML + "{{ strftime_now('%d %b %Y') }}", "today's date.*set student.template_date"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_line(
    tmp_path: Path, template: str | None, reason: str
) -> None:
    with pytest.raises(StudentError, match=reason) as caught:
        tokenizer_of(saved(tmp_path, template))
    assert len(str(caught.value).splitlines()) == 1


def test_a_date_can_be_set(tmp_path: Path) -> None:
    config = saved(tmp_path, "{{ strftime_now('%d %b %Y') }}" + CHATML)
    dated = StudentConfig.model_validate({**config.model_dump(), "template_date": "2026-01-31"})
    tokenizer = tokenizer_of(dated)
    (tokens,) = tokenize(tokenizer, [PAIR], 200)
    assert tokenizer.decode(tokens.input_ids).startswith("31 Jan 2026<|im_start|>user")


def test_a_date_needs_the_template() -> None:
    with pytest.raises(ValidationError, match="template_date` needs `chat_template: own"):
        StudentConfig.model_validate({"model": "x", "template_date": "2026-01-31"})
