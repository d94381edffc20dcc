from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from kvdistill.attention.importance import QueriesAndKeys, importance, queries_and_keys
from kvdistill.attention.rotary import rotate, unrotate
from kvdistill.store.manifest import RotarySpec

ROTARY = RotarySpec(rotary_dim=6, inv_freq=(1.0, 0.3, 0.01))
SEGMENTED = np.array([-1, 1, 1, 2, 2, 2, 2, 3, 3, -1], np.int8)
PLAIN = np.zeros(12, np.int8)
NO_RATIONALE = np.array([1, 1, 3], np.int8)


def naive(
    query: Tensor, key: Tensor, queries: list[int], keys: list[int], *, scaling: float, causal: bool
) -> Tensor:
    """The formula, one query, one head and one key at a time. `[HQ, T, D]`, `[H, T, D]`."""
    num_heads, num_tokens, _ = key.shape
    group = query.shape[0] // num_heads
    positions = torch.arange(num_tokens)
    query, key = rotate(query, positions, ROTARY), rotate(key, positions, ROTARY)
    total = torch.zeros(num_heads, num_tokens)
    for head in range(num_heads):
        for q in queries:
            seen = [k for k in keys if not causal or k <= q]
            scores = [
                max(float(query[head * group + g, q] @ key[head, k]) for g in range(group))
                for k in seen
            ]
            weights = torch.tensor(scores).mul(scaling).softmax(0)
            for k, weight in zip(seen, weights, strict=True):
                total[head, k] += weight / len(queries)
    return total


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [1, 3])
def test_equals_the_formula_in_a_padded_batch(causal: bool, groups: int) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(3, 2 * groups, 12, 8), torch.randn(3, 2, 12, 8)
    attended = queries_and_keys([SEGMENTED, PLAIN, NO_RATIONALE])
    found = importance(query, key, attended, 0.4, ROTARY, causal=causal)
    expected = [([7, 8], [3, 4, 5, 6]), (list(range(4, 12)), list(range(12))), ([2], [0, 1])]
    for row, (queries, keys) in enumerate(expected):
        own = naive(query[row], key[row], queries, keys, scaling=0.4, causal=causal)
        torch.testing.assert_close(found[row], own, rtol=1e-5, atol=1e-6)


def test_a_soft_cap_bends_scores_before_the_softmax() -> None:
    torch.manual_seed(0)
    query, key = 9 * torch.randn(1, 4, 10, 8), torch.randn(1, 2, 10, 8)
    asked = (queries_and_keys([SEGMENTED]), 0.4, ROTARY)
    plain = importance(query, key, *asked, causal=True)
    capped = importance(query, key, *asked, causal=True, softcap=2.0)
    turned, keys = rotate(query, torch.arange(10), ROTARY), rotate(key, torch.arange(10), ROTARY)
    scores = torch.stack([turned[0, 2 * h : 2 * h + 2] @ keys[0, h].T for h in range(2)])
    scores = (0.4 * scores).amax(1)[:, 7:9, 3:7]
    expected = (2.0 * torch.tanh(scores / 2.0)).softmax(-1).mean(1)
    torch.testing.assert_close(capped[0, :, 3:7], expected)
    assert (capped - plain).abs().max() > 0.05


def test_many_queries_are_taken_in_chunks() -> None:
    torch.manual_seed(0)
    segment = np.array([2] * 40 + [3] * 150, np.int8)
    query, key = torch.randn(1, 2, 190, 8), torch.randn(1, 1, 190, 8)
    found = importance(query, key, queries_and_keys([segment]), 0.4, ROTARY, causal=True)
    own = naive(query[0], key[0], list(range(40, 190)), list(range(40)), scaling=0.4, causal=True)
    torch.testing.assert_close(found[0], own, rtol=1e-4, atol=1e-6)


def test_sums_to_one_over_the_keys_and_is_zero_elsewhere() -> None:
    torch.manual_seed(0)
    found = importance(
        *torch.randn(2, 1, 2, 10, 8), queries_and_keys([SEGMENTED]), 1.0, None, causal=True
    )
    torch.testing.assert_close(found.sum(-1), torch.ones(1, 2))
    assert not found[..., [0, 1, 2, 7, 8, 9]].any()


def test_samples_without_text_get_zeros() -> None:
    attended = queries_and_keys([np.array([-1], np.int8), np.zeros(0, np.int8)])
    found = importance(
        torch.randn(2, 2, 1, 8), torch.randn(2, 2, 1, 8), attended, 1.0, None, causal=True
    )
    assert not found.any()
    assert isinstance(attended, QueriesAndKeys)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_has_an_inverse_and_keeps_relative_scores(interleaved: bool) -> None:
    torch.manual_seed(0)
    spec = ROTARY.model_copy(update={"interleaved": interleaved, "attention_scaling": 1.3})
    x, positions = torch.randn(2, 5, 8), torch.arange(5) + 100
    torch.testing.assert_close(unrotate(rotate(x, positions, spec), positions, spec), x)
    near = rotate(x, torch.arange(5), spec)
    far = rotate(x, torch.arange(5) + 40, spec)
    torch.testing.assert_close(near @ near.mT, far @ far.mT, rtol=1e-3, atol=1e-4)
