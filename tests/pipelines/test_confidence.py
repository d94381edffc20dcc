"""From a store with confidence to the weights of a batch, and what `plan` and `inspect` show."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from kvdistill.commands.prepare import plan_command
from kvdistill.commands.store import inspect_command
from kvdistill.config.load import load_experiment
from kvdistill.corpus.readers import load_corpus
from kvdistill.errors import ConfigError, StoreMismatch
from kvdistill.pipelines.extract import extract
from kvdistill.pipelines.plan import estimate_extraction
from kvdistill.pipelines.train import train
from kvdistill.store.confidence import nats_per_character
from kvdistill.store.reader import KVStore
from tests.pipelines.test_parts import CODE, ROWS, assembled
from tests.pipelines.tiny import variant
from tests.slurm.experiment import write_experiment, write_models

FUSION = {"method": "confidence", "temperature": 0.02}


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``llama`` and its ``twin`` read everything with confidence, and so does ``bert`` without."""
    folder = tmp_path_factory.mktemp("confidence")
    write_models(folder / "models")
    shutil.copytree(folder / "models/llama", folder / "models/twin")
    path = write_experiment(folder, folder / "models")
    (folder / "math.jsonl").write_text("\n".join(ROWS[:8]) + "\n", encoding="utf-8")
    (folder / "code.jsonl").write_text("\n".join(map(json.dumps, CODE[:6])), encoding="utf-8")
    parts = {name: {"path": str(folder / f"{name}.jsonl")} for name in ("math", "code")}
    models = {name: {"model": str(folder / "models" / name)} for name in ("llama", "twin", "bert")}
    experiment = variant(
        path, folder / "runs", corpus={"parts": parts, "shard_chars": 2500}, teachers=models,
        extraction__confidence=True, extraction__logits=2,
    )  # fmt: skip
    path.write_text(json.dumps(experiment.model_dump(mode="json", exclude_defaults=True)))
    assert extract(experiment).complete
    return path


def by_hand(store: KVStore, teacher: str) -> dict[str, tuple[float, int]]:
    """Nats and characters of every sample, whose tokens cover every character once."""
    found = {}
    for shard_id in store.shard_ids:
        shard, samples = store.read_shard(teacher, shard_id), store.samples(shard_id)
        for i, sample in enumerate(samples):
            span = shard.tokens.span(i)
            first = int(shard.tokens.char_end[span][0])
            nats = float(shard.arrays["nll"][span][1:].astype(np.float64).sum())
            found[sample.sample_id] = nats, len(sample.text) - first
    return found


def test_inspect_shows_nats_per_character(extracted: Path) -> None:
    experiment = load_experiment(extracted)
    store = KVStore.open(experiment.store)
    tasks = {s.sample_id: s.task for s in load_corpus(experiment.corpus).train}
    hand = by_hand(store, "llama")
    wanted = {"all texts": np.sum(list(hand.values()), axis=0)}
    for task in ("math", "code"):
        wanted[task] = np.sum([hand[i] for i in hand if tasks[i] == task], axis=0)
    runner = CliRunner()
    report = json.loads(runner.invoke(inspect_command, [str(experiment.store), "--json"]).output)
    shown = {teacher["teacher"]: teacher["nats_per_character"] for teacher in report["teachers"]}
    assert shown["bert"] == {}
    assert shown["llama"] == shown["twin"]
    assert shown["llama"] == pytest.approx({k: nats / chars for k, (nats, chars) in wanted.items()})
    table = runner.invoke(inspect_command, [str(experiment.store)]).output
    assert f"{shown['llama']['code']:.3f}" in table


@pytest.mark.slow
def test_the_plan_shows_them_and_counts_what_predictions_take(
    extracted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = json.loads(extracted.read_text(encoding="utf-8"))
    settings = {"backend": "safetensors", "device": "cpu"}
    plain, whole = (
        variant(
            extracted, tmp_path, store=str(tmp_path / "store"), extraction=settings | more,
            teachers={"llama": body["teachers"]["llama"]}, corpus__shard_chars=10**6,
        )
        for more in ({}, {"confidence": True, "logits": 30})
    )  # fmt: skip
    estimate = estimate_extraction(whole, 14, 14)
    (without,), (with_it,) = estimate_extraction(plain, 14, 14).teachers, estimate.teachers
    difference = (with_it.gigabytes["int8"] - without.gigabytes["int8"]) * 1e9
    assert difference == pytest.approx(with_it.tokens * (4 + 6 * 30 + 2), rel=0.05)
    rates = nats_per_character(KVStore.open(load_experiment(extracted).store), "llama")
    assert with_it.nats_per_character == pytest.approx(rates, rel=1e-3)
    monkeypatch.setattr("kvdistill.pipelines.plan.estimate_extraction", lambda *_, **__: estimate)
    shown = CliRunner().invoke(plan_command, [str(extracted)]).output
    assert f"nats per character, of the pilot: all texts {rates['all texts']:.3f}, " in shown
    extract(whole)
    store = KVStore.open(whole.store)
    files = store.paths.shard("llama", store.shard_ids[0]).rglob("*")
    size = sum(file.stat().st_size for file in files if file.is_file())
    assert with_it.gigabytes["int8"] == pytest.approx(size / 1e9, rel=0.05)


@pytest.mark.parametrize("granularity", ["sample", "segment", "token"])
def test_weights_follow_the_stored_likelihoods(
    granularity: str, extracted: Path, tmp_path: Path
) -> None:
    fusion = FUSION | {"granularity": granularity, "encoder_share": 0.25}
    run = assembled(variant(extracted, tmp_path, fusion=fusion))
    for batch in run.stream:
        mixture = run.distiller.weigh(batch, None)
        alpha = mixture.alpha()
        torch.testing.assert_close(alpha.sum(0), mixture.serves_NBLT.any(0).float())
        llama, twin, bert = (
            alpha[run.distiller.weigh.names.index(n)] for n in ("llama", "twin", "bert")
        )
        assert torch.equal(llama, twin)
        everyone = mixture.serves_NBLT.all(0)
        torch.testing.assert_close(bert[everyone], torch.full_like(bert[everyone], 0.25))
    assert run.distiller(batch)["loss"].isfinite()


def test_a_text_goes_to_who_finds_it_likeliest(extracted: Path, tmp_path: Path) -> None:
    body = json.loads(extracted.read_text(encoding="utf-8"))["teachers"]
    models = {name: body[name] for name in ("llama", "twin")}
    run = assembled(variant(extracted, tmp_path, teachers=models, fusion=FUSION))
    store = KVStore.open(load_experiment(extracted).store)
    hand = {i: nats / chars for i, (nats, chars) in by_hand(store, "llama").items()}
    batch = next(iter(run.stream))
    nats = batch["teachers"]["llama"]["nats"]
    wanted = [[hand[sample_id]] for sample_id in batch["sample_ids"]]
    torch.testing.assert_close(nats, torch.tensor(wanted))
    batch["teachers"]["twin"]["nats"] = nats + 0.02
    alpha = run.distiller.weigh(batch, None).alpha()[:, :, 0]
    served = alpha.sum(0) > 0
    ratio = alpha[0][served] / alpha[1][served]
    torch.testing.assert_close(ratio, torch.full_like(ratio, np.e), rtol=1e-4, atol=0)


def test_a_store_without_confidence_is_refused(extracted: Path, tmp_path: Path) -> None:
    plain = variant(
        extracted, tmp_path, store=str(tmp_path / "plain"), extraction={"device": "cpu"}
    )
    extract(plain)
    wanted: dict[str, Any] = {"extraction": {"confidence": True}, "fusion": FUSION}
    with pytest.raises(StoreMismatch, match="confidence: stored False, requested True"):
        train(variant(extracted, tmp_path, store=str(plain.store), **wanted))
    with pytest.raises(ConfigError, match=r"set extraction\.confidence: true"):
        variant(extracted, tmp_path, extraction={}, fusion=FUSION)
    only = json.loads(extracted.read_text(encoding="utf-8"))["teachers"]["bert"]
    with pytest.raises(ConfigError, match="no teacher predicts text; use fixed"):
        train(variant(extracted, tmp_path, teachers={"bert": only}, fusion=FUSION))
