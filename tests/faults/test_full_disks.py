"""Disks that fill up at random sizes: one line that names the path, and nothing is lost.

As root the disk is a small tmpfs; otherwise a limit on the size of files fails the same writes.
The counts of the default run are small; ``-m slow`` fills 100 disks.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.numpy import load_file

from kvdistill.pipelines import extract as extraction
from kvdistill.pipelines.run_folder import RunFolder
from kvdistill.pipelines.train import train
from kvdistill.store.maintenance import verify_store
from kvdistill.store.reader import KVStore
from kvdistill.studies.design import load_study, write_record
from kvdistill.studies.report.page import write_report
from kvdistill.studies.runs import train_runs
from tests.faults.verdict import Outcome, faults_of, outcomes, rounds
from tests.pipelines.tiny import small_extraction, variant


class Disk:
    """A folder that holds ``size`` bytes while something runs on it, and any number after."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.is_mounted = os.geteuid() == 0 and not self._mount("size=1g")

    def _mount(self, options: str) -> int:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.folder)]
        return subprocess.run(command, check=False, capture_output=True).returncode

    def run(self, work: Callable[[], Any], size: int) -> Outcome:
        def limited() -> Any:
            if not self.is_mounted:
                most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
                resource.setrlimit(resource.RLIMIT_FSIZE, (size // 4, most))
            return work()

        if self.is_mounted:
            assert not self._mount(f"remount,size={size}")
        try:
            return outcomes({"work": limited})["work"]
        finally:
            if self.is_mounted:
                assert not self._mount("remount,size=1g")

    def used(self) -> int:
        return sum(p.stat().st_blocks * 512 for p in self.folder.rglob("*") if p.is_file())

    def clear(self) -> None:
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    made = Disk(tmp_path / "disk")
    yield made
    if made.is_mounted:
        subprocess.run(["umount", "--lazy", str(made.folder)], check=True)


def fill(disk: Disk, work: Callable[[], Any], count: int, seed: int) -> None:
    """Run ``work`` on disks of random sizes; after each, it runs to the undisturbed end."""
    wanted = outcomes({"work": work})["work"]
    assert wanted.how == "done", wanted
    whole, rng, faults, full = disk.used(), random.Random(seed), list[str](), 0
    for i in range(count):
        disk.clear()
        size = rng.randrange(4096, whole - whole // 8)
        found = disk.run(work, size)
        full += found.how == "refused"
        where = f"{i}: {size:,} of {whole:,} bytes"
        faults += faults_of({"full": found}, {"full": wanted}, where, path_length=200)
        if found.how == "refused" and str(disk.folder) not in found.said:
            faults.append(f"{where}: names no path: {found.said}")
        again = outcomes({"again": work})
        faults += faults_of(again, {"again": wanted}, where, path_length=0)
        if again["again"].how == "refused":
            faults.append(f"{where}: lost: {again['again'].said}")
    print(f"\n{count} disks, {full} of them too small")
    assert not faults
    assert full > count // 2


@pytest.mark.parametrize(("count", "seed"), rounds(1, many=40, pieces=2))
def test_full_disks_while_extracting(
    extracted: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch, count: int, seed: int
) -> None:
    experiment = small_extraction(extracted, disk.folder, disk.folder / "store")
    teacher = extraction.load_teacher("llama", experiment, None)
    monkeypatch.setattr(extraction, "load_teacher", lambda *_: teacher)

    def work() -> Any:
        assert extraction.extract(experiment).complete
        store = KVStore.open(experiment.store)
        assert not verify_store(store)
        return [store.read_shard("llama", i) for i in store.shard_ids], store.statistics("llama")

    fill(disk, work, count, seed)


def result(folder: RunFolder) -> Any:
    record = folder.read_record()
    return record["metrics"], record["steps"], load_file(folder.student / "model.safetensors")


@pytest.mark.parametrize(("count", "seed"), rounds(0, many=36, pieces=2))
def test_full_disks_while_training(extracted: Path, disk: Disk, count: int, seed: int) -> None:
    experiment = variant(extracted, disk.folder, training__save_steps=2)

    def work() -> Any:
        return result(RunFolder(train(experiment).folder))

    fill(disk, work, count, seed)


@pytest.mark.slow
def test_full_disks_while_ablating(extracted: Path, disk: Disk, tmp_path: Path) -> None:
    experiment = yaml.safe_load(extracted.read_text()) | {"output_dir": str(disk.folder)}
    arms = {"a": {}, "text": {"settings": {"losses.key": 0, "losses.value": 0}}}
    study = tmp_path / "study.yaml"
    body = {"name": "study", "experiment": experiment, "seeds": [0], "arms": arms}
    study.write_text(yaml.safe_dump(body))

    def work() -> Any:
        design = load_study(study)
        write_record(design)
        train_runs(design, design.missing, workers=1, log=lambda _: None)
        return [result(run.folder) for run in design.runs]

    fill(disk, work, 10, 0)


@pytest.mark.parametrize(("count", "seed"), rounds(0, many=14))
def test_full_disks_while_reporting(
    extracted: Path, tmp_path: Path, disk: Disk, count: int, seed: int
) -> None:
    experiment = variant(extracted, tmp_path / "runs")
    assert outcomes({"train": lambda: train(experiment)})["train"].how == "done"

    def work() -> Any:
        folder = experiment.output_dir / experiment.name
        return [p.read_text() for p in write_report([folder], disk.folder / "report.html")[0]]

    fill(disk, work, count, seed)
