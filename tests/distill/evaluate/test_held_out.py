"""Exact match by generation: a student that knows the answers, and what it costs it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from kvdistill.corpus.samples import Sample
from kvdistill.distill.data.collate import student_batch, tokenize
from kvdistill.distill.evaluate.held_out import generate_and_grade
from kvdistill.distill.student.build import train_tokenizer
from kvdistill.errors import CorpusError, StudentError


def sums(*pairs: tuple[int, int]) -> list[Sample]:
    return [
        Sample(
            f"{a}+{b}",
            (
                ("prompt", "Please add: " * (1 + a % 3) + f"{a} + {b}?"),
                ("rationale", f"\n{a}+{b}={a + b}"),
                ("answer", f"\n#### {a + b}"),
            ),
        )
        for a, b in pairs
    ]


SAMPLES = sums((1, 2), (3, 4), (5, 1), (2, 2), (6, 9))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer([sample.text for sample in SAMPLES], 300)


@pytest.fixture(scope="module")
def student(tokenizer: Any) -> Any:
    """A tiny model that has learned the five texts by heart."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    batch = student_batch(tokenize(tokenizer, SAMPLES, 128), 0)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(80):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.2
    return model


def test_a_student_that_knows_the_texts_answers_all_and_stops(student: Any, tokenizer: Any) -> None:
    found = generate_and_grade(student, tokenizer, SAMPLES, max_new_tokens=40)
    assert found.share == 1.0
    for sample, answer in zip(SAMPLES, found.answers, strict=True):
        assert answer.sample_id == sample.sample_id
        rest = sample.text[len(dict(sample.segments)["prompt"]) :]
        assert answer.text == rest
        written = tokenizer(rest, add_special_tokens=False)["input_ids"]
        assert answer.num_new_tokens == answer.num_forwards == len(written) + 1  # and EOS


def test_only_wrong_answers_count_as_wrong(student: Any, tokenizer: Any) -> None:
    changed = [*SAMPLES[:3], sums((2, 3))[0]]
    last = SAMPLES[4]
    changed.append(Sample(last.sample_id, (*last.segments[:2], ("answer", "\n#### 16"))))
    found = generate_and_grade(student, tokenizer, changed, max_new_tokens=40, batch_size=2)
    assert [answer.correct for answer in found.answers][:3] == [True] * 3
    assert not found.answers[4].correct
    assert (found.answers[4].expected, found.answers[4].predicted) == ("16", "15")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_batch_gives_what_single_samples_give(student: Any, tokenizer: Any, kind: str) -> None:
    if kind == "gpt2":  # learned positions: padding on the left must not shift them
        torch.manual_seed(1)
        config = GPT2Config(
            n_embd=32, n_layer=2, n_head=4, n_positions=128, vocab_size=len(tokenizer),
            initializer_range=0.5,
        )  # fmt: skip
        student = GPT2LMHeadModel(config)
    short = {"max_new_tokens": 12}
    together = generate_and_grade(student, tokenizer, SAMPLES, batch_size=5, **short)
    alone = [generate_and_grade(student, tokenizer, [s], **short).answers[0] for s in SAMPLES]
    assert list(together.answers) == alone


def test_forward_passes_are_those_that_a_sample_takes_alone(student: Any, tokenizer: Any) -> None:
    calls = []
    hook = student.model.register_forward_hook(lambda *_: calls.append(1))
    (answer,) = generate_and_grade(student, tokenizer, SAMPLES[:1], max_new_tokens=40).answers
    hook.remove()
    assert answer.num_forwards == len(calls)


def test_settings_of_the_model_do_not_make_it_random(student: Any, tokenizer: Any) -> None:
    plain = generate_and_grade(student, tokenizer, SAMPLES, max_new_tokens=40)
    own = student.generation_config
    own.do_sample, own.temperature, own.repetition_penalty = True, 9.0, 5.0
    try:
        assert generate_and_grade(student, tokenizer, SAMPLES, max_new_tokens=40) == plain
    finally:
        own.do_sample, own.temperature, own.repetition_penalty = None, None, None


def test_the_model_is_left_as_it_was(student: Any, tokenizer: Any) -> None:
    student.train()
    generate_and_grade(student, tokenizer, SAMPLES[:1], max_new_tokens=2)
    assert student.training
    assert generate_and_grade(student, tokenizer, [], max_new_tokens=2).share == 0


def test_a_prompt_that_is_too_long_loses_its_beginning(student: Any, tokenizer: Any) -> None:
    long = Sample("long", (("prompt", "word " * 300 + SAMPLES[0].text[:10]), ("answer", "\n1")))
    (answer,) = generate_and_grade(student, tokenizer, [long], max_new_tokens=5).answers
    assert answer.num_new_tokens <= 5


def test_what_cannot_be_asked_is_refused(student: Any, tokenizer: Any) -> None:
    with pytest.raises(StudentError, match="128 positions"):
        generate_and_grade(student, tokenizer, SAMPLES, max_new_tokens=128)
    with pytest.raises(CorpusError, match="plain"):
        generate_and_grade(student, tokenizer, [Sample("plain", (("text", "x"),))])
