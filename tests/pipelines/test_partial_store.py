"""Training begins on the shards that are there, and keeps to them."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from kvdistill.distill.train.trainer import KVDistillTrainer
from kvdistill.errors import IncompleteStore, Interrupted
from kvdistill.pipelines.run_folder import RunFolder
from kvdistill.pipelines.train import train
from kvdistill.store.format import StorePaths
from kvdistill.store.reader import KVStore
from tests.pipelines.tiny import variant


@pytest.fixture
def growing(extracted: Path, tmp_path: Path) -> StorePaths:
    """A store of which one teacher has all shards and another lacks two."""
    source = variant(extracted, tmp_path).store
    shutil.copytree(source, tmp_path / "store")
    paths = StorePaths(tmp_path / "store")
    store = KVStore.open(paths.root)
    name = store.teachers()[0]
    paths.aside(name).mkdir()
    for shard_id in store.shard_ids[1:3]:
        paths.shard(name, shard_id).rename(paths.aside(name) / shard_id)
    return paths


def test_a_run_keeps_to_the_shards_of_its_start(
    extracted: Path, growing: StorePaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"store": str(growing.root), "training__max_steps": 4, "training__save_steps": 2}
    with pytest.raises(IncompleteStore, match="lacks 2 of"):
        train(variant(extracted, tmp_path / "whole", **options))

    options["training__partial_store"] = True
    reference = train(variant(extracted, tmp_path / "reference", **options))
    store = KVStore.open(growing.root)
    name = store.teachers()[0]
    there = [shard_id for shard_id in store.shard_ids if store.is_committed(name, shard_id)]
    assert len(there) == len(store.shard_ids) - 2
    assert RunFolder(reference.folder).read_record()["shards"] == there

    experiment = variant(extracted, tmp_path / "stopped", **options)
    stop_after_two_steps(monkeypatch)
    with pytest.raises(Interrupted):
        train(experiment)
    monkeypatch.undo()
    for shard in growing.aside(name).iterdir():  # the store has grown meanwhile
        shard.rename(growing.shard(name, shard.name))
    resumed = train(experiment)
    assert resumed.resumed
    assert RunFolder(resumed.folder).read_record()["shards"] == there
    weights = [report.folder / "student/model.safetensors" for report in (reference, resumed)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def stop_after_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal arrives in the second step."""

    step, count = KVDistillTrainer.training_step, iter(range(1, 100))

    def stopped(*args: object, **kwargs: object) -> object:
        if next(count) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args, **kwargs)

    monkeypatch.setattr(KVDistillTrainer, "training_step", stopped)


def test_a_store_without_a_common_shard_is_refused(
    extracted: Path, growing: StorePaths, tmp_path: Path
) -> None:
    store = KVStore.open(growing.root)
    for shard_id in store.shard_ids:
        if store.is_committed(store.teachers()[0], shard_id):
            shutil.rmtree(growing.shard(store.teachers()[1], shard_id))
    options = {"store": str(growing.root), "training__partial_store": True}
    with pytest.raises(IncompleteStore, match="no shard yet that all teachers have"):
        train(variant(extracted, tmp_path / "runs", **options))
