"""Exact match by generation: the student reads the prompt, writes, and its answer is graded.

Decoding is greedy and batched with padding on the left, in the order of the prompts' lengths.
What a sample gets does not depend on the batch it is in (up to rounding): the room to write is
the same for all, and a prompt that would leave too little of the model's positions loses its
beginning. Forward passes are counted as if a sample ran alone: one for the prompt, which gives
the first token, and one for each further token. That is what latent reasoning saves (KaVa,
arXiv 2510.02312, counts the same).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from kvdistill.attention.padded_generation import generate_padded
from kvdistill.corpus.samples import Sample
from kvdistill.distill.evaluate.answers import Answer, ExactMatch, grade, target
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
    """Let a student answer every sample, on the device it is on.

    Args:
        student: a transformers causal LM.
        tokenizer: its tokenizer; a BOS token is put before the prompt, as in training.
        samples: with prompt and answer segments.
        max_new_tokens: room for the rationale and the answer together.
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
    answers: list[Answer | None] = [None] * len(samples)
    was_training = student.training
    student.eval()
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        written = generate_padded(student, [prompts[i] for i in chosen], settings)
        for i, ids in zip(chosen, written, strict=True):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            answers[i] = grade(samples[i], text, num_new_tokens=len(ids), num_forwards=len(ids))
    student.train(was_training)
    return ExactMatch(tuple(answer for answer in answers if answer is not None))


def _prompts(
    student: Any, tokenizer: Any, samples: Sequence[Sample], max_new_tokens: int
) -> list[list[int]]:
    """Token ids of every prompt, cut on the left where the model has too few positions."""
    positions = getattr(student.config.get_text_config(), "max_position_embeddings", None)
    room = None if positions is None else positions - max_new_tokens
    if room is not None and room < 1:
        raise StudentError(
            f"the student has {positions} positions, which leaves none for a prompt before "
            f"{max_new_tokens} new tokens; generate fewer"
        )
    texts = [dict(sample.segments)["prompt"] for sample in samples]
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    kept = None if room is None else max(room - len(before), 0)
    return [
        before + (ids if kept is None else ids[max(len(ids) - kept, 0) :])
        for ids in encoded["input_ids"]
    ]


def _greedy_settings(student: Any, tokenizer: Any, max_new_tokens: int) -> GenerationConfig:
    """Greedy, whatever the model's own generation settings ask for."""
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
