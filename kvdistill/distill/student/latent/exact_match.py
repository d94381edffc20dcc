"""How often a latent student answers right, and at how many forward passes.

Answers are graded as those of any other student (``answers.py``); a forward pass is a run of the
model that has to wait for another: the passes that thinking takes, and one per token of the
answer after the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvdistill.corpus.samples import Sample
from kvdistill.distill.evaluate.answers import Answer, ExactMatch, grade, is_gradable
from kvdistill.distill.evaluate.held_out import HeldOut
from kvdistill.distill.student.latent.model import LatentStudent, Think, answer
from kvdistill.distill.student.latent.questions import question_and_answer


def latent_exact_match(
    student: LatentStudent,
    tokenizer: Any,
    samples: Sequence[Sample],
    *,
    max_new_tokens: int,
    batch_size: int,
    think: Think | None = None,
) -> ExactMatch:
    """Let a latent student answer every sample, on the device it is on.

    Args:
        student: any latent student.
        tokenizer: its own.
        samples: with prompt and answer segments.
        max_new_tokens: room for an answer.
        batch_size: questions per batch.
        think: as for ``generation.answer``.

    Raises:
        CorpusError: a sample has no prompt or no answer.
    """
    questions = [question_and_answer(sample)[0] for sample in samples]
    order = sorted(range(len(samples)), key=lambda i: len(questions[i]))
    answers: dict[int, Answer] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        written = answer(student, tokenizer, [questions[i] for i in chosen], max_new_tokens, think)
        for i, ids in zip(chosen, written, strict=True):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            passes = student.num_passes + len(ids) - 1
            answers[i] = grade(samples[i], text, num_new_tokens=len(ids), num_forwards=passes)
    return ExactMatch(tuple(answers[i] for i in range(len(samples))))


def score_latent(
    student: LatentStudent,
    tokenizer: Any,
    samples: Sequence[Sample],
    *,
    batch_size: int,
    answer: int | None = None,
    max_new_tokens: int | None = None,
) -> HeldOut:
    """Exact match on the first ``answer`` samples that can be graded; on all of them if None."""
    asked = [sample for sample in samples if is_gradable(sample)][:answer]
    found = latent_exact_match(
        student,
        tokenizer,
        asked,
        max_new_tokens=max_new_tokens or student.config.max_new_tokens,
        batch_size=batch_size,
    )
    return HeldOut(found.to_dict(), found.rows())
