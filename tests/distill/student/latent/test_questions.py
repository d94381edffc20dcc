"""Batches of questions and answers: padding, labels, and batches that count nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvdistill.config.distill import AlignmentConfig, LatentConfig, LossConfig
from kvdistill.corpus.samples import Sample
from kvdistill.distill.data.collate import Item
from kvdistill.distill.student.latent.questions import LatentCollate
from kvdistill.errors import CorpusError
from tests.distill.student.latent.test_generation import TOKENIZER


def collate(max_length: int = 20, **losses: Any) -> LatentCollate:
    settings = (AlignmentConfig(), LossConfig(**losses), (), {"sums": 1})
    return LatentCollate(TOKENIZER, max_length, *settings, LatentConfig(num_latents=2))


def item(prompt: str, answer: str, rationale: str = "", task: str | None = None) -> Item:
    segments = (("prompt", prompt), ("rationale", rationale), ("answer", answer))
    return Item(Sample(prompt, segments, task), {})


ITEMS = [item("1+2*3", "\n9", "3*3=9", "sums"), item("7", "\n12345")]


def test_questions_are_padded_on_the_left_and_answers_on_the_right() -> None:
    batch = collate()(ITEMS)
    bos, eos, pad = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id, TOKENIZER.pad_token_id
    asked, answered = (TOKENIZER(text)["input_ids"] for text in ("7", "\n9"))
    assert batch["question_ids"][1].tolist() == [pad] * 4 + [bos, *asked]
    assert batch["question_mask"][1].tolist() == [0] * 4 + [1, 1]
    assert batch["answer_ids"][0].tolist() == [*answered, eos] + [pad] * 4
    assert batch["labels"][0].tolist() == [-100, *answered, eos] + [-100] * 4
    assert batch["task"].tolist() == [1, 0]


def test_the_full_text_has_labels_after_the_question_alone() -> None:
    batch = collate(rationale=1.0)(ITEMS)
    texts = [
        TOKENIZER.decode(row[row >= 0], skip_special_tokens=True)
        for row in batch["rationale_labels"]
    ]
    assert texts == ["3*3=9\n9", "\n12345"]


@pytest.mark.parametrize("rationale", [0.0, 1.0])
def test_a_batch_without_weight_has_no_labels(rationale: float) -> None:
    """As a rank gets that has no samples of a global batch."""
    made = collate(rationale=rationale)
    batch = made(ITEMS)
    masked = made.without_weight(batch)
    assert masked.keys() == batch.keys()
    for name in ("labels", "rationale_labels"):
        assert name not in masked or bool((masked[name] == -100).all())
    assert torch.equal(masked["question_ids"], batch["question_ids"])


def test_a_sample_without_an_answer_is_refused_by_name() -> None:
    with pytest.raises(CorpusError, match="'lonely': expected a prompt and an answer"):
        collate()([Item(Sample("lonely", (("text", "1"),)), {})])
