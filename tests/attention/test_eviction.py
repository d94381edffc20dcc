"""Eviction against slow loops over tokens, and against figures computed elsewhere."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvdistill.attention.eviction import evict, num_evicted, rkv_original_score, rkv_score
from kvdistill.errors import ConfigError, GeometryError

METHODS = ["full", "right_crop", "uniform", "random", "importance", "rkv", "rkv_original"]


def batch(mask, num_layers=2, num_heads=2, dim=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    b, t = mask.shape
    key = torch.randn(b, num_layers, num_heads, t, dim, generator=generator)
    key[..., 1::2, :] += key[..., :1, :] * 2  # some tokens are alike
    importance = torch.rand(b, num_layers, num_heads, t, generator=generator)
    return {"key_BLHTD": key, "importance_BLHT": importance, "seed_B": torch.arange(b) + seed}


def choose(method, mask, budget, **given):
    return evict(method, mask, 2, 2, budget, **(given or batch(mask)))


def lengths(*counts, before=0, after=0):
    total = max(counts) + before + after
    at = torch.arange(total)
    return torch.stack([(at >= before) & (at < before + n) for n in counts])


masks = st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=3).map(
    torch.tensor
)


@given(masks, st.sampled_from(METHODS), st.integers(1, 14))
def test_indices_are_valid_tokens_in_time_order(mask, method, budget):
    kept = choose(method, mask, budget)
    num = mask.shape[1] if method == "full" else budget
    assert kept.index_BLHM.shape == kept.mask_BLHM.shape == (*mask.shape[:1], 2, 2, num)
    assert bool(((kept.index_BLHM >= 0) & (kept.index_BLHM < mask.shape[1])).all())
    for row in range(mask.shape[0]):
        for index, present in zip(
            kept.index_BLHM[row].flatten(0, 1), kept.mask_BLHM[row].flatten(0, 1), strict=True
        ):
            chosen = index[present].tolist()
            assert chosen == sorted(set(chosen))
            assert len(chosen) == min(num, int(mask[row].sum()))
            assert bool(mask[row, chosen].all())
            assert bool(present[: len(chosen)].all())


@given(masks, st.sampled_from(METHODS))
def test_a_large_budget_keeps_everything(mask, method):
    kept = choose(method, mask, 9)
    for row in range(mask.shape[0]):
        expected = mask[row].nonzero().flatten()
        index = kept.index_BLHM[row, :, :, : len(expected)]
        assert bool((index == expected).all())


@pytest.mark.parametrize("method", METHODS)
def test_padding_and_company_change_nothing(method):
    mask = lengths(11, 6)
    given = batch(mask)
    whole = choose(method, mask, 4, **given)
    alone = choose(
        method,
        mask[1:, :6],
        4,
        **{name: x[1:] if name == "seed_B" else x[1:, :, :, :6] for name, x in given.items()},
    )
    num = 6 if method == "full" else 4
    assert torch.equal(whole.index_BLHM[1:, ..., :num], alone.index_BLHM)
    assert torch.equal(whole.mask_BLHM[1:, ..., :num], alone.mask_BLHM)


def test_simple_methods_by_hand():
    mask = lengths(8, before=1)
    first = choose("right_crop", mask, 3)
    assert first.index_BLHM[0, 0, 0].tolist() == [1, 2, 3]
    spread = choose("uniform", mask, 4)
    assert spread.index_BLHM[0, 1, 0].tolist() == [2, 4, 6, 8]
    importance = torch.tensor([9, 0.1, 0.5, 0.5, 0.2, 0.5, 0, 0.4, 0.3]).expand(1, 2, 2, 9)
    top = choose("importance", mask, 2, importance_BLHT=importance)
    assert top.index_BLHM[0, 0, 0].tolist() == [2, 3]  # of three equals, the earlier two


def test_all_equal_keeps_the_earliest():
    mask = lengths(6)
    given = {"key_BLHTD": torch.ones(1, 2, 2, 6, 3), "importance_BLHT": torch.ones(1, 2, 2, 6)}
    for method in ("importance", "rkv"):
        assert choose(method, mask, 3, **given).index_BLHM[0, 0, 0].tolist() == [0, 1, 2]


def test_random_is_seeded_by_sample_and_differs_between_heads():
    mask = lengths(60, 60)
    one, same, other = (
        choose("random", mask, 10, seed_B=torch.tensor(seeds)) for seeds in ([3, 4], [3, 9], [5, 4])
    )
    assert torch.equal(one.index_BLHM[0], same.index_BLHM[0])
    assert torch.equal(one.index_BLHM[1], other.index_BLHM[1])
    assert not torch.equal(one.index_BLHM[0], other.index_BLHM[0])
    assert not torch.equal(one.index_BLHM[0, 0, 0], one.index_BLHM[0, 0, 1])
    many = choose("random", lengths(8).expand(4000, 8), 2, seed_B=torch.arange(4000))
    share = torch.bincount(many.index_BLHM.flatten(), minlength=8) / many.index_BLHM.numel()
    assert bool(((share - 1 / 8).abs() < 0.01).all())


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(x * x for x in b))


def softmax(values):
    top = max(values)
    exp = [math.exp(v - top) for v in values]
    return [e / sum(exp) for e in exp]


def slow_rkv(keys, importance, mix):
    n = len(keys)
    logits = [-sum(cosine(keys[i], keys[j]) for j in range(n) if j != i) / n for i in range(n)]
    return [mix * i + (1 - mix) * r for i, r in zip(importance, softmax(logits), strict=True)]


def slow_rkv_original(keys, importance, mix):
    n = len(keys)
    table = [[0.0 if i == j else cosine(keys[i], keys[j]) for j in range(n)] for i in range(n)]
    for row in table:
        alike = [j for j in range(n) if row[j] > 0.5]
        row[alike[-1] if alike else 0] = 0.0
    redundancy = softmax([sum(table[i][j] for i in range(n)) / n for j in range(n)])
    out = []
    for j in range(n):
        near = [importance[k] for k in range(max(j - 3, 0), min(j + 4, n)) if k < n - 8]
        out.append(math.inf if j >= n - 8 else mix * max(near) - (1 - mix) * redundancy[j])
    return out


@pytest.mark.parametrize(
    ("fast", "slow"),
    [
        (rkv_score, slow_rkv),
        (rkv_original_score, slow_rkv_original),
    ],
)
@pytest.mark.parametrize("mix", [0.1, 0.7])
def test_scores_equal_the_slow_form(fast, slow, mix):
    mask = lengths(15, 9, 3, before=2, after=1)
    given = batch(mask)
    key, importance = given["key_BLHTD"], given["importance_BLHT"]
    got = fast(key, importance, mask, mix)
    for row in range(3):
        chosen = mask[row]
        for layer in range(2):
            for head in range(2):
                expected = slow(
                    key[row, layer, head, chosen].tolist(),
                    importance[row, layer, head, chosen].tolist(),
                    mix,
                )
                torch.testing.assert_close(
                    got[row, layer, head, chosen], torch.tensor(expected), atol=1e-6, rtol=1e-4
                )


def test_original_form_equals_figures_computed_independently():
    """Eleven 2-d keys at given angles; the figures are from a 10-line awk of the definition."""
    degrees = torch.tensor([0, 10, 100, 190, 95, 200, 303, 5, 120, 251, 59.0])
    key = torch.stack([degrees.deg2rad().cos(), degrees.deg2rad().sin()], dim=-1)
    importance = torch.tensor([0.30, 0.05, 0.20] + [0.05] * 8)
    mask = torch.ones(1, 11, dtype=torch.bool)
    got = rkv_original_score(key.view(1, 1, 1, 11, 2), importance.view(1, 1, 1, 11), mask)
    figures = torch.tensor([-0.061816, -0.064127, -0.065487])
    torch.testing.assert_close(got[0, 0, 0, :3], figures, atol=1e-6, rtol=0)
    assert bool((got[0, 0, 0, 3:] == torch.inf).all())  # the last eight are always kept


def test_keep_gathers_and_clears():
    mask = lengths(5, 2)
    kept = choose("right_crop", mask, 3)
    x = torch.randn(2, 2, 2, 5, 4)
    out = kept.keep(x)
    assert torch.equal(out[0], x[0, :, :, :3])
    assert torch.equal(out[1, :, :, :2], x[1, :, :, :2])
    assert not out[1, :, :, 2].any()


def test_how_often_the_budget_bites():
    mask = lengths(5, 2, 3)
    assert num_evicted(mask, 3).tolist() == [2, 0, 0]
    covered = choose("uniform", mask, 3).covered
    assert covered.tolist() == [[True] * 3, [True, True, False], [True] * 3]


def test_no_token_at_all():
    for mask in (torch.zeros(2, 0, dtype=torch.bool), torch.zeros(2, 4, dtype=torch.bool)):
        for method in METHODS:
            kept = choose(method, mask, 3)
            assert not kept.mask_BLHM.any()
            assert not kept.keep(torch.ones(*kept.index_BLHM.shape[:3], mask.shape[1], 4)).any()


def test_errors():
    mask = lengths(4)
    with pytest.raises(ConfigError, match="at least 1 token, got 0"):
        choose("uniform", mask, 0)
    with pytest.raises(ConfigError, match="'rkv' needs key_BLHTD"):
        choose("rkv", mask, 2, importance_BLHT=torch.ones(1, 2, 2, 4))
    with pytest.raises(ConfigError, match="'random' needs seed_B"):
        evict("random", mask, 2, 2, 2)
    with pytest.raises(GeometryError, match=r"expected key \[B, L, H, T\] = \(1, 2, 2, 4\)"):
        choose("rkv", mask, 2, key_BLHTD=torch.ones(1, 2, 6, 4, 3))
