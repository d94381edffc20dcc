from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from kvdistill.attention.prompt_template import (
    PLAIN_TEXT,
    PromptTemplate,
    chat_template,
    parse_template,
)
from kvdistill.corpus.samples import Sample
from kvdistill.errors import TeacherError
from kvdistill.extract.tokenise import Bos, PromptTokenizer, TokenisedSample
from tests.extract.models import tiny_tokenizer

GSM = Sample("a", (("prompt", "How many?"), ("rationale", "\n48+24=72."), ("answer", "\n#### 72")))
PLAIN = Sample("b", (("text", "Natalia sold clips."),))
EMPTY = Sample("c", (("text", ""),))
TOKENIZER = tiny_tokenizer()
BOS_TOKENIZER = tiny_tokenizer(bos=True)
TEMPLATE = parse_template("Q: {prompt}\nA:{rationale}{answer} END")


def encode(
    tokenizer: object, samples: list[Sample], template: PromptTemplate, limit: int | None = None
) -> list[TokenisedSample]:
    return PromptTokenizer(tokenizer, template).tokenise(samples, limit)


def covered(sample: Sample, template: PromptTemplate, tokenizer: object = TOKENIZER) -> list[int]:
    """How often every character of the sample is inside a text token."""
    (encoded,) = encode(tokenizer, [sample], template)
    counts = [0] * len(sample.text)
    for start, end in zip(encoded.char_start, encoded.char_end, strict=True):
        for position in range(start, end):
            counts[position] += 1
    return counts


def test_without_a_template_every_character_is_read_once() -> None:
    assert covered(GSM, PLAIN_TEXT) == [1] * len(GSM.text)


def test_template_words_are_special_and_the_text_still_maps() -> None:
    (encoded,) = encode(TOKENIZER, [GSM], TEMPLATE)
    assert covered(GSM, TEMPLATE) == [1] * len(GSM.text)
    text = encoded.segment >= 0
    assert (encoded.char_start[~text] == encoded.char_end[~text]).all()
    assert encoded.segment[0] == -1
    assert encoded.segment[-1] == -1
    assert (np.diff(encoded.char_start) >= 0).all()


def test_segments_follow_the_first_character() -> None:
    (encoded,) = encode(TOKENIZER, [GSM], TEMPLATE)
    for start, segment in zip(encoded.char_start, encoded.segment, strict=True):
        if segment >= 0:
            owner = next(i for a, b, i in GSM.spans if a <= start < b)
            assert segment == owner


def test_templates_may_leave_parts_out_and_change_their_order() -> None:
    template = parse_template("{answer} because {rationale}")
    (encoded,) = encode(TOKENIZER, [GSM], template)
    counts = covered(GSM, template)
    prompt = len(GSM.segments[0][1])
    assert counts[:prompt] == [0] * prompt
    assert counts[prompt:] == [1] * (len(GSM.text) - prompt)
    assert set(encoded.segment) == {-1, 2, 3}


def test_bos_has_no_text() -> None:
    (encoded,) = encode(BOS_TOKENIZER, [GSM], PLAIN_TEXT)
    assert (encoded.token_ids[0], encoded.segment[0], encoded.char_end[0]) == (1, -1, 0)
    assert covered(GSM, PLAIN_TEXT, BOS_TOKENIZER) == [1] * len(GSM.text)


def test_empty_text() -> None:
    assert encode(TOKENIZER, [EMPTY], PLAIN_TEXT)[0].num_tokens == 0
    assert encode(TOKENIZER, [], PLAIN_TEXT) == []
    with_bos = encode(BOS_TOKENIZER, [EMPTY], PLAIN_TEXT)[0]
    assert with_bos.segment.tolist() == [-1]


def test_multi_byte_characters_are_covered_by_each_of_their_tokens() -> None:
    sample = Sample("m", (("text", "aé猫🙂"),))
    (encoded,) = encode(TOKENIZER, [sample], PLAIN_TEXT)
    spans = list(zip(encoded.char_start.tolist(), encoded.char_end.tolist(), strict=True))
    assert all(end > start for start, end in spans)
    assert len(spans) > 4
    assert {span for span in spans if span[0] == 3} == {(3, 4)}


@given(st.lists(st.text(max_size=30), min_size=3, max_size=3))
def test_any_text_is_covered_and_in_order(parts: list[str]) -> None:
    prompt, rationale, answer = parts
    sample = Sample("h", (("prompt", prompt), ("rationale", rationale), ("answer", answer)))
    (encoded,) = encode(TOKENIZER, [sample], TEMPLATE)
    assert all(count >= 1 for count in covered(sample, TEMPLATE))
    assert (encoded.char_end <= len(sample.text)).all()
    assert (np.diff(encoded.char_start) >= 0).all()
    assert ((encoded.segment >= 0) == (encoded.char_end > encoded.char_start)).all()


def test_truncation_keeps_the_special_tokens() -> None:
    (encoded,) = encode(BOS_TOKENIZER, [GSM], PLAIN_TEXT, 5)
    assert encoded.num_tokens == 5
    assert encoded.segment.tolist()[0] == -1


@pytest.mark.parametrize("template", ["no placeholder", "{nothing}", "{prompt", "{}"])
def test_bad_templates(template: str) -> None:
    with pytest.raises(TeacherError, match="template"):
        parse_template(template)


def test_a_template_of_segments_needs_segments() -> None:
    with pytest.raises(TeacherError, match="'b' is plain text"):
        encode(TOKENIZER, [PLAIN], TEMPLATE)


class _Backwards:
    """A tokenizer whose offsets are wrong."""

    is_fast = True

    def __init__(self, offsets: list[tuple[int, int]]) -> None:
        self.offsets = offsets

    def __call__(self, texts: list[str], **options: object) -> dict[str, list[list[object]]]:
        return {
            "input_ids": [[1] * len(self.offsets) for _ in texts],
            "offset_mapping": [list(self.offsets) for _ in texts],
        }


@pytest.mark.parametrize("offsets", [[(0, 4), (3, 999)], [(5, 6), (0, 5)], [(4, 2)], [(-1, 2)]])
def test_wrong_offsets_name_the_sample(offsets: list[tuple[int, int]]) -> None:
    with pytest.raises(TeacherError, match="sample 'b'"):
        encode(_Backwards(offsets), [PLAIN], PLAIN_TEXT)


CHAT = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</s>{% endfor %}"


def test_the_chat_template_is_cut_at_the_turns() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    template = chat_template(tokenizer, "Be brief.")
    assert template.render(GSM).text == (
        "<s><system>Be brief.</s><user>How many?</s><assistant>48+24=72.\n#### 72</s>"
    )
    (encoded,) = PromptTokenizer(tokenizer, template, add_special_tokens=False).tokenise([GSM])
    assert (encoded.token_ids[0], encoded.token_ids[-1]) == (1, 2)
    counts = covered(GSM, template, tokenizer)
    assert [i for i, count in enumerate(counts) if count != 1] == [len("How many?")]


def test_chat_needs_a_template_that_shows_both_turns() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(TeacherError, match="no chat template"):
        chat_template(tokenizer)
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(TeacherError, match="exactly once"):
        chat_template(tokenizer)


@pytest.mark.parametrize(
    ("tokenizer", "bos", "expected"),
    [
        (TOKENIZER, "add", True),
        (TOKENIZER, "keep", False),
        (BOS_TOKENIZER, "add", True),
        (BOS_TOKENIZER, "remove", False),
        (TOKENIZER, "remove", False),
    ],
)
def test_rules_for_bos(tokenizer: object, bos: Bos, expected: bool) -> None:
    (encoded,) = PromptTokenizer(tokenizer, bos=bos).tokenise([GSM])
    assert (encoded.token_ids == 1).sum() == expected
    assert (encoded.token_ids[0] == 1) == expected
    assert (encoded.segment == -1).sum() == expected
    (cut,) = PromptTokenizer(tokenizer, bos=bos).tokenise([GSM], 5)
    assert cut.num_tokens <= 5


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("[{prompt}|{rationale:strip}]", "[How many?|48+24=72.]"),
        ("[{rationale:lstrip}{answer:rstrip}]", "[48+24=72.\n#### 72]"),
        ("{{}}{text}", "{}How many?\n48+24=72.\n#### 72"),
    ],
)
def test_rendering(template: str, text: str) -> None:
    rendered = parse_template(template).render(GSM)
    assert rendered.text == text
    for start, end, origin in rendered.ranges:
        assert rendered.text[start:end] == GSM.text[origin : origin + end - start]


def test_what_stands_before_a_slot() -> None:
    assert TEMPLATE.before("rationale").render(GSM).text == "Q: How many?\nA:"
    with pytest.raises(TeacherError, match="to generate"):
        PLAIN_TEXT.before("rationale")


@pytest.mark.parametrize("bos", ["keep", "add"])
@pytest.mark.parametrize(
    ("template", "text"), [("<s>Q {text}", "Two?"), ("{text}", "<s>Two?"), ("<s>{text}", "<s>Two?")]
)
def test_a_bos_that_is_spelled_out_is_not_added_again(bos: Bos, template: str, text: str) -> None:
    sample = Sample("a", (("text", text),))
    tokenizer = PromptTokenizer(BOS_TOKENIZER, parse_template(template), bos=bos)
    (encoded,) = tokenizer.tokenise([sample])
    spelled = parse_template(template).render(sample).text.replace("<s><s>", "<s>")
    assert encoded.token_ids.tolist() == BOS_TOKENIZER.encode(spelled, add_special_tokens=False)
    in_text = encoded.segment[0] >= 0
    assert (encoded.char_end[0] == 3) == in_text == text.startswith("<s>")


def test_special_tokens_at_both_ends_are_not_added_again() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    for text in ("Two?", "<s>Two?", "Two?</s>", "<s>Two?</s>"):
        (encoded,) = encode(tokenizer, [Sample("a", (("text", text),))], PLAIN_TEXT)
        ids = encoded.token_ids.tolist()
        assert ids == [1, *tokenizer.encode("Two?", add_special_tokens=False), 2]
    (empty,) = encode(tokenizer, [EMPTY], PLAIN_TEXT)
    assert empty.token_ids.tolist() == [1, 2]
