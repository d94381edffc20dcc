"""verify, repair, convert, merge and remove; prefetch and the statistics cache."""

from __future__ import annotations

import gc
import pickle
import shutil
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvdistill.errors import ShardCorrupt, ShardNotFound, StoreError, StoreMismatch
from kvdistill.store.maintenance import (
    convert_store,
    merge_stores,
    remove_teacher,
    repair_store,
    verify_store,
)
from kvdistill.store.prefetch import ShardRequest, prefetch
from kvdistill.store.reader import KVStore
from kvdistill.store.writer import add_teacher, create, publish_shard


def _equal(a: KVStore, b: KVStore, teacher: str, shard_id: str) -> None:
    ours, theirs = a.read_shard(teacher, shard_id), b.read_shard(teacher, shard_id)
    assert ours.arrays.keys() == theirs.arrays.keys()
    for name, array in ours.arrays.items():
        np.testing.assert_array_equal(array, theirs.arrays[name])
    np.testing.assert_array_equal(ours.tokens.char_end, theirs.tokens.char_end)
    assert ours.texts == theirs.texts
    for name, stats in a.shard_statistics(teacher, shard_id).items():
        other = b.shard_statistics(teacher, shard_id)[name]
        np.testing.assert_array_equal(stats.to_array(), other.to_array())


def test_a_good_store_has_no_findings(tmp_path: Path, build: Any, backend: str) -> None:
    teacher = build.teacher(backend=backend, has_importance=True, own_text=True)
    store, _ = build.store(tmp_path / "store", teacher)
    seen: list[tuple[str, str]] = []
    assert verify_store(store, progress=lambda *at: seen.append(at)) == []
    assert seen == [("tiny", "00000"), ("tiny", "00001")]


def test_repair_moves_only_the_bad_shard_and_extraction_makes_it_again(
    tmp_path: Path, build: Any, backend: str
) -> None:
    store, made = build.store(tmp_path / "store", build.teacher(backend=backend))
    store.read_shard("tiny", "00001")
    folder = store.paths.shard("tiny", "00001")
    victim = max(
        (p for p in folder.rglob("*") if p.is_file()), key=lambda path: path.stat().st_size
    )
    victim.write_bytes(victim.read_bytes()[:-1])
    findings = verify_store(store)
    assert {(f.teacher, f.shard_id) for f in findings} == {("tiny", "00001")}
    assert victim.name in findings[0].problem
    (aside,) = repair_store(store, findings)
    assert (aside / "COMMIT.json").is_file()
    assert store.missing("tiny") == ["00001"]
    one = made["00001"]
    assert publish_shard(store, "tiny", "00001", one.shard, one.statistics)
    assert verify_store(store) == []


def test_offsets_outside_the_text_and_foreign_shards_are_found(tmp_path: Path, build: Any) -> None:
    shards = build.corpus(1)
    store = create(tmp_path / "store", shards)
    teacher = add_teacher(store, build.teacher())
    one = build.shard(teacher, ["s0", "s1", "s2"], (201, 0, 1))
    publish_shard(store, "tiny", "00000", one.shard, one.statistics)
    (store.paths.shards("tiny") / "stray").mkdir()
    problems = [finding.problem for finding in verify_store(store)]
    assert any("token 200 of sample 's0' covers characters 200 to 201" in p for p in problems)
    assert any("the plan has no such shard" in p for p in problems)


def test_own_texts_of_other_samples_are_found(tmp_path: Path, build: Any) -> None:
    store = create(tmp_path / "store", build.corpus(1))
    teacher = add_teacher(store, build.teacher(own_text=True))
    one = build.shard(teacher, ["s0", "s1", "s2"], build.lengths)
    fewer = type(one.shard)(one.shard.tokens, one.shard.arrays, one.shard.texts[:2])
    publish_shard(store, "tiny", "00000", fewer, one.statistics)
    (finding,) = verify_store(store)
    assert "its samples are ('s0', 's1', 's2') …" in finding.problem


@pytest.mark.parametrize("target", ["zarr", "safetensors"])
def test_convert_keeps_every_code(tmp_path: Path, build: Any, backend: str, target: Any) -> None:
    teacher = build.teacher(
        backend=backend, groups=build.two_groups, codec={"key": "bf16", "value": "int4"}
    )
    store, _ = build.store(tmp_path / "store", teacher)
    other = convert_store(store, tmp_path / "other", target)
    assert other.teacher("tiny").backend == target
    assert verify_store(other) == []
    for shard_id in store.shard_ids:
        _equal(store, other, "tiny", shard_id)
    assert convert_store(store, tmp_path / "other", target).missing("tiny") == []
    with pytest.raises(StoreError, match="onto itself"):
        convert_store(store, tmp_path / "store", target)


def test_merge_brings_missing_shards_and_teachers(tmp_path: Path, build: Any, backend: str) -> None:
    whole, _ = build.store(tmp_path / "a", build.teacher(backend=backend))
    other, _ = build.store(tmp_path / "b", build.teacher(backend=backend, name="second"))
    shutil.copytree(tmp_path / "a", tmp_path / "half")
    shutil.rmtree(whole.paths.shard("tiny", "00000"))
    half = KVStore.open(tmp_path / "half")
    shutil.rmtree(half.paths.shard("tiny", "00001"))
    assert merge_stores(whole, [half, other]) == 3
    assert merge_stores(whole, [half, other]) == 0
    assert whole.teachers() == ["second", "tiny"]
    assert verify_store(whole) == []
    _equal(whole, half, "tiny", "00000")


def test_merge_refuses_what_does_not_belong_together(tmp_path: Path, build: Any) -> None:
    store, _ = build.store(tmp_path / "a", build.teacher())
    longer, _ = build.store(tmp_path / "b", build.teacher(), num_shards=3)
    with pytest.raises(StoreMismatch, match="only stores over the same corpus"):
        merge_stores(store, [longer])
    changed, _ = build.store(tmp_path / "c", build.teacher(weights_fingerprint="v" * 64))
    with pytest.raises(StoreMismatch, match="with other parameters"):
        merge_stores(store, [changed])
    damaged, _ = build.store(tmp_path / "d", build.teacher(name="second"))
    path = damaged.paths.shard("second", "00000") / "key/c/0/0/0/0"
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(ShardCorrupt, match="key/c/0/0/0/0 does not match"):
        merge_stores(store, [damaged])
    assert store.committed("second") == frozenset()


def test_a_removed_teacher_is_gone_and_the_others_stay(tmp_path: Path, build: Any) -> None:
    store, _ = build.store(tmp_path / "store", build.teacher())
    add_teacher(store, build.teacher(name="second"))
    store.read_shard("tiny", "00000")
    remove_teacher(store, "tiny")
    assert store.teachers() == ["second"]
    assert not list(tmp_path.rglob("key"))
    with pytest.raises(ShardNotFound, match="no teacher 'tiny'"):
        store.read_shard("tiny", "00000")
    with pytest.raises(ShardNotFound, match="no teacher 'tiny'"):
        remove_teacher(store, "tiny")


def test_prefetch_keeps_the_order_and_its_bound(tmp_path: Path, build: Any, backend: str) -> None:
    store, _ = build.store(tmp_path / "store", build.teacher(backend=backend), num_shards=5)
    asked = 0

    def requests() -> Any:
        nonlocal asked
        for shard_id in store.shard_ids * 2:
            asked += 1
            yield ShardRequest("tiny", shard_id, layers=[1], kinds=["key"])

    seen = []
    for request, shard in prefetch(store, requests(), threads=3, depth=3):
        seen.append(request.shard_id)
        assert asked - len(seen) <= 3
        want = store.read_shard("tiny", request.shard_id, [1], kinds=["key"])
        np.testing.assert_array_equal(shard.arrays["key"], want.arrays["key"])
    assert seen == list(store.shard_ids) * 2


def test_prefetch_keeps_no_shard_that_the_caller_let_go(tmp_path: Path, build: Any) -> None:
    store, _ = build.store(tmp_path / "store", build.teacher(), num_shards=4)
    requests = [ShardRequest("tiny", shard_id) for shard_id in store.shard_ids]
    stream = prefetch(store, requests, threads=1, depth=1)
    _, shard = next(stream)
    gone = weakref.ref(shard)
    del shard
    gc.collect()
    assert gone() is None
    stream.close()


def test_several_threads_may_prefetch_from_one_store(
    tmp_path: Path, build: Any, backend: str
) -> None:
    store, made = build.store(tmp_path / "store", build.teacher(backend=backend), num_shards=6)

    def total(_: int) -> int:
        requests = [ShardRequest("tiny", shard_id) for shard_id in store.shard_ids]
        return sum(int(shard.arrays["key"].sum()) for _, shard in prefetch(store, requests))

    want = sum(int(one.shard.arrays["key"].sum()) for one in made.values())
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(total, range(8))) == {want}


def test_prefetch_raises_at_the_turn_of_the_bad_shard(tmp_path: Path, build: Any) -> None:
    store, _ = build.store(tmp_path / "store", build.teacher(), num_shards=3)
    shutil.rmtree(store.paths.shard("tiny", "00001"))
    stream = prefetch(
        store, [ShardRequest("tiny", shard_id) for shard_id in store.shard_ids], depth=3
    )
    assert next(stream)[0].shard_id == "00000"
    with pytest.raises(ShardNotFound, match="00001"):
        next(stream)
    with pytest.raises(ValueError, match="at least 1"):
        prefetch(store, [], threads=0)


def test_a_store_can_be_sent_to_another_process(tmp_path: Path, build: Any) -> None:
    store, _ = build.store(tmp_path / "store", build.teacher())
    _equal(pickle.loads(pickle.dumps(store)), store, "tiny", "00001")
