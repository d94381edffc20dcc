"""Stage 2 on real keys and values: SmolLM2, Gemma 3 and MiniLM over GSM8K."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvdistill.config.experiment import Experiment
from kvdistill.config.load import parse_experiment
from kvdistill.corpus.readers import read_files
from kvdistill.distill.student.build import train_tokenizer
from kvdistill.pipelines.extract import extract
from kvdistill.pipelines.run_folder import RunFolder
from kvdistill.pipelines.train import train
from tests.slurm.experiment import CORPUS

pytestmark = pytest.mark.real_model

TEACHERS = ("smollm2", "gemma3", "minilm")
SAMPLES = 40


def body(folder: Path, models: Path, output: Path) -> dict[str, Any]:
    return {
        "store": str(folder / "store"),
        "output_dir": str(output),
        "corpus": {"path": str(CORPUS), "max_samples": SAMPLES, "shard_chars": 6000},
        "teachers": {name: {"model": str(models / name)} for name in TEACHERS},
        "extraction": {"device": "cpu", "summaries": True, "batch_tokens": 2048},
        "student": {
            "tokenizer": str(folder / "tokenizer"),
            "architecture": {
                "model_type": "llama", "hidden_size": 96, "intermediate_size": 192,
                "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2,
                "head_dim": 16,
            },
        },
        "training": {
            "max_steps": 100, "batch_size": 4, "max_length": 160, "learning_rate": 2e-3,
            "log_steps": 10, "diagnostic_steps": 10, "device": "cpu",
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, real_models: Path) -> Path:
    folder = tmp_path_factory.mktemp("real")
    texts = (sample.text for sample in read_files(CORPUS))
    train_tokenizer(texts, 1024).save_pretrained(str(folder / "tokenizer"))
    extract(parse_experiment(body(folder, real_models, folder)))
    return folder


@pytest.fixture
def make(store: Path, tmp_path: Path, real_models: Path) -> Any:
    def variant(**changes: Any) -> Experiment:
        whole = body(store, real_models, tmp_path)
        for dotted, value in changes.items():
            *parents, last = dotted.split("__")
            place = whole
            for parent in parents:
                place = place.setdefault(parent, {})
            place[last] = value
        return parse_experiment(whole)

    return variant


def logged(folder: Path, key: str) -> list[float]:
    rows = [json.loads(line) for line in RunFolder(folder).log.read_text().splitlines()]
    return [row[key] for row in rows if key in row]


PHASES = {
    "phase-1": {"teachers": ("smollm2", "minilm")},
    "phase-2": {},
    "phase-3": {},
    "phase-4": {},
    "phase-5": {},
}


@pytest.mark.parametrize("phase", PHASES)
def test_each_phase_trains_on_real_keys_and_values(make: Any, phase: str) -> None:
    experiment = make(preset=phase)
    chosen = PHASES[phase].get("teachers", TEACHERS)
    teachers = {name: experiment.teachers[name].model_dump(mode="json") for name in chosen}
    report = train(make(preset=phase, teachers=teachers))
    total = logged(report.folder, "loss")
    assert len(total) == 10
    assert np.isfinite(total).all()
    assert np.mean(total[-3:]) < np.mean(total[:3])
    text = logged(report.folder, "loss_cross_entropy")
    assert np.mean(text[-3:]) < np.mean(text[:3])
    # not the errors of keys and values: phase 5 trains its targets, whose variance grows
    explained = logged(report.folder, "explained_variance")
    assert np.mean(explained[-3:]) > np.mean(explained[:3]) + 0.05


def test_a_joint_projector_is_caught_absorbing_and_the_default_is_not(
    make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    steps = {"training__max_steps": 200, "losses__cosine": 0.0}
    with caplog.at_level(logging.WARNING, "kvdistill"):
        joint = train(make(name="joint", projection__mode="joint", **steps))
        warned = [record for record in caplog.records if "absorbing" in record.getMessage()]
        caplog.clear()
        default = train(make(name="default", **steps))
        quiet = not any("absorbing" in record.getMessage() for record in caplog.records)
    assert warned, logged(joint.folder, "target_variance")
    assert quiet
    explained = logged(default.folder, "explained_variance")
    assert explained[-1] > explained[0] + 0.05
