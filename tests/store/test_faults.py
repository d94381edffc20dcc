"""Killed writers, racing writers, flipped bytes, missing files, full disks, absurd manifests."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvdistill.errors import KVDistillError, ShardCorrupt, StoreError, StoreFormatError
from kvdistill.store.maintenance import verify_store
from kvdistill.store.manifest import Commit, Document, _document_checksum
from kvdistill.store.reader import KVStore
from kvdistill.store.writer import add_teacher, create, publish_shard


def in_child(work: Callable[[], int]) -> int:
    """Fork; run ``work`` in the child and return its process id. No cleanup runs in the child."""
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            status = work()
        finally:
            os._exit(status)
    return pid


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def touch_everything(store: KVStore) -> None:
    """Read every byte that a reader can ask for."""
    for shard_id in store.shard_ids:
        store.samples(shard_id)
        for teacher in store.teachers():
            store.read_shard(teacher, shard_id)
            store.shard_statistics(teacher, shard_id)


def refused(path: Path) -> bool:
    """Whether reading everything fails with an error of ours."""
    try:
        touch_everything(KVStore.open(path))
    except KVDistillError:
        return True
    return False


def touch_in_parts(store: KVStore, teacher: str) -> None:
    """Read every key and value, and never a whole array: one layer and head, then some tokens."""
    for shard_id in store.shard_ids:
        for layer in store.teacher(teacher).layers:
            for head in (0, 1):
                store.read_shard(teacher, shard_id, [layer], [head])
        for sample in store.samples(shard_id):
            for kind, tokens in product(("key", "value"), (slice(0, 5), slice(5, None))):
                store.read_sample(teacher, sample.sample_id, kind, tokens=tokens)


@pytest.mark.parametrize("codec", ["bf16", "int8", "int4"])
def test_a_flipped_byte_is_refused_by_whoever_reads_a_part_with_it(
    tmp_path: Path, build: Any, backend: str, codec: str
) -> None:
    teacher = build.teacher(backend=backend, codec={"key": codec, "value": codec})
    store, _ = build.store(tmp_path / "store", teacher, num_shards=1)
    touch_in_parts(store, "tiny")
    rng = random.Random(0)
    shard = store.paths.shard("tiny", store.shard_ids[0])
    parts = [path for path in shard.rglob("[0-9]") if path.is_file()]
    parts = [p for p in parts if re.match(r"(key|value)(?!_stat)", p.relative_to(shard).parts[0])]
    for path in sorted(parts) or [*shard.glob("*.safetensors")]:
        good = path.read_bytes()
        for place in [0, *(rng.randrange(len(good)) for _ in range(2))]:
            bad = bytearray(good)
            bad[place] ^= 1 << rng.randrange(8)
            path.write_bytes(bad)
            with pytest.raises(ShardCorrupt):
                touch_in_parts(KVStore.open(tmp_path / "store"), "tiny")
        path.write_bytes(good)


def test_a_flipped_byte_in_chunks_that_the_tokens_do_not_fill_is_refused(
    tmp_path: Path, build: Any, backend: str
) -> None:
    """A file of whole chunks holds more than the array, so no read of it is one of the file."""
    store = create(tmp_path / "store", build.corpus(1, 1))
    teacher = add_teacher(store, build.teacher(backend=backend))
    ids = [sample.sample_id for sample in store.samples("00000")]
    one = build.shard(teacher, ids, (1100,))
    assert publish_shard(store, "tiny", "00000", one.shard, one.statistics)
    shard = store.paths.shard("tiny", "00000")
    (path,) = shard.glob("key/c/0/0/0/0") if "zarr" in backend else shard.glob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 64
    path.write_bytes(content)
    with pytest.raises(ShardCorrupt, match="checksum"):
        touch_everything(KVStore.open(tmp_path / "store"))


@pytest.mark.parametrize("kills", [8, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_writers_leave_whole_shards_only(
    tmp_path: Path, build: Any, backend: str, kills: int
) -> None:
    shards = build.corpus(200, 1)
    store = create(tmp_path / "store", shards)
    teacher = add_teacher(store, build.teacher(backend=backend))

    def write(limit: int | None = None) -> int:
        for shard_id in store.missing("tiny")[:limit]:
            ids = [sample.sample_id for sample in store.samples(shard_id)]
            one = build.shard(teacher, ids, (130,))
            assert publish_shard(store, "tiny", shard_id, one.shard, one.statistics)
        return 0

    started = time.perf_counter()
    write(limit=1)
    one_shard = time.perf_counter() - started
    rng = random.Random(0)
    for _ in range(kills):
        before = store.committed("tiny")
        pid = in_child(write)
        time.sleep(rng.uniform(0, 2 * one_shard))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        again = KVStore.open(tmp_path / "store")
        assert verify_store(again, shard_ids=again.committed("tiny") - before) == []
    assert write(limit=1) == 0
    assert verify_store(KVStore.open(tmp_path / "store")) == []


def test_two_writers_at_once_leave_one_valid_shard(
    tmp_path: Path, build: Any, backend: str
) -> None:
    shards = build.corpus(6)
    store = create(tmp_path / "store", shards)
    teacher = add_teacher(store, build.teacher(backend=backend))
    for shard in shards:
        ids = [sample.sample_id for sample in shard.samples]
        one = build.shard(teacher, ids, (130, 0, 64))
        start = time.monotonic() + 0.05

        def write(shard_id: str = shard.shard_id, one: Any = one, start: float = start) -> int:
            time.sleep(max(0.0, start - time.monotonic()))
            return int(publish_shard(store, "tiny", shard_id, one.shard, one.statistics))

        codes = [exit_code(pid) for pid in [in_child(write) for _ in range(3)]]
        assert sorted(codes) == [0, 0, 1]
    assert verify_store(KVStore.open(tmp_path / "store")) == []
    assert list(store.paths.temporary("tiny").iterdir()) == []


def test_two_processes_that_create_one_store_agree(tmp_path: Path, build: Any) -> None:
    shards = build.corpus(3)

    def work() -> int:
        add_teacher(create(tmp_path / "store", shards), build.teacher())
        return 0

    assert [exit_code(pid) for pid in [in_child(work) for _ in range(4)]] == [0] * 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]
    assert KVStore.open(tmp_path / "store").teachers() == ["tiny"]


def test_a_flipped_byte_in_any_file_is_found_and_refused(
    tmp_path: Path, build: Any, backend: str
) -> None:
    teacher = build.teacher(backend=backend, has_importance=True, own_text=True)
    build.store(tmp_path / "store", teacher, num_shards=1)
    rng = random.Random(0)
    files = sorted(path for path in (tmp_path / "store").rglob("*") if path.is_file())
    assert len(files) > (3 if backend == "safetensors" else 20)
    for path in files:
        good = path.read_bytes()
        for place in {0, len(good) - 1, rng.randrange(len(good)), rng.randrange(len(good))}:
            bad = bytearray(good)
            bad[place] ^= 1 << rng.randrange(8)
            path.write_bytes(bad)
            where = f"{path}, byte {place}"
            assert refused(tmp_path / "store"), f"the reader took {where}"
            try:
                assert verify_store(KVStore.open(tmp_path / "store")), f"verify took {where}"
            except StoreFormatError:
                assert path.name == "kvstore.json"
        path.write_bytes(good)
    touch_everything(KVStore.open(tmp_path / "store"))


@pytest.mark.parametrize("harm", ["truncate", "empty", "remove"])
def test_a_short_or_missing_file_is_an_error_and_never_zeros(
    tmp_path: Path, build: Any, backend: str, harm: str
) -> None:
    build.store(tmp_path / "store", build.teacher(backend=backend), num_shards=1)
    folder = tmp_path / "store" / "teachers" / "tiny" / "shards" / "00000"
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        good = path.read_bytes()
        if harm == "remove":
            path.unlink()
        else:
            path.write_bytes(good[: len(good) // 2] if harm == "truncate" else b"")
        with pytest.raises(KVDistillError, match=path.name):
            touch_everything(KVStore.open(tmp_path / "store"))
        assert verify_store(KVStore.open(tmp_path / "store"))
        path.write_bytes(good)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_clear_error_and_loses_nothing(
    small_disk: Path, build: Any, backend: str
) -> None:
    shards = build.corpus(40)
    store = create(small_disk / "store", shards)
    teacher = add_teacher(store, build.teacher(backend=backend))
    written = []

    def fill() -> None:
        for shard in shards:
            ids = [sample.sample_id for sample in shard.samples]
            one = build.shard(teacher, ids, (130, 0, 64))
            publish_shard(store, "tiny", shard.shard_id, one.shard, one.statistics)
            written.append(shard.shard_id)

    with pytest.raises(StoreError, match="No space left on device; nothing was published"):
        fill()
    assert written
    again = KVStore.open(small_disk / "store")
    assert again.committed("tiny") == set(written)
    assert verify_store(again) == []
    assert list(store.paths.temporary("tiny").iterdir()) == []


def test_a_read_only_store_is_one_clear_error(build: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)
        store, made = build.store(root / "store", build.teacher())
        one = made["00000"]
        store.paths.shard("tiny", "00000").rename(root / "elsewhere")
        store.forget("tiny", "00000")
        for path in root.rglob("*"):
            path.chmod(0o555 if path.is_dir() else 0o444)

        def write() -> int:
            if os.geteuid() == 0:
                os.setuid(65534)
            try:
                publish_shard(store, "tiny", "00000", one.shard, one.statistics)
            except StoreError as error:
                return 7 if "Permission denied; nothing was published" in str(error) else 8
            return 0

        assert exit_code(in_child(write)) == 7
        for path in root.rglob("*"):
            path.chmod(0o755)


def _rewrite(path: Path, **changes: Any) -> None:
    """Change a document and make its checksum right again."""
    body = {**json.loads(path.read_text()), **changes}
    body.pop("checksum")
    path.write_text(json.dumps({**body, "checksum": _document_checksum(body)}))


@pytest.mark.parametrize("tokens", [2**31 - 1, 195, 0])
def test_an_absurd_commit_allocates_nothing(
    tmp_path: Path, build: Any, backend: str, tokens: int
) -> None:
    store, _ = build.store(tmp_path / "store", build.teacher(backend=backend), num_shards=1)
    _rewrite(store.paths.shard("tiny", "00000") / "COMMIT.json", num_tokens=tokens)
    limit = resource.getrlimit(resource.RLIMIT_AS)

    def read() -> int:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, limit[1]))
        try:
            touch_everything(KVStore.open(tmp_path / "store"))
        except ShardCorrupt:
            return 7
        return 0

    assert exit_code(in_child(read)) == 7


@pytest.mark.parametrize(
    "group",
    [
        {"layers": [0], "num_key_value_heads": 10**12, "key_head_dim": 8, "value_head_dim": 8},
        {"layers": [0], "num_key_value_heads": 2, "key_head_dim": 0, "value_head_dim": 8},
        {"layers": [3, 1], "num_key_value_heads": 2, "key_head_dim": 8, "value_head_dim": 8},
        {"layers": [], "num_key_value_heads": 2, "key_head_dim": 8, "value_head_dim": 8},
        {"layers": [-1], "num_key_value_heads": 2, "key_head_dim": 8, "value_head_dim": 8},
    ],
)
def test_an_absurd_geometry_is_refused(tmp_path: Path, build: Any, group: Any) -> None:
    store, _ = build.store(tmp_path / "store", build.teacher(), num_shards=1)
    _rewrite(store.paths.teacher_manifest("tiny"), groups=[group])
    with pytest.raises(StoreFormatError, match=r"teacher\.json: groups"):
        KVStore.open(tmp_path / "store").teacher("tiny")


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("codec", [None, "int4", {"key": ["int4"], "value": {}}])
def test_an_absurd_codec_is_refused(tmp_path: Path, build: Any, version: int, codec: Any) -> None:
    store, _ = build.store(tmp_path / "store", build.teacher(), num_shards=1)
    _rewrite(store.paths.teacher_manifest("tiny"), codec=codec, format_version=version)
    with pytest.raises(StoreFormatError, match=r"teacher\.json: codec"):
        KVStore.open(tmp_path / "store").teacher("tiny")


@pytest.mark.parametrize("name", ["../../outside", "/etc", ".hidden", "a/b", ""])
def test_no_name_leads_out_of_the_store(tmp_path: Path, build: Any, name: str) -> None:
    store, _ = build.store(tmp_path / "store", build.teacher(), num_shards=1)
    with pytest.raises(StoreFormatError, match="not a usable name"):
        store.teacher(name)
    manifest = json.loads(store.paths.manifest.read_text())
    _rewrite(store.paths.manifest, shards=[{**manifest["shards"][0], "shard_id": name}])
    with pytest.raises(StoreFormatError, match="shard_id"):
        KVStore.open(tmp_path / "store")


def test_a_shard_of_another_extraction_is_refused(tmp_path: Path, build: Any) -> None:
    store, _ = build.store(tmp_path / "store", build.teacher(), num_shards=1)
    path = store.paths.shard("tiny", "00000") / "COMMIT.json"
    _rewrite(path, extraction_fingerprint="f" * 64)
    with pytest.raises(ShardCorrupt, match="fff"):
        touch_everything(KVStore.open(tmp_path / "store"))
    assert "fff" in verify_store(store)[0].problem


def test_documents_are_frozen_and_checked() -> None:
    assert issubclass(Commit, Document)
    with pytest.raises(StoreFormatError, match="not JSON"):
        Commit.from_json("{", "here")
    with pytest.raises(StoreFormatError, match="expected a JSON object"):
        Commit.from_json("[]", "here")


def test_threads_and_a_forked_child_read_what_their_parent_had_open(
    tmp_path: Path, build: Any, backend: str
) -> None:
    store, made = build.store(tmp_path / "store", build.teacher(backend=backend))

    def read() -> int:
        for shard_id, one in made.items():
            found = store.read_shard("tiny", shard_id).arrays
            for name, array in one.shard.arrays.items():
                np.testing.assert_array_equal(found[name], array)
        return 0

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: read(), range(16))) == [0] * 16
        pid = in_child(read)
        assert list(pool.map(lambda _: read(), range(4))) == [0] * 4
    assert exit_code(pid) == 0


def test_a_file_that_vanishes_after_opening_is_an_error_and_never_fill_values(
    tmp_path: Path, build: Any
) -> None:
    store, _ = build.store(tmp_path / "store", build.teacher(), num_shards=1)
    touch_everything(store)
    (data,) = (store.paths.shard("tiny", "00000") / "value").glob("c/*/*/*/*")
    data.unlink()
    with pytest.raises(ShardCorrupt, match=r"value/c/0/0/0/0: missing"):
        store.read("tiny", "s0", 0, 0, "value")
