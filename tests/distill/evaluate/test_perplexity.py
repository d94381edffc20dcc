"""Scores of held-out texts, sample by sample."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from kvdistill.attention import language_head
from kvdistill.corpus.samples import Sample
from kvdistill.distill.evaluate.held_out import score_held_out
from kvdistill.distill.evaluate.perplexity import CALIBRATION_BINS, Calibration, score_texts
from kvdistill.distill.student.build import train_tokenizer
from kvdistill.errors import StudentError

TEXTS = ["How many?", "two and two make four, and four and four make eight", "", "x", "ééé 🙂 ok"]
SAMPLES = [Sample(f"s{i}", (("text", text),)) for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(TEXTS, 300)


@pytest.fixture(scope="module")
def student(tokenizer: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def by_hand(student: Any, tokenizer: Any, text: str) -> float:
    """Negative log-likelihood of a text after BOS, token by token."""
    ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    with torch.no_grad():
        logs = student(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return -sum(float(logs[i, token]) for i, token in enumerate(ids[1:]))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_sample_has_its_own_figures(student: Any, tokenizer: Any, batch_size: int) -> None:
    found = score_texts(student, tokenizer, SAMPLES, max_length=100, batch_size=batch_size)
    assert [score.sample_id for score in found.samples] == ["s0", "s1", "s2", "s3", "s4"]
    for score, text in zip(found.samples, TEXTS, strict=True):
        assert score.nll == pytest.approx(by_hand(student, tokenizer, text), rel=1e-5, abs=1e-6)
        assert score.num_tokens == len(tokenizer(text, add_special_tokens=False)["input_ids"])
        assert score.num_chars == len(text)
    figures, nll = found.to_dict(), sum(score.nll for score in found.samples)
    assert figures["nll"] == pytest.approx(nll)
    assert figures["perplexity"] == pytest.approx(math.exp(nll / figures["num_tokens"]))
    chars = sum(map(len, TEXTS))
    assert figures["bits_per_character"] == pytest.approx(nll / math.log(2) / chars)


def test_what_is_cut_off_is_not_counted(student: Any, tokenizer: Any) -> None:
    (score,) = score_texts(student, tokenizer, SAMPLES[1:2], max_length=4, batch_size=1).samples
    assert score.num_tokens == 3
    assert 0 < score.num_chars < len(TEXTS[1])


def calibration_by_hand(logits: Tensor, labels: Tensor) -> float:
    bins: dict[int, list[tuple[float, bool]]] = {}
    for row, label in zip(logits.flatten(0, 1), labels.flatten().tolist(), strict=True):
        if label >= 0:
            confidence = float(row.double().softmax(-1).max())
            place = min(int(confidence * CALIBRATION_BINS), CALIBRATION_BINS - 1)
            bins.setdefault(place, []).append((confidence, int(row.argmax()) == label))
    total = sum(map(len, bins.values()))
    gaps = [
        abs(sum(c for c, _ in found) / len(found) - sum(r for _, r in found) / len(found))
        * len(found)
        for found in bins.values()
    ]
    return sum(gaps) / total


def test_calibration_equals_its_definition_over_several_batches() -> None:
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(4, 50, 7), torch.randint(0, 7, (4, 50))
    labels[:, 40:] = -100
    calibration = Calibration(torch.device("cpu"))
    for half in (slice(0, 1), slice(1, 4)):
        calibration.add(logits[half], labels[half])
    assert calibration.error == pytest.approx(calibration_by_hand(logits, labels), abs=1e-6)
    assert calibration.error > 0.1
    total = sum(found["num_tokens"] for found in calibration.bins)
    gaps = [
        found["num_tokens"] * abs(found["confidence"] - found["accuracy"])
        for found in calibration.bins
    ]
    assert sum(gaps) / total == pytest.approx(calibration.error)
    assert total == int((labels != -100).sum())


@pytest.mark.parametrize(("right", "error"), [(True, 0.0), (False, 1.0)])
def test_certainty_is_calibrated_only_where_it_is_right(right: bool, error: float) -> None:
    logits = torch.zeros(1, 6, 5)
    logits[..., 2] = 100.0
    calibration = Calibration(torch.device("cpu"))
    calibration.add(logits, torch.full((1, 6), 2 if right else 3))
    assert calibration.error == pytest.approx(error, abs=1e-6)
    assert Calibration(torch.device("cpu")).error == 0


def test_answers_are_asked_of_the_first_samples_that_have_one(student: Any, tokenizer: Any) -> None:
    asked = [
        Sample(f"q{i}", (("prompt", f"How many {i}?"), ("answer", f"\n#### {i}"))) for i in range(3)
    ]
    found = score_held_out(
        student, tokenizer, [*SAMPLES, *asked], max_length=32, batch_size=2, answer=2,
        max_new_tokens=4,
    )  # fmt: skip
    assert found.metrics["num_answers"] == 2
    assert [row["sample_id"] for row in found.rows if "correct" in row] == ["q0", "q1"]
    assert all({"nll", "num_tokens", "num_chars"} <= row.keys() for row in found.rows)
    without = score_held_out(student, tokenizer, asked, max_length=32, batch_size=2)
    assert "exact_match" not in without.metrics


def test_every_task_counts_alike_in_the_mean_over_tasks(student: Any, tokenizer: Any) -> None:
    texts = ["aa bb", "one two three four five six", "seven eight"]
    labelled = [
        Sample(f"t{i}", (("text", text),), task)
        for i, (text, task) in enumerate(zip(texts, ["short", "long", "long"], strict=True))
    ]
    found = score_held_out(student, tokenizer, labelled, max_length=64, batch_size=2)
    bits = {
        task: sum(by_hand(student, tokenizer, text) for text in chosen)
        / (math.log(2) * sum(map(len, chosen)))
        for task, chosen in {"short": texts[:1], "long": texts[1:]}.items()
    }
    for task, expected in bits.items():
        assert found.metrics[f"bits_per_character/{task}"] == pytest.approx(expected, rel=1e-5)
    mean = (bits["short"] + bits["long"]) / 2
    assert found.metrics["bits_per_character_macro"] == pytest.approx(mean, rel=1e-5)
    assert [row["task"] for row in found.rows] == ["short", "long", "long"]

    one = score_held_out(student, tokenizer, labelled[1:], max_length=64, batch_size=2)
    assert not any("/" in name or "macro" in name for name in one.metrics)


class Alone(Exception):
    """Ends a rank where it would wait for the others."""


@pytest.mark.parametrize("world", [2, 3])
def test_every_rank_scores_its_share_and_all_get_the_same_figures(
    student: Any, tokenizer: Any, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = SAMPLES * 2
    options: dict[str, Any] = {"max_length": 40, "batch_size": 2}
    alone = score_texts(student, tokenizer, samples, **options)
    boxes: list[Any] = []

    def gather(found: list[Any], mine: Any) -> None:
        if len(boxes) < world:
            boxes.append(mine)
            raise Alone
        found[:] = boxes

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: world)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    for rank in range(world):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        with pytest.raises(Alone):
            score_texts(student, tokenizer, samples, **options)
    assert sorted(n for own, _ in boxes for n in own) == list(range((len(samples) + 1) // 2))
    together = score_texts(student, tokenizer, samples, **options)
    assert together.samples == alone.samples
    assert together.to_dict() == alone.to_dict()
    boxes[1] = ({}, StudentError("rank 1 failed"))
    with pytest.raises(StudentError, match="rank 1 failed"):
        score_texts(student, tokenizer, samples, **options)


def test_a_large_vocabulary_is_scored_in_chunks(
    student: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"max_length": 100, "batch_size": 3}
    whole = score_texts(student, tokenizer, SAMPLES, **options)
    monkeypatch.setattr(language_head, "MAX_LOGITS", 4 * len(tokenizer))
    found = score_texts(student, tokenizer, SAMPLES, **options)
    assert found.to_dict() == pytest.approx(whole.to_dict(), rel=1e-5)
    for ours, theirs in zip(found.samples, whole.samples, strict=True):
        assert ours.nll == pytest.approx(theirs.nll, rel=1e-5, abs=1e-6)
