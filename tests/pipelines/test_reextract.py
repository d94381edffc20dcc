"""Reading samples again through the teacher: the same, changed codes, another teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvdistill.errors import ShardNotFound, StoreMismatch
from kvdistill.pipelines.extract import extract
from kvdistill.pipelines.extract_tasks import prepare_store
from kvdistill.pipelines.reextract import reextract
from kvdistill.store.reader import KVStore
from tests.extract.models import save_teacher
from tests.pipelines.test_teachers import CORPUS, make


def test_the_same_teacher_says_the_same(tmp_path: Path) -> None:
    save_teacher(tmp_path / "t")
    experiment = make(tmp_path, {})
    extract(experiment)
    found = reextract(KVStore.open(experiment.store), experiment, "t", 2)
    assert (found.teacher, found.samples) == ("t", 2)
    assert found.tokens > 2
    assert found.prediction_error is None
    assert max(found.key_error, found.value_error) < 1e-3
    assert found.agrees


def test_changed_codes_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_teacher(tmp_path / "t")
    experiment = make(tmp_path, {})
    extract(experiment)
    original = KVStore.read_sample

    def forged(self: KVStore, *args: Any, **kwargs: Any) -> Any:
        stored = original(self, *args, **kwargs)
        if args[2] == "value":
            stored[1, 0] = np.roll(stored[1, 0], 1, axis=-1)
        return stored

    monkeypatch.setattr(KVStore, "read_sample", forged)
    found = reextract(KVStore.open(experiment.store), experiment, "t", 1)
    assert found.key_error < 1e-3
    assert found.value_error > 0.1
    assert not found.agrees


@pytest.mark.parametrize("name", ["nll", "entropy", "top_logprobs", "rest_logprob", "top_ids"])
def test_changed_predictions_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    save_teacher(tmp_path / "t", tie_word_embeddings=True)
    experiment = make(tmp_path, {}, confidence=True, logits=2)
    extract(experiment)
    store = KVStore.open(experiment.store)
    same = reextract(store, experiment, "t", 2)
    assert same.agrees
    assert same.prediction_error is not None
    assert same.prediction_error < 1e-2
    assert same.moved == 0
    original = KVStore.token_array

    def forged(self: KVStore, teacher: str, shard_id: str, array: str) -> Any:
        stored = original(self, teacher, shard_id, array)
        forge = {"top_ids": lambda x: (x + 1) % 7}.get(name, lambda x: x - np.float16(0.5))
        return forge(stored) if array == name else stored

    monkeypatch.setattr(KVStore, "token_array", forged)
    found = reextract(store, experiment, "t", 2)
    assert max(found.key_error, found.value_error) < 1e-3
    assert (found.moved > 0.05) == (name == "top_ids")
    assert (found.prediction_error > found.tolerance) == (name != "top_ids")
    assert not found.agrees


def test_another_teacher_is_refused(tmp_path: Path) -> None:
    save_teacher(tmp_path / "t")
    extract(make(tmp_path, {}))
    save_teacher(tmp_path / "t", seed=1)
    with pytest.raises(StoreMismatch, match="with other parameters"):
        reextract(KVStore.open(tmp_path / "store"), make(tmp_path, {}), "t", 1)


def test_nothing_to_compare(tmp_path: Path) -> None:
    save_teacher(tmp_path / "t")
    experiment = make(tmp_path, {}, CORPUS)
    with pytest.raises(ShardNotFound, match=r"no teacher 't'|no shard yet"):
        reextract(prepare_store(experiment), experiment, "t", 1)
