"""Teachers in memory against teachers in a store: the same items, and the same losses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvdistill.config.experiment import Experiment
from kvdistill.config.load import parse_experiment
from kvdistill.corpus.readers import load_corpus
from kvdistill.errors import IncompleteStore
from kvdistill.pipelines.extract import extract
from kvdistill.pipelines.live import LiveSource, live_source, only_layers
from kvdistill.pipelines.run_folder import RunFolder, begin
from kvdistill.pipelines.train import build_trainer, train
from kvdistill.store.reader import KVStore
from kvdistill.types import CodecName
from tests.pipelines.tiny import variant
from tests.slurm.experiment import write_experiment, write_models

INT8_BOUND = 0.01
"""Largest relative difference of a step's loss, int8 store against 16-bit live teachers."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two teachers that stay, and a store of each codec."""
    folder = tmp_path_factory.mktemp("live")
    write_models(folder / "models")
    path = write_experiment(folder, folder / "models")
    for codec in ("fp16", "int8"):
        extract(experiment_of(path, folder, codec))
    return folder


def experiment_of(path: Path, folder: Path, codec: CodecName, **changes: Any) -> Experiment:
    return variant(
        path, folder / "runs",
        store=str(folder / codec), extraction__codec={"key": codec, "value": codec},
        training__log_steps=1, training__save_steps=None, training__max_steps=2, **changes,
    )  # fmt: skip


def losses(experiment: Experiment, *, live: bool) -> list[dict[str, float]]:
    folder = begin(experiment)
    experiment = experiment.model_copy(update={"kv_source": "live" if live else "store"})
    store, splits = KVStore.open(experiment.store), load_corpus(experiment.corpus)
    trainer = build_trainer(experiment, store, splits, folder)
    trainer.train()
    rows = [json.loads(line) for line in folder.log.read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def test_cached_and_live_teachers_give_the_same_losses(folder: Path) -> None:
    found = {}
    path = folder / "experiment.yaml"
    for codec in ("fp16", "int8"):
        for live in (False, True):
            experiment = experiment_of(path, folder, codec, name=f"{codec}-{live}")
            found[codec, live] = losses(experiment, live=live)
    for codec in ("fp16", "int8"):
        for cached, live in zip(found[codec, False], found[codec, True], strict=True):
            for part in ("loss", "loss_key", "loss_value", "loss_cross_entropy", "grad_norm"):
                assert cached[part] == pytest.approx(live[part], rel=1e-5), part
    for cached, live in zip(found["int8", False], found["fp16", True], strict=True):
        assert cached["loss"] == pytest.approx(live["loss"], rel=INT8_BOUND)
    assert found["int8", False][0]["loss_key"] != found["fp16", True][0]["loss_key"]


def test_live_teachers_need_the_first_shards_alone(folder: Path, tmp_path: Path) -> None:
    path = folder / "experiment.yaml"
    changes = {
        "store": str(tmp_path / "store"), "kv_source": "live", "projection__pilot_batches": 1,
        "corpus__shard_chars": 300, "training__max_steps": 3,
    }  # fmt: skip
    experiment = variant(path, tmp_path / "runs", **changes)
    assert extract(experiment).complete
    store = KVStore.open(experiment.store)
    made = store.committed("llama")
    assert 0 < len(made) < len(store.shard_ids)
    assert sum(store.plan(shard_id).num_samples for shard_id in made) >= 8
    report = train(experiment)
    assert RunFolder(report.folder).read_record()["steps"] == 3
    assert store.committed("llama") == made
    with pytest.raises(IncompleteStore, match="lacks"):
        train(variant(path, tmp_path / "cached", **{**changes, "kv_source": "store"}))


def test_a_live_shard_is_the_stored_one(folder: Path) -> None:
    experiment = parse_experiment(
        experiment_of(folder / "experiment.yaml", folder, "int8").model_dump(mode="json")
    )
    store = KVStore.open(experiment.store)
    layers = {"llama": (0, 2), "bert": (0, 1)}
    source = live_source(experiment, store)(store, layers)
    assert isinstance(source, LiveSource)
    loaded = source.load(1)
    assert [shard.samples for shard in source.load_all([1], threads=1, num_ahead=1)] == [
        loaded.samples
    ]
    for name, needed in layers.items():
        stored = store.read_shard(name, store.shard_ids[1], needed)
        live = loaded.teachers[name]
        assert stored.tokens.sample_ids == live.tokens.sample_ids
        for array in set(stored.arrays) - {"importance"}:
            np.testing.assert_array_equal(stored.arrays[array], live.arrays[array], array)


def test_only_some_layers_of_a_shard_of_two_geometries(folder: Path) -> None:
    store = KVStore.open(folder / "int8")
    manifest = store.teacher("llama")
    (group,) = manifest.groups
    split = manifest.model_copy(
        update={"groups": (replace(group, layers=(0, 2)), replace(group, layers=(1,)))}
    )
    whole = store.read_shard("llama", store.shard_ids[0])
    arrays = {
        f"{prefix}{name}": array[rows]
        for prefix, rows in (("g0/", [0, 2]), ("g1/", [1]))
        for name, array in whole.arrays.items()
    }
    found = only_layers(replace(whole, arrays=arrays), split, (2,)).arrays
    assert {name.split("/")[0] for name in found} == {"g0"}
    np.testing.assert_array_equal(found["g0/key"], whole.arrays["key"][[2]])
