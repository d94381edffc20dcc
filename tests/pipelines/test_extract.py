"""Stage 1 end to end with tiny teachers: once, again, in shares, killed, and refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvdistill.attention.hooks import capture
from kvdistill.config.experiment import Experiment
from kvdistill.config.load import dump_experiment, parse_experiment
from kvdistill.errors import (
    ConfigError,
    Interrupted,
    NonFiniteError,
    SlurmError,
    StoreError,
    StoreMismatch,
    TeacherError,
)
from kvdistill.extract.encode import BatchPacker
from kvdistill.extract.teacher import Teacher, load_teacher
from kvdistill.extract.tokenise import TeacherBatch
from kvdistill.pipelines.extract import ExtractionWork, Progress, extract
from kvdistill.pipelines.extract_tasks import extract_share, prepare_store
from kvdistill.store.reader import KVStore
from kvdistill.store.writer import publish_shard
from tests.extract.models import save_teacher
from tests.store.made import statistics_of

CORPUS = "".join(
    f'{{"prompt": "Ann has {i} apples and {"eats " * (i % 5)}one.", '
    f'"rationale": "So {i} - 1 = {i - 1}.", "answer": "{i - 1}"}}\n'
    for i in range(1, 13)
)


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    (tmp_path / "corpus.jsonl").write_text(CORPUS + '{"text": ""}\n', encoding="utf-8")
    save_teacher(tmp_path / "llama", "llama")
    save_teacher(tmp_path / "bert", "bert", num_key_value_heads=4, type_vocab_size=1, bos=True)
    return make(tmp_path)


def make(folder: Path, **changes: Any) -> Experiment:
    body: dict[str, Any] = {
        "store": str(folder / "store"),
        "corpus": {"path": str(folder / "corpus.jsonl"), "shard_chars": 240},
        "teachers": {
            "llama": {"model": str(folder / "llama"), "codec": {"key": "bf16", "value": "bf16"}},
            "bert": {"model": str(folder / "bert")},
        },
        "extraction": {"batch_tokens": 200, "device": "cpu"},
        "student": {"model": str(folder / "student")},
    }
    for dotted, value in changes.items():
        *parents, last = dotted.split("__")
        place = body
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return parse_experiment(body)


def contents(store: KVStore) -> dict[str, np.ndarray]:
    found = {}
    for teacher in store.teachers():
        for shard_id in store.shard_ids:
            shard = store.read_shard(teacher, shard_id)
            found |= {f"{teacher}/{shard_id}/{k}": np.asarray(v) for k, v in shard.arrays.items()}
            found[f"{teacher}/{shard_id}/ids"] = shard.tokens.token_ids
            found[f"{teacher}/{shard_id}/ptr"] = shard.tokens.sample_ptr
    return found


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name], err_msg=name)


def test_once_and_again(experiment: Experiment) -> None:
    words: list[Progress] = []
    report = extract(experiment, progress=words.append)
    store = KVStore.open(experiment.store)
    assert report.complete
    assert store.teachers() == ["bert", "llama"]
    assert len(store.shard_ids) == 3
    assert sum(word.committed for word in words) == 2 * len(store.shard_ids)
    assert [teacher.shards for teacher in report.teachers] == [len(store.shard_ids)] * 2
    before = {path: path.stat().st_mtime_ns for path in experiment.store.rglob("*")}
    again = extract(experiment)
    assert [teacher.shards for teacher in again.teachers] == [0, 0]
    assert {path: path.stat().st_mtime_ns for path in experiment.store.rglob("*")} == before


def test_again_needs_no_teacher(experiment: Experiment, tmp_path: Path) -> None:
    extract(experiment)
    (tmp_path / "llama").rename(tmp_path / "gone")
    assert extract(experiment).complete


def test_stored_keys_are_the_teachers_own(experiment: Experiment) -> None:
    """Every stored value against a forward pass of one sample alone, without any padding."""
    extract(experiment, ["llama"])
    store = KVStore.open(experiment.store)
    teacher = load_teacher("llama", experiment)
    for shard_id in store.shard_ids:
        tokens = store.read_shard("llama", shard_id).tokens
        for i, sample in enumerate(store.samples(shard_id)):
            ids = torch.from_numpy(tokens.token_ids[tokens.span(i)].astype(np.int64))[None]
            if not ids.numel():
                assert sample.text == ""
                continue
            seen: dict[int, Any] = {}
            with capture(teacher.sites, seen.__setitem__):
                teacher.forward(TeacherBatch((0,), (ids.shape[1],), ids))
            for layer_idx, qkv in seen.items():
                for kind, own in (("key", qkv.key), ("value", qkv.value)):
                    for head in range(2):
                        read = store.read("llama", sample.sample_id, layer_idx, head, kind)
                        np.testing.assert_allclose(read, own[0, head], rtol=8e-3, atol=1e-4)


def test_statistics_are_of_the_text_tokens(experiment: Experiment) -> None:
    extract(experiment, ["llama"])
    store = KVStore.open(experiment.store)
    merged = store.statistics("llama")
    rows = [
        np.stack(
            [
                [store.read("llama", sample.sample_id, layer, head, "key") for head in range(2)]
                for layer in range(3)
            ]
        )
        for shard_id in store.shard_ids
        for sample in store.samples(shard_id)
    ]
    expected = statistics_of(rows)
    assert merged["key"].count == expected.count
    np.testing.assert_allclose(merged["key"].mean, expected.mean, atol=2e-3)
    np.testing.assert_allclose(merged["key"].std, expected.std, rtol=2e-2)


def test_special_tokens_are_not_counted(experiment: Experiment) -> None:
    extract(experiment, ["bert"])
    store = KVStore.open(experiment.store)
    tables = [store.read_shard("bert", shard_id).tokens for shard_id in store.shard_ids]
    text = sum(int((table.segment >= 0).sum()) for table in tables)
    assert sum(table.num_tokens for table in tables) == text + 13  # one <s> each
    assert store.statistics("bert")["key"].count == text


def test_shares_make_the_same_store(experiment: Experiment, tmp_path: Path) -> None:
    extract(experiment)
    shared = make(tmp_path, store=str(tmp_path / "shared"))
    for teacher in shared.teachers:
        endings = [extract_share(shared, teacher, task, 3, workers=1) for task in range(3)]
        assert {ending.outcome for ending in endings} == {"complete"}
    assert_same(contents(KVStore.open(shared.store)), contents(KVStore.open(experiment.store)))


@pytest.mark.parametrize("batch_tokens", [60, 10_000])
def test_codes_do_not_depend_on_the_batch(
    experiment: Experiment, tmp_path: Path, batch_tokens: int
) -> None:
    """Arithmetic differs by rounding between batch shapes; nothing else may."""
    one = make(tmp_path, extraction__batch_tokens=1)
    other = make(tmp_path, store=str(tmp_path / "other"), extraction__batch_tokens=batch_tokens)
    for found in (one, other):
        extract(found)
    ours, theirs = contents(KVStore.open(one.store)), contents(KVStore.open(other.store))
    for name, array in ours.items():
        if array.dtype == np.int8:
            assert np.abs(array.astype(int) - theirs[name]).max(initial=0) <= 1, name
        elif array.dtype == np.uint16:  # bfloat16's bits
            close = [(x.astype(np.uint32) << 16).view(np.float32) for x in (array, theirs[name])]
            np.testing.assert_allclose(*close, rtol=1e-2, atol=1e-4, err_msg=name)
        else:
            np.testing.assert_allclose(array, theirs[name], rtol=2e-3, atol=1e-6, err_msg=name)


def test_a_stopped_shard_is_abandoned_between_two_batches(experiment: Experiment) -> None:
    store = prepare_store(experiment)
    work = ExtractionWork(experiment, "llama")
    work.run(store.shard_ids[0], lambda: False)
    calls = iter([False, True])
    with pytest.raises(Interrupted, match="00001 of llama abandoned"):
        work.run(store.shard_ids[1], lambda: next(calls))
    assert store.committed("llama") == {"00000"}
    assert extract(experiment).complete


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.15, 0.4])
def test_killed_and_completed(experiment: Experiment, tmp_path: Path, delay: float) -> None:
    extract(experiment)
    killed = make(tmp_path, store=str(tmp_path / "killed"))
    config = tmp_path / "killed.yaml"
    config.write_text(dump_experiment(killed), encoding="utf-8")
    command = [sys.executable, "-m", "kvdistill.cli", "extract", str(config)]
    for _ in range(3):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stderr is not None
        process.stderr.readline()  # the first shard is committed
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    assert extract(killed).complete
    assert_same(contents(KVStore.open(killed.store)), contents(KVStore.open(experiment.store)))


def test_another_extraction_under_the_same_name(experiment: Experiment, tmp_path: Path) -> None:
    extract(experiment)
    with pytest.raises(StoreMismatch, match="codec"):
        extract(make(tmp_path, teachers__llama__codec={"key": "int8", "value": "int8"}))
    save_teacher(tmp_path / "llama2", "llama", num_hidden_layers=2)
    with pytest.raises(StoreMismatch, match="with other parameters"):
        extract(make(tmp_path, teachers__llama__model=str(tmp_path / "llama2")))


def test_only_some_layers(experiment: Experiment, tmp_path: Path) -> None:
    chosen = make(tmp_path, teachers__llama__layers=[0, 2])
    extract(chosen, ["llama"])
    store = KVStore.open(chosen.store)
    assert store.teacher("llama").layers == (0, 2)
    assert store.read_shard("llama", store.shard_ids[0]).arrays["key"].shape[0] == 2
    with pytest.raises(TeacherError, match=r"no attention layer \[7\]"):
        extract(make(tmp_path, teachers__llama__layers=[7], store=str(tmp_path / "s2")))


@pytest.mark.parametrize(("policy", "truncated", "skipped"), [("truncate", 4, 0), ("skip", 0, 4)])
def test_long_texts(
    experiment: Experiment, tmp_path: Path, policy: str, truncated: int, skipped: int
) -> None:
    long = make(tmp_path, extraction__max_length=48, extraction__long_text=policy)
    (report,) = extract(long, ["llama"]).teachers
    assert (report.truncated, report.skipped) == (truncated, skipped)
    own = {"teachers__llama__max_length": 48, "teachers__llama__long_text": policy}
    for_one = make(tmp_path, store=str(tmp_path / "one"), **own)
    assert [x.truncated + x.skipped for x in extract(for_one).teachers] == [4, 0]
    table = [
        KVStore.open(long.store).read_shard("llama", s).tokens
        for s in prepare_store(long).shard_ids
    ]
    lengths = np.concatenate([np.diff(t.sample_ptr) for t in table])
    assert lengths.max() <= 48
    assert (lengths == 48).any() == (policy == "truncate")


def test_long_texts_are_an_error_by_default(experiment: Experiment, tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"sample '\d+' has \d+ tokens, .*at most 48"):
        extract(make(tmp_path, extraction__max_length=48), ["llama"])


def test_non_finite_activations_name_layer_and_sample(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = load_teacher

    def poisoned(*arguments: Any) -> Any:
        teacher = original(*arguments)
        teacher.model.layers[1].self_attn.v_proj.weight[0, 0] = float("nan")
        return teacher

    monkeypatch.setattr("kvdistill.pipelines.extract.load_teacher", poisoned)
    with pytest.raises(NonFiniteError, match=r"layer 1, head 0, sample '\d+': values"):
        extract(experiment, ["llama"])
    assert not KVStore.open(experiment.store).committed("llama")


def test_out_of_memory_halves_the_batch(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(make(tmp_path, extraction__batch_tokens=1, store=str(tmp_path / "single")), ["llama"])
    sizes: list[int] = []
    forward = Teacher.forward

    def small_memory(self: Teacher, batch: TeacherBatch) -> torch.Tensor:
        hidden = forward(self, batch)
        if len(batch.lengths) > 1:
            raise torch.OutOfMemoryError("no room, noticed late")
        sizes.append(len(batch.lengths))
        return hidden

    monkeypatch.setattr(Teacher, "forward", small_memory)
    assert extract(make(tmp_path, extraction__batch_tokens=10_000), ["llama"]).complete is True
    assert len(sizes) == 12
    assert_same(
        contents(KVStore.open(tmp_path / "store")), contents(KVStore.open(tmp_path / "single"))
    )


def test_codes_are_placed_while_the_next_batch_is_read(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_by_one = {"extraction__batch_tokens": 1, "corpus__shard_chars": 10**6}
    events: list[str] = []
    for owner, name in ((Teacher, "forward"), (BatchPacker, "finish")):
        call = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *args, call=call, name=name: events.append(name) or call(*args)
        )
    extract(make(tmp_path, corpus__max_samples=3, **one_by_one), ["llama"])
    assert events == ["forward", "forward", "finish", "forward", "finish", "finish"]


def test_a_failed_write_stops_the_run_and_leaves_what_was_written(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []

    def full_disk(store: KVStore, teacher: str, shard_id: str, *args: Any, **kwargs: Any) -> bool:
        if written:
            raise StoreError("no space left on device")
        written.append(shard_id)
        return publish_shard(store, teacher, shard_id, *args, **kwargs)

    monkeypatch.setattr("kvdistill.pipelines.extract.publish_shard", full_disk)
    with pytest.raises(StoreError, match="no space left"):
        extract(experiment, ["llama"])
    assert KVStore.open(experiment.store).committed("llama") == set(written)


def test_unknown_teacher_and_task(experiment: Experiment) -> None:
    with pytest.raises(ConfigError, match="no teacher"):
        extract(experiment, ["nobody"])
    with pytest.raises(SlurmError, match="task 3 of 3"):
        extract_share(experiment, "llama", 3, 3, workers=1)


def test_a_missing_model_is_one_clear_line(experiment: Experiment, tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"teacher 'llama': cannot load") as caught:
        extract(make(tmp_path, teachers__llama__model=str(tmp_path / "nowhere")), ["llama"])
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_not_read(experiment: Experiment, tmp_path: Path) -> None:
    folder = tmp_path / "llama"
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(TeacherError, match="safetensors"):
        extract(experiment, ["llama"])
