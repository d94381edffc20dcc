"""Codec klt from the teacher to the loss: fitted once, the same for every task, learned from."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from kvdistill.config.experiment import Experiment
from kvdistill.errors import ConfigError, ShardCorrupt, StoreMismatch
from kvdistill.extract.encode import fit_bases
from kvdistill.extract.teacher import load_teacher
from kvdistill.pipelines.extract import ExtractionWork, extract
from kvdistill.pipelines.extract_tasks import prepare_store
from kvdistill.pipelines.plan import estimate_extraction
from kvdistill.pipelines.reextract import reextract
from kvdistill.pipelines.train import train
from kvdistill.store.maintenance import verify_store
from kvdistill.store.reader import KVStore
from kvdistill.types import KINDS
from tests.extract.models import save_teacher
from tests.pipelines.test_extract import CORPUS, make
from tests.pipelines.test_train import losses
from tests.pipelines.tiny import variant

SPEC = {"key": "klt", "value": "klt", "key_bits": 3.0, "value_bits": 3.0, "block_layers": 2}


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    (tmp_path / "corpus.jsonl").write_text(CORPUS + '{"text": ""}\n', encoding="utf-8")
    save_teacher(tmp_path / "llama", "llama")
    return make(tmp_path, teachers={"llama": {"model": str(tmp_path / "llama"), "codec": SPEC}})


def test_every_task_codes_in_the_bases_of_the_first(experiment: Experiment) -> None:
    store = prepare_store(experiment)
    first, second = (ExtractionWork(experiment, "llama") for _ in range(2))
    first.prepare()
    second.prepare()
    path = store.paths.transform("llama")
    fitted = path.read_bytes()
    for i, unit in enumerate(store.shard_ids):
        (first, second)[i % 2].run(unit, lambda: False)
    assert path.read_bytes() == fitted
    store = KVStore.open(experiment.store)
    assert verify_store(store) == []
    before = {kind: store.read_decoded("llama", "00001", kind) for kind in KINDS}
    shutil.rmtree(store.paths.shard("llama", "00001"))
    extract(experiment)
    again = KVStore.open(experiment.store)
    for kind in KINDS:
        np.testing.assert_array_equal(again.read_decoded("llama", "00001", kind), before[kind])
    assert reextract(again, experiment, "llama", 3).agrees


def test_decoded_keys_and_values_are_near_the_teachers_own(
    experiment: Experiment, tmp_path: Path
) -> None:
    extract(experiment)
    exact = {"llama": {"model": str(tmp_path / "llama"), "codec": {"key": "fp16", "value": "fp16"}}}
    extract(make(tmp_path, teachers=exact, store=str(tmp_path / "exact")))
    stores = [KVStore.open(tmp_path / name) for name in ("store", "exact")]
    for shard_id in stores[0].shard_ids:
        for kind in KINDS:
            got, want = (store.read_decoded("llama", shard_id, kind) for store in stores)
            assert np.linalg.norm(got - want) < 0.25 * np.linalg.norm(want)
            first = stores[0].token_table("llama", shard_id).sample_ptr[:-1]
            first = first[first < got.shape[2]]
            np.testing.assert_allclose(got[:, :, first], want[:, :, first], rtol=1e-3, atol=1e-3)


def test_lost_bases_and_another_rate_are_refused(experiment: Experiment, tmp_path: Path) -> None:
    extract(experiment)
    store = KVStore.open(experiment.store)
    teachers = {"llama": {"model": str(tmp_path / "llama"), "codec": {**SPEC, "key_bits": 2.0}}}
    with pytest.raises(
        StoreMismatch, match=r"codec: stored \{'key_bits': 3.0\}, requested \{'key_bits': 2.0\}"
    ):
        extract(make(tmp_path, teachers=teachers))
    store.paths.transform("llama").unlink()
    shutil.rmtree(store.paths.shard("llama", "00000"))
    with pytest.raises(ShardCorrupt, match=r"missing, and codec klt needs it; restore it"):
        extract(experiment)


def test_queries_weigh_the_channels_of_keys(experiment: Experiment) -> None:
    """A channel whose rotated pair no query reads gets (next to) no weight, a loud one more."""
    teacher = load_teacher("llama", experiment)
    attention = teacher.model.layers[0].self_attn
    dim = teacher.layers[0].key_head_dim
    attention.q_proj.weight.data.view(-1, dim, attention.q_proj.in_features)[
        :, [1, 1 + dim // 2]
    ] = 0
    samples = list(prepare_store(experiment).samples("00000"))
    bases = fit_bases(teacher, samples, 200)
    weight = bases["key.0"].weight.reshape(2, -1, dim)
    assert weight[0, :, [1, 1 + dim // 2]].max() < 0.01 * weight[0].mean()
    np.testing.assert_allclose(weight[:, :, 0], weight[:, :, dim // 2])
    assert weight[1, :, 1].min() > 0.01 * weight[1].mean()


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["ratio", "skip"])
def test_a_student_learns_from_klt_as_from_exact_values(
    extracted: Path, tmp_path: Path, layers: str
) -> None:
    found = []
    for codec in ({"key": "fp16", "value": "fp16"}, {**SPEC, "key_bits": 8, "value_bits": 8}):
        store = tmp_path / str(codec["key"])
        experiment = variant(
            extracted, tmp_path / f"out-{store.name}", store=str(store), alignment__layers=layers,
            training__log_steps=1, extraction__codec=codec,
        )  # fmt: skip
        experiment = experiment.model_copy(
            update={"teachers": {"llama": experiment.teachers["llama"]}}
        )
        extract(experiment)
        found.append([row["loss"] for row in losses(train(experiment).folder)])
    np.testing.assert_allclose(found[0], found[1], rtol=0.05)


@pytest.mark.slow
def test_a_plan_counts_the_bytes_of_klt(experiment: Experiment) -> None:
    plan = estimate_extraction(experiment, num_samples=8, num_sized=4).teachers[0]
    assert plan.gigabytes["klt"] < plan.gigabytes["int8"]


def test_what_klt_cannot_do_is_refused(tmp_path: Path, extracted: Path) -> None:
    teachers = {"llama": {"model": "x", "codec": SPEC, "eviction": {"method": "uniform"}}}
    with pytest.raises(ConfigError, match="codec klt transforms layers and heads together"):
        make(tmp_path, teachers=teachers)
    experiment = variant(
        extracted, tmp_path, store=str(tmp_path / "store"), extraction__codec=SPEC,
        placebo={"method": "noise"},
    )  # fmt: skip
    experiment = experiment.model_copy(update={"teachers": {"llama": experiment.teachers["llama"]}})
    extract(experiment)
    with pytest.raises(ConfigError, match="cannot represent independent noise; use shuffled"):
        train(experiment)
