"""Both stages with a bucket in the place of the store's folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from kvdistill.cli import cli
from kvdistill.config.experiment import Experiment
from kvdistill.config.load import dump_experiment, load_experiment
from kvdistill.pipelines.cluster import overview
from kvdistill.pipelines.extract import extract
from kvdistill.pipelines.train import train
from kvdistill.store.bucket import cache_folder
from kvdistill.store.reader import KVStore
from kvdistill.studies.report.reading import read_study
from kvdistill.studies.report.tables import savings_table
from tests.pipelines.tiny import variant
from tests.slurm.experiment import write_experiment, write_models


@pytest.fixture(params=["file", pytest.param("s3", marks=pytest.mark.slow)])
def place(request: pytest.FixtureRequest, tmp_path: Path, private_cache: Path) -> str:
    """URL of an empty folder, and of an empty place in a bucket."""
    if request.param == "file":
        return f"file://{tmp_path}/shared"
    return str(request.getfixturevalue("bucket"))


def weights(experiment: Experiment) -> dict[str, torch.Tensor]:
    return load_file(train(experiment).folder / "student/model.safetensors")


def test_training_from_a_bucket_equals_training_from_the_folder(
    extracted: Path, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = load_experiment(extracted).store
    pushed = CliRunner().invoke(cli, ["push", str(folder), place])
    assert pushed.exit_code == 0, pushed.output
    from_folder = weights(variant(extracted, tmp_path / "folder", training__max_steps=3))
    # Too small for two shards: each is evicted once the next one is read, and fetched again.
    monkeypatch.setenv("KVDISTILL_CACHE_GB", "1e-6")
    experiment = variant(extracted, tmp_path / "bucket", training__max_steps=3, store=place)
    from_bucket = weights(experiment)
    assert from_folder.keys() == from_bucket.keys()
    assert all(torch.equal(from_folder[name], from_bucket[name]) for name in from_folder)
    assert str(place) in dump_experiment(experiment)
    assert list(cache_folder().glob("*/teachers/*/shards/*"))


def test_reading_commands_take_a_url(extracted: Path, tmp_path: Path, place: str) -> None:
    folder, run = load_experiment(extracted).store, CliRunner().invoke
    teacher = KVStore.open(folder).teachers()[0]
    assert run(cli, ["push", str(folder), place, "--teacher", teacher]).exit_code == 0
    assert KVStore.open(place).teachers() == [teacher]
    for command in (["verify"], ["inspect", "--json"], ["status", "--json", "--check"]):
        done = run(cli, [command[0], place, *command[1:]])
        assert done.exit_code == 0, done.output
        assert place in done.output
    shown = [json.loads(run(cli, ["inspect", str(x), "--json"]).stdout) for x in (folder, place)]
    (there,) = (each for each in shown[0]["teachers"] if each["teacher"] == teacher)
    assert shown[1]["teachers"] == [there]
    pulled = run(cli, ["pull", place, str(tmp_path / "copy")])
    assert pulled.exit_code == 0, pulled.output
    assert KVStore.open(tmp_path / "copy").missing(teacher) == []
    assert run(cli, ["rm", place, "--teacher", teacher, "--yes"]).exit_code == 0
    assert KVStore.open(place).teachers() == []


def test_extraction_into_a_bucket_equals_extraction_into_a_folder(
    tmp_path: Path, place: str
) -> None:
    write_models(tmp_path / "models")
    path = write_experiment(tmp_path, tmp_path / "models")
    local = load_experiment(path)
    name = next(iter(local.teachers))
    extract(local, [name])
    experiment = load_experiment(path, [f"store={place}"])
    report = extract(experiment, [name])
    assert report.missing == {name: 0}
    assert extract(experiment, [name]).teachers[0].shards == 0
    here, there = KVStore.open(local.store), KVStore.open(place)
    assert there.missing(name) == []
    for shard_id in here.shard_ids:
        ours, theirs = here.read_shard(name, shard_id), there.read_shard(name, shard_id)
        for key, array in ours.arrays.items():
            np.testing.assert_array_equal(array, theirs.arrays[key])
    (seen,) = overview(place).teachers
    assert seen.status.count("done") == len(here.shard_ids)
    assert overview(path, [f"store={place}"], [name]).is_complete


@pytest.mark.slow
def test_a_report_reads_its_store_in_the_bucket(
    extracted: Path, tmp_path: Path, place: str
) -> None:
    folder = load_experiment(extracted).store
    CliRunner().invoke(cli, ["push", str(folder), place])
    train(variant(extracted, tmp_path / "runs", training__max_steps=1, store=place))
    table, notes = savings_table(read_study([tmp_path / "runs"]))
    assert table is not None
    assert notes == []
