"""Evaluation of a student on held-out samples: one set of metrics, one row per sample.

A text student is scored by likelihood (``perplexity.py``) and, on request, by exact match of greedy
answers. A latent student is scored by exact match alone: it generates no rationale whose tokens
could have a likelihood. Rows are kept because runs are compared sample by sample.

Prompts are batched by length and left-padded; one that does not fit into the model's positions
beside the token budget is left-truncated. Forward passes are those that wait for one another,
counted for the sample alone as in KaVa (arXiv 2510.02312): one over the prompt (of a latent
student, the passes over its latents), which gives the first token, and one per further token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig

from kvdistill.attention.padded_generation import end_token_ids, generate_padded
from kvdistill.corpus.samples import Sample
from kvdistill.distill.evaluate.answers import Answer, ExactMatch, grade, is_gradable, target
from kvdistill.distill.evaluate.over_ranks import over_ranks
from kvdistill.distill.evaluate.perplexity import by_task, score_texts
from kvdistill.distill.student.build import question_ids
from kvdistill.distill.student.latent.model import LatentStudent, Think, answer
from kvdistill.distill.student.latent.questions import question_and_answer
from kvdistill.errors import StudentError


@dataclass(frozen=True)
class HeldOut:
    """Result of an evaluation."""

    metrics: dict[str, float]
    rows: list[dict[str, Any]]
    """Per sample: ``nll`` (nats), ``num_tokens``, ``num_chars`` and ``task`` of a text student;
    ``correct``, ``expected``, ``predicted``, ``text``, ``num_new_tokens``, ``num_forwards`` of a
    graded one."""
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
        answer: number of gradable samples; all of them if None.
        max_new_tokens: token budget of a rationale and an answer.
    """
    scores = score_texts(student, tokenizer, samples, max_length=max_length, batch_size=batch_size)
    metrics = scores.to_dict() | by_task(scores, [sample.task for sample in samples])
    tasks = {sample.sample_id: {"task": sample.task} for sample in samples if sample.task}
    rows = {row["sample_id"]: row | tasks.get(row["sample_id"], {}) for row in scores.rows()}
    gradable = [sample for sample in samples if is_gradable(sample)][:answer]
    if gradable:
        answers = generate_and_grade(
            student, tokenizer, gradable, max_new_tokens=max_new_tokens, batch_size=batch_size
        )
        metrics |= answers.to_dict()
        for row in answers.rows():
            rows[row["sample_id"]] |= row
    return HeldOut(metrics, list(rows.values()), scores.calibration.bins)


def score_latent(
    student: LatentStudent,
    tokenizer: Any,
    samples: Sequence[Sample],
    *,
    batch_size: int,
    max_new_tokens: int,
    answer: int | None = None,
) -> HeldOut:
    """Exact match on the first ``answer`` gradable samples; on all of them if None."""
    gradable = [sample for sample in samples if is_gradable(sample)][:answer]
    found = latent_exact_match(
        student, tokenizer, gradable, max_new_tokens=max_new_tokens, batch_size=batch_size
    )
    return HeldOut(found.to_dict(), found.rows())


@torch.inference_mode()
def generate_and_grade(
    student: Any,
    tokenizer: Any,
    samples: Sequence[Sample],
    *,
    max_new_tokens: int = 256,
    batch_size: int = 8,
) -> ExactMatch:
    """Generate and grade the answers of a transformers causal LM, on its device.

    A BOS token precedes the prompt, as in training. ``max_new_tokens`` is the budget of the
    rationale and the answer together.

    Raises:
        CorpusError: a sample has no prompt or no answer.
        StudentError: the model has too few positions for ``max_new_tokens``.
    """
    for sample in samples:
        target(sample)
    prompts = _truncated_prompts(student, tokenizer, samples, max_new_tokens) if samples else []
    settings = _greedy_settings(student, tokenizer, max_new_tokens)
    was_training = student.training
    student.eval()
    found = _grade_in_batches(
        student,
        samples,
        tokenizer,
        prompts,
        lambda batch: generate_padded(student, batch, settings),
        batch_size=batch_size,
    )
    student.train(was_training)
    return found


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

    ``think`` replaces the student's forward pass; see ``answer`` in ``latent/model.py``.

    Raises:
        CorpusError: a sample has no prompt or no answer.
    """
    questions = [question_and_answer(sample)[0] for sample in samples]
    return _grade_in_batches(
        student,
        samples,
        tokenizer,
        questions,
        lambda batch: answer(student, tokenizer, batch, max_new_tokens, think),
        batch_size=batch_size,
        extra_forwards=student.num_passes - 1,
    )


def _grade_in_batches(
    student: Any,
    samples: Sequence[Sample],
    tokenizer: Any,
    prompts: Sequence[Any],
    generate: Callable[[list[Any]], list[list[int]]],
    *,
    batch_size: int,
    extra_forwards: int = 0,
) -> ExactMatch:
    """Grade answers in the samples' order; ``generate`` maps prompts to new token ids."""
    order = sorted(range(len(samples)), key=lambda i: len(prompts[i]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    generated = over_ranks(student, batches, lambda rows: generate([prompts[i] for i in rows]))
    answers: dict[int, Answer] = {}
    for chosen, batch in zip(batches, generated, strict=True):
        for i, ids in zip(chosen, batch, strict=True):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            num_forwards = len(ids) + extra_forwards
            answers[i] = grade(samples[i], text, num_new_tokens=len(ids), num_forwards=num_forwards)
    return ExactMatch(tuple(answers[i] for i in range(len(samples))))


def _truncated_prompts(
    student: Any, tokenizer: Any, samples: Sequence[Sample], max_new_tokens: int
) -> list[list[int]]:
    """Token ids of every prompt, left-truncated after BOS to the model's positions."""
    prompts = question_ids(tokenizer, samples)
    budget = prompt_budget(student, max_new_tokens)
    if budget is None:
        return prompts
    bos = [int(ids[:1] == [tokenizer.bos_token_id]) for ids in prompts]
    kept = [max(n, len(x) - max(budget - n, 0)) for n, x in zip(bos, prompts, strict=True)]
    return [x[:n] + x[k:] for n, k, x in zip(bos, kept, prompts, strict=True)]


def prompt_budget(student: Any, max_new_tokens: int) -> int | None:
    """Tokens that a prompt may have beside its answer; None for a student without a limit.

    Raises:
        StudentError: the model has too few positions for ``max_new_tokens``.
    """
    positions = getattr(student.config.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        return None
    if positions <= max_new_tokens:
        raise StudentError(
            f"max_new_tokens: expected fewer than the student's {positions} positions, got "
            f"{max_new_tokens}, which leaves none for a prompt; generate fewer"
        )
    return int(positions - max_new_tokens)


def _greedy_settings(student: Any, tokenizer: Any, max_new_tokens: int) -> GenerationConfig:
    """Greedy decoding; of the model's own generation config only its EOS tokens are used."""
    ends = end_token_ids(student, tokenizer)
    pad_id = tokenizer.pad_token_id
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=max_new_tokens,
        pad_token_id=min(ends, default=0) if pad_id is None else pad_id,
        eos_token_id=ends or None,
    )
