"""Stores are shared: what somebody else wrote, with valid checksums, is refused and reported."""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvdistill.errors import KVDistillError
from kvdistill.store.commit import file_record
from kvdistill.store.format import StorePaths
from kvdistill.store.maintenance import verify_store
from kvdistill.store.manifest import _document_checksum
from kvdistill.store.reader import KVStore
from tests.store.made import make_store, make_teacher
from tests.store.test_faults import exit_code, in_child, touch_everything

GIGABYTE = 2**30


def sign(path: Path, change: Callable[[Any], None]) -> None:
    """Change a JSON document of the store and make its checksum right again."""
    body = json.loads(path.read_text())
    body.pop("checksum")
    change(body)
    path.write_text(json.dumps({**body, "checksum": _document_checksum(body)}))


def recommit(shard: Path, name: str, content: bytes) -> None:
    """Replace a file of a shard, and its record in the commit."""
    (shard / name).write_bytes(content)
    record = file_record(shard / name).model_dump()
    sign(shard / "COMMIT.json", lambda body: body["files"].update({name: record}))


def refused_and_reported(root: Path) -> None:
    """Reading fails with an error of ours, verification reports; neither takes a gigabyte."""

    def look() -> int:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (used + GIGABYTE, GIGABYTE * 1024))
        try:
            store = KVStore.open(root)
            store.teacher("tiny")
            touch_everything(store)
        except KVDistillError:
            pass
        else:
            return 3
        try:
            return 0 if verify_store(KVStore.open(root)) else 4
        except KVDistillError:
            return 0  # the plan itself

    assert exit_code(in_child(look)) == 0


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store, _ = make_store(tmp_path_factory.mktemp("honest") / "store", make_teacher(), num_shards=1)
    return store.paths.root


@pytest.fixture
def shard(honest: Path, tmp_path: Path) -> Path:
    shutil.copytree(honest, tmp_path / "store")
    return StorePaths(tmp_path / "store").shard("tiny", "00000")


def deep(levels: int = 100_000) -> bytes:
    return b"[" * levels + b"]" * levels


@pytest.mark.parametrize("name", ["kvstore.json", "teacher.json", "COMMIT.json", "corpus"])
@pytest.mark.parametrize("kind", ["fifo", "zero", "folder", "deep", "huge"])
def test_documents_that_are_no_small_files(
    shard: Path, tmp_path: Path, name: str, kind: str
) -> None:
    root = tmp_path / "store"
    path = root / "corpus/00000.jsonl" if name == "corpus" else next(root.rglob(name))
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "zero":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "deep":
        path.write_bytes(deep())
    else:
        with path.open("wb") as file:
            file.truncate(2 * GIGABYTE)
    refused_and_reported(root)


CHUNKS = ("chunk_grid", "configuration", "chunk_shape")


def inner(body: Any) -> Any:
    return body["codecs"][0]["configuration"]


HOSTILE: dict[str, Callable[[Any], None]] = {
    "zero chunk": lambda b: inner(b).update(chunk_shape=[0, 1, 1, 1]),
    "negative chunk": lambda b: inner(b).update(chunk_shape=[1, 1, -1, 8]),
    "fractional chunk": lambda b: inner(b).update(chunk_shape=[1, 1, 1.5, 8]),
    "endless chunk": lambda b: inner(b).update(chunk_shape=[2**40, 2**40, 2**40, 8]),
    "text chunk": lambda b: inner(b).update(chunk_shape="all"),
    "few axes": lambda b: inner(b).update(chunk_shape=[1]),
    "endless grid": lambda b: b["chunk_grid"]["configuration"].update(chunk_shape=[2**62] * 4),
    "zero grid": lambda b: b["chunk_grid"]["configuration"].update(chunk_shape=[0] * 4),
    "no grid": lambda b: b.pop("chunk_grid"),
    "other grid": lambda b: b.update(chunk_grid={"name": "rectilinear"}),
    "no codecs": lambda b: b.update(codecs=[]),
    "unknown codec": lambda b: b["codecs"].append({"name": "exec"}),
    "no type": lambda b: b.pop("data_type"),
    "type": lambda b: b.update(data_type={"name": "struct"}),
    "shape": lambda b: b.update(shape=[2**31] * 4),
    "fill value": lambda b: b.pop("fill_value"),
    "other key": lambda b: b.update(chunk_key_encoding={"name": "v2"}),
}


@pytest.mark.parametrize("harm", HOSTILE)
def test_hostile_array_metadata(shard: Path, tmp_path: Path, harm: str) -> None:
    body = json.loads((shard / "value/zarr.json").read_text())
    HOSTILE[harm](body)
    recommit(shard, "value/zarr.json", json.dumps(body).encode())
    refused_and_reported(tmp_path / "store")


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b"null", b"\xff\xfe", deep(), b'{"attributes": 1}', b'{"attributes": {}}'],
    ids=lambda content: content[:20].decode("latin-1"),
)
@pytest.mark.parametrize("name", ["zarr.json", "token_ids/zarr.json"])
def test_hostile_group_metadata(shard: Path, tmp_path: Path, name: str, content: bytes) -> None:
    recommit(shard, name, content)
    refused_and_reported(tmp_path / "store")


@pytest.mark.parametrize("value", [2**64 - 1, 2**63, 2**62, 0])
def test_hostile_offsets_of_chunks(shard: Path, tmp_path: Path, value: int) -> None:
    """The shard index stands at the end of the file, with a CRC-32C."""
    import google_crc32c  # a dependency of zarr

    (path,) = (shard / "value").glob("c/*/*/*/*")
    content = bytearray(path.read_bytes())
    num_chunks = 1
    outer = json.loads((shard / "value/zarr.json").read_text())
    for size, chunk in zip(
        outer["chunk_grid"]["configuration"]["chunk_shape"],
        inner(outer)["chunk_shape"],
        strict=True,
    ):
        num_chunks *= size // chunk
    start = len(content) - 16 * num_chunks - 4
    content[start : start + 8] = value.to_bytes(8, "little")
    content[-4:] = google_crc32c.value(bytes(content[start:-4])).to_bytes(4, "little")
    if value == 0 and content == path.read_bytes():
        content[start + 8 : start + 16] = (2**40).to_bytes(8, "little")
        content[-4:] = google_crc32c.value(bytes(content[start:-4])).to_bytes(4, "little")
    recommit(shard, path.relative_to(shard).as_posix(), bytes(content))
    refused_and_reported(tmp_path / "store")


def test_hostile_safetensors(tmp_path: Path, build: Any) -> None:
    store, _ = build.store(tmp_path / "store", build.teacher(backend="safetensors"), num_shards=1)
    shard = store.paths.shard("tiny", "00000")
    whole = (shard / "shard.safetensors").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    tensor = next(name for name in header if name != "__metadata__")
    bodies = [b"", b"{}", deep(), b"\0" * 100]
    bodies += [
        json.dumps({**header, tensor: {**header[tensor], **change}}).encode()
        for change in (
            {"shape": [2**62, 2**62]}, {"shape": [-1, 8]}, {"data_offsets": [0, 2**64 - 1]},
            {"data_offsets": [2**63, 0]}, {"dtype": "F1024"}, {"data_offsets": []},
        )
    ]  # fmt: skip
    files = [len(body).to_bytes(8, "little") + body + whole[8 + length :] for body in bodies]
    files += [size.to_bytes(8, "little") + whole[8:] for size in (2**64 - 1, 2**40, 0, length + 1)]
    for content in files:
        recommit(shard, "shard.safetensors", content)
        refused_and_reported(tmp_path / "store")


@pytest.mark.parametrize("tokens", [2**31 - 1, 10**6])
def test_sizes_on_which_both_manifests_agree(shard: Path, tmp_path: Path, tokens: int) -> None:
    sign(shard / "COMMIT.json", lambda body: body.update(num_tokens=tokens, num_blocks=tokens))
    for path in shard.glob("*/zarr.json"):
        body = json.loads(path.read_text())
        axes = body.get("dimension_names") or ()
        for i, axis in enumerate(axes):
            if axis in ("token", "block"):
                body["shape"][i] = tokens
                body["chunk_grid"]["configuration"]["chunk_shape"][i] = tokens
        recommit(shard, path.relative_to(shard).as_posix(), json.dumps(body).encode())
    refused_and_reported(tmp_path / "store")


def zstd_frame(blocks: int, stated: int | None = None, last_block: int = 2**17) -> bytes:
    """A frame of ``blocks`` × 128 kB of zeros in 4 bytes each, whatever size it states."""
    # A window of 128 kB and no size, or one segment and its size in 8 bytes.
    head = b"\x00\x38" if stated is None else b"\xe0" + struct.pack("<Q", stated)
    sizes = [2**17] * (blocks - 1) + [last_block]
    rle = [(size << 3 | 1 << 1 | (i == blocks - 1)) for i, size in enumerate(sizes)]
    return b"\x28\xb5\x2f\xfd" + head + b"".join(struct.pack("<I", b)[:3] + b"\0" for b in rle)


MANY = 31_300  # × 128 kB is 4.1 GB
BOMBS = {
    "no size": zstd_frame(MANY),
    "a true size": zstd_frame(MANY, MANY * 2**17),
    "a small size": zstd_frame(MANY, 776),
    "an endless size": zstd_frame(1, 2**62),
    "a skipped frame": b"\x50\x2a\x4d\x18\0\0\0\0" + zstd_frame(MANY),
    "many frames": zstd_frame(1) * (MANY // 2),
    "a frame behind the chunk": zstd_frame(1, 776, 776) + zstd_frame(MANY),
}


@pytest.mark.parametrize("has_zarrs", [True, False])
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_chunk_that_inflates_to_gigabytes(
    shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bomb: str, has_zarrs: bool
) -> None:
    """All checksums are right."""
    import google_crc32c

    if not has_zarrs:
        monkeypatch.setattr("kvdistill.store.backends.zarr._HAS_ZARRS", False)
    chunk = BOMBS[bomb] + google_crc32c.value(BOMBS[bomb]).to_bytes(4, "little")
    index = struct.pack("<QQ", 0, len(chunk))
    index += google_crc32c.value(index).to_bytes(4, "little")
    recommit(shard, "token_ids/c/0", chunk + index)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pid = in_child(lambda: refused_in_child(tmp_path / "store"))
    _, status, usage = os.wait4(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert usage.ru_maxrss < used + 300_000  # kB


def refused_in_child(root: Path) -> int:
    try:
        touch_everything(KVStore.open(root))
    except KVDistillError as error:
        return 0 if "token_ids" in str(error) and len(str(error)) < 500 else 3
    return 4
