"""Teachers of which only some heads and tokens are stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvdistill.attention.eviction import evict
from kvdistill.attention.importance import importance, queries_and_keys
from kvdistill.attention.rotary import rotate
from kvdistill.corpus.readers import load_corpus
from kvdistill.distill.data.stream import Rank
from kvdistill.distill.student.build import train_tokenizer
from kvdistill.distill.train.set_up import assemble
from kvdistill.errors import ConfigError, TeacherError
from kvdistill.extract.teacher import load_teacher
from kvdistill.extract.tokenise import collate_teacher_batch
from kvdistill.pipelines.extract import extract
from kvdistill.pipelines.plan import estimate_extraction
from kvdistill.pipelines.reextract import reextract
from kvdistill.store.identity import extraction_fingerprint, recorded_settings
from kvdistill.store.maintenance import convert_store, verify_store
from kvdistill.store.reader import KVStore
from tests.extract.models import save_teacher
from tests.pipelines.test_teachers import make

ROWS = "".join(
    f'{{"prompt": "Ann has {i} apples?", "rationale": "{"So she has even more. " * (i % 4)}{i}.", '
    f'"answer": "{i}"}}\n'
    for i in range(6)
)
LOSSLESS = {"key": "fp16", "value": "fp16"}
METHODS = ("right_crop", "uniform", "random", "importance", "rkv", "rkv_original")


def stored(folder: Path, teacher: dict[str, Any], text: str = ROWS, **extraction: Any) -> Any:
    """An extracted store in a folder of its own, and its only shard."""
    folder.mkdir()
    save_teacher(folder / "t")
    experiment = make(folder, teacher, text, codec=LOSSLESS, **extraction)
    extract(experiment)
    store = KVStore.open(experiment.store)
    return experiment, store, store.read_shard("t", store.shard_ids[0])


@pytest.mark.parametrize("backend", ["zarr", "safetensors"])
@pytest.mark.parametrize("method", METHODS)
def test_slots_hold_what_everything_holds_there(tmp_path: Path, method: str, backend: str) -> None:
    """Same keys, values, importance and statistics as a store of everything, at ``kept``."""
    spec = {"method": method, "budget": 5}
    _, _, whole = stored(tmp_path / "whole", {}, backend=backend)
    _, store, part = stored(tmp_path / "part", {"eviction": spec}, backend=backend)
    assert not verify_store(store)
    kept, table = part.arrays["kept"], part.tokens
    for i in range(table.num_samples):
        slots, tokens = table.span(i), whole.tokens.span(i)
        rationale = np.flatnonzero(whole.tokens.segment[tokens] == 2)
        assert slots.stop - slots.start == min(5, rationale.size)
        assert (table.segment[slots] == 2).all()
        index = kept[:, :, slots]
        assert np.isin(index, rationale).all()
        assert (np.diff(index, axis=2) > 0).all()
        for name in ("key", "value", "importance"):
            theirs = whole.arrays[name][:, :, tokens]
            at = index if name == "importance" else index[..., None]
            np.testing.assert_array_equal(
                part.arrays[name][:, :, slots], np.take_along_axis(theirs, at, axis=2)
            )
    assert store.statistics("t")["key"].mean == pytest.approx(
        KVStore.open(tmp_path / "whole" / "store").statistics("t")["key"].mean
    )


@pytest.mark.parametrize("method", ["importance", "rkv", "rkv_original"])
def test_each_layer_and_head_ranks_by_what_the_teacher_computes(
    tmp_path: Path, method: str
) -> None:
    experiment, store, part = stored(
        tmp_path / "part", {"eviction": {"method": method, "budget": 10}}
    )
    teacher = load_teacher("t", experiment)
    encoded = teacher.tokenise(store.samples(store.shard_ids[0]))
    for i, sample in enumerate(encoded):
        seen: dict[int, Any] = {}
        teacher.run(collate_teacher_batch(encoded, [i], 0, teacher.device), seen.__setitem__)
        mask = torch.from_numpy(sample.segment == 2)[None]
        for layer, measured in zip(seen, teacher.layers, strict=True):
            query, key, _ = seen[layer]
            received = importance(query, key, queries_and_keys([sample.segment]), measured)
            turned = rotate(key, torch.arange(key.shape[2]), measured.rotary)
            wanted = evict(
                method, mask, 1, 2, 10, key_BLHTD=turned[:, None], importance_BLHT=received[:, None]
            )
            count = int(mask.sum().clamp_max(10))
            got = part.arrays["kept"][layer, :, part.tokens.span(i)]
            np.testing.assert_array_equal(got, wanted.index_BLHM[0, 0, :, :count].numpy())
    kept = part.arrays["kept"]
    assert (kept[0] != kept[1]).any()
    assert (kept[:, 0] != kept[:, 1]).any()


def test_random_draws_anew_in_every_sample_layer_and_head(tmp_path: Path) -> None:
    text = '{"text": "The same text of some length, twice over."}\n' * 2
    _, _, part = stored(tmp_path / "s", {"eviction": {"method": "random", "budget": 6}}, text)
    kept = part.arrays["kept"].reshape(3, 2, 2, 6)
    drawn = {tuple(row) for row in kept.reshape(-1, 6).tolist()}
    assert len(drawn) == 12
    assert (part.tokens.segment == 0).all()  # no rationale: chosen from all text


def test_some_heads(tmp_path: Path) -> None:
    _, _, whole = stored(tmp_path / "whole", {})
    _, store, part = stored(tmp_path / "part", {"heads": [1], "layers": [0, 2]})
    manifest = store.teacher("t")
    assert (manifest.kept_heads, manifest.groups[0].num_key_value_heads) == ((1,), 1)
    for name in ("key", "value", "importance"):
        np.testing.assert_array_equal(part.arrays[name], whole.arrays[name][[0, 2]][:, [1]])
    read = store.read("t", part.tokens.sample_ids[3], 2, 0, "value")
    assert read.shape == (part.tokens.span(3).stop - part.tokens.span(3).start, 8)


def test_an_evicted_store_changes_backends_without_its_teacher(tmp_path: Path) -> None:
    _, store, part = stored(tmp_path / "part", {"eviction": {"budget": 4}})
    convert_store(store, tmp_path / "mapped", "safetensors")
    mapped = KVStore.open(tmp_path / "mapped").read_shard("t", "00000")
    np.testing.assert_array_equal(mapped.arrays["kept"], part.arrays["kept"])


def test_an_evicted_teacher_is_refused_by_characters(tmp_path: Path) -> None:
    experiment, store, _ = stored(tmp_path / "part", {"eviction": {"budget": 4}})
    samples = load_corpus(experiment.corpus).train
    tokenizer = tmp_path / "tokenizer"
    train_tokenizer((sample.text for sample in samples), 280).save_pretrained(str(tokenizer))
    student = experiment.student.model_copy(
        update={
            "model": None,
            "tokenizer": str(tokenizer),
            "architecture": {
                "model_type": "llama", "hidden_size": 16, "intermediate_size": 16,
                "num_hidden_layers": 1, "num_attention_heads": 1,
            },
        }
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"eviction rkv to 4 tokens.*set it to latent"):
        assemble(experiment.model_copy(update={"student": student}), store, samples, Rank())


def test_the_plan_says_what_is_kept(tmp_path: Path) -> None:
    spec = {"eviction": {"method": "uniform", "budget": 5}, "heads": [0]}
    experiment, _, part = stored(tmp_path / "part", spec)
    (planned,) = estimate_extraction(experiment, 6, 6).teachers
    (whole,) = estimate_extraction(make(tmp_path / "part", {}, ROWS, codec=LOSSLESS), 6, 6).teachers
    assert whole.kept == 1.0
    assert planned.tokens == whole.tokens
    assert planned.kept == pytest.approx(part.tokens.num_tokens / whole.tokens / 2)
    assert planned.gigabytes["fp16"] < whole.gigabytes["fp16"]


def test_reading_again_agrees_and_a_changed_choice_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment, store, _ = stored(tmp_path / "part", {"eviction": {"budget": 5}})
    found = reextract(store, experiment, "t", 6)
    assert found.agrees
    assert (found.moved, found.key_error < 1e-3) == (0.0, True)
    original = KVStore.read_shard

    def forged(self: KVStore, *args: Any, **kwargs: Any) -> Any:
        shard = original(self, *args, **kwargs)
        shard.arrays["kept"][0] += 1  # type: ignore[index]
        return shard

    monkeypatch.setattr(KVStore, "read_shard", forged)
    again = reextract(store, experiment, "t", 6)
    assert again.moved == 1.0
    assert not again.agrees


def test_what_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    save_teacher(tmp_path / "t")
    with pytest.raises(TeacherError, match=r"no key/value head \[2\]; it has 2"):
        extract(make(tmp_path, {"heads": [0, 2]}))
    with pytest.raises(ConfigError, match=r"eviction\.method rkv ranks.*importance: true"):
        make(tmp_path, {"eviction": {}}, importance=False)


def test_settings_at_their_default_are_another_extraction_only_when_given(tmp_path: Path) -> None:
    def fingerprint(**teacher: Any) -> str:
        return extraction_fingerprint(recorded_settings(make(tmp_path, known | teacher), "t"))

    known = {"dtype": "float32"}  # what `auto` is by the time that it is recorded
    # As earlier versions computed it: their stores go on.
    plain = fingerprint()
    assert plain == "733abec7d74f64ab15459be488d95c66cda59fe7b5085c7ed0222babd60706c5"
    assert fingerprint(heads=None, eviction=None) == plain
    assert (
        fingerprint(eviction={})
        == "9a0af92d8563680e4d1eea1945c2832dd871ed2236866650e77112bd695a9ddb"
    )
    assert fingerprint(heads=[0]) != plain
