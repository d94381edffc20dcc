"""Placebos over a real store: what changes, what stays, and that training runs on them."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, LlamaForCausalLM

from kvdistill.config.distill import PlaceboConfig
from kvdistill.config.load import load_experiment
from kvdistill.distill.data.placebo import with_placebo
from kvdistill.distill.data.stream import StoreSource
from kvdistill.errors import ConfigError
from kvdistill.pipelines.extract import extract
from kvdistill.pipelines.train import train
from kvdistill.store.codecs import CODECS
from kvdistill.store.identity import extraction_fingerprint, recorded_settings
from kvdistill.store.reader import KVStore
from tests.pipelines.tiny import variant

LAYERS = {"llama": (0, 2), "bert": (1,)}


@pytest.fixture
def store(extracted: Path) -> KVStore:
    return KVStore.open(load_experiment(extracted).store)


def source(store: KVStore, **settings: Any) -> Any:
    return with_placebo(
        StoreSource(store, LAYERS), store, LAYERS, PlaceboConfig.model_validate(settings)
    )


def values(store: KVStore, arrays: Any) -> torch.Tensor:
    codec = CODECS[store.teacher("llama").codec.value]
    parts = {
        "": torch.from_numpy(arrays["value"]),
        "scale": torch.from_numpy(arrays["value_scale"]),
    }
    return codec.decode(parts, "value")


def test_no_placebo_is_the_source_itself(store: KVStore) -> None:
    real = StoreSource(store, LAYERS)
    assert with_placebo(real, store, LAYERS, PlaceboConfig()) is real


def test_shuffled_gives_every_text_the_kv_of_another_one(store: KVStore) -> None:
    real, shuffled = source(store).load(0), source(store, method="shuffled").load(0)
    for idx in range(len(real.samples)):
        item = shuffled.item(idx)
        assert item.sample == real.samples[idx]
        _, llama = item.shards["llama"]
        assert llama == item.shards["bert"][1] != idx
    again = source(store, method="shuffled").load(0)
    for idx in range(len(real.samples)):
        assert again.item(idx).shards["llama"][1] == shuffled.item(idx).shards["llama"][1]


def test_a_shard_of_one_text_borrows_from_its_neighbour(store: KVStore) -> None:
    shuffled = source(store, method="shuffled")
    lone = [i for i, size in enumerate(shuffled.sizes) if size == 1]
    assert lone, "this corpus was cut so that its last shard has one text"
    shard, neighbour = shuffled.load(lone[-1]), StoreSource(store, LAYERS).load(lone[-1] - 1)
    lender, partner = shard.item(0).shards["llama"]
    length = len(shard.samples[0].text)
    gaps = [abs(len(sample.text) - length) for sample in neighbour.samples]
    assert lender.tokens.sample_ids == tuple(sample.sample_id for sample in neighbour.samples)
    assert gaps[partner] == min(gaps)


def test_noise_has_the_stored_moments_and_nothing_of_the_text(store: KVStore) -> None:
    noisy = source(store, method="noise")
    shards = [noisy.load(i).teachers["llama"] for i in range(len(noisy.sizes))]
    drawn_LHTD = torch.cat([values(store, shard.arrays) for shard in shards], dim=2)
    stored = store.statistics("llama")["value"]
    rows = [0, 2]
    count = drawn_LHTD.shape[2]
    std = torch.from_numpy(stored.std[rows])
    off = (drawn_LHTD.mean(2) - torch.from_numpy(stored.mean[rows])).abs() / std
    assert off.max() < 5 / math.sqrt(count)
    assert ((drawn_LHTD.std(2) / std - 1).abs() < 5 / math.sqrt(2 * count)).all()
    plain = source(store)
    real_LHTD = torch.cat(
        [values(store, plain.load(i).teachers["llama"].arrays) for i in range(len(shards))], dim=2
    )
    centred = [x - x.mean(2, keepdim=True) for x in (drawn_LHTD, real_LHTD)]
    correlation = (centred[0] * centred[1]).mean(2) / (drawn_LHTD.std(2) * real_LHTD.std(2))
    assert correlation.abs().max() < 5 / math.sqrt(count)


def test_noise_is_the_same_at_every_pass_and_leaves_other_teachers_alone(store: KVStore) -> None:
    noisy = source(store, method="noise", teachers=["llama"])
    first, second = noisy.load(1), next(noisy.load_all([1], threads=1, num_ahead=1))
    for name in ("key", "key_scale", "value", "value_scale"):
        assert np.array_equal(
            first.teachers["llama"].arrays[name], second.teachers["llama"].arrays[name]
        )
    other = source(store, method="noise", seed=1).load(1)
    assert (other.teachers["llama"].arrays["key"] != first.teachers["llama"].arrays["key"]).any()
    real = source(store).load(1)
    assert np.array_equal(first.teachers["bert"].arrays["key"], real.teachers["bert"].arrays["key"])
    assert first.teachers["llama"].tokens.sample_ids == real.teachers["llama"].tokens.sample_ids


def test_an_unknown_teacher_is_refused_by_name(store: KVStore) -> None:
    with pytest.raises(ConfigError, match=r"'nobody'.*'bert', 'llama'"):
        source(store, method="noise", teachers=["nobody"])


@pytest.mark.parametrize("method", ["shuffled", "noise"])
def test_training_runs_on_a_placebo_and_ends_elsewhere(
    extracted: Path, tmp_path: Path, method: str
) -> None:
    real = train(variant(extracted, tmp_path, name="real"))
    placebo = train(variant(extracted, tmp_path, name="placebo", placebo__method=method))
    assert math.isfinite(placebo.metrics["eval_perplexity"])
    assert placebo.metrics["eval_perplexity"] != real.metrics["eval_perplexity"]


def test_an_untrained_teacher_is_another_extraction_and_always_the_same(
    extracted: Path, tmp_path: Path
) -> None:
    model = str(tmp_path / "llama")
    shutil.copytree(load_experiment(extracted).teachers["llama"].model, model)
    torch.manual_seed(1)  # the tiny teacher itself is as untrained as can be, from seed 0
    LlamaForCausalLM(AutoConfig.from_pretrained(model)).save_pretrained(model)
    found = []
    for number in range(2):
        body = variant(
            extracted,
            tmp_path,
            store=str(tmp_path / f"store{number}"),
            teachers={
                "llama": {"model": model},
                "untrained": {"model": model, "weights": "random"},
            },
        )
        extract(body)
        store = KVStore.open(body.store)
        trained, random = (recorded_settings(body, name) for name in ("llama", "untrained"))
        assert extraction_fingerprint(trained) != extraction_fingerprint(random)
        found.append({name: store.teacher(name).weights_fingerprint for name in body.teachers})
    assert found[0] == found[1]
    assert found[0]["llama"] != found[0]["untrained"]


def test_a_random_teacher_takes_no_weights_from_a_file(extracted: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="gguf_file"):
        variant(
            extracted,
            tmp_path,
            teachers={"t": {"model": "m", "weights": "random", "gguf_file": "m.gguf"}},
        )
