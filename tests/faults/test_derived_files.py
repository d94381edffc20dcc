"""What is derived from all shards is in no commit: damaged or missing, it is made again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvdistill.errors import ShardCorrupt
from kvdistill.store.maintenance import repair_store, verify_store
from kvdistill.store.prototypes import hidden_summaries, prototypes, teacher_prototypes
from kvdistill.store.reader import KVStore

CENTRES = 2


@pytest.fixture
def store(tmp_path: Path, build: Any) -> KVStore:
    made: KVStore = build.store(tmp_path / "store", build.teacher(has_summaries=True))[0]
    return made


def numbers(store: KVStore) -> dict[str, np.ndarray[Any, Any]]:
    """Everything derived of a teacher."""
    found = {f"statistics/{k}": v.to_array() for k, v in store.statistics("tiny").items()}
    return found | {f"prototypes/{k}": v for k, v in made(store).items()}


def made(store: KVStore) -> dict[str, np.ndarray[Any, Any]]:
    return dict(teacher_prototypes(store, "tiny", CENTRES))


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array)


def test_a_teacher_killed_before_its_prototypes_gets_them_from_whoever_needs_them(
    store: KVStore,
) -> None:
    assert not store.paths.prototypes("tiny").exists()
    assert_same(made(store), prototypes(*hidden_summaries(store, "tiny"), CENTRES))
    assert store.paths.prototypes("tiny").is_file()


@pytest.mark.parametrize("name", ["statistics", "prototypes"])
def test_a_flipped_byte_changes_no_number(store: KVStore, name: str) -> None:
    wanted = numbers(store)
    path = getattr(store.paths, name)("tiny")
    whole = path.read_bytes()
    for position in np.random.default_rng(0).choice(len(whole), 20, replace=False):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << int(position % 8)
        path.write_bytes(flipped)
        findings = [(f.teacher, f.shard_id) for f in verify_store(store)]
        assert findings == [("tiny", path.name)], position
        assert_same(numbers(store), wanted)
        assert verify_store(store) == []


@pytest.mark.parametrize("name", ["statistics", "prototypes"])
@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"PK damaged", b"\xff" * 8])
def test_a_file_of_something_else_is_replaced(store: KVStore, name: str, content: bytes) -> None:
    wanted = numbers(store)
    path = getattr(store.paths, name)("tiny")
    for cut in (content, path.read_bytes()[:-1], path.read_bytes() + b"x"):
        path.write_bytes(cut)
        assert_same(numbers(store), wanted)


def test_a_part_and_the_whole_keep_their_own(
    store: KVStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run on some of the shards does not make the others derive everything again."""
    part = store.only(["00001"])
    wanted = [numbers(each) for each in (store, part)]
    assert wanted[0]["statistics/key"][0].max() != wanted[1]["statistics/key"][0].max()
    monkeypatch.setattr(KVStore, "_opened", lambda *_: pytest.fail("a shard was read again"))
    again = KVStore.open(store.paths.root)
    for each, numbers_of_it in zip((again, again.only(["00001"])), wanted, strict=True):
        assert_same(numbers(each), numbers_of_it)
    monkeypatch.undo()
    for path in store.paths.teacher("tiny").glob("statistics.*.safetensors"):
        path.write_bytes(b"damaged")
    (finding,) = verify_store(store)
    assert finding.shard_id.startswith("statistics.")
    assert repair_store(store, [finding])
    assert verify_store(store) == []


def test_repair_moves_a_damaged_file_aside(store: KVStore) -> None:
    numbers(store)
    path = store.paths.statistics("tiny")
    path.write_bytes(b"damaged")
    (moved,) = repair_store(store, verify_store(store))
    assert moved.read_bytes() == b"damaged"
    assert not path.exists()
    assert verify_store(store) == []


def test_they_follow_the_shards_that_are_committed(store: KVStore, tmp_path: Path) -> None:
    both = numbers(store)
    shard = store.paths.shard("tiny", "00001")
    shutil.move(shard, tmp_path / "kept")
    assert store.statistics("tiny")["key"].count < both["statistics/key"][0].flat[0]
    shutil.move(tmp_path / "kept", shard)
    assert_same(numbers(store), both)


def test_a_shard_without_its_commit_is_one_line(store: KVStore) -> None:
    numbers(store)
    path = store.paths.shard("tiny", "00001") / "COMMIT.json"
    path.unlink()
    for derive in (lambda: store.statistics("tiny"), lambda: made(store)):
        with pytest.raises(ShardCorrupt, match=f"^{path}: missing; run"):
            derive()


def test_another_number_of_centres_is_another_file(store: KVStore) -> None:
    assert len(teacher_prototypes(store, "tiny", 1)["kmeans"]) == 1
    assert len(teacher_prototypes(store, "tiny", 2)["kmeans"]) == 2


def test_a_store_that_cannot_be_written_goes_without(
    store: KVStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = numbers(store)
    paths = store.paths.statistics("tiny"), store.paths.prototypes("tiny")
    for path in paths:
        path.unlink()

    def refuse(*_: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    assert_same(numbers(store), wanted)
    assert not any(path.exists() for path in paths)
    assert not list(store.paths.teacher("tiny").glob(".*"))
