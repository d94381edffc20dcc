"""A study as a Slurm array: every run trained once, none submitted twice, a killed one goes on."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from kvdistill.pipelines.extract import extract
from kvdistill.slurm.worker import work
from kvdistill.studies.controls import check_records
from kvdistill.studies.design import load_study
from kvdistill.studies.runs import ablation_tasks, ablation_work
from tests.slurm.cluster import Cluster, run_until_idle
from tests.slurm.experiment import ROOT, load, write_experiment, write_models

ARMS = {
    "alone": {"teachers": [], "settings": {"losses.key": 0, "losses.value": 0}},
    "both": {},
}


def write_study(folder: Path) -> Path:
    write_models(folder / "models")
    config = write_experiment(folder, folder / "models")
    extract(load(config))
    body = {"name": "study", "experiment": "experiment.yaml", "seeds": [0, 1], "arms": ARMS}
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(body, sort_keys=False))
    return path


def ablate(path: Path, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "kvdistill.cli", "ablate", str(path), *options],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_worker_does_its_share_and_leaves_the_finished_alone(tmp_path: Path) -> None:
    design = load_study(write_study(tmp_path))
    first, second = ablation_tasks(design, design.runs, num_tasks=2)
    assert sorted(first.units + second.units) == sorted(run.name for run in design.runs)
    assert work(first).outcome == "complete"
    records = {run.name: run.folder.record.read_bytes() for run in design.runs if run.is_finished}
    assert set(records) == set(first.units)
    assert work(first).outcome == work(second).outcome == "complete"
    for run in design.runs:
        assert run.folder.record.read_bytes() == records.get(
            run.name, run.folder.record.read_bytes()
        )
    assert design.missing == []
    frozen = ablation_work(str(first.arguments["config"]))
    assert all(frozen.is_done(run.name) for run in design.runs)


@pytest.mark.slurm
def test_a_study_is_one_array(login: Cluster, tmp_path: Path) -> None:
    path = write_study(tmp_path)
    said = ablate(path, "--slurm")
    found = re.search(r"job (\d+): 4 runs in 3 tasks", said)
    assert found, said
    assert "nothing to submit" in ablate(path, "--slurm")
    run_until_idle(login, found[1], seconds=240)
    design = load_study(path)
    assert design.missing == []
    check_records(design)
    assert "4 of 4 runs are finished" in ablate(path)
