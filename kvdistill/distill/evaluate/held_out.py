"""Everything that is asked about held-out samples: how well they are predicted, and answered.

One row per sample holds all its figures, because runs are compared sample by sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from kvdistill.corpus.samples import Sample
from kvdistill.distill.evaluate.answers import is_gradable
from kvdistill.distill.evaluate.generation import generate_and_grade
from kvdistill.distill.evaluate.perplexity import score_texts


@dataclass(frozen=True)
class HeldOut:
    """What an evaluation found."""

    metrics: dict[str, float]
    rows: list[dict[str, Any]]
    """Per sample: ``nll`` (nats), ``num_tokens``, ``num_chars``; and, where it was asked to
    answer, ``correct``, ``expected``, ``predicted``, ``text``, ``num_new_tokens``,
    ``num_forwards``."""
    calibration: list[dict[str, float]] = field(default_factory=list)
    """``num_tokens``, ``confidence`` and ``accuracy`` of every bin that holds tokens."""


def score_held_out(
    student: Any,
    tokenizer: Any,
    samples: Sequence[Sample],
    *,
    max_length: int,
    batch_size: int,
    answer: int | None = 0,
    max_new_tokens: int = 256,
) -> HeldOut:
    """Perplexity and its like on every sample, exact match on the first ``answer`` that have one.

    Args:
        student: a transformers causal LM.
        tokenizer: its tokenizer.
        samples: held-out samples.
        max_length: tokens per text that are scored.
        batch_size: samples per forward pass.
        answer: how many samples with a prompt and an answer to generate for; None for all.
        max_new_tokens: room for a rationale and an answer.
    """
    scores = score_texts(student, tokenizer, samples, max_length=max_length, batch_size=batch_size)
    metrics, rows = scores.to_dict(), {row["sample_id"]: row for row in scores.rows()}
    asked = [sample for sample in samples if is_gradable(sample)][:answer]
    if asked:
        answers = generate_and_grade(
            student, tokenizer, asked, max_new_tokens=max_new_tokens, batch_size=batch_size
        )
        metrics |= answers.to_dict()
        for row in answers.rows():
            rows[row["sample_id"]] |= row
    return HeldOut(metrics, list(rows.values()), [asdict(found) for found in scores.calibration])
