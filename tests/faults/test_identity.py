"""One identity of an extraction: what computes and what is stored, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvdistill.config.experiment import Experiment
from kvdistill.config.load import dump_experiment
from kvdistill.corpus.readers import load_corpus
from kvdistill.errors import StoreMismatch, TeacherError
from kvdistill.extract.loading import native_dtype
from kvdistill.pipelines import extract as extraction
from kvdistill.pipelines.cluster import overview
from kvdistill.pipelines.extract import extract, extraction_work
from kvdistill.pipelines.extract_tasks import pending_shards
from kvdistill.pipelines.reextract import reextract
from kvdistill.pipelines.train import require_matching_store
from kvdistill.store import identity
from kvdistill.store.maintenance import convert_store, merge_stores, verify_store
from kvdistill.store.reader import KVStore
from tests.attention.families import DECODERS
from tests.extract.models import save_teacher
from tests.pipelines.test_teachers import CORPUS, PLAIN, make

LONG = "x" * 200


def two_shards(folder: Path, teacher: dict[str, Any] | None = None, **more: Any) -> Experiment:
    experiment = make(folder, teacher or {}, more.pop("text", CORPUS), **more)
    corpus = experiment.corpus.model_copy(update={"shard_chars": 30})
    return experiment.model_copy(update={"corpus": corpus, "output_dir": folder / "runs"})


def check_training(experiment: Experiment) -> None:
    store = KVStore.open(experiment.store)
    require_matching_store(store, experiment, load_corpus(experiment.corpus))


def is_complete(experiment: Experiment) -> bool:
    path = Path(experiment.store).parent / "experiment.yaml"
    path.write_text(dump_experiment(experiment), encoding="utf-8")
    return overview(path).is_complete


def lose_a_shard(experiment: Experiment) -> None:
    store = KVStore.open(experiment.store)
    store.paths.shard("t", store.shard_ids[-1]).rename(experiment.store.parent / "lost")


def older(experiment: Experiment, **changes: Any) -> None:
    """Make a store's teacher what an earlier version would have written."""
    store = KVStore.open(experiment.store)
    path = store.paths.teacher_manifest("t")
    fields = ("settings", "architecture", "state_fingerprint", "model_files")
    absent = dict.fromkeys(fields)
    manifest = store.teacher("t").model_copy(update={**absent, **changes})
    body = manifest.model_dump(mode="json", exclude=set(fields))
    path.write_text(type(manifest).model_validate(body).to_json())


def refused(experiment: Experiment, match: str) -> None:
    """Each reader and writer refuses a finished teacher, with one line."""
    assert not is_complete(experiment)
    for ask in (
        check_training,
        extract,
        lambda x: pending_shards(x, "t", ask_slurm=False),
        lambda x: reextract(KVStore.open(x.store), x, "t", 1),
    ):
        with pytest.raises(StoreMismatch, match=match) as caught:
            ask(experiment)
        assert len(str(caught.value)) <= 500
        assert "\n" not in str(caught.value)


@pytest.fixture
def no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        pytest.fail("a text was read again")

    monkeypatch.setattr(extraction, "extract_samples", fail)


OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "weights": ({"weights": "random"}, {}, "weights: stored 'trained', requested 'random'"),
    "template": ({"template": "Q {prompt}{rationale}{answer}"}, {}, "template: stored None"),
    "bos": ({"bos": "always"}, {}, "bos: stored 'auto', requested 'always'"),
    "dtype": ({"dtype": "bfloat16"}, {}, "dtype: stored 'float32', requested 'bfloat16'"),
    "layers": ({"layers": [0, 2]}, {}, r"layers: stored None, requested \[0, 2\]"),
    "heads": ({"heads": [1]}, {}, r"heads: stored None, requested \[1\]"),
    "eviction": ({"eviction": {"budget": 3}}, {}, "eviction: stored None, requested {'budget': 3}"),
    "generate": ({"generate": {}}, {}, "generate: stored None"),
    "kernel": ({"attn_implementation": "eager"}, {}, "attn_implementation: stored 'sdpa'"),
    "codec": ({}, {"codec": {"key": "bf16"}}, "codec: stored .*'int8'.*requested .*'bf16'"),
    "logits": ({}, {"logits": 3}, "logits: stored 0, requested 3"),
    "confidence": ({}, {"confidence": True}, "confidence: stored False, requested True"),
    "cue": ({}, {"hidden_at_cue": True}, "hidden_at_cue: stored False, requested True"),
    "summaries": ({}, {"summaries": True}, "summaries: stored False, requested True"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher and its complete store."""
    folder = tmp_path_factory.mktemp("finished")
    save_teacher(folder / "t")
    assert extract(two_shards(folder)).complete
    return folder


@pytest.mark.parametrize("kind", OTHERS)
def test_another_setting_is_refused_by_its_name_and_both_values(finished: Path, kind: str) -> None:
    teacher, settings, match = OTHERS[kind]
    refused(two_shards(finished, teacher, **settings), match)


@pytest.mark.parametrize("is_older", [False, True])
def test_a_store_that_has_more_than_is_asked_goes_on(tmp_path: Path, is_older: bool) -> None:
    save_teacher(tmp_path / "t", tie_word_embeddings=True)
    more = {"confidence": True, "logits": 3, "summaries": True, "hidden_at_cue": True}
    asked = two_shards(tmp_path, importance=False)
    assert extract(two_shards(tmp_path, **more)).complete
    if is_older:
        older(asked)
    lose_a_shard(asked)
    assert extract(asked).complete
    check_training(asked)
    assert is_complete(asked)
    store = KVStore.open(asked.store)
    assert verify_store(store) == []
    assert store.token_array("t", store.shard_ids[-1], "top_ids").shape[1] == 3
    assert reextract(store, asked, "t", 2).agrees
    assert extract(two_shards(tmp_path, logits=2)).complete
    refused(
        two_shards(tmp_path, logits=4), "without names" if is_older else "logits: stored 3, req"
    )


def test_what_has_more_is_not_merged_with_what_has_less(tmp_path: Path) -> None:
    for name, more in (("more", {"confidence": True}), ("less", {})):
        (tmp_path / name).mkdir()
        save_teacher(tmp_path / name / "t", tie_word_embeddings=True)
        extract(two_shards(tmp_path / name, **more))
    stores = [KVStore.open(tmp_path / name / "store") for name in ("more", "less")]
    with pytest.raises(StoreMismatch, match="confidence: stored True, requested False"):
        merge_stores(stores[0], [stores[1]])


@pytest.mark.parametrize("kind", ["dtype", "codec", "summaries", "bos"])
def test_an_older_store_is_compared_by_what_it_records(tmp_path: Path, kind: str) -> None:
    save_teacher(tmp_path / "t")
    assert extract(two_shards(tmp_path)).complete
    older(two_shards(tmp_path))
    teacher, settings, match = OTHERS[kind]
    refused(
        two_shards(tmp_path, teacher, **settings),
        match if kind in ("dtype", "codec") else "stored without names",
    )


def test_an_older_store_goes_on_and_says_what_is_not_compared(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_teacher(tmp_path / "t")
    experiment = two_shards(tmp_path)
    assert extract(experiment).complete
    older(experiment)
    lose_a_shard(experiment)
    assert extract(experiment).complete
    assert extract(two_shards(tmp_path, long_text="skip")).complete
    check_training(experiment)
    assert sum("earlier version" in record.message for record in caplog.records) == 1
    assert verify_store(KVStore.open(experiment.store)) == []


def hub_snapshot(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    place = folder / "hub" / "models--org--t"
    shutil.copytree(folder / "t", place / "snapshots" / "abc")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
    return "org/t"


def moved(folder: Path) -> str:
    return str((folder / "t").rename(folder / "moved"))


def copied(folder: Path) -> str:
    return str(shutil.copytree(folder / "t", folder / "copied"))


def linked(folder: Path) -> str:
    (folder / "link").symlink_to(folder / "t")
    return str(folder / "link")


def saved_again(folder: Path) -> str:
    """By another version of transformers, which spells the config otherwise."""
    copied(folder)
    config = folder / "copied" / "config.json"
    body = json.loads(config.read_text())
    body |= {"_name_or_path": "x", "transformers_version": "9", "use_cache": False, "new": None}
    body["torch_dtype"] = body.pop("dtype", "float32")
    config.write_text(json.dumps(body))
    return str(folder / "copied")


@pytest.mark.usefixtures("no_reading")
@pytest.mark.parametrize(
    "respell",
    [moved, copied, linked, saved_again, lambda x: f"{x}/t/", lambda x: os.path.relpath(x / "t")],
    ids=["moved", "copied", "linked", "saved again", "slash", "relative"],
)
def test_a_model_spelt_otherwise_is_the_same_teacher(
    tmp_path: Path, finished: Path, respell: Callable[[Path], str]
) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    experiment = two_shards(tmp_path, {"model": respell(tmp_path)})
    report = extract(experiment)
    assert report.complete
    assert report.teachers[0].already_done == 2
    assert is_complete(experiment)
    check_training(experiment)
    work = extraction_work(str(tmp_path / "experiment.yaml"), "t")
    assert all(work.is_done(unit) for unit in KVStore.open(experiment.store).shard_ids)


@pytest.mark.usefixtures("no_reading")
def test_a_snapshot_of_the_hub_is_the_folder_it_holds(
    tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    experiment = two_shards(tmp_path, {"model": hub_snapshot(tmp_path, monkeypatch)})
    assert is_complete(experiment)
    check_training(experiment)
    assert extract(experiment).complete


def test_a_model_that_is_elsewhere_is_trusted_and_the_log_says_so(
    tmp_path: Path, finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "t")
    experiment = two_shards(tmp_path, {"model": "/elsewhere/u"})
    check_training(experiment)
    assert "'t': weights not compared" in caplog.text
    assert "/elsewhere/u" in caplog.text
    assert extract(experiment).complete
    lose_a_shard(experiment)
    with pytest.raises(TeacherError, match="/elsewhere/u"):
        extract(experiment)


def test_another_model_of_the_same_shape_is_refused(tmp_path: Path, finished: Path) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    save_teacher(tmp_path / "u", seed=1)
    refused(two_shards(tmp_path, {"model": str(tmp_path / "u")}), r"model: stored .*t'.*u'.* other")


def test_another_tokenizer_is_refused(tmp_path: Path, finished: Path) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    save_teacher(tmp_path / "u", bos=True)
    refused(two_shards(tmp_path, {"tokenizer": str(tmp_path / "u")}), "with other tokenizer")


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


CHANGES = {
    "rms_norm_eps": (0.01, "rms_norm_eps of the model's config: stored 1e-0., requested 0.01"),
    "hidden_act": ("relu", "hidden_act of the model's config: stored 'silu', requested 'relu'"),
    "sliding_window": (None, "sliding_window of the model's config: stored 4, requested None"),
}


@pytest.mark.parametrize("key", CHANGES)
def test_a_config_that_changes_half_way_is_refused(tmp_path: Path, key: str) -> None:
    save_teacher(tmp_path / "t", "mistral", sliding_window=4)
    experiment = two_shards(tmp_path)
    assert extract(experiment).complete
    value, match = CHANGES[key]
    edit_config(tmp_path / "t", **{key: value})
    refused(experiment, match)
    lose_a_shard(experiment)
    with pytest.raises(StoreMismatch, match=match):
        extract(experiment)


def test_weights_that_are_buffers_are_part_of_the_teacher(tmp_path: Path) -> None:
    model_type, options = DECODERS["deepseek_v3, latent"]
    options = {**options, "first_k_dense_replace": 0, "mlp_layer_types": ["sparse"] * 3}
    save_teacher(tmp_path / "t", model_type, **options, base={})
    experiment = two_shards(tmp_path)
    assert extract(experiment).complete
    lose_a_shard(experiment)
    path = tmp_path / "t" / "model.safetensors"
    tensors = load_file(path)
    (name, *_) = [name for name in tensors if name.endswith("e_score_correction_bias")]
    tensors[name] += torch.arange(tensors[name].numel())
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(StoreMismatch, match="with other buffers, head, code"):
        extract(experiment)


def test_the_head_of_a_teacher_that_generates_is_part_of_it(tmp_path: Path) -> None:
    save_teacher(tmp_path / "t", head=True, tie_word_embeddings=False, initializer_range=0.3)
    generates = {"generate": {"max_new_tokens": 4}}
    for teacher in (generates, {}):
        experiment = two_shards(tmp_path, teacher)
        experiment = experiment.model_copy(update={"store": tmp_path / f"store{len(teacher)}"})
        assert extract(experiment).complete
        lose_a_shard(experiment)
        shutil.rmtree(tmp_path / "lost")
    path = tmp_path / "t" / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].flip(0)
    save_file(tensors, path, metadata={"format": "pt"})
    assert extract(experiment).complete  # the head of a teacher that reads computes nothing
    other = two_shards(tmp_path, generates).model_copy(update={"store": tmp_path / "store1"})
    with pytest.raises(StoreMismatch, match="with other buffers, head, code"):
        extract(other)


SAME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "long_text": ({}, {"long_text": "truncate"}),
    "window_overlap": ({}, {"window_overlap": 4}),
    "max_length, not reached": ({}, {"max_length": 64}),
    "every layer": ({"layers": [2, 0, 1]}, {}),
    "every head": ({"heads": [0, 1]}, {}),
    "revision": ({"revision": "main"}, {}),
    "placement": ({"device_map": "auto", "trust_remote_code": True}, {"batch_tokens": 64}),
    "backend": ({}, {"backend": "safetensors"}),
}


@pytest.mark.usefixtures("no_reading")
@pytest.mark.parametrize("kind", SAME)
def test_a_setting_that_changed_no_stored_byte_refuses_nothing(finished: Path, kind: str) -> None:
    teacher, settings = SAME[kind]
    experiment = two_shards(finished, teacher, **settings)
    assert extract(experiment).complete
    assert is_complete(experiment)
    check_training(experiment)


def test_fewer_layers_spelt_out_are_every_layer_again(tmp_path: Path) -> None:
    save_teacher(tmp_path / "t")
    assert extract(two_shards(tmp_path, {"layers": [0, 1, 2]})).complete
    experiment = two_shards(tmp_path)
    check_training(experiment)
    lose_a_shard(experiment)
    assert extract(experiment).complete
    assert verify_store(KVStore.open(experiment.store)) == []


def test_what_was_done_to_a_long_text_is_part_of_the_teacher(tmp_path: Path) -> None:
    save_teacher(tmp_path / "t")
    text = PLAIN + json.dumps({"text": LONG}) + "\n"
    with pytest.raises(TeacherError, match="long_text"):
        extract(two_shards(tmp_path, text=text))
    assert len(KVStore.open(tmp_path / "store").committed("t")) == 1
    assert extract(two_shards(tmp_path, text=text, long_text="truncate")).complete
    check_training(two_shards(tmp_path, text=text, long_text="truncate"))
    match = "long_text: stored 'error', requested 'skip'"
    refused(two_shards(tmp_path, text=text, long_text="skip"), match)
    match = "max_length: stored None, requested 20"
    refused(two_shards(tmp_path, text=text, max_length=20), match)


def test_a_lower_limit_than_a_stored_text_is_refused(finished: Path) -> None:
    refused(two_shards(finished, max_length=8), "max_length: stored None, requested 8")


def test_stores_of_equal_teachers_are_merged_whatever_their_spelling(tmp_path: Path) -> None:
    save_teacher(tmp_path / "t")
    first = two_shards(tmp_path)
    assert extract(first).complete
    lose_a_shard(first)
    second = two_shards(tmp_path, {"model": copied(tmp_path)}, long_text="truncate")
    second = second.model_copy(update={"store": tmp_path / "second"})
    assert extract(second).complete
    target = KVStore.open(first.store)
    assert merge_stores(target, [KVStore.open(second.store)]) == 1
    assert verify_store(target) == []
    assert target.commit("t", target.shard_ids[-1]).num_tokens
    check_training(first)


def test_a_converted_store_trains_and_continues_in_its_own_backend(
    tmp_path: Path, finished: Path
) -> None:
    convert_store(KVStore.open(finished / "store"), tmp_path / "store", "safetensors")
    experiment = two_shards(tmp_path, {"model": str(finished / "t")})
    assert extract(experiment).complete
    lose_a_shard(experiment)
    with pytest.raises(StoreMismatch, match="backend: stored 'safetensors', requested 'zarr'"):
        extract(experiment)


def test_a_stamp_saves_reading_the_weights_and_sees_every_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = two_shards(tmp_path).teachers["t"]
    save_teacher(tmp_path / "t")
    assert "stamp" not in identity.teacher_files(config, {})  # it changed a moment ago
    monkeypatch.setattr(identity, "_SETTLED_SECONDS", 0.01)
    time.sleep(0.05)
    first = identity.teacher_files(config, {})
    reads: list[Path] = []
    monkeypatch.setattr(identity, "file_record", counting(reads))
    moved = config.model_copy(update={"model": str((tmp_path / "t").rename(tmp_path / "u"))})
    assert identity.teacher_files(moved, first) == first
    assert not [path for path in reads if path.suffix == ".safetensors"]
    path = tmp_path / "u" / "model.safetensors"
    times, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as rsync or tar would
    time.sleep(0.05)
    assert identity.teacher_files(moved, first)["weights"] != first["weights"]


def counting(reads: list[Path]) -> Callable[[Path], Any]:
    def record(path: Path) -> Any:
        reads.append(path)
        return file_record(path)

    file_record = identity.file_record
    return record


def test_dtype_auto_is_recorded_as_what_computes_and_goes_on_as_stored(tmp_path: Path) -> None:
    save_teacher(tmp_path / "t")
    found = {}
    for dtype in ("auto", "float32", "bfloat16"):
        experiment = two_shards(tmp_path, {"dtype": dtype})
        experiment = experiment.model_copy(update={"store": tmp_path / dtype})
        assert extract(experiment).complete
        found[dtype] = KVStore.open(experiment.store).teacher("t")
    assert found["auto"].dtype == found["auto"].settings["dtype"] == "float32"
    assert found["auto"].extraction_fingerprint == found["float32"].extraction_fingerprint
    known = "733abec7d74f"  # of earlier versions, whose default was float32
    assert found["auto"].extraction_fingerprint.startswith(known)
    auto = two_shards(tmp_path).model_copy(update={"store": tmp_path / "bfloat16"})
    assert auto.teachers["t"].dtype == "auto"
    lose_a_shard(auto)
    assert extract(auto).complete
    check_training(auto)
    with pytest.raises(StoreMismatch, match="dtype: stored 'bfloat16', requested 'float32'"):
        extract(two_shards(tmp_path, {"dtype": "float32"}).model_copy(update={"store": auto.store}))


def test_dtype_auto_on_two_kinds_of_nodes_is_that_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_teacher(tmp_path / "t")
    experiment, load = two_shards(tmp_path), extraction.load_teacher
    loads: list[str] = []

    def overtaken(name: str, known: Experiment, day: Any) -> Any:
        loads.append(known.teachers[name].dtype)
        if len(loads) == 1:  # another node registers the teacher while this one loads it
            first = two_shards(tmp_path, {"dtype": "bfloat16"})
            extraction.open_teacher(KVStore.open(first.store), first, name)
        return load(name, known, day)

    monkeypatch.setattr(extraction, "load_teacher", overtaken)
    assert extract(experiment).complete
    assert loads == ["auto", "bfloat16", "bfloat16"]
    assert KVStore.open(experiment.store).teacher("t").dtype == "bfloat16"


def test_dtype_auto_is_bfloat16_where_a_gpu_computes_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for supported, dtype in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda *, including_emulation, s=supported: s
        )
        assert native_dtype(torch.device("cuda", 0)) == dtype
        assert native_dtype(torch.device("cpu")) == "float32"
