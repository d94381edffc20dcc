"""Generation from a padded batch against each prompt on its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from kvdistill.attention.padded_generation import generate_padded, pad_left, through_first
from tests.extract.models import BASE, tiny_model


def test_a_batch_writes_what_each_prompt_alone_writes_and_stops_at_its_end() -> None:
    model = tiny_model("llama", head=True, **BASE, vocab_size=20, initializer_range=0.4)
    model.generation_config.eos_token_id = None
    prompts = [[1, 7, 9, 3], np.array([5], np.int32), [8, 8, 2]]
    settings = GenerationConfig(do_sample=False, max_new_tokens=10, pad_token_id=0)
    greedy = []
    for prompt in prompts:
        ids = torch.as_tensor(prompt).long()[None]
        for _ in range(10):
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        greedy.append(ids[0, len(prompt) :].tolist())
    end = greedy[0][3]
    for eos in (end, [end, 99]):
        settings.eos_token_id = eos
        expected = [row[: row.index(end) + 1] if end in row else row for row in greedy]
        assert generate_padded(model, prompts, settings) == expected
    settings.eos_token_id = None
    assert generate_padded(model, prompts, settings) == greedy


def test_padding_is_on_the_left() -> None:
    ids, mask = pad_left([[4, 5, 6], [], [7]], 9)
    assert ids.tolist() == [[4, 5, 6], [9, 9, 9], [9, 9, 7]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize(("ends", "count"), [([3], 2), ([9, 2], 4), ([], 5), ([None], 5)])
def test_through_first(ends: list[int | None], count: int) -> None:
    ids = [1, 3, 4, 2, 3]
    assert through_first(ids, ends) == ids[:count]
