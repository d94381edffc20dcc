"""What latents are compared with: the same tokens that a slow choice over stored keys keeps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kvdistill.attention.geometry import HeadShape
from kvdistill.config.distill import LatentConfig
from kvdistill.distill.align.layers import LayerMap
from kvdistill.distill.student.latent.latent_distiller import RationaleEviction, nearest_layers
from kvdistill.distill.targets import GroupSpace, TargetStatistics
from kvdistill.store.manifest import RotarySpec
from kvdistill.types import KINDS

LAYERS = (0, 2)
SPECS = {
    0: RotarySpec(rotary_dim=4, inv_freq=(1.0, 0.3)),
    1: RotarySpec(rotary_dim=4, inv_freq=(9.0, 9.0)),
    2: RotarySpec(rotary_dim=2, inv_freq=(0.5,), interleaved=True),
}


def group() -> GroupSpace:
    shape, moments = HeadShape(2, 6), torch.zeros(2, 2, 6)
    statistics = TargetStatistics(moments, moments + 1)
    return GroupSpace(
        "", (0, 1), LayerMap(LAYERS, LAYERS, (0.0, 0.0)),
        dict.fromkeys(KINDS, shape), dict.fromkeys(KINDS, statistics),
    )  # fmt: skip


def stored(num_tokens: int = 9) -> tuple[Tensor, dict[str, Any]]:
    """Keys of two samples, whose rationales are tokens 3 … 7 and nothing."""
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(2, 2, 2, num_tokens, 6, generator=generator)
    rationale = torch.zeros(2, num_tokens, dtype=torch.bool)
    rationale[0, 3:8] = True
    importance = torch.rand(2, 2, 2, num_tokens, generator=generator)
    teacher = {
        "rationale": rationale,
        "importance": {"": importance},
        "seed": torch.tensor([5, 6]),
        "length": torch.tensor([num_tokens, num_tokens]),
    }
    return key, teacher


def turned(vector: list[float], position: int, spec: RotarySpec) -> list[float]:
    """One key rotated by hand."""
    out, half = list(vector), len(spec.inv_freq)
    for i, frequency in enumerate(spec.inv_freq):
        a, b = (2 * i, 2 * i + 1) if spec.interleaved else (i, i + half)
        cos, sin = math.cos(position * frequency), math.sin(position * frequency)
        out[a] = vector[a] * cos - vector[b] * sin
        out[b] = vector[b] * cos + vector[a] * sin
    return out


def by_hand(key: Tensor, importance: Tensor, tokens: list[int], layer: int, budget: int) -> list:
    """KaVa's R-KV over the rotated keys of one head, with loops."""
    rotated = [turned(key[t].tolist(), t, SPECS[layer]) for t in tokens]
    norms = [math.sqrt(sum(x * x for x in k)) for k in rotated]
    unit = [[x / n for x in k] for k, n in zip(rotated, norms, strict=True)]
    count = len(tokens)
    logits = [
        -sum(sum(a * b for a, b in zip(unit[i], unit[j], strict=True))
             for j in range(count) if j != i) / count
        for i in range(count)
    ]  # fmt: skip
    total = sum(math.exp(x) for x in logits)
    scores = [
        0.1 * float(importance[t]) + 0.9 * math.exp(x) / total
        for t, x in zip(tokens, logits, strict=True)
    ]
    best = sorted(range(count), key=lambda i: -scores[i])[:budget]
    return sorted(tokens[i] for i in best)


def chosen(**eviction: Any) -> Any:
    key, teacher = stored()
    latent = LatentConfig(num_latents=4, eviction=eviction)
    return RationaleEviction(latent, SPECS).select(group(), key, teacher)


def test_rkv_ranks_rotated_keys_of_the_rationale_per_layer_and_head() -> None:
    key, teacher = stored()
    kept = chosen(budget=3)
    assert kept.index_BLHM.shape == (2, 2, 2, 4)
    assert kept.mask_BLHM[0].sum(-1).unique().tolist() == [3]
    for i, layer in enumerate(LAYERS):
        for head in range(2):
            expected = by_hand(
                key[0, i, head], teacher["importance"][""][0, i, head], [3, 4, 5, 6, 7], layer, 3
            )
            assert kept.index_BLHM[0, i, head, :3].tolist() == expected


def test_unrotated_keys_would_choose_otherwise() -> None:
    key, teacher = stored()
    latent = LatentConfig(num_latents=2)
    rotated = RationaleEviction(latent, SPECS).select(group(), key, teacher)
    plain = RationaleEviction(latent, {}).select(group(), key, teacher)
    assert not torch.equal(rotated.index_BLHM, plain.index_BLHM)


@pytest.mark.parametrize(
    "method", ["right_crop", "uniform", "random", "importance", "rkv", "rkv_original"]
)
def test_a_sample_without_a_rationale_teaches_nothing(method: str) -> None:
    kept = chosen(method=method)
    assert not kept.mask_BLHM[1].any()
    assert kept.covered.tolist() == [[True] * 4, [False] * 4]
    assert not kept.keep(stored()[0])[1].any()


def test_a_large_budget_keeps_the_rationale_in_order() -> None:
    key, teacher = stored()
    latent = LatentConfig(num_latents=7)
    kept = RationaleEviction(latent, SPECS).select(group(), key, teacher)
    assert (kept.index_BLHM[0, :, :, :5] == torch.arange(3, 8)).all()
    assert kept.covered[0].tolist() == [True] * 5 + [False] * 2


def test_random_depends_on_the_sample_alone() -> None:
    key, teacher = stored()
    latent = LatentConfig(num_latents=3, eviction={"method": "random"})
    whole = RationaleEviction(latent, SPECS).select(group(), key, teacher)
    alone = {**teacher, "rationale": teacher["rationale"][:1], "seed": teacher["seed"][:1]}
    alone["importance"] = {"": teacher["importance"][""][:1]}
    one = RationaleEviction(latent, SPECS).select(group(), key[:1], alone)
    assert torch.equal(one.index_BLHM, whole.index_BLHM[:1])


def test_longrope_rotates_by_the_length_of_the_text_not_of_the_batch() -> None:
    """The first text has 9 tokens, in a batch padded to 12; only longer ones turn faster."""
    longrope = {"trained_length": 9, "long_inv_freq": (2.5, 1.3)}
    specs = {layer: spec.model_copy(update=longrope) for layer, spec in SPECS.items() if layer < 2}
    specs[2] = SPECS[2]
    key, teacher = stored(12)
    teacher["length"] = torch.tensor([9, 12])
    latent = LatentConfig(num_latents=2)
    short, plain = (
        RationaleEviction(latent, rotary).select(group(), key, teacher).index_BLHM
        for rotary in (specs, SPECS)
    )
    assert torch.equal(short, plain)
    teacher["length"] = torch.tensor([12, 12])
    long = RationaleEviction(latent, specs).select(group(), key, teacher).index_BLHM
    assert not torch.equal(long[0, 0], plain[0, 0])


def test_layers_are_taken_whole() -> None:
    mixed = LayerMap((0, 3, 5), (1, 4, 5), (0.2, 0.5, 0.0))
    assert nearest_layers(mixed) == LayerMap((0, 4, 5), (0, 4, 5), (0.0, 0.0, 0.0))
