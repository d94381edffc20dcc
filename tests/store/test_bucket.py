"""A store in a bucket, on a real S3 server on loopback: copies, faults, and the bounded cache."""

from __future__ import annotations

import fcntl
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import obstore.store
import pytest

from kvdistill.errors import (
    ConfigError,
    MissingExtra,
    ShardCorrupt,
    StoreError,
    StoreMismatch,
    StoreNotFound,
)
from kvdistill.store.bucket import Bucket, cache_folder
from kvdistill.store.maintenance import copy_store, remove_teacher, repair_store, verify_store
from kvdistill.store.reader import KVStore
from kvdistill.store.writer import add_teacher, create, publish_shard
from tests.store.made import assert_equal_stores, bytes_of

BACKENDS = ["safetensors", pytest.param("zarr", marks=pytest.mark.slow)]


@pytest.fixture
def pushed(tmp_path: Path, build: Any, bucket: str) -> tuple[KVStore, str]:
    """A store of two shards, and its copy's URL."""
    store, _ = build.store(tmp_path / "store", build.teacher(backend="safetensors"))
    copy_store(store, bucket)
    return store, bucket


def objects(url: str) -> dict[str, bytes]:
    place = obstore.store.from_url(url)
    names = [meta["path"] for page in obstore.list(place) for meta in page]
    return {name: bytes(obstore.get(place, name).bytes()) for name in names}


@pytest.mark.parametrize("kind", BACKENDS)
def test_a_copy_there_and_back_is_equal_byte_by_byte(
    tmp_path: Path, build: Any, kind: str, bucket: str
) -> None:
    teacher = build.teacher(backend=kind, own_text=True, has_summaries=True)
    store, _ = build.store(tmp_path / "store", teacher)
    there, copied = copy_store(store, bucket)
    assert copied == 2
    assert_equal_stores(there, store)
    assert_equal_stores(pickle.loads(pickle.dumps(there)), store)
    assert objects(bucket) == bytes_of(tmp_path / "store")
    back, copied = copy_store(KVStore.open(bucket), tmp_path / "back")
    assert copied == 2
    assert bytes_of(tmp_path / "back") == bytes_of(tmp_path / "store")
    assert verify_store(back) == [] == verify_store(there, ["tiny"])
    assert copy_store(store, bucket)[1] == copy_store(there, tmp_path / "back")[1] == 0


def test_an_uploaded_folder_is_a_store(tmp_path: Path, build: Any, bucket: str) -> None:
    store, _ = build.store(tmp_path / "store", build.teacher(backend="safetensors"))
    there = Bucket(bucket)
    for name, content in bytes_of(tmp_path / "store").items():
        there.put(there.paths.root / name, content)
    assert_equal_stores(KVStore.open(bucket), store)


def test_readers_of_a_copy_need_no_shard_for_its_statistics(pushed: tuple[KVStore, str]) -> None:
    KVStore.open(pushed[1]).statistics("tiny")
    assert list(cache_folder().glob("*/teachers/*/shards/*")) == []


def test_a_killed_upload_is_continued(
    tmp_path: Path, build: Any, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = build.store(tmp_path / "store", build.teacher())
    files = len(store.commit("tiny", "00000").files)
    put, left = obstore.put, [files // 2]

    def dies(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return put(*args, **kwargs)

    states = []
    while True:
        monkeypatch.setattr(obstore, "put", dies)
        try:
            copy_store(store, bucket)
            break
        except KeyboardInterrupt:
            monkeypatch.setattr(obstore, "put", put)
            states.append(sum("COMMIT" in name for name in objects(bucket)))
            left[0] = files + 6  # of one shard, and of what was whole already
    monkeypatch.setattr(obstore, "put", put)
    assert states == [0, 1]
    assert_equal_stores(KVStore.open(bucket), store)


def test_the_first_of_two_uploads_of_a_shard_wins(
    tmp_path: Path, build: Any, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They differ, and the slower one overwrites files of the faster one before it commits."""
    teacher = build.teacher(backend="safetensors")
    store, _ = build.store(tmp_path / "store", teacher, 1)
    other = create(tmp_path / "other", build.corpus(1))
    shutil.copytree(store.paths.teacher("tiny"), other.paths.teacher("tiny"))
    shutil.rmtree(other.paths.shard("tiny", "00000"))
    ids = [sample.sample_id for sample in other.samples("00000")]
    made = build.shard(teacher, ids, build.lengths, seed=7)
    publish_shard(other, "tiny", "00000", made.shard, made.statistics)
    make, entered, results = Bucket.create, threading.Event(), []

    def create_late(self: Bucket, path: Path, content: bytes) -> bool:
        if path.name == "COMMIT.json" and not entered.is_set():
            entered.set()
            results.append(copy_store(other, bucket)[1])
            # Between our files and our commit: theirs are in the bucket, and committed.
        return make(self, path, content)

    monkeypatch.setattr(Bucket, "create", create_late)
    results.append(copy_store(store, bucket)[1])
    assert results == [1, 0]
    there = KVStore.open(bucket)
    assert_equal_stores(there, other)
    assert verify_store(there, ["tiny"]) == []


def test_files_that_a_slower_upload_overwrote_are_put_again(
    tmp_path: Path, build: Any, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = build.store(tmp_path / "store", build.teacher(backend="safetensors"), 1)
    make = Bucket.create

    def clobbered(self: Bucket, path: Path, content: bytes) -> bool:
        if path.name == "COMMIT.json":
            self.put(path.parent / "shard.safetensors", b"of the slower one")
        return make(self, path, content)

    monkeypatch.setattr(Bucket, "create", clobbered)
    copy_store(store, bucket)
    assert_equal_stores(KVStore.open(bucket), store)


def test_another_corpus_or_extraction_is_refused(
    tmp_path: Path, build: Any, pushed: tuple[KVStore, str]
) -> None:
    larger, _ = build.store(tmp_path / "larger", build.teacher(), 3)
    with pytest.raises(StoreMismatch, match="only stores over the same corpus"):
        copy_store(larger, pushed[1])
    other, _ = build.store(tmp_path / "other", build.teacher(extraction_fingerprint="f" * 64))
    with pytest.raises(StoreMismatch, match=f"{pushed[1][:20]}.*extracted differently"):
        copy_store(other, pushed[1])


def test_a_truncated_object_is_one_line_and_repaired_by_a_push(
    tmp_path: Path, pushed: tuple[KVStore, str]
) -> None:
    store, url = pushed
    path = store.paths.shard("tiny", "00001") / "shard.safetensors"
    key = Bucket(url).paths.root / path.relative_to(store.paths.root)
    for content in (path.read_bytes()[:-9], path.read_bytes()[:-1] + b"?"):
        Bucket(url).put(key, content)
        there = KVStore.open(url)
        with pytest.raises(ShardCorrupt, match=rf"^{url}/teachers/tiny/shards/00001/shard.saf"):
            there.read_shard("tiny", "00001")
        with pytest.raises(ShardCorrupt):
            copy_store(there, tmp_path / "back")
        assert KVStore.open(tmp_path / "back").committed("tiny") == {"00000"}
        findings = verify_store(there, ["tiny"])
        assert [found.shard_id for found in findings] == ["00001"]
        repair_store(there, findings)
        assert there.missing("tiny") == ["00001"]
        assert copy_store(store, url)[1] == 1
        assert_equal_stores(there, store)
        shutil.rmtree(cache_folder())
        shutil.rmtree(tmp_path / "back")


def test_a_damaged_copy_in_the_cache_is_dropped_by_verify(pushed: tuple[KVStore, str]) -> None:
    store, url = pushed
    KVStore.open(url).read_shard("tiny", "00000")
    (cached,) = cache_folder().glob("*/teachers/*/shards/*/shard.safetensors")
    cached.write_bytes(cached.read_bytes()[:-1] + b"?")
    with pytest.raises(ShardCorrupt, match="checksum"):
        assert_equal_stores(KVStore.open(url), store)
    assert verify_store(KVStore.open(url), ["tiny"]) == []
    assert_equal_stores(KVStore.open(url), store)


@pytest.mark.parametrize("changes", [{"num_samples": 2}, {"files": 0}, {"teacher": "other"}])
def test_a_crafted_commit_is_one_line_that_names_the_object(
    pushed: tuple[KVStore, str], changes: dict[str, Any]
) -> None:
    store, url = pushed
    commit = store.commit("tiny", "00000")
    if "files" in changes:
        (name, record), *_ = commit.files.items()
        changes = {
            "files": {**commit.files, name: record.model_copy(update={"size_bytes": 1 << 60})}
        }
    bucket, crafted = Bucket(url), commit.model_copy(update=changes)
    bucket.put(bucket.paths.shard("tiny", "00000") / "COMMIT.json", crafted.to_json().encode())
    with pytest.raises(ShardCorrupt, match=rf"^{url}/teachers/tiny/shards/00000/") as caught:
        KVStore.open(url).read_shard("tiny", "00000")
    assert len(str(caught.value)) < 500


def test_what_is_no_teacher_in_a_bucket_is_left_alone(pushed: tuple[KVStore, str]) -> None:
    store, url = pushed
    bucket = Bucket(url)
    bucket.put(bucket.paths.teachers / "of a person" / "teacher.json", b"{}")
    bucket.put(bucket.paths.teachers / "empty" / "notes.txt", b"")
    assert_equal_stores(KVStore.open(url), store)


def test_a_missing_client_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(MissingExtra, match=r"pip install 'kvdistill\[buckets\]'"):
        KVStore.open("s3://bucket/a")


def test_a_commit_that_names_files_elsewhere_writes_none(
    tmp_path: Path, pushed: tuple[KVStore, str]
) -> None:
    store, url = pushed
    bucket = Bucket(url)
    commit = store.commit("tiny", "00000")
    record = next(iter(commit.files.values()))
    crafted = commit.model_copy(update={"files": {"../../escaped": record}})
    bucket.put(bucket.paths.shard("tiny", "00000") / "COMMIT.json", crafted.to_json().encode())
    with pytest.raises(ShardCorrupt, match="escaped"):
        KVStore.open(url).read_shard("tiny", "00000")
    assert not list(cache_folder().rglob("escaped"))


@pytest.mark.parametrize("location", ["s3://no-such-bucket/a", "s3://{bucket}/nothing"])
def test_a_missing_bucket_and_a_missing_store_are_one_line(bucket: str, location: str) -> None:
    url = location.format(bucket=bucket.split("/")[2])
    with pytest.raises(StoreError, match=r"no such bucket|^no store at s3") as caught:
        KVStore.open(url)
    assert isinstance(caught.value, StoreNotFound) == ("nothing" in url)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("url", ["s4://bucket/a", "az://bucket/a"])
def test_an_impossible_url_is_one_line(url: str) -> None:
    with pytest.raises(StoreError, match=f"^{url}: .*; expected s3://") as caught:
        KVStore.open(url)
    assert len(str(caught.value).splitlines()) == 1


def test_refused_requests_and_conditions_are_one_line(
    tmp_path: Path, build: Any, refusing: Callable[[int, str], str]
) -> None:
    store, _ = build.store(tmp_path / "store", build.teacher(), 1)
    for status, code, told in (
        (403, "AccessDenied", "access refused .*check the credentials"),
        (401, "Unauthorized", "access refused .*check the credentials"),
        (501, "NotImplemented", "refuses conditional writes"),
    ):
        url = refusing(status, code)
        with pytest.raises(StoreError, match=told) as caught:
            copy_store(store, url)
        assert len(str(caught.value)) < 500
        assert str(caught.value).startswith(url)


def test_a_bucket_that_ignores_conditions_is_refused(
    tmp_path: Path, build: Any, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = build.store(tmp_path / "store", build.teacher(), 1)
    put = obstore.put
    monkeypatch.setattr(obstore, "put", lambda *args, **_mode: put(*args))
    with pytest.raises(StoreError, match="ignores the condition"):
        copy_store(store, bucket)


@pytest.mark.parametrize("kind", BACKENDS)
def test_the_cache_is_bounded_and_keeps_what_is_open(
    tmp_path: Path, build: Any, bucket: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = build.store(tmp_path / "store", build.teacher(backend=kind), 6)
    copy_store(store, bucket)
    size = max(
        sum(p.stat().st_size for p in store.paths.shard("tiny", i).rglob("*") if p.is_file())
        for i in store.shard_ids
    )
    monkeypatch.setenv("KVDISTILL_CACHE_GB", str(2.5 * size / 1e9))
    held = KVStore.open(bucket)
    held.token_table("tiny", "00000")  # keeps it open, and has read no key yet
    for shard_id in store.shard_ids:
        KVStore.open(bucket).read_shard("tiny", shard_id)
        cached = sorted(path.name[:5] for path in cache_folder().glob("*/teachers/*/shards/*"))
        assert "00000" in cached
        assert shard_id in cached
        assert len(cached) <= 2
    np.testing.assert_array_equal(
        held.read_shard("tiny", "00000").arrays["key"],
        store.read_shard("tiny", "00000").arrays["key"],
    )
    del held
    KVStore.open(bucket).read_shard("tiny", "00001")
    KVStore.open(bucket).read_shard("tiny", "00002")
    assert "00000" not in [path.name[:5] for path in cache_folder().glob("*/*/*/shards/*")]


def test_many_readers_download_a_shard_once(
    pushed: tuple[KVStore, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, seen = obstore.get_range, []
    monkeypatch.setattr(
        obstore, "get_range", lambda *args, **kw: (seen.append(args[1]), read(*args, **kw))[1]
    )
    all_looking, lock = threading.Barrier(6, timeout=60), fcntl.flock

    def lock_together(descriptor: int, operation: int) -> None:
        lock(descriptor, operation)
        if operation == fcntl.LOCK_SH:
            all_looking.wait()

    monkeypatch.setattr(fcntl, "flock", lock_together)
    stores = [KVStore.open(pushed[1]) for _ in range(6)]
    threads = [
        threading.Thread(target=store.read_shard, args=("tiny", "00000"), daemon=True)
        for store in stores
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert len(seen) == 1


def test_a_shard_that_was_extracted_again_is_fetched_again(
    build: Any, pushed: tuple[KVStore, str]
) -> None:
    url = pushed[1]
    KVStore.open(url).read_shard("tiny", "00000")
    teacher = build.teacher(backend="safetensors")
    remove_teacher(KVStore.open(url), "tiny")
    assert KVStore.open(url).teachers() == []
    ids = [sample.sample_id for sample in KVStore.open(url).samples("00000")]
    made = build.shard(teacher, ids, build.lengths, seed=9)
    add_teacher(KVStore.open(url), teacher)
    assert publish_shard(KVStore.open(url), "tiny", "00000", made.shard, made.statistics)
    assert not publish_shard(KVStore.open(url), "tiny", "00000", made.shard, made.statistics)
    found = KVStore.open(url).read_shard("tiny", "00000").arrays["key"]
    np.testing.assert_array_equal(found, made.shard.arrays["key"])


def test_a_forked_child_is_told(pushed: tuple[KVStore, str]) -> None:
    store = KVStore.open(pushed[1])
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            store.read_shard("tiny", "00000")
            os.write(writer, b"read")
        except StoreError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    assert b"spawn" in os.read(reader, 1000)
    os.waitpid(child, 0)


def test_a_bound_that_is_no_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvdistill.store.bucket import cache_bytes

    for given in ("0", "-1", "many", "nan", "1.2.3"):
        monkeypatch.setenv("KVDISTILL_CACHE_GB", given)
        with pytest.raises(ConfigError, match=f"KVDISTILL_CACHE_GB is '{given}'"):
            cache_bytes()


def test_a_folder_serves_as_a_bucket(tmp_path: Path, build: Any, private_cache: Path) -> None:
    store, _ = build.store(tmp_path / "store", build.teacher())
    there, _ = copy_store(store, f"file://{tmp_path}/shared/store")
    assert_equal_stores(there, store)
    assert bytes_of(tmp_path / "shared/store") == bytes_of(tmp_path / "store")
    assert_equal_stores(KVStore.open(tmp_path / "shared/store"), store)


READER = """
import random, sys
from kvdistill.store.reader import KVStore

random.seed(int(sys.argv[3]))
local = KVStore.open(sys.argv[1])
expected = {i: local.read_shard("tiny", i).arrays["key"].tobytes() for i in local.shard_ids}
for round in range(20):
    store = KVStore.open(sys.argv[2])
    for shard_id in random.choices(store.shard_ids, k=4):
        assert store.read_shard("tiny", shard_id).arrays["key"].tobytes() == expected[shard_id]
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zarr", "safetensors"])
def test_processes_that_evict_and_kill_each_other_read_right_numbers(
    tmp_path: Path, build: Any, private_cache: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four readers in a cache for two shards; a fifth is killed again and again."""
    store, _ = build.store(tmp_path / "store", build.teacher(backend=kind), 6)
    url = f"file://{tmp_path}/shared"
    copy_store(store, url)
    size = sum(path.stat().st_size for path in tmp_path.glob("store/teachers/*/shards/**/*"))
    monkeypatch.setenv("KVDISTILL_CACHE_GB", str(2.5 * size / 6 / 1e9))

    def start(seed: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", READER, str(tmp_path / "store"), url, str(seed)]
        return subprocess.Popen(command, stderr=subprocess.PIPE)

    readers = [start(seed) for seed in range(4)]
    killed = 0
    while any(reader.poll() is None for reader in readers):
        victim = start(100 + killed)
        time.sleep(2 + 0.3 * (killed % 7))
        victim.kill()
        victim.communicate()
        killed += 1
    for reader in readers:
        assert reader.returncode == 0, reader.communicate()[1].decode()
    assert killed > 0
    for folder in private_cache.glob("*/teachers/*/shards/00000.*"):
        shutil.rmtree(folder)
    KVStore.open(url).read_shard("tiny", "00000")  # sweeps what the killed one left, and evicts
    cached = list(private_cache.glob("*/teachers/*/shards/*"))
    assert 0 < len(cached) <= 2
    assert not list(private_cache.glob("*/teachers/*/tmp/*"))


@pytest.mark.slow
def test_a_push_that_is_killed_again_and_again_ends_whole(
    tmp_path: Path, build: Any, bucket: str
) -> None:
    store, _ = build.store(tmp_path / "store", build.teacher(), 4)
    command = [sys.executable, "-m", "kvdistill.cli", "push", str(tmp_path / "store"), bucket]
    kills = 0
    while (done := subprocess.Popen(command, stdout=subprocess.DEVNULL)).poll() is None:
        try:
            assert done.wait(0.3 + 0.15 * kills) == 0
            break
        except subprocess.TimeoutExpired:
            done.kill()
            done.wait()
            kills += 1
    assert kills > 0
    there = KVStore.open(bucket)
    assert verify_store(there, ["tiny"]) == []
    assert_equal_stores(there, store)
