"""SmolLM2, MiniLM and Gemma 3 for real: capture against transformers, and a store of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from kvdistill.attention.hooks import capture
from kvdistill.attention.rotary import unrotate
from kvdistill.config.load import parse_experiment
from kvdistill.extract.teacher import load_teacher
from kvdistill.extract.tokenise import TeacherBatch, collate_teacher_batch
from kvdistill.pipelines.extract import extract
from kvdistill.store.reader import KVStore
from tests.attention.test_hooks import recorded_attention
from tests.extract.models import TEXTS

pytestmark = pytest.mark.real_model

GEOMETRY = {"smollm2": (30, 3, 64), "minilm": (6, 12, 32), "gemma3": (18, 1, 256)}


def experiment_of(folder: Path, models: Path, name: str, **teacher: Any) -> Any:
    rows = "".join(f'{{"text": "{text}"}}\n' for text in TEXTS)
    (folder / "corpus.jsonl").write_text(rows, encoding="utf-8")
    return parse_experiment(
        {
            "store": str(folder / "store"),
            "corpus": {"path": str(folder / "corpus.jsonl")},
            "teachers": {name: {"model": str(models / name), **teacher}},
            "extraction": {"device": "cpu"},
            "student": {"model": "none"},
        }
    )


def batch_of(teacher: Any, texts: list[str]) -> TeacherBatch:
    from kvdistill.corpus.samples import Sample

    encoded = teacher.tokenise([Sample(str(i), (("text", t),)) for i, t in enumerate(texts)])
    return collate_teacher_batch(encoded, range(len(texts)), 0, torch.device("cpu"))


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_keys_unrotated_from_the_models_own_cache_are_the_captured_ones(
    name: str, tmp_path: Path, real_models: Path
) -> None:
    teacher = load_teacher(name, experiment_of(tmp_path, real_models, name))
    # Gemma's sliding window is 512 tokens: the long text goes past it.
    long = " ".join(TEXTS * (1 if name == "smollm2" else 12))
    batch = batch_of(teacher, [TEXTS[0], long])
    if name == "gemma3":
        assert max(batch.lengths) > 512
        assert (batch.input_ids[:, 0] == teacher.tokenizer.bos_token_id).all()
    cache = DynamicCache()
    seen: dict[int, Any] = {}
    with capture(teacher.sites, seen.__setitem__), torch.inference_mode():
        teacher.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            past_key_values=cache,
            use_cache=True,
        )
    positions = torch.arange(max(batch.lengths))
    real = batch.real_mask[:, None, :, None]
    assert sorted(seen) == list(range(GEOMETRY[name][0]))
    for layer in teacher.layers:
        own, cached = seen[layer.layer_idx], cache.layers[layer.layer_idx]
        assert layer.rotary is not None
        key = unrotate(cached.keys, positions, layer.rotary)
        for ours, theirs in ((own.key, key), (own.value, cached.values)):
            assert ours.shape[1::2] == GEOMETRY[name][1:]
            error = ((ours - theirs) * real).abs().max() / theirs.abs().max()
            assert error < 1e-5


def test_minilm_equals_its_own_attention_inputs(tmp_path: Path, real_models: Path) -> None:
    teacher = load_teacher("minilm", experiment_of(tmp_path, real_models, "minilm"))
    assert teacher.max_length == 512
    batch = batch_of(teacher, TEXTS)
    seen: dict[int, Any] = {}
    with recorded_attention() as products, capture(teacher.sites, seen.__setitem__):
        teacher.forward(batch)
    for layer_idx, (_, key, value) in enumerate(products):
        torch.testing.assert_close(seen[layer_idx].key, key, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(seen[layer_idx].value, value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["smollm2", "minilm", "gemma3"])
def test_extracted_for_real(name: str, tmp_path: Path, real_models: Path) -> None:
    experiment = experiment_of(tmp_path, real_models, name)
    assert extract(experiment).complete
    store = KVStore.open(experiment.store)
    (group,) = store.teacher(name).groups
    assert (len(group.layers), group.num_key_value_heads, group.key_head_dim) == GEOMETRY[name]
    teacher = load_teacher(name, experiment)
    batch = batch_of(teacher, TEXTS[2:])
    seen: dict[int, Any] = {}
    with capture(teacher.sites, seen.__setitem__):
        teacher.forward(batch)
    for layer_idx in (0, GEOMETRY[name][0] - 1):
        for kind in ("key", "value"):
            stored = store.read(name, "00000002", layer_idx, 0, kind)
            own = getattr(seen[layer_idx], kind)[0, 0].numpy()
            assert np.linalg.norm(stored - own) < 0.03 * np.linalg.norm(own)
    tokens = store.read_shard(name, "00000").tokens
    text = tokens.segment == 0
    assert (tokens.char_end > tokens.char_start)[text].all()
