"""Evaluation of a student on held-out samples: one set of metrics, one row per sample.

A text student is scored by perplexity, bits per character and calibration (``perplexity.py``) and,
on request, by exact match of generated answers (``generation.py``). A latent student is scored by
exact match alone: it generates no rationale whose tokens could have a likelihood. Rows are kept
because runs are compared sample by sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from kvdistill.corpus.samples import Sample
from kvdistill.distill.evaluate.answers import Answer, ExactMatch, grade, is_gradable
from kvdistill.distill.evaluate.generation import generate_and_grade
from kvdistill.distill.evaluate.perplexity import score_texts
from kvdistill.distill.student.latent.model import LatentStudent, Think, answer
from kvdistill.distill.student.latent.questions import question_and_answer


@dataclass(frozen=True)
class HeldOut:
    """Result of an evaluation."""

    metrics: dict[str, float]
    rows: list[dict[str, Any]]
    """Per sample: ``nll`` (nats), ``num_tokens``, ``num_chars`` of a text student; ``correct``,
    ``expected``, ``predicted``, ``text``, ``num_new_tokens``, ``num_forwards`` of a graded one."""
    calibration: list[dict[str, float]] = field(default_factory=list)
    """``num_tokens``, ``confidence`` and ``accuracy`` of every non-empty bin."""


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
    """Score every sample by likelihood, and the first ``answer`` gradable ones by exact match.

    Args:
        student: a transformers causal LM.
        tokenizer: its tokenizer.
        samples: held-out samples.
        max_length: tokens per text that are scored.
        batch_size: samples per forward pass.
        answer: number of samples to generate answers for; None for all that can be graded.
        max_new_tokens: token budget of a rationale and an answer.
    """
    scores = score_texts(student, tokenizer, samples, max_length=max_length, batch_size=batch_size)
    metrics, rows = scores.to_dict(), {row["sample_id"]: row for row in scores.rows()}
    gradable = [sample for sample in samples if is_gradable(sample)][:answer]
    if gradable:
        answers = generate_and_grade(
            student, tokenizer, gradable, max_new_tokens=max_new_tokens, batch_size=batch_size
        )
        metrics |= answers.to_dict()
        for row in answers.rows():
            rows[row["sample_id"]] |= row
    return HeldOut(metrics, list(rows.values()), [asdict(found) for found in scores.calibration])


def score_latent(
    student: LatentStudent,
    tokenizer: Any,
    samples: Sequence[Sample],
    *,
    batch_size: int,
    answer: int | None = None,
    max_new_tokens: int | None = None,
) -> HeldOut:
    """Exact match on the first ``answer`` gradable samples; on all of them if None.

    ``max_new_tokens`` defaults to the student's own setting.
    """
    found = latent_exact_match(
        student,
        tokenizer,
        [sample for sample in samples if is_gradable(sample)][:answer],
        max_new_tokens=max_new_tokens or student.config.max_new_tokens,
        batch_size=batch_size,
    )
    return HeldOut(found.to_dict(), found.rows())


def latent_exact_match(
    student: LatentStudent,
    tokenizer: Any,
    samples: Sequence[Sample],
    *,
    max_new_tokens: int,
    batch_size: int,
    think: Think | None = None,
) -> ExactMatch:
    """Generate and grade a latent student's answers, on the student's device.

    Forward passes are those that wait for one another: the passes of thinking, and one for each
    token of the answer after the first.

    Args:
        student: any latent student.
        tokenizer: its tokenizer.
        samples: with prompt and answer segments.
        max_new_tokens: token budget of an answer.
        batch_size: questions per batch.
        think: replaces the student's forward pass; see ``answer`` in ``latent/model.py``.

    Raises:
        CorpusError: a sample has no prompt or no answer.
    """
    questions = [question_and_answer(sample)[0] for sample in samples]
    order = sorted(range(len(samples)), key=lambda i: len(questions[i]))
    answers: dict[int, Answer] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        generated = answer(
            student, tokenizer, [questions[i] for i in chosen], max_new_tokens, think
        )
        for i, ids in zip(chosen, generated, strict=True):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            num_forwards = student.num_passes + len(ids) - 1
            answers[i] = grade(samples[i], text, num_new_tokens=len(ids), num_forwards=num_forwards)
    return ExactMatch(tuple(answers[i] for i in range(len(samples))))
