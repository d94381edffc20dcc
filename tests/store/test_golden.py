"""Stores written by earlier versions stay readable for ever, bit for bit."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from kvdistill.errors import StoreMismatch
from kvdistill.store.maintenance import convert_store, verify_store
from kvdistill.store.manifest import FORMAT_VERSION
from kvdistill.store.reader import KVStore
from kvdistill.store.writer import add_teacher
from kvdistill.types import Backend, CodecSpec
from tests.store.make_golden import GOLDEN, digests

ARCHIVES = sorted(GOLDEN.glob("*.tar.xz"))


@pytest.fixture(params=ARCHIVES, ids=lambda path: path.name.partition(".")[0])
def archive(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


@pytest.fixture
def store(archive: Path, tmp_path: Path) -> KVStore:
    with tarfile.open(archive) as files:
        files.extractall(tmp_path, filter="data")
    return KVStore.open(tmp_path / "store")


def _expected(archive: Path) -> object:
    version = archive.name.partition("_")[0]
    return json.loads((GOLDEN / f"{version}_expected.json").read_text())


def test_an_old_store_decodes_to_the_same_bits(archive: Path, store: KVStore) -> None:
    assert verify_store(store) == []
    assert digests(store) == _expected(archive)


def test_an_old_store_can_be_converted(archive: Path, store: KVStore, tmp_path: Path) -> None:
    to: Backend = "zarr" if "safetensors" in archive.name else "safetensors"
    converted = convert_store(store, tmp_path / "converted", to)
    assert verify_store(converted) == []
    assert digests(converted) == _expected(archive)


def test_an_old_extraction_goes_on_unless_its_codec_changed(store: KVStore) -> None:
    for name in store.teachers():
        manifest = store.teacher(name)
        asked = manifest.model_copy(update={"codec": CodecSpec(key=name, value=name)})
        if manifest.codec.value == "int4_v1":
            with pytest.raises(StoreMismatch, match=r"codec: stored .*int4_v1.* requested .*int4"):
                add_teacher(store, asked)
        else:
            assert add_teacher(store, asked) == manifest


def test_every_format_has_a_golden_store_of_a_few_kilobytes_in_both_backends() -> None:
    assert len(ARCHIVES) == 2 * FORMAT_VERSION
    assert all(path.stat().st_size < 64_000 for path in ARCHIVES)
