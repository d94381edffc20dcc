"""Extraction and training killed at any moment: nothing lost, nothing different, nothing left.

The counts of the default run are small; ``-m slow`` kills 1,000 times.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from kvdistill.config.experiment import Experiment
from kvdistill.pipelines import extract as extraction
from kvdistill.pipelines.cluster import overview
from kvdistill.pipelines.run_folder import RunFolder
from kvdistill.pipelines.train import train
from kvdistill.store.maintenance import verify_store
from kvdistill.store.prototypes import teacher_prototypes
from kvdistill.store.reader import KVStore
from kvdistill.studies.report.reading import read_run
from tests.faults.kill import Killer
from tests.faults.verdict import digest, outcomes, rounds
from tests.pipelines.tiny import small_extraction, variant


def content(store: KVStore, shard_id: str) -> str:
    return digest((store.read_shard("llama", shard_id), store.shard_statistics("llama", shard_id)))


def whole(root: Path, experiment: Experiment) -> Any:
    store = KVStore.open(root)
    prototypes = teacher_prototypes(store, "llama", experiment.extraction.prototypes)
    return [content(store, i) for i in store.shard_ids], store.statistics("llama"), prototypes


@pytest.mark.parametrize(("kills", "seed"), rounds(4, many=800, pieces=16))
def test_killed_extractions(
    extracted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kills: int, seed: int
) -> None:
    root = tmp_path / "store"
    experiment = small_extraction(extracted, tmp_path, root)
    teacher = extraction.load_teacher("llama", experiment, None)  # once, for all children
    monkeypatch.setattr(extraction, "load_teacher", lambda *_: teacher)
    killer = Killer(root, seed, lambda: extraction.extract(experiment))
    expected = KVStore.open(root)
    wanted = {i: content(expected, i) for i in expected.shard_ids}
    at_the_end = outcomes({"all": lambda: whole(root, experiment)})["all"]
    assert at_the_end.how == "done", at_the_end

    def check(before: frozenset[str]) -> None:
        if not root.exists():
            return
        store = KVStore.open(root)
        new = store.committed("llama") - before
        assert not verify_store(store, shard_ids=new)
        assert {i: content(store, i) for i in new} == {i: wanted[i] for i in new}
        overview(root)

    def complete() -> Any:
        assert extraction.extract(experiment).complete
        store = KVStore.open(root)
        assert not verify_store(store)
        assert not [*store.paths.temporary("llama").glob("*"), *root.glob("tmp/*")]
        return whole(root, experiment)

    shutil.rmtree(root)
    done, stores = 0, 0
    while done < kills:
        before = KVStore.open(root).committed("llama") if root.exists() else frozenset[str]()
        killed = killer.kill(lambda: extraction.extract(experiment), share=0.2)
        done += killed
        found = outcomes({"check": lambda before=before: check(before)})["check"]
        assert found.how == "done", f"after {done} kills: {found.said}"
        if not killed or done == kills:
            found = outcomes({"all": complete})["all"]
            assert found == at_the_end, f"after {done} kills: {found.said}"
            shutil.rmtree(root)
            stores += 1
    print(f"\n{done} kills of extraction, {stores} stores completed")


@pytest.mark.parametrize(("kills", "seed"), rounds(1, many=200, pieces=4))
def test_killed_trainings(extracted: Path, tmp_path: Path, kills: int, seed: int) -> None:
    settings: dict[str, Any] = {"training__save_steps": 1, "training__log_steps": 1}
    experiment = variant(extracted, tmp_path / "runs", **settings)
    folder = RunFolder(tmp_path / "runs" / experiment.name)

    def result() -> Any:
        metrics = train(experiment).metrics
        curve = read_run(folder.path).curve("loss")
        return metrics, curve, load_file(folder.student / "model.safetensors")

    def check() -> None:
        folder.read_record()
        folder.checkpoint()

    killer = Killer(folder.path, seed, lambda: train(experiment))
    wanted = outcomes({"result": result})["result"]  # of the finished run: nothing is trained
    assert wanted.how == "done"
    shutil.rmtree(folder.path)
    done, runs = 0, 0
    while done < kills:
        killed = killer.kill(lambda: train(experiment))
        done += killed
        found = outcomes({"check": check})["check"]
        assert found.how == "done", f"after {done} kills: {found.said}"
        if not killed or done == kills:
            found = outcomes({"result": result})["result"]
            assert found == wanted, f"after {done} kills: {found.said}"
            shutil.rmtree(folder.path)
            runs += 1
    print(f"\n{done} kills of training, {runs} runs finished")
