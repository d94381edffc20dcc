"""``extract --workers``: the real extraction in several processes of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kvdistill.pipelines.extract import extract
from kvdistill.store.maintenance import verify_store
from kvdistill.store.reader import KVStore
from tests.slurm.experiment import ROOT, load, write_experiment, write_models
from tests.slurm.toy import leftovers

pytestmark = pytest.mark.slow


def cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvdistill.cli", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_two_workers_make_the_same_store_as_one_process(tmp_path: Path) -> None:
    write_models(tmp_path / "models")
    config = write_experiment(tmp_path / "pool", tmp_path / "models")
    alone = load(write_experiment(tmp_path / "alone", tmp_path / "models"))
    assert extract(alone, ["bert"]).complete
    done = cli("extract", config, "--workers", 2, "--teacher", "bert")
    assert done.returncode == 0, done.stderr
    assert "bert: complete" in done.stdout
    store, reference = KVStore.open(load(config).store), KVStore.open(alone.store)
    assert verify_store(store) == []
    for shard_id in reference.shard_ids:
        here, there = store.read_shard("bert", shard_id), reference.read_shard("bert", shard_id)
        assert here.arrays.keys() == there.arrays.keys()
        for name, array in there.arrays.items():
            np.testing.assert_array_equal(here.arrays[name], array)
    assert not leftovers(store.paths.teacher("bert"))
    again = cli("extract", config, "--workers", 2, "--teacher", "bert")
    assert (again.returncode, "bert: complete" in again.stdout) == (0, True)


def test_a_teacher_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    config = write_experiment(tmp_path, tmp_path / "models")
    done = cli("extract", config, "--workers", 2, "--teacher", "bert")
    assert done.returncode == 3
    assert "bert: 12 shards missing" in done.stdout
    assert "could not start: TeacherError" in done.stderr
    status = cli("status", config)
    assert "could not start: TeacherError" in status.stdout
    assert "12 pending" in status.stdout
