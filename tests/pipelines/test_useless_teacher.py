"""A router that is trained by injection finds out which of two stored teachers knows nothing.

The teachers are the keys and values of SmolLM2's first layers and noise of the same moments, both
*stored*, so that noise is the same at every pass and could serve as a text's name. The corpus is
made so that what follows cannot be told without the prompt, and the student gets the prompt from
the teachers alone (``inject_style: replace``): on free text a student this small does not use its
prompt within minutes, and the router then has no signal (docs/lab-notebook.md).
"""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvdistill.config.experiment import Experiment
from kvdistill.config.load import parse_experiment
from kvdistill.corpus.readers import read_files
from kvdistill.distill.student.build import train_tokenizer
from kvdistill.pipelines.extract import extract
from kvdistill.pipelines.run_folder import RunFolder
from kvdistill.pipelines.train import train
from kvdistill.store.reader import KVStore
from tests.pipelines.noise import add_noise_teacher

pytestmark = pytest.mark.real_model

NAMES = ("Ann", "Ben", "Carla", "David", "Emma", "Frank", "Grace", "Henry", "Ivy", "Jack")
THINGS = ("apples", "pears", "books", "coins", "cards", "shells", "stamps", "marbles", "pens")
NUM_TEXTS, WARMUP, STEPS = 1000, 150, 250


def write_corpus(path: Path) -> None:
    every = list(itertools.product(NAMES, range(10, 100), THINGS))
    with path.open("w", encoding="utf-8") as lines:
        for name, number, thing in random.Random(0).sample(every, NUM_TEXTS):
            fact = f"{name} has {number} {thing}."
            row = {
                "prompt": f"{fact} How many {thing} does {name} have?",
                "rationale": f" {fact}",
                "answer": f" {number}",
            }
            lines.write(json.dumps(row) + "\n")


def experiment(folder: Path, name: str, **changes: Any) -> Experiment:
    teacher = {"model": str(folder / "teacher"), "layers": [1, 3, 5, 7]}
    body: dict[str, Any] = {
        "name": name,
        "store": str(folder / "store"),
        "output_dir": str(folder / "runs"),
        "corpus": {"path": str(folder / "corpus.jsonl"), "shard_chars": 12_000},
        "teachers": {"smollm2": teacher, "noise": teacher},
        "extraction": {"device": "cpu", "importance": False},
        "student": {
            "tokenizer": str(folder / "tokenizer"),
            "architecture": {
                "model_type": "llama", "hidden_size": 96, "intermediate_size": 192,
                "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2,
                "head_dim": 16,
            },
        },
        "fusion": {"method": "mlp", "warmup_steps": WARMUP},
        "training": {
            "max_steps": STEPS, "batch_size": 16, "max_length": 64, "learning_rate": 3e-3,
            "schedule": "constant_with_warmup", "log_steps": 10, "diagnostic_steps": 10,
            "device": "cpu",
        },
    }  # fmt: skip
    return parse_experiment({**body, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, real_models: Path) -> Path:
    folder = tmp_path_factory.mktemp("useless")
    source = real_models / "smollm2"
    shallow = AutoModelForCausalLM.from_pretrained(source, num_hidden_layers=8)
    shallow.save_pretrained(folder / "teacher")
    AutoTokenizer.from_pretrained(source).save_pretrained(folder / "teacher")
    write_corpus(folder / "corpus.jsonl")
    texts = (sample.text for sample in read_files(folder / "corpus.jsonl"))
    train_tokenizer(texts, 400).save_pretrained(str(folder / "tokenizer"))
    whole = experiment(folder, "extract")
    extract(whole, ["smollm2"])
    add_noise_teacher(KVStore.open(whole.store), "smollm2", "noise")
    return folder


def weights_of_noise(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in RunFolder(folder).log.read_text().splitlines()]
    return [row["weight_noise"] for row in rows if "weight_noise" in row]


@pytest.mark.parametrize("seed", [0, 1])
def test_injection_votes_a_stored_noise_teacher_out(folder: Path, seed: int) -> None:
    report = train(
        experiment(
            folder,
            f"inject-{seed}",
            seed=seed,
            projection={"mode": "frozen"},
            losses={"key": 0, "value": 0, "inject": 1.0, "inject_style": "replace"},
        )
    )
    weights = weights_of_noise(report.folder)
    assert weights[5] == pytest.approx(0.5, abs=0.01)  # while the router warms up
    assert max(weights[-3:]) < 0.05


def test_the_error_of_keys_and_values_alone_leaves_noise_at_once(folder: Path) -> None:
    """Noise cannot be imitated; this says nothing of a teacher that is easy and useless."""
    report = train(experiment(folder, "imitate"))
    assert weights_of_noise(report.folder)[-1] < 0.05
