"""A small real experiment: GSM8K texts, two random teachers that differ, a tiny student.

``held_work`` is extraction whose shards wait while a file says so, which makes "while it runs"
a fact rather than a matter of timing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from kvdistill.config.experiment import Experiment
from kvdistill.config.load import load_experiment
from kvdistill.corpus.readers import read_files
from kvdistill.errors import Interrupted
from kvdistill.pipelines.extract import ExtractionWork, extraction_work

ROOT = Path(__file__).parents[2]
CORPUS = ROOT / "examples/data/gsm8k_train.jsonl"
HELD_TARGET = "tests.slurm.experiment:held_work"
PROFILE = {
    "partition": "low",
    "cpus_per_task": 1,
    "memory_gb": 1,
    "time_min": 10,
    "signal_delay_s": 20,
    "array_parallelism": 4,
    "tasks": 3,
    "setup": ["export OMP_NUM_THREADS=1"],
}


def write_models(folder: Path) -> None:
    """Two random teachers with tokenizers of their own, which the student shares one of."""
    import torch
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

    from kvdistill.distill.student.build import train_tokenizer

    texts = [sample.text for sample in read_files(CORPUS, limit=40)]
    torch.manual_seed(0)
    llama = LlamaConfig(
        vocab_size=500, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    bert = BertConfig(
        vocab_size=400, hidden_size=24, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=3, max_position_embeddings=1024,
    )  # fmt: skip
    made: list[tuple[str, Any, int]] = [
        ("llama", LlamaForCausalLM(llama), 500),
        ("bert", BertModel(bert), 400),
    ]
    for name, model, vocab_size in made:
        model.save_pretrained(folder / name)
        train_tokenizer(texts, vocab_size).save_pretrained(str(folder / name))


def write_experiment(folder: Path, models: Path, **profile: Any) -> Path:
    """An experiment file under ``folder``; ``profile`` changes the one profile ``site``."""
    body = {
        "name": "tiny",
        "store": str(folder / "store"),
        "output_dir": str(folder / "runs"),
        "corpus": {"path": str(CORPUS), "max_samples": 48, "shard_chars": 2500, "eval_samples": 4},
        "teachers": {name: {"model": str(models / name)} for name in ("llama", "bert")},
        "extraction": {"device": "cpu", "batch_tokens": 512},
        "student": {
            "tokenizer": str(models / "llama"),
            "architecture": {
                "model_type": "llama",
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
            },
        },
        "training": {
            "max_steps": 6,
            "batch_size": 2,
            "max_length": 64,
            "save_steps": 2,
            "device": "cpu",
        },
        "slurm": {"profiles": {"site": {**PROFILE, **profile}}},
    }
    path = folder / "experiment.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(body, sort_keys=False))
    return path


def load(path: Path, *overrides: str) -> Experiment:
    return load_experiment(path, overrides)


class HeldWork(ExtractionWork):
    """Extraction that waits before a shard while ``STORE/../hold/<teacher>`` names it."""

    hold: Path

    def run(self, unit: str, should_stop: Callable[[], bool]) -> int:
        while is_held(self.hold, unit):
            if should_stop():
                raise Interrupted(unit)
            time.sleep(0.05)
        return super().run(unit, should_stop)


def is_held(hold: Path, unit: str) -> bool:
    return hold.exists() and unit in hold.read_text().split()


def held_work(config: str, teacher: str) -> HeldWork:
    plain = extraction_work(config, teacher)
    work = HeldWork.__new__(HeldWork)
    work.__dict__.update(plain.__dict__)
    work.hold = hold_file(load_experiment(Path(config)), teacher)
    return work


def hold_file(experiment: Experiment, teacher: str) -> Path:
    """Names the shards of a teacher that must wait; remove it, or shards from it, to let go."""
    return experiment.store.parent / f"hold.{teacher}"
