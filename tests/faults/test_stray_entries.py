"""What file systems, desktops and people leave in folders is neither ours nor in the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvdistill.config.load import load_experiment
from kvdistill.errors import StoreFormatError
from kvdistill.pipelines.cluster import overview
from kvdistill.pipelines.run_folder import RunFolder
from kvdistill.store.commit import commit_folder
from kvdistill.store.format import StorePaths
from kvdistill.store.maintenance import verify_store
from kvdistill.store.manifest import Document, StoreManifest, _document_checksum
from kvdistill.store.reader import KVStore

STRAY = (".DS_Store", ".snapshot", "lost+found", "._a", "Thumbs.db", "notes (copy).txt", "~x")


def litter(folder: Path) -> None:
    """A file, a folder, a dangling link and an unreadable folder among what belongs there."""
    for name in STRAY[:4]:
        (folder / name).mkdir()
    for name in STRAY[4:]:
        (folder / name).write_text("x")
    (folder / ".nfs0001").symlink_to("/nonexistent")
    (folder / "lost+found").chmod(0)


def test_a_store_with_stray_entries_reads_as_before(extracted: Path) -> None:
    root = load_experiment(extracted).store
    store = KVStore.open(root)
    names = store.teachers()
    committed = {name: store.committed(name) for name in names}
    paths = StorePaths(root)
    for folder in (root, paths.teachers, paths.corpus, *(paths.shards(name) for name in names)):
        litter(folder)
    try:
        store = KVStore.open(root)
        assert store.teachers() == names
        assert {name: store.committed(name) for name in names} == committed
        assert [teacher.teacher for teacher in overview(root).teachers] == names
        assert verify_store(store) == []
    finally:
        for path in sorted(root.rglob("*")):
            if path.name in STRAY or path.name == ".nfs0001":
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


@pytest.mark.parametrize("name", ["checkpoint-x", "checkpoint-", "checkpoint-12.tmp", "checkpoint"])
def test_a_run_with_a_stray_checkpoint_resumes_from_a_real_one(tmp_path: Path, name: str) -> None:
    for folder in ("checkpoint-3", "checkpoint-12", name):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "trainer_state.json").write_text("{}")
        commit_folder(tmp_path / folder)
    found = RunFolder(tmp_path).checkpoint()
    assert found is not None
    assert found.name == "checkpoint-12"


@pytest.mark.parametrize("version", ["3", 3.0, 2.0, 0, -5, True, None, [2], 10**30])
def test_a_format_version_is_a_known_whole_number(version: object) -> None:
    body = {
        "format_version": version,
        "created_by": "test",
        "corpus_fingerprint": "0",
        "shards": [],
    }
    text = json.dumps({**body, "checksum": _document_checksum(body)})
    with pytest.raises(StoreFormatError, match="format version") as caught:
        StoreManifest.from_json(text, "kvstore.json")
    assert len(str(caught.value)) < 300


def test_every_document_has_a_version() -> None:
    for kind in Document.__subclasses__():
        assert "format_version" in kind.model_fields
