from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvdistill.attention.attention_rule import AttentionRule, LinearBias, MaskRule
from kvdistill.attention.importance import QueriesAndKeys, importance, queries_and_keys
from kvdistill.attention.rotary import rotate, unrotate
from kvdistill.store.manifest import RotarySpec

ROTARY = RotarySpec(rotary_dim=6, inv_freq=(1.0, 0.3, 0.01))
SEGMENTED = np.array([-1, 1, 1, 2, 2, 2, 2, 3, 3, -1], np.int8)
PLAIN = np.zeros(12, np.int8)
NO_RATIONALE = np.array([1, 1, 3], np.int8)


def naive(
    query: Tensor,
    key: Tensor,
    queries: list[int],
    keys: list[int],
    *,
    mask: MaskRule,
    slopes: Sequence[float] = (0.0,) * 6,
) -> Tensor:
    """The formula, one query, one head and one key at a time. `[HQ, T, D]`, `[H, T, D]`."""
    num_heads, num_tokens, _ = key.shape
    group = query.shape[0] // num_heads
    positions = torch.arange(num_tokens)
    query, key = rotate(query, positions, ROTARY), rotate(key, positions, ROTARY)
    total = torch.zeros(num_heads, num_tokens)
    for head in range(num_heads):
        seeing = {q: [k for k in keys if sees(mask, q, k)] for q in queries}
        seeing = {q: seen for q, seen in seeing.items() if seen}
        for q, seen in seeing.items():
            scores = [
                max(
                    0.4 * float(query[h, q] @ key[head, k]) + slopes[h] * (k - q)
                    for h in range(head * group, head * group + group)
                )
                for k in seen
            ]
            weights = torch.tensor(scores).softmax(0)
            for k, weight in zip(seen, weights, strict=True):
                total[head, k] += weight / len(seeing)
    return total


def sees(mask: MaskRule, query: int, key: int) -> bool:
    """Whether a query sees a key, by the definition of each kind of mask."""
    window, chunk = mask.sliding_window, mask.chunk_size
    is_near = window is None or abs(query - key) < window
    return (
        is_near
        and (not mask.causal or key <= query)
        and (chunk is None or query // chunk == key // chunk)
    )


def rule(**settings: Any) -> AttentionRule:
    return AttentionRule(**{"rotary": ROTARY, "scaling": 0.4, "mask": MASKS["causal"], **settings})


MASKS = {
    "causal": MaskRule(causal=True),
    "bidirectional": MaskRule(causal=False),
    "window": MaskRule(causal=True, sliding_window=3),
    "window of an encoder": MaskRule(causal=False, sliding_window=3),
    "chunk": MaskRule(causal=True, chunk_size=4),
    "seen by no query": MaskRule(causal=True, sliding_window=1),
}


@pytest.mark.parametrize("slopes", [None, (0.5, 0.1, 0.3, 0.0, 0.2, 0.4)])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("groups", [1, 3])
def test_equals_the_formula_in_a_padded_batch(groups: int, mask: str, slopes: Any) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(3, 2 * groups, 12, 8), torch.randn(3, 2, 12, 8)
    attended = queries_and_keys([SEGMENTED, PLAIN, NO_RATIONALE])
    slopes = slopes and slopes[: 2 * groups]
    bias = None if slopes is None else LinearBias(slopes)
    found = importance(query, key, attended, rule(mask=MASKS[mask], bias=bias))
    expected = [([7, 8], [3, 4, 5, 6]), (list(range(4, 12)), list(range(12))), ([2], [0, 1])]
    for row, (queries, keys) in enumerate(expected):
        own = naive(
            query[row], key[row], queries, keys, mask=MASKS[mask], slopes=slopes or (0.0,) * 6
        )
        torch.testing.assert_close(found[row], own, rtol=1e-5, atol=1e-6)


def test_a_soft_cap_bends_scores_before_the_softmax() -> None:
    torch.manual_seed(0)
    query, key = 9 * torch.randn(1, 4, 10, 8), torch.randn(1, 2, 10, 8)
    chosen = queries_and_keys([SEGMENTED])
    plain = importance(query, key, chosen, rule())
    capped = importance(query, key, chosen, rule(softcap=2.0))
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
    found = importance(query, key, queries_and_keys([segment]), rule())
    own = naive(query[0], key[0], list(range(40, 190)), list(range(40)), mask=MASKS["causal"])
    torch.testing.assert_close(found[0], own, rtol=1e-4, atol=1e-6)


def test_sums_to_one_over_the_keys_and_is_zero_elsewhere() -> None:
    torch.manual_seed(0)
    plain = rule(rotary=None)
    found = importance(*torch.randn(2, 1, 2, 10, 8), queries_and_keys([SEGMENTED]), plain)
    torch.testing.assert_close(found.sum(-1), torch.ones(1, 2))
    assert not found[..., [0, 1, 2, 7, 8, 9]].any()


def test_samples_without_text_get_zeros() -> None:
    attended = queries_and_keys([np.array([-1], np.int8), np.zeros(0, np.int8)])
    plain = rule(rotary=None)
    found = importance(torch.randn(2, 2, 1, 8), torch.randn(2, 2, 1, 8), attended, plain)
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


LONG_ROPE = ROTARY.model_copy(
    update={"trained_length": 8, "long_inv_freq": (0.5, 0.1, 0.001), "attention_scaling": 1.2}
)


def test_the_text_s_length_decides_which_frequencies_rotate() -> None:
    """Of longrope: short factors up to the trained length, long ones for all tokens beyond it."""
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 12, 8), torch.randn(1, 2, 12, 8)
    for length, inv_freq in ((8, ROTARY.inv_freq), (9, LONG_ROPE.long_inv_freq)):
        q, k, chosen = query[:, :, :length], key[:, :, :length], queries_and_keys([PLAIN[:length]])
        fixed = ROTARY.model_copy(update={"inv_freq": inv_freq, "attention_scaling": 1.2})
        expected = importance(q, k, chosen, rule(rotary=fixed))
        torch.testing.assert_close(importance(q, k, chosen, rule(rotary=LONG_ROPE)), expected)


def test_dynamic_frequencies_stretch_with_the_text() -> None:
    spec = ROTARY.model_copy(update={"trained_length": 4, "dynamic_factor": 2.0})
    x, positions = torch.randn(2, 9, 8), torch.arange(9)
    # ntk with s' = s·n/L − (s − 1) = 2·9/4 − 1 = 3.5: the slowest pair is divided by it
    stretched = tuple(f * 3.5 ** (-i / 2) for i, f in enumerate(ROTARY.inv_freq))
    expected = rotate(x, positions, ROTARY.model_copy(update={"inv_freq": stretched}))
    torch.testing.assert_close(rotate(x, positions, spec), expected)
    torch.testing.assert_close(rotate(x, positions, spec, length=4), rotate(x, positions, ROTARY))
