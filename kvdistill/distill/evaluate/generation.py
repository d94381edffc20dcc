"""Exact match by greedy generation.

Prompts are batched by length and left-padded. A sample's answer does not depend on its batch (up to
rounding): all samples have the same token budget, and a prompt that does not fit into the model's
positions beside it is left-truncated. Forward passes are counted for the sample alone: one over
the prompt, which gives the first token, and one for each further token, as in KaVa
(arXiv 2510.02312); they are what latent reasoning saves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from kvdistill.attention.padded_generation import generate_padded
from kvdistill.corpus.samples import Sample
from kvdistill.distill.evaluate.answers import Answer, ExactMatch, grade, target
from kvdistill.distill.student.build import prompt_ids
from kvdistill.errors import StudentError


@torch.inference_mode()
def generate_and_grade(
    student: Any,
    tokenizer: Any,
    samples: Sequence[Sample],
    *,
    max_new_tokens: int = 256,
    batch_size: int = 8,
) -> ExactMatch:
    """Generate and grade an answer to every sample, on the student's device.

    Args:
        student: a transformers causal LM.
        tokenizer: its tokenizer; a BOS token precedes the prompt, as in training.
        samples: with prompt and answer segments.
        max_new_tokens: token budget of the rationale and the answer together.
        batch_size: prompts per batch.

    Raises:
        CorpusError: a sample has no prompt or no answer.
        StudentError: the model has too few positions for ``max_new_tokens``.
    """
    if not samples:
        return ExactMatch(())
    for sample in samples:
        target(sample)
    prompts = _prompts(student, tokenizer, samples, max_new_tokens)
    settings = _greedy_settings(student, tokenizer, max_new_tokens)
    order = sorted(range(len(samples)), key=lambda i: len(prompts[i]))
    answers: dict[int, Answer] = {}
    was_training = student.training
    student.eval()
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        generated = generate_padded(student, [prompts[i] for i in chosen], settings)
        for i, ids in zip(chosen, generated, strict=True):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            answers[i] = grade(samples[i], text, num_new_tokens=len(ids), num_forwards=len(ids))
    student.train(was_training)
    return ExactMatch(tuple(answers[i] for i in range(len(samples))))


def _prompts(
    student: Any, tokenizer: Any, samples: Sequence[Sample], max_new_tokens: int
) -> list[list[int]]:
    """Token ids of every prompt, left-truncated after BOS to the model's positions."""
    prompts = prompt_ids(tokenizer, [dict(sample.segments)["prompt"] for sample in samples])
    positions = getattr(student.config.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        return prompts
    budget = positions - max_new_tokens
    if budget < 1:
        raise StudentError(
            f"max_new_tokens: expected fewer than the student's {positions} positions, got "
            f"{max_new_tokens}, which leaves none for a prompt; generate fewer"
        )
    num_bos = int(tokenizer.bos_token_id is not None)
    kept = max(budget - num_bos, 0)
    return [ids[:num_bos] + ids[max(len(ids) - kept, num_bos) :] for ids in prompts]


def _greedy_settings(student: Any, tokenizer: Any, max_new_tokens: int) -> GenerationConfig:
    """Greedy decoding; of the model's own generation config only its EOS tokens are used."""
    own = student.generation_config.eos_token_id if student.can_generate() else None
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    pad_id = tokenizer.pad_token_id
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=max_new_tokens,
        pad_token_id=min(ends, default=0) if pad_id is None else pad_id,
        eos_token_id=sorted(ends) or None,
    )
