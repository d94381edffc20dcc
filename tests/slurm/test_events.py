"""Random events of a real cluster, over an array of real shards and a training job.

Whatever happens, every shard is there and equal to an undisturbed extraction, and training ends
with the weights of an undisturbed run. The slow rounds are 200 events over 300 shards each.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from kvdistill.config.experiment import Experiment
from kvdistill.errors import Interrupted
from kvdistill.pipelines import extract_tasks, run
from kvdistill.pipelines.extract import ExtractionWork, extract, extraction_work
from kvdistill.pipelines.run_folder import RunFolder
from kvdistill.pipelines.train import train
from kvdistill.slurm import client
from kvdistill.store.maintenance import verify_store
from kvdistill.store.reader import KVStore
from tests.faults.verdict import digest, outcomes
from tests.slurm.cluster import NODES, Cluster, Waiting, wait_for
from tests.slurm.experiment import CORPUS, load, write_experiment, write_models
from tests.slurm.test_run import assert_equal_stores, assert_tidy

pytestmark = pytest.mark.slurm

SECONDS = "TEST_SECONDS_A_SHARD"


class SlowWork(ExtractionWork):
    """Extraction that takes its time, so that events find it at work."""

    def run(self, unit: str, should_stop: Callable[[], bool]) -> int:
        end = time.monotonic() + float(os.environ[SECONDS])
        while time.monotonic() < end:
            if should_stop():
                raise Interrupted(unit)
            time.sleep(0.05)
        return super().run(unit, should_stop)


def slow_work(config: str, teacher: str) -> SlowWork:
    work = SlowWork.__new__(SlowWork)
    work.__dict__.update(extraction_work(config, teacher).__dict__)
    return work


class Events:
    """Random events upon running jobs, by a seed."""

    def __init__(self, cluster: Cluster, folder: Path, seed: int) -> None:
        self.cluster, self.folder, self.rng = cluster, folder, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.urgent = folder / "urgent.sh"
        self.urgent.write_text("#!/bin/sh\nsleep 1\n")
        self.urgent.chmod(0o755)

    def strike(self, jobs: list[str]) -> None:
        """One event, at one of the running jobs or elements."""
        kinds = {"requeue": 4, "kill": 4, "terminate": 3, "preempt": 1, "node down": 2}
        kind = self.rng.choices([*kinds], [*kinds.values()])[0]
        victim = self.rng.choice(sorted(jobs))
        if kind == "requeue":
            self.cluster.client("scontrol", "requeue", victim, check=False)
        elif kind == "kill":
            self.cluster.client("scancel", "--signal=KILL", victim, check=False)
        elif kind == "terminate":
            self.cluster.client("scancel", "--signal=TERM", "--full", victim, check=False)
        elif kind == "preempt":
            self.cluster.client(
                "sbatch", "--partition=high", "--cpus-per-task=3", "--mem=100",
                f"--output={self.folder}/urgent.log", str(self.urgent),
            )  # fmt: skip
        else:
            node = self.rng.choice(NODES)
            frozen = self.rng.random() < 0.5
            if frozen:  # its jobs run on, unseen, while Slurm starts them elsewhere
                self.cluster.freeze(node)
            update = ("scontrol", "update", f"nodename={node}")
            self.cluster.client(*update, "state=down", "reason=test", check=False)
            time.sleep(self.rng.uniform(0, 4))
            if frozen:
                self.cluster.thaw(node)
            self.cluster.client(*update, "state=resume", check=False)  # it may have come by itself
        self.counts[kind] += 1

    def repair(self) -> None:
        """What an administrator does: a node that met two copies of a job is drained."""
        rows = self.cluster.client("sinfo", "-h", "-N", "-p", "low", "-o", "%N %T", check=False)
        for node, state in (row.split() for row in rows.splitlines()):
            if "drain" in state or "down" in state:
                self.cluster.client(
                    "scontrol", "update", f"nodename={node}", "state=resume", check=False
                )

    @property
    def total(self) -> int:
        return sum(self.counts.values())


SMALL = pytest.param((16, 6, 0), id="16-6-0")
LARGE = [pytest.param((300, 50, i), id=f"300-50-{i}", marks=pytest.mark.slow) for i in range(1, 5)]


@pytest.mark.parametrize("size", [SMALL, *LARGE])
def test_random_events(
    login: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int, int]
) -> None:
    shards, events, seed = size
    write_models(tmp_path / "models")
    lines = [line for p in sorted(CORPUS.parent.glob("gsm8k_train*")) for line in p.open()]
    (tmp_path / "corpus.jsonl").write_text("".join(lines[: shards + 4]))
    changes = (
        f"training.max_steps={4 * events}",
        "training.save_steps=5",
        "extraction.summaries=true",
        f"corpus.path={tmp_path}/corpus.jsonl",
        "corpus.max_samples=null",
        "corpus.shard_chars=1",
    )
    calm = load(write_experiment(tmp_path / "calm", tmp_path / "models"), *changes)
    wild = load(write_experiment(tmp_path / "wild", tmp_path / "models", tasks=6), *changes)
    calm, wild = (one_teacher(each) for each in (calm, wild))
    assert extract(calm).complete
    assert len(KVStore.open(calm.store).shard_ids) == shards
    monkeypatch.setattr(extract_tasks, "TARGET", "tests.slurm.test_events:slow_work")
    monkeypatch.setenv(SECONDS, str(events / 50))
    happening = Events(login, tmp_path, seed)
    waiting = Waiting(login)

    extract_tasks.prepare_store(wild)
    until(
        happening, waiting, events * 3 // 4,
        submit=lambda: submit_array(wild),
        is_done=lambda: not KVStore.open(wild.store).missing("llama"),
    )  # fmt: skip
    store = KVStore.open(wild.store)
    assert verify_store(store) == []
    assert_equal_stores(store, KVStore.open(calm.store), "llama")
    assert_tidy(wild, "llama")

    until(
        happening, waiting, events,
        submit=lambda: [run.submit_training(wild, run.choose_profile(wild, None, "train"))],
        is_done=lambda: bool(RunFolder(wild.output_dir / wild.name).read_record().get("finished")),
    )  # fmt: skip
    assert outcomes({"calm": lambda: train(calm) and None})["calm"].how == "done"
    assert result(wild) == result(calm)
    assert happening.total > events * 0.6
    print(f"\n{happening.total} events over {shards} shards: {dict(happening.counts)}")


def one_teacher(experiment: Experiment) -> Experiment:
    return experiment.model_copy(update={"teachers": {"llama": experiment.teachers["llama"]}})


def submit_array(experiment: Experiment) -> list[str]:
    """Submit what is missing, as a person does; shards that were killed too often are retried."""
    ledger = extract_tasks.extraction_ledger(experiment, "llama")
    for unit in ledger.failed_units():
        ledger.clear_failures(unit)
    profile = run.choose_profile(experiment, None, "extract")
    return extract_tasks.submit_extraction(experiment, ["llama"], profile)["llama"][1]


def result(experiment: Experiment) -> str:
    folder = RunFolder(experiment.output_dir / experiment.name)
    record: dict[str, Any] = folder.read_record()
    return digest((record["metrics"], load_file(folder.student / "model.safetensors")))


def until(
    happening: Events,
    waiting: Waiting,
    events: int,
    *,
    submit: Callable[[], list[str]],
    is_done: Callable[[], bool],
) -> None:
    """Let jobs run to their end, with events as long as they are due; submit again what ended."""
    jobs: list[str] = []
    last = time.monotonic()

    def ended() -> bool:
        nonlocal jobs, last
        happening.repair()
        living = waiting.start(",".join(jobs)) if jobs else {}
        if not living:
            if is_done():
                return True
            jobs = submit()
            return False
        running = [job for job, row in client.queue(jobs).items() if row.state == "RUNNING"]
        if running and happening.total < events and time.monotonic() > last:
            happening.strike(running)
            last = time.monotonic() + happening.rng.uniform(0, 3)
        return False

    wait_for(f"{events} events, and all work done", ended, 120 + 15 * events)
