"""R-KV and the other evictions on real keys: SmolLM2 on GSM8K, from its store, against loops."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvdistill.attention.eviction import evict, rkv_original_score, rkv_score
from kvdistill.attention.rotary import rotate
from kvdistill.config.load import parse_experiment
from kvdistill.pipelines.extract import extract
from kvdistill.store.reader import KVStore
from tests.attention.test_eviction import slow_rkv, slow_rkv_original
from tests.slurm.experiment import CORPUS

pytestmark = pytest.mark.real_model
LAYERS = (0, 12, 29)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, real_models: Path) -> tuple[Tensor, Tensor]:
    """Rotated keys ``[1, L, H, T, D]`` and importance of one rationale."""
    folder = tmp_path_factory.mktemp("real")
    body = {
        "store": str(folder / "store"),
        "corpus": {"path": str(CORPUS), "max_samples": 1},
        "teachers": {"smollm2": {"model": str(real_models / "smollm2"), "layers": LAYERS}},
        "extraction": {"device": "cpu"},
        "student": {"model": "none"},
    }
    experiment = parse_experiment(body)
    extract(experiment)
    store = KVStore.open(experiment.store)
    (sample,) = store.samples("00000")
    shard = store.read_shard("smollm2", "00000")
    chosen = torch.from_numpy(shard.tokens.segment == 2)
    rotary = store.teacher("smollm2").rotary
    position = torch.arange(len(chosen))
    keys = [
        torch.stack(
            [
                torch.from_numpy(store.read("smollm2", sample.sample_id, layer, head, "key"))
                for head in range(3)
            ]
        )
        for layer in LAYERS
    ]
    turned = [
        rotate(key[None, None], position, rotary[layer])
        for key, layer in zip(keys, LAYERS, strict=True)
    ]
    importance = torch.from_numpy(shard.arrays["importance"]).float()[None]
    return torch.cat(turned, dim=1)[..., chosen, :], importance[..., chosen]


@pytest.mark.parametrize(
    ("method", "fast", "slow"),
    [("rkv", rkv_score, slow_rkv), ("rkv_original", rkv_original_score, slow_rkv_original)],
)
def test_rkv_on_real_keys_equals_the_slow_form(
    method: str, fast: object, slow: object, real: tuple[Tensor, Tensor]
) -> None:
    key, importance = real
    num_tokens = key.shape[3]
    assert num_tokens > 24
    mask = torch.ones(1, num_tokens, dtype=torch.bool)
    scores = fast(key, importance, mask, 0.1)
    kept = evict(
        method, mask, len(LAYERS), 3, 24, key_BLHTD=key, importance_BLHT=importance, mix=0.1
    )
    for layer in range(len(LAYERS)):
        for head in range(3):
            expected = torch.tensor(
                slow(key[0, layer, head].tolist(), importance[0, layer, head].tolist(), 0.1)
            )
            torch.testing.assert_close(scores[0, layer, head], expected, atol=1e-5, rtol=1e-4)
            chosen = scores[0, layer, head].argsort(descending=True, stable=True)[:24]
            assert kept.index_BLHM[0, layer, head].tolist() == sorted(chosen.tolist())


def test_methods_differ_on_real_keys(real: tuple[Tensor, Tensor]) -> None:
    key, importance = real
    mask = torch.ones(1, key.shape[3], dtype=torch.bool)
    options = {"key_BLHTD": key, "importance_BLHT": importance, "seed_B": torch.tensor([1])}
    kept = {
        method: evict(method, mask, len(LAYERS), 3, 24, **options).index_BLHM
        for method in ("right_crop", "uniform", "random", "importance", "rkv", "rkv_original")
    }
    names = list(kept)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            assert not torch.equal(kept[one], kept[other]), (one, other)
