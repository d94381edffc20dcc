"""Extraction with two teachers on a real Slurm, through every fault, then training.

Shards are held by a file that names them, so that "while it runs" does not depend on timing.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvdistill.config.experiment import Experiment
from kvdistill.config.slurm import SlurmProfile
from kvdistill.pipelines import extract_tasks as work
from kvdistill.pipelines import run as runs
from kvdistill.pipelines.cluster import overview
from kvdistill.pipelines.extract import extract
from kvdistill.slurm import client
from kvdistill.slurm.ledger import Attempt
from kvdistill.slurm.status import UNIT_STATES
from kvdistill.slurm.submit import dask_cluster
from kvdistill.store.maintenance import verify_store
from kvdistill.store.reader import KVStore
from kvdistill.types import KINDS
from tests.slurm.cluster import CREDENTIAL_SECONDS, Cluster, run_until_idle, wait_for
from tests.slurm.experiment import (
    HELD_TARGET,
    ROOT,
    hold_file,
    load,
    write_experiment,
    write_models,
)
from tests.slurm.toy import leftovers

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


@pytest.fixture(scope="module")
def reference(models: Path, tmp_path_factory: pytest.TempPathFactory) -> KVStore:
    """What one process on this machine extracts."""
    experiment = load(write_experiment(tmp_path_factory.mktemp("reference"), models))
    assert extract(experiment).complete
    return KVStore.open(experiment.store)


def cli(*arguments: object, expect: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "kvdistill.cli", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def states(config: Path) -> dict[str, dict[str, int]]:
    """What ``status`` says, without the zeros."""
    seen = overview(config).teachers
    counts = {each.teacher: {s: each.status.count(s) for s in UNIT_STATES} for each in seen}
    return {name: {s: n for s, n in found.items() if n} for name, found in counts.items()}


def holder(experiment: Experiment, teacher: str, unit: str) -> Attempt | None:
    ledger = work.extraction_ledger(experiment, teacher)
    return ledger.attempt(ledger.holder(unit) or "")


def is_running(experiment: Experiment, teacher: str, unit: str, restart: int = 0) -> bool:
    attempt = holder(experiment, teacher, unit)
    return attempt is not None and attempt.unit == unit and attempt.restart == restart


def assert_equal_stores(one: KVStore, other: KVStore, teacher: str) -> None:
    assert one.shard_ids == other.shard_ids
    for shard_id in one.shard_ids:
        a, b = one.read_shard(teacher, shard_id), other.read_shard(teacher, shard_id)
        assert a.arrays.keys() == b.arrays.keys() > set(KINDS)
        for name in a.arrays:
            np.testing.assert_array_equal(a.arrays[name], b.arrays[name])
        np.testing.assert_array_equal(a.tokens.token_ids, b.tokens.token_ids)


def assert_tidy(experiment: Experiment, teacher: str) -> None:
    paths = KVStore.open(experiment.store).paths
    staged = paths.temporary(teacher)
    assert not (list(staged.iterdir()) if staged.is_dir() else [])
    assert not leftovers(paths.teacher(teacher))


def test_two_teachers_survive_the_cluster(
    login: Cluster,
    models: Path,
    reference: KVStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(work, "TARGET", HELD_TARGET)
    config = write_experiment(tmp_path, models)
    experiment = load(config)
    # Task i of 3 owns shards i, i+3, …: each stops at its first one; one bert task at its first.
    hold_file(experiment, "llama").write_text("00000 00001 00002")
    hold_file(experiment, "bert").write_text("00000")
    profile = runs.choose_profile(experiment, None, "extract")
    submitted = work.submit_extraction(experiment, ["llama", "bert"], profile)
    (llama_job,), (bert_job,) = (job_ids for _, job_ids, _ in submitted.values())
    for unit in ("00000", "00001", "00002"):
        wait_for(f"llama {unit}", lambda unit=unit: is_running(experiment, "llama", unit), 120)
    wait_for("bert", lambda: states(config)["bert"] == {"done": 8, "running": 1, "pending": 3}, 120)
    assert states(config)["llama"] == {"running": 3, "pending": 9}

    first = holder(experiment, "llama", "00000")
    assert first is not None
    login.client("scontrol", "requeue", f"{llama_job}_0")
    client.cancel([f"{llama_job}_1"])
    victim = holder(experiment, "llama", "00002")
    assert victim is not None
    os.kill(victim.pid, signal.SIGKILL)
    wait_for("all three blows", lambda: states(config)["llama"] == {"stale": 1, "pending": 11}, 60)

    copy = holder(experiment, "bert", "00000")
    assert copy is not None
    login.freeze(copy.host)
    try:
        login.set_node(copy.host, "down")
        time.sleep(CREDENTIAL_SECONDS)
        login.start_now(f"{bert_job}_0")
        wait_for("the second copy", lambda: is_running(experiment, "bert", "00000", restart=1), 120)
        assert states(config)["bert"] == {"done": 8, "running": 1, "pending": 3}
        # Both copies hold the shard; both now write it.
        hold_file(experiment, "bert").unlink()
        hold_file(experiment, "llama").unlink()
        for job_id in (bert_job, llama_job):
            run_until_idle(login, job_id, 150)
    finally:
        login.thaw(copy.host)
        login.set_node(copy.host, "resume")
    assert states(config) == {"llama": {"done": 4, "stale": 1, "pending": 7}, "bert": {"done": 12}}
    assert "8 of llama" in cli("status", config, "--check", expect=3)

    said = cli("extract", config, "--slurm")
    assert "8 shards in 3 tasks" in said
    assert "bert: nothing to submit" in said
    newest = work.extraction_ledger(experiment, "llama").submissions()[-1].job_id
    run_until_idle(login, newest, 150)
    cli("status", config, "--check")
    store = KVStore.open(experiment.store)
    assert verify_store(store) == []
    for teacher in ("llama", "bert"):
        assert_equal_stores(store, reference, teacher)
        assert_tidy(experiment, teacher)
    kinds = [f.kind for f in work.extraction_ledger(experiment, "llama").failures("00002")]
    assert kinds == ["killed"]


def test_training_refuses_then_trains_and_resumes(
    login: Cluster, models: Path, reference: KVStore, tmp_path: Path
) -> None:
    config = write_experiment(tmp_path, models, extra={"mem": "2G"})
    shutil.copytree(reference.paths.root, tmp_path / "store")
    shutil.rmtree(tmp_path / "store/teachers/bert")
    overrides = ("training.max_steps=40", "training.save_steps=5")
    experiment = load(config, *overrides)
    profile = runs.choose_profile(experiment, None, "train")
    refused = runs.submit_training(experiment, profile)
    run_until_idle(login, refused)
    shown = login.client("scontrol", "show", "job", refused)
    assert "ExitCode=3:0" in shown
    log = runs.training_ledger(experiment).jobs / f"{refused}_0_log.err"
    assert "no teacher 'bert'" in log.read_text()
    assert "has ended, and the run is not finished" in cli("status", config)
    assert "no teacher 'bert'" in cli("logs", config)

    options: list[Any] = [part for each in overrides for part in ("--set", each)]
    assert "training: job" in cli("run", config, "--slurm", *options)
    training = runs.training_ledger(experiment).submissions()[-1].job_id
    assert f"job {training} is pending (Dependency)" in cli("status", config)
    again = cli("run", config, "--slurm", *options)
    assert f"training: job {training} is already queued" in again, "one run, one training job"
    run = experiment.output_dir / "tiny"
    wait_for("a checkpoint", (run / "checkpoint-5/trainer_state.json").exists, 120)
    login.client("scontrol", "requeue", training)
    run_until_idle(login, training, 150)
    record = json.loads((run / "run.json").read_text())
    assert record["finished"]
    assert record["steps"] == 40
    assert len(record["attempts"]) == 2
    assert f"training: finished, in {run}" in cli("status", config)


def test_written_scripts_do_the_same(
    login: Cluster, models: Path, reference: KVStore, tmp_path: Path
) -> None:
    config = write_experiment(tmp_path, models, tasks=2)
    cli("extract", config, "--teacher", "bert", "--write-sbatch", tmp_path / "scripts")
    job_id = login.client("sbatch", "--parsable", str(tmp_path / "scripts/extract-bert.sbatch"))
    run_until_idle(login, job_id, 150)
    experiment = load(config)
    assert_equal_stores(KVStore.open(experiment.store), reference, "bert")
    attempts = work.extraction_ledger(experiment, "bert").attempts()
    assert {attempt.job for attempt in attempts} == {f"{job_id}_0", f"{job_id}_1"}
    assert_tidy(experiment, "bert")


def test_training_on_two_nodes(
    login: Cluster, models: Path, reference: KVStore, tmp_path: Path
) -> None:
    config = write_experiment(tmp_path, models, nodes=2, extra={"mem": "2G"})
    shutil.copytree(reference.paths.root, tmp_path / "store")
    experiment = load(config)
    profile = runs.choose_profile(experiment, None, "train")
    job_id = runs.submit_training(experiment, profile)
    run_until_idle(login, job_id, 150)
    record = json.loads((experiment.output_dir / "tiny/run.json").read_text())
    assert record["finished"]
    log = runs.training_ledger(experiment).jobs / f"{job_id}_1_log.out"
    assert log.exists(), "the second node took part"


def test_a_store_is_verified_by_dask_workers(
    login: Cluster, reference: KVStore, tmp_path: Path
) -> None:
    pytest.importorskip("dask_jobqueue")
    store = tmp_path / "store"
    shutil.copytree(reference.paths.root, store)
    profile = SlurmProfile(partition="low", cpus_per_task=1, memory_gb=2, time_min=10)
    with dask_cluster(profile, 2, tmp_path / "logs") as address:
        assert "24 shards, no errors found" in cli("verify", store, "--scheduler", address)
        victim = max(
            (store / "teachers/bert/shards/00003").rglob("*"), key=lambda p: p.stat().st_size
        )
        body = bytearray(victim.read_bytes())
        body[len(body) // 2] ^= 1
        victim.write_bytes(body)
        assert "bert 00003" in cli("verify", store, "--scheduler", address, expect=1)
