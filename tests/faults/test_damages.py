"""Every file of a store, a run and a checkpoint, damaged: found, made again, or without effect.

Never other numbers without a word, never a traceback, never a hang. The counts of the default
run are small; ``-m slow`` damages 2,000 files.
"""

from __future__ import annotations

import csv
import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import dask
import pytest
from safetensors.numpy import load_file

from kvdistill.config.experiment import Experiment
from kvdistill.corpus.readers import load_corpus
from kvdistill.corpus.samples import Shard
from kvdistill.errors import ShardCorrupt
from kvdistill.pipelines.cluster import overview
from kvdistill.pipelines.evaluate import evaluate_folder
from kvdistill.pipelines.inspect import inspect_teacher
from kvdistill.pipelines.run_folder import RunFolder, begin
from kvdistill.pipelines.train import build_trainer, train
from kvdistill.slurm.ledger import Ledger
from kvdistill.store.maintenance import convert_store, merge_stores, verify_store
from kvdistill.store.prototypes import teacher_prototypes
from kvdistill.store.reader import KVStore
from kvdistill.store.writer import add_teacher, create, publish_shard
from kvdistill.studies.report.page import write_report
from kvdistill.studies.report.reading import read_run
from tests.faults.damage import round_of_damages
from tests.faults.verdict import Commands, Outcome, outcomes, rounds
from tests.pipelines.test_train import StopAt
from tests.pipelines.tiny import variant

TEACHERS = ("full", "other", "tiny")


@pytest.fixture(scope="module")
def whole_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two teachers in two backends with everything that a shard may hold, and derived files."""
    from tests.store.made import LENGTHS, make_shard, make_store, make_teacher

    features = {"has_importance": True, "has_hidden_at_cue": True, "has_summaries": True}
    int4 = {"key": "int4", "value": "int4"}
    store, _ = make_store(tmp_path_factory.mktemp("whole") / "store", make_teacher(codec=int4))
    other = make_teacher(name="other", backend="safetensors", own_text=True, **features)
    full = make_teacher(name="full", **features)
    for seed, teacher in enumerate([other, full], start=2):
        add_teacher(store, teacher)
        for shard_id in store.shard_ids:
            ids = [sample.sample_id for sample in store.samples(shard_id)]
            made = make_shard(teacher, ids, LENGTHS, seed)
            assert publish_shard(store, teacher.name, shard_id, made.shard, made.statistics)
    import dask.array  # noqa: F401  once, for all children

    outcomes(store_commands(store.paths.root))  # writes the derived files
    Ledger(store.paths.teacher("full")).claim("00000", "nobody")
    return store.paths.root


def shards_of(store: KVStore) -> Any:
    return [
        (store.samples(i), [store.read_shard(name, i) for name in TEACHERS])
        for i in store.shard_ids
    ]


def store_commands(root: Path) -> Commands:
    def read() -> Any:
        return shards_of(KVStore.open(root))

    def parts() -> Any:
        store = KVStore.open(root)
        chosen = [(name, i) for name in TEACHERS for i in store.shard_ids]
        return [store.read_shard(*one, store.teacher(one[0]).layers[-1:], [1]) for one in chosen]

    def derived() -> Any:
        store = KVStore.open(root)
        return [store.statistics(name) for name in TEACHERS]

    def prototypes() -> Any:
        return [teacher_prototypes(KVStore.open(root), name, 2) for name in ("full", "other")]

    def verify() -> None:
        for finding in verify_store(KVStore.open(root)):
            raise ShardCorrupt(finding.problem)

    def status() -> Any:
        return [teacher.teacher for teacher in overview(root).teachers]

    return {"verify": verify, "read": read, "parts": parts, "statistics": derived,
            "prototypes": prototypes, "status": status}  # fmt: skip


def unreported(found: dict[str, Outcome]) -> str:
    """What a reader refuses, verification must report."""
    refused = {name for name, outcome in found.items() if outcome.how == "refused"}
    return "verify found nothing" if refused and "verify" not in refused else ""


@pytest.mark.parametrize(("count", "seed"), rounds(8, many=1300, pieces=13))
def test_damages_of_a_store(whole_store: Path, tmp_path: Path, count: int, seed: int) -> None:
    work = tmp_path / "store"
    commands = store_commands(work)
    assert not round_of_damages(
        whole_store, work, commands, count=count, seed=seed, also=unreported
    )


@pytest.mark.parametrize(("count", "seed"), rounds(1, many=200, pieces=2))
def test_damages_of_a_store_that_is_inspected_or_copied(
    whole_store: Path, tmp_path: Path, count: int, seed: int
) -> None:
    work = tmp_path / "store"
    pristine = KVStore.open(whole_store)
    plan = [
        Shard(p.shard_id, p.first_sample, pristine.samples(p.shard_id))
        for p in pristine.manifest.shards
    ]

    def merge() -> Any:
        with TemporaryDirectory() as scratch:
            target = create(Path(scratch) / "target", plan)
            merge_stores(target, [KVStore.open(work)])
            return shards_of(target)

    def convert() -> Any:
        with TemporaryDirectory() as scratch:
            return shards_of(convert_store(KVStore.open(work), f"{scratch}/target", "safetensors"))

    def inspect() -> Any:
        # In a fork: Dask's pool of threads does not live there if the parent has used it.
        with dask.config.set(scheduler="synchronous"):
            return [inspect_teacher(KVStore.open(work), name, 1, None) for name in TEACHERS]

    commands = {"inspect": inspect, "merge": merge, "convert": convert}
    assert not round_of_damages(whole_store, work, commands, count=count, seed=seed)


SETTINGS = {"training__save_steps": 2, "training__keep_checkpoints": 3, "training__log_steps": 1}


def without_measurements(path: Path) -> Any:
    """A report's file without times and sizes: a run without its record is taken again."""
    if path.suffix == ".csv":
        rows = csv.DictReader(path.read_text().splitlines())
        return [{key: row[key] for key in row.keys() - {"seconds"}} for row in rows]
    text = re.sub(r"Cost of one run.*?\n(?=\*\*|#)", "", path.read_text(), flags=re.DOTALL)
    return re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", "", text)


def run_commands(experiment: Experiment, *, finished: bool) -> Commands:
    """What resumes a run, or what reads a finished one."""
    folder = RunFolder(experiment.output_dir / experiment.name)

    def resume() -> Any:
        metrics = train(experiment).metrics
        return (
            metrics,
            read_run(folder.path).curve("loss"),
            load_file(folder.student / "model.safetensors"),
        )

    def report() -> Any:
        with TemporaryDirectory() as scratch:
            files, _ = write_report([folder.path], Path(scratch) / "report.html")
            return [without_measurements(path) for path in files if path.suffix != ".html"]

    def evaluate() -> Any:
        limits: dict[str, int] = {"max_samples": 2, "max_length": 64, "batch_size": 2}
        return evaluate_folder(folder.student, experiment.corpus.path, **limits).metrics

    again = {"again": lambda: train(experiment).metrics, "report": report, "evaluate": evaluate}
    return again if finished else {"resume": resume}


@pytest.fixture(scope="module")
def runs(extracted: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An experiment, and folders of its run: killed after the fifth of six steps, and finished."""
    work = tmp_path_factory.mktemp("runs")
    experiment = variant(extracted, work / "here", **SETTINGS)
    folder = work / "here" / experiment.name

    def begin_and_stop() -> None:
        store, splits = KVStore.open(experiment.store), load_corpus(experiment.corpus)
        trainer = build_trainer(experiment, store, splits, begin(experiment))
        trainer.add_callback(StopAt(5))
        trainer.train()

    for name, command in {"killed": begin_and_stop, "finished": lambda: train(experiment)}.items():
        assert outcomes({name: command})[name].how == "done"
        shutil.copytree(folder, work / name)
    shutil.rmtree(folder)
    return {"experiment": experiment, "work": folder, "pristine": work}


@pytest.mark.parametrize(("count", "seed"), rounds(1, many=300, pieces=3))
def test_damages_of_a_run_that_is_resumed(runs: dict[str, Any], count: int, seed: int) -> None:
    resume = run_commands(runs["experiment"], finished=False)
    assert not round_of_damages(
        runs["pristine"] / "killed", runs["work"], resume, count=count, seed=seed
    )


@pytest.mark.parametrize(("count", "seed"), rounds(1, many=200, pieces=2))
def test_damages_of_a_finished_run(runs: dict[str, Any], count: int, seed: int) -> None:
    commands = run_commands(runs["experiment"], finished=True)
    assert not round_of_damages(
        runs["pristine"] / "finished", runs["work"], commands, count=count, seed=seed,
        only=lambda name: not name.startswith("checkpoint"),
    )  # fmt: skip
