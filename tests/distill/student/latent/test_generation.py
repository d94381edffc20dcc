"""Answers against the slow way, in any batch; how many passes they take; saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import kvdistill
from kvdistill.corpus.samples import Sample
from kvdistill.distill.evaluate.held_out import latent_exact_match
from kvdistill.distill.student.build import character_tokenizer
from kvdistill.distill.student.latent.model import LatentStudent, answer, is_latent
from kvdistill.distill.student.latent.probes import TAMPERINGS, tamper_with, tampered
from kvdistill.errors import CorpusError, StudentError
from tests.distill.student.latent.thinkers import LLAMA, slow, thinker

QUESTIONS = ["1+2*3", "7", "40-5"]
TOKENIZER = character_tokenizer(["0123456789+-*=\n "])
METHODS: dict[str, dict[str, Any]] = {
    "none": {"method": "none"},
    "pause": {"method": "pause"},
    "pccot": {"method": "pccot", "iterations": 2},
    "codi": {"method": "codi"},
}


def student_of(**settings: Any) -> LatentStudent:
    family = (LLAMA[0], {**LLAMA[1], "vocab_size": len(TOKENIZER)})
    return thinker(family, num_latents=3, **settings)


def slowly(student: LatentStudent, question: str, room: int) -> list[int]:
    ids = [TOKENIZER.bos_token_id, *TOKENIZER(question)["input_ids"]]
    written: list[int] = []
    while len(written) < room and TOKENIZER.eos_token_id not in written:
        one = {"question_BT": torch.tensor([ids])}
        one["answer_BA"] = torch.tensor([written], dtype=torch.long)
        written.append(int(slow(student, one)[0][-1].argmax()))
    return written


@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
def test_answers_equal_the_slow_way_in_any_batch(settings: dict[str, Any]) -> None:
    student = student_of(**settings)
    together = answer(student, TOKENIZER, QUESTIONS, 6)
    assert together == [slowly(student, question, 6) for question in QUESTIONS]
    assert together == [answer(student, TOKENIZER, [q], 6)[0] for q in QUESTIONS]


def test_an_answer_ends_with_the_end_of_text() -> None:
    student = student_of(method="pause")
    row = answer(student, TOKENIZER, QUESTIONS[:1], 8)[0]
    end = row[2]  # make a token it writes the end
    tokenizer = character_tokenizer(["0123456789+-*=\n "])
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    assert answer(student, tokenizer, QUESTIONS, 8)[0] == row[: row.index(end) + 1]
    assert answer(student, tokenizer, [], 8) == []
    with pytest.raises(StudentError, match="at least 1"):
        answer(student, tokenizer, QUESTIONS, 0)


@pytest.mark.parametrize(
    ("settings", "thinking"),
    [({"method": "none"}, 1), ({"method": "pause"}, 1), ({"method": "codi"}, 4),
     ({"method": "pccot", "iterations": 2}, 3)],
)  # fmt: skip
def test_forward_passes_are_counted_as_they_are_made(
    settings: dict[str, Any], thinking: int
) -> None:
    student = student_of(**settings)
    made = 0

    def count(*_: Any) -> None:
        nonlocal made
        made += 1

    sample = Sample("a", (("prompt", "1+2"), ("answer", "\n3")))
    handle = student.backbone.base_model.register_forward_hook(count)
    found = latent_exact_match(student, TOKENIZER, [sample], max_new_tokens=5, batch_size=4)
    handle.remove()
    assert student.num_passes == thinking
    assert found.answers[0].num_forwards == made == thinking + found.answers[0].num_new_tokens - 1


def test_samples_without_an_answer_are_refused() -> None:
    with pytest.raises(CorpusError, match="prompt and an answer"):
        latent_exact_match(
            student_of(method="pause"), TOKENIZER, [Sample("a", (("text", "1"),))],
            max_new_tokens=2, batch_size=2,
        )  # fmt: skip


@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
def test_saved_and_loaded_it_answers_the_same(settings: dict[str, Any], tmp_path: Path) -> None:
    student = student_of(**settings)
    student.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(str(tmp_path))
    loaded = kvdistill.LatentStudent.from_pretrained(tmp_path)
    assert loaded.config == student.config
    for name, value in student.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    assert loaded.generate(TOKENIZER, QUESTIONS) == student.generate(TOKENIZER, QUESTIONS)
    backbone = AutoModelForCausalLM.from_pretrained(tmp_path)  # an ordinary folder as well
    assert torch.equal(backbone.lm_head.weight, student.backbone.lm_head.weight)


def test_a_folder_without_latents_is_refused(tmp_path: Path) -> None:
    student = student_of(method="pause")
    student.backbone.save_pretrained(tmp_path)
    assert not is_latent(tmp_path)
    with pytest.raises(StudentError, match="no latent student"):
        LatentStudent.from_pretrained(tmp_path)
    student.save_pretrained(tmp_path)
    (tmp_path / "latent.json").write_text(
        student.config.model_copy(update={"method": "codi"}).model_dump_json()
    )
    with pytest.raises(StudentError, match="missing"):
        LatentStudent.from_pretrained(tmp_path)


@pytest.mark.parametrize("method", ["pause", "pccot", "codi"])
def test_latents_that_are_left_alone_give_the_same_answers(method: str) -> None:
    student = student_of(method=method)
    untouched = tampered(student, lambda x_BHMD: x_BHMD)
    whole = answer(student, TOKENIZER, QUESTIONS, 5)
    assert answer(student, TOKENIZER, QUESTIONS, 5, untouched) == whole
    ids = torch.tensor([[1, 9, 8, 7]])
    ours, theirs = student(ids, torch.ones_like(ids)), untouched(ids, torch.ones_like(ids))
    torch.testing.assert_close(ours.answer_logits, theirs.answer_logits, atol=1e-5, rtol=1e-5)


def test_every_tampering_reaches_what_the_answer_sees() -> None:
    student = student_of(method="pccot", iterations=2)
    ids = torch.tensor([[1, 9, 8, 7], [1, 5, 5, 4]])
    mask = torch.ones_like(ids)
    logits = student(ids, mask).answer_logits
    for name, tamper in TAMPERINGS.items():
        changed = (tampered(student, tamper)(ids, mask).answer_logits - logits).abs().amax((1, 2))
        assert bool((changed > 1e-5).all()), name
    twins = ids[:1].expand(2, -1)  # who swaps with a twin has swapped nothing
    swapped = tampered(student, TAMPERINGS["swapped"])(twins, mask).answer_logits
    torch.testing.assert_close(swapped, student(twins, mask).answer_logits, atol=1e-5, rtol=1e-5)


def test_zeroed_latents_are_keys_and_values_of_zero_in_every_layer() -> None:
    student = student_of(method="pause")
    ids = torch.tensor([[1, 9, 8, 7]])
    thought = tampered(student, TAMPERINGS["zeroed"])(ids, torch.ones_like(ids))
    for layer in thought.cache.layers:
        assert float(layer.values[:, :, thought.columns].abs().max()) == 0
        assert float(layer.keys[:, :, thought.columns].abs().max()) == 0
        assert float(layer.values[:, :, -1].abs().max()) > 0


def test_tampering_needs_latents() -> None:
    sample = Sample("a", (("prompt", "1+2"), ("answer", "\n3")))
    with pytest.raises(StudentError, match="no latents"):
        tamper_with(student_of(method="none"), TOKENIZER, [sample], max_new_tokens=2, batch_size=1)
