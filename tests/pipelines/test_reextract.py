from __future__ import annotations

from pathlib import Path

import pytest

from kvdistill.errors import ShardNotFound, StoreMismatch
from kvdistill.pipelines.extract import extract
from kvdistill.pipelines.reextract import reextract
from kvdistill.pipelines.stored import prepare
from kvdistill.store.reader import KVStore
from tests.extract.models import save_teacher
from tests.pipelines.test_teachers import CORPUS, make


def test_the_same_teacher_says_the_same(tmp_path: Path) -> None:
    save_teacher(tmp_path / "t")
    experiment = make(tmp_path, {})
    extract(experiment)
    found = reextract(KVStore.open(experiment.store), experiment, "t", 2)
    assert [(d.sample_id, d.kind) for d in found] == [
        (sample, kind) for sample in ("00000000", "00000001") for kind in ("key", "value")
    ]
    assert all(d.same_tokens and d.relative_error < 1e-3 for d in found)


def test_changed_codes_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_teacher(tmp_path / "t")
    experiment = make(tmp_path, {})
    extract(experiment)
    original = KVStore.read_shard

    def forged(self: KVStore, *args: object, **kwargs: object) -> object:
        shard = original(self, *args, **kwargs)  # type: ignore[arg-type]
        shard.arrays["value"][1] = 0
        return shard

    monkeypatch.setattr(KVStore, "read_shard", forged)
    found = reextract(KVStore.open(experiment.store), experiment, "t", 1)
    assert found[0].relative_error < 1e-3
    assert found[1].relative_error > 0.1


def test_another_teacher_is_refused(tmp_path: Path) -> None:
    save_teacher(tmp_path / "t")
    extract(make(tmp_path, {}))
    save_teacher(tmp_path / "t", seed=1)
    with pytest.raises(StoreMismatch, match="weights_fingerprint"):
        reextract(KVStore.open(tmp_path / "store"), make(tmp_path, {}), "t")


def test_nothing_to_compare(tmp_path: Path) -> None:
    save_teacher(tmp_path / "t")
    experiment = make(tmp_path, {}, CORPUS)
    with pytest.raises(ShardNotFound, match="no committed shard"):
        reextract(prepare(experiment), experiment, "t")
