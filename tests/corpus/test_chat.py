"""Conversations: turns become segments, templates print them, and only the answers are learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvdistill.attention.prompt_template import chat_template, parse_template
from kvdistill.config.distill import AlignmentConfig, LossConfig
from kvdistill.corpus.readers import conversation, read_files
from kvdistill.corpus.samples import Sample
from kvdistill.distill.data.collate import Collate, Item
from kvdistill.distill.evaluate.answers import is_gradable
from kvdistill.distill.evaluate.perplexity import score_texts
from kvdistill.distill.student.build import train_tokenizer
from kvdistill.errors import CorpusError, TeacherError
from kvdistill.extract.tokenise import PromptTokenizer

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Two and two?"},
    {"role": "assistant", "content": "Four.", "reasoning_content": "2 + 2"},
    {"role": "user", "content": "And three?"},
    {"role": "assistant", "content": "Seven."},
]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}</{{ m['role'] }}>\n"
    "{% endfor %}"
)


def sample(turns: list[dict[str, Any]] = TURNS) -> Sample:
    return Sample("a", conversation(turns), chat=True)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = train_tokenizer([" ".join(turn["content"] for turn in TURNS)], 300)
    made.chat_template = TEMPLATE
    return made


def test_turns_become_segments_and_are_found_again(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    shared = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    rows = [{"messages": TURNS, "task": "sums"}, {"conversations": shared}, {"messages": parts}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole, sharegpt, unanswered = read_files(path)
    assert whole.segments == (
        ("prompt", "Be brief."), ("prompt", "\nTwo and two?"), ("rationale", "\n2 + 2"),
        ("answer", "\nFour."), ("prompt", "\nAnd three?"), ("answer", "\nSeven."),
    )  # fmt: skip
    assert [role for role, _ in whole.turns] == ["system", *["user", "assistant"] * 2]
    assert whole.question == whole.text.removesuffix("\nSeven.")
    assert sharegpt.segments == (("prompt", "Hi"), ("answer", "\nHello"))
    assert (is_gradable(whole), is_gradable(unanswered)) == (True, False)
    assert Sample.from_json(whole.to_json()) == whole
    assert "chat" not in Sample("a", (("text", "x"),)).to_json()


@pytest.mark.parametrize("system", [None, "Be kind."])
def test_a_teacher_reads_what_its_chat_template_prints(tokenizer: Any, system: str | None) -> None:
    one = sample()
    rendered = chat_template(tokenizer, system).render(one)
    thought = {"role": "assistant", "content": "2 + 2\nFour."}
    assert rendered.text == tokenizer.apply_chat_template(
        [*TURNS[:2], thought, *TURNS[3:]], tokenize=False
    )  # the conversation's own system message wins
    back = "".join(rendered.text[start:end] for start, end, _ in rendered.ranges)
    assert back == one.text.replace("\n", "").replace("2Four", "2\nFour")
    other = chat_template(tokenizer, system).render(sample(TURNS[1:2]))
    head = [] if system is None else [{"role": "system", "content": system}]
    assert other.text == tokenizer.apply_chat_template([*head, TURNS[1]], tokenize=False)


def test_one_turn_keeps_the_template_that_pairs_have(tokenizer: Any) -> None:
    pair = Sample("a", (("prompt", "Hi"), ("answer", "\nHello")))
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    template = chat_template(tokenizer)
    assert template.render(sample(turns)).text == template.render(pair).text.replace(">\nH", ">H")


def test_several_turns_do_not_fit_a_template_of_one(tokenizer: Any) -> None:
    with pytest.raises(TeacherError, match=r"several turns.*`chat: true`"):
        parse_template("Q: {prompt}{answer}").render(sample())
    assert parse_template("{text}").render(sample()).text == sample().text


WORDS = st.text("ab \n", min_size=1, max_size=8).filter(str.strip)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(WORDS, min_size=1, max_size=6), has_system=st.booleans())
def test_tokens_of_any_conversation_map_to_their_turns(
    tokenizer: Any, texts: list[str], has_system: bool
) -> None:
    roles = [["user", "assistant"][i % 2] for i in range(len(texts))]
    if has_system:
        texts, roles = ["a", *texts], ["system", *roles]
    one = sample([{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)])
    assert [role for role, _ in one.turns] == roles
    prompts = PromptTokenizer(tokenizer, chat_template(tokenizer), add_special_tokens=False)
    (tokens,) = prompts.tokenise([one])
    read = set()
    for start, end, segment in zip(tokens.char_start, tokens.char_end, tokens.segment, strict=True):
        read |= set(range(start, end))
        if segment >= 0:
            assert any(a <= start < b and segment == s for a, b, s in one.spans)
    unread = "".join(char for i, char in enumerate(one.text) if i not in read)
    assert not unread.strip()


def test_cross_entropy_and_perplexity_count_the_assistants_turns(tokenizer: Any) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    one, plain = sample(), Sample("b", sample().segments)
    collate = Collate(tokenizer, 200, AlignmentConfig(), LossConfig(), (), {})
    labels = collate([Item(one, {}), Item(plain, {})])["labels"]
    learned = tokenizer.decode(labels[0][labels[0] >= 0], skip_special_tokens=True)
    assert learned == "\n2 + 2\nFour.\nSeven."
    assert (labels[1] >= 0).sum() > (labels[0] >= 0).sum()
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    student = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=2, **sizes)
    )
    scores = score_texts(student, tokenizer, [one, plain], max_length=200, batch_size=2).samples
    assert scores[0].num_chars == len("\n2 + 2\nFour.\nSeven.")
    assert scores[1].num_chars == len(one.text)
    assert scores[0].nll < scores[1].nll
    with pytest.raises(CorpusError, match="has a token to predict"):
        score_texts(student, tokenizer, [sample(TURNS[:2])], max_length=200, batch_size=2)
