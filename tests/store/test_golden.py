"""Stores written by earlier versions stay readable for ever, bit for bit."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from kvdistill.store.reader import KVStore
from kvdistill.store.verify import verify
from tests.store.make_golden import GOLDEN, digests

ARCHIVES = sorted(GOLDEN.glob("*.tar.xz"))


@pytest.mark.parametrize("archive", ARCHIVES, ids=lambda path: path.name.partition(".")[0])
def test_an_old_store_decodes_to_the_same_bits(archive: Path, tmp_path: Path) -> None:
    with tarfile.open(archive) as files:
        files.extractall(tmp_path, filter="data")
    store = KVStore.open(tmp_path / "store")
    assert verify(store) == []
    version = archive.name.partition("_")[0]
    assert digests(store) == json.loads((GOLDEN / f"{version}_expected.json").read_text())


def test_both_backends_have_a_golden_store_of_a_few_kilobytes() -> None:
    assert len(ARCHIVES) >= 2
    assert all(path.stat().st_size < 64_000 for path in ARCHIVES)
