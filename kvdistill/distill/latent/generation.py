"""Answers of a latent student: think, then write greedily from the cache that thinking left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvdistill.distill.latent.student import LatentStudent, Thought
from kvdistill.errors import StudentError

Think = Callable[[Tensor, Tensor], Thought]


@torch.inference_mode()
def answer(
    student: LatentStudent,
    tokenizer: Any,
    questions: Sequence[str],
    max_new_tokens: int,
    think: Think | None = None,
) -> list[list[int]]:
    """Token ids of an answer to every question, its end-of-text token included.

    Args:
        student: on any device.
        tokenizer: its own.
        questions: texts; one batch.
        max_new_tokens: room for an answer.
        think: how to get from ``(question_BT, mask_BT)`` to a thought; the student's own way if
            not given (diagnostics tamper with it).

    Raises:
        StudentError: no room for an answer.
    """
    if max_new_tokens < 1:
        raise StudentError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    if not questions:
        return []
    was_training = student.training
    student.eval()
    device = student.get_input_embeddings().weight.device
    ids, mask = left_padded(tokenizer, questions)
    thought = (think or student)(ids.to(device), mask.to(device))
    written = _greedy(student, thought, max_new_tokens, tokenizer.eos_token_id)
    student.train(was_training)
    return written


def left_padded(tokenizer: Any, questions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """``BOS question`` of every text, padded on the left: ids and mask, ``[B, T]`` long."""
    encoded = tokenizer(
        list(questions), add_special_tokens=False, return_attention_mask=False, verbose=False
    )
    before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return pad_left([before + row for row in encoded["input_ids"]], tokenizer.pad_token_id or 0)


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Rows of ids to a tensor and its mask, ``[B, T]`` long, padding on the left."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        if len(row):
            ids[i, width - len(row) :] = torch.as_tensor(row)
            mask[i, width - len(row) :] = 1
    return ids, mask


def _greedy(
    student: LatentStudent, thought: Thought, max_new_tokens: int, eos_id: int | None
) -> list[list[int]]:
    cache, mask = thought.run.cache, thought.mask_BT
    token_B = thought.answer_logits[:, 0].argmax(-1)
    written = [token_B]
    done = token_B == eos_id if eos_id is not None else torch.zeros_like(token_B, dtype=torch.bool)
    while len(written) < max_new_tokens and not bool(done.all()):
        mask = F.pad(mask, (0, 1), value=1)
        output = student.backbone(
            input_ids=token_B[:, None],
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1)[:, -1:],
            past_key_values=cache,
            use_cache=True,
        )
        token_B = output.logits[:, -1].argmax(-1)
        written.append(token_B)
        if eos_id is not None:
            done = done | (token_B == eos_id)
    rows = torch.stack(written, 1).tolist()
    return [_until(row, eos_id) for row in rows]


def _until(row: list[int], eos_id: int | None) -> list[int]:
    return row[: row.index(eos_id) + 1] if eos_id in row else row
