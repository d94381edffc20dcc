"""Batched generation from prompts of unequal length: left-padding, and the new tokens per row."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from transformers import GenerationConfig

TokenIds = Sequence[int] | NDArray[np.integer[Any]]


@torch.inference_mode()
def generate_padded(
    model: Any, prompts: Sequence[TokenIds], settings: GenerationConfig, **options: Any
) -> list[list[int]]:
    """Continue a batch of prompts on the model's own device.

    Args:
        model: a transformers causal LM.
        prompts: token ids of each prompt; left-padded here with ``settings.pad_token_id``.
        settings: how to decode; used instead of the model's own generation config.
        **options: passed on to ``generate`` (logits processors, the tokenizer of stop strings).

    Returns:
        New token ids of each prompt, up to and including its first end-of-sequence token.
    """
    ids_BT, mask_BT = pad_left(prompts, settings.pad_token_id)
    device = model.get_input_embeddings().weight.device
    output_BT: Tensor = model.generate(
        ids_BT.to(device), attention_mask=mask_BT.to(device), generation_config=settings, **options
    )
    eos = settings.eos_token_id
    ends = eos if isinstance(eos, list) else [eos]
    return [through_first(row, ends) for row in output_BT[:, ids_BT.shape[1] :].tolist()]


def end_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Token ids that end a text: the model's own, of which there may be several, and EOS."""
    own = model.generation_config.eos_token_id if model.can_generate() else None
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    return sorted(ends)


def pad_left(rows: Sequence[TokenIds], pad_id: int) -> tuple[Tensor, Tensor]:
    """Left-pad rows of token ids: ids and attention mask, long ``[B, T]`` on the CPU."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.as_tensor(row)
        mask[i, width - len(row) :] = 1
    return ids, mask


def through_first(ids: list[int], ends: Collection[int | None]) -> list[int]:
    """``ids`` up to and including the first that is in ``ends``; all of them if none is."""
    first = next((i for i, token_id in enumerate(ids) if token_id in ends), len(ids))
    return ids[: first + 1]
