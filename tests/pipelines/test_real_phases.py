"""Stage 2 on real keys and values: SmolLM2, Gemma 3 and MiniLM over GSM8K."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvdistill import config_file
from kvdistill.config import Experiment
from kvdistill.corpus import read_jsonl
from kvdistill.distill.tokenizer import train_tokenizer
from kvdistill.pipelines.extract import extract
from kvdistill.pipelines.runs import RunFolder
from kvdistill.pipelines.train import train
from kvdistill.store.codecs import CODECS, part_name
from kvdistill.store.reader import KVStore
from kvdistill.store.shard import EncodedShard
from kvdistill.store.writer import add_teacher, publish_shard
from kvdistill.types import KINDS
from tests.slurm.experiment import CORPUS

pytestmark = [pytest.mark.real_model, pytest.mark.slow]

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
            "log_steps": 10, "figure_steps": 10, "device": "cpu",
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, real_models: Path) -> Path:
    folder = tmp_path_factory.mktemp("real")
    texts = (sample.text for sample in read_jsonl(CORPUS))
    train_tokenizer(texts, 1024).save_pretrained(str(folder / "tokenizer"))
    extract(config_file.parse(body(folder, real_models, folder)))
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
        return config_file.parse(whole)

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
    for name in ("loss_key", "loss_value", "loss_cross_entropy"):
        part = logged(report.folder, name)
        assert np.mean(part[-3:]) < np.mean(part[:3]), name


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


def test_a_router_that_learns_from_injection_leaves_a_useless_teacher(
    make: Any, store: Path, tmp_path: Path
) -> None:
    """Two decoders, one of which holds noise of the other's moments instead of what it read."""
    copy = tmp_path / "store"
    shutil.copytree(store / "store", copy)
    add_noise_teacher(KVStore.open(copy), "smollm2", "noise")
    smollm2 = make().teachers["smollm2"].model_dump(mode="json")
    routed = {
        "store": str(copy), "teachers": {"smollm2": smollm2, "noise": smollm2},
        "fusion__method": "mlp", "training__max_steps": 250, "fusion__warmup_steps": 50,
        "projection__learning_rate": 1e-2,
    }  # fmt: skip
    injected = {"losses__inject": 1.0, "projection__mode": "frozen"}
    by_task = train(make(name="inject", **routed, **injected))
    by_kv = train(make(name="kv", **routed))
    weights = {run: logged(r.folder, "weight_noise") for run, r in
               {"inject": by_task, "kv": by_kv}.items()}  # fmt: skip
    print("weight of the useless teacher", weights)
    assert weights["inject"][-1] < 0.05


def add_noise_teacher(store: KVStore, source: str, name: str) -> None:
    """A teacher of the same shapes whose KV is Gaussian with the source's channel moments."""
    manifest = store.teacher(source).model_copy(update={"name": name})
    add_teacher(store, manifest)
    statistics = store.statistics(source)
    generator = torch.Generator().manual_seed(0)
    for shard_id in store.shard_ids:
        shard = store.read_shard(source, shard_id)
        arrays = dict(shard.arrays)
        for kind in KINDS:
            codec = CODECS[getattr(manifest.codec, kind)]
            mean, std = (torch.from_numpy(x).float() for x in
                         (statistics[kind].mean, statistics[kind].std))  # fmt: skip
            encoded: dict[str, list[torch.Tensor]] = {}
            for length in np.diff(shard.tokens.sample_ptr):
                shape = (*mean.shape[:2], int(length), mean.shape[2])
                noise = torch.randn(shape, generator=generator) * std[:, :, None] + mean[:, :, None]
                for suffix, part in codec.encode(noise, kind).items():
                    encoded.setdefault(suffix, []).append(part)
            for suffix, parts in encoded.items():
                arrays[part_name(kind, suffix)] = torch.cat(parts, dim=2).numpy()
        publish_shard(store, name, shard_id, EncodedShard(shard.tokens, arrays), statistics)
