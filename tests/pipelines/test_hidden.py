"""Hidden states beside keys and values: what is stored, what a student learns of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from kvdistill.errors import ConfigError
from kvdistill.pipelines.extract import extract
from kvdistill.pipelines.reextract import reextract
from kvdistill.pipelines.train import train
from kvdistill.store.lazy_arrays import dataset
from kvdistill.store.maintenance import convert_store, verify_store
from kvdistill.store.reader import KVStore
from kvdistill.studies.report.figures import sections
from kvdistill.studies.report.reading import read_run, read_study
from tests.extract.models import save_teacher
from tests.pipelines.test_live import losses as logged_losses
from tests.pipelines.test_parts import assembled
from tests.pipelines.test_teachers import make
from tests.pipelines.tiny import variant
from tests.slurm.experiment import write_experiment, write_models
from tests.store.test_format_page import decoder

ALONE = {"losses__key": 0, "losses__value": 0, "losses__hidden": 1.0}
EXACT = {"key": "fp16", "value": "fp16", "hidden": "fp16"}


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``llama`` and ``bert`` with their hidden states."""
    folder = tmp_path_factory.mktemp("hidden")
    write_models(folder / "models")
    path = write_experiment(folder, folder / "models")
    experiment = variant(
        path, folder / "runs", corpus__max_samples=16, extraction__hidden=True,
        extraction__codec=EXACT,
    )  # fmt: skip
    path.write_text(json.dumps(experiment.model_dump(mode="json", exclude_defaults=True)))
    assert extract(experiment).complete
    return path


@pytest.mark.parametrize("backend", ["zarr", "safetensors"])
@pytest.mark.parametrize("model_type", ["llama", "bert"])
def test_what_is_stored_is_the_output_of_every_layer(
    tmp_path: Path, model_type: str, backend: str
) -> None:
    save_teacher(tmp_path / "t", model_type, num_hidden_layers=3)
    experiment = make(
        tmp_path, {"layers": [0, 2]}, codec=EXACT, hidden=True, importance=False, backend=backend
    )
    extract(experiment)
    store = KVStore.open(experiment.store)
    assert not verify_store(store)
    from transformers import AutoModel

    model = AutoModel.from_pretrained(tmp_path / "t").eval()
    sample_id = store.samples(store.shard_ids[0])[1].sample_id
    table = store.token_table("t", store.shard_ids[0])
    ids = torch.from_numpy(table.token_ids[table.span(1)].astype(np.int64))[None]
    outputs: list[torch.Tensor] = []
    layers = model.layers if model_type == "llama" else model.encoder.layer
    for layer in layers:
        layer.register_forward_hook(
            lambda _, __, out: outputs.append(out[0] if isinstance(out, tuple) else out)
        )
    with torch.no_grad():
        model(ids)
    again = reextract(store, experiment, "t", 2)
    assert again.agrees
    assert again.hidden_error is not None
    assert again.hidden_error < 1e-3
    others = {"zarr": "safetensors", "safetensors": "zarr"}
    store = convert_store(store, tmp_path / "other", others[backend])
    assert not verify_store(store)
    assert dataset(store, "t")["hidden"].shape == (2, 1, table.num_tokens, model.config.hidden_size)
    found = store.read_sample("t", sample_id, "hidden")
    wanted = torch.stack([outputs[0], outputs[2]])  # [L, 1, T, E]
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("codec", ["int8", "int4", "fp8_e4m3"])
def test_small_codecs_keep_channels_of_unequal_size(tmp_path: Path, codec: str) -> None:
    """Residual streams have a few channels that are a thousand times as large as the others."""
    save_teacher(tmp_path / "t")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "t")
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 3] += 300
    model.save_pretrained(tmp_path / "t")
    found = []
    for name in ("fp16", codec):
        experiment = make(tmp_path, {}, codec={"hidden": name}, hidden=True)
        experiment = experiment.model_copy(update={"store": tmp_path / name})
        extract(experiment)
        store = KVStore.open(experiment.store)
        found.append(store.read_decoded("t", store.shard_ids[0], "hidden"))
    shard = zarr.open_group(store.paths.shard("t", store.shard_ids[0]), mode="r")
    np.testing.assert_array_equal(decoder()(shard, "hidden"), found[1])  # as its page says
    exact, near = (np.delete(x, 3, axis=-1) for x in found)
    assert np.abs(near - exact).mean() < {"int8": 0.01, "int4": 0.1, "fp8_e4m3": 0.05}[codec] * (
        exact.std()
    )


def test_a_store_with_hidden_states_trains_as_one_without(extracted: Path, tmp_path: Path) -> None:
    plain = variant(
        extracted, tmp_path, store=str(tmp_path / "store"), extraction__hidden=False,
    )  # fmt: skip
    extract(plain)
    both = (assembled(experiment) for experiment in (plain, variant(extracted, tmp_path)))
    batches, parts = [], []
    for run in both:
        batches.append(next(iter(run.stream)))
        parts.append(run.distiller.eval()(batches[-1])["parts"])
    assert all("hidden" not in batch["teachers"]["llama"] for batch in batches)
    assert parts[0].keys() == parts[1].keys()
    for name in parts[0]:
        assert torch.equal(parts[0][name], parts[1][name]), name


def test_a_student_regresses_all_layers_of_all_teachers(extracted: Path, tmp_path: Path) -> None:
    run = assembled(variant(extracted, tmp_path, **ALONE))
    batch = next(iter(run.stream))
    distiller = run.distiller.train()
    found = distiller(batch, figures=True)
    assert set(found["parts"]) == {"cross_entropy", "hidden"}
    assert float(found["parts"]["hidden"].detach()) == pytest.approx(
        1.0, abs=0.6
    )  # of unit variance
    assert float(found["figures"]["target_variance"]) == pytest.approx(1.0, abs=0.4)
    found["parts"]["hidden"].backward()
    moved = {
        n for n, p in distiller.student.named_parameters() if p.grad is not None and p.grad.any()
    }
    assert "model.layers.1.mlp.down_proj.weight" in moved  # the last layer's output
    assert not {n for n in moved if n.startswith(("lm_head", "model.norm"))}
    for space in distiller.teachers:
        head = distiller.head(space.name, "hidden")
        assert all(p.grad is not None and p.grad.any() for p in head.parameters())
        assert not any(p.grad is not None for p in distiller.head(space.name, "key").parameters())


def test_the_error_is_that_of_the_mapped_outputs(extracted: Path, tmp_path: Path) -> None:
    """By hand: standardised targets on the student's tokens, mean over channels and tokens."""
    body = json.loads(extracted.read_text(encoding="utf-8"))["teachers"]
    run = assembled(variant(extracted, tmp_path, teachers={"llama": body["llama"]}, **ALONE))
    batch = next(iter(run.stream))
    distiller = run.distiller.eval()
    output = distiller.run_student(batch)
    assert output.hidden_BLHTD.shape[1:3] == (2, 1)
    (target,) = distiller.targets(batch["teachers"])["hidden"][0]
    (ours,) = distiller.head("llama", "hidden").predictions(output.hidden_BLHTD)
    covered = batch["teachers"]["llama"]["covered"]
    error = (ours - target).square().mean(dim=(2, 4)).mean(1)[covered].mean()
    torch.testing.assert_close(distiller(batch)["parts"]["hidden"], error, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("placebo", ["none", "shuffled", "noise"])
def test_ridge_fits_a_twin_but_no_placebo(extracted: Path, tmp_path: Path, placebo: str) -> None:
    body = json.loads(extracted.read_text(encoding="utf-8"))["teachers"]
    run = assembled(
        variant(
            extracted, tmp_path, teachers={"llama": body["llama"]}, placebo__method=placebo,
            student={"model": str(extracted.parent / "models/llama")}, projection__init="ridge",
            **ALONE,
        )
    )  # fmt: skip
    error = float(run.distiller.eval()(next(iter(run.stream)))["parts"]["hidden"].detach())
    if placebo == "none":
        assert min(run.explained["llama"]["hidden"]) > 0.9
        assert error < 0.05
    else:
        assert max(run.explained["llama"]["hidden"]) < 0.5
        assert error > 0.3


def test_it_is_learned(extracted: Path, tmp_path: Path) -> None:
    experiment = variant(
        extracted, tmp_path, losses__cross_entropy=0, training__max_steps=20,
        training__learning_rate=0.02, training__log_steps=1, **ALONE,
    )  # fmt: skip
    curve = read_run(train(experiment).folder).curve("loss_hidden")[1]
    assert sum(curve[-3:]) < 0.9 * sum(curve[:3])


def test_live_teachers_give_the_same_losses(extracted: Path, tmp_path: Path) -> None:
    experiment = variant(
        extracted, tmp_path, training__log_steps=1, training__save_steps=None,
        training__max_steps=2, **ALONE,
    )  # fmt: skip
    cached, live = (
        logged_losses(experiment.model_copy(update={"name": str(x)}), live=x) for x in (False, True)
    )
    for stored, fresh in zip(cached, live, strict=True):
        assert stored["loss_hidden"] == pytest.approx(fresh["loss_hidden"], rel=1e-5)


def test_windows_are_stitched(tmp_path: Path) -> None:
    save_teacher(tmp_path / "t")
    row = json.dumps({"text": "Ann has 3 apples and Bob has none. " * 4}) + "\n"
    options = {"hidden": True, "importance": False, "codec": EXACT}
    found = []
    for name, limits in (("whole", {}), ("part", {"max_length": 24, "window_overlap": 8})):
        teacher = {"long_text": "window"}
        experiment = make(tmp_path, teacher, row, **options, **limits)
        experiment = experiment.model_copy(update={"store": tmp_path / name})
        extract(experiment)
        store = KVStore.open(experiment.store)
        found.append(store.read_decoded("t", store.shard_ids[0], "hidden"))
    whole, part = found
    assert whole.shape == part.shape
    np.testing.assert_allclose(part[:, :, :24], whole[:, :, :24], atol=2e-3)
    assert not np.allclose(part[-1, :, 24:], whole[-1, :, 24:], atol=2e-3)


def test_what_cannot_be_is_refused(extracted: Path, tmp_path: Path) -> None:
    for changes, line in (
        ({"extraction__hidden": False}, "layers' outputs that extraction must store"),
        ({"projection": {"mode": "frozen"}}, "student_to_teacher alone; got frozen"),
        ({"latent": {}, "alignment__time": "latent"}, "losses.hidden is undefined on latent"),
        ({"fusion": {"balance": {"method": "gradnorm"}}}, "got losses.hidden"),
        ({"extraction__codec": {"hidden": "klt"}}, "extraction.codec.hidden"),
    ):
        with pytest.raises(ConfigError, match=line):
            variant(extracted, tmp_path, **ALONE | changes)
    body: dict[str, Any] = json.loads(extracted.read_text(encoding="utf-8"))["teachers"]
    body["llama"]["eviction"] = {"budget": 5}
    with pytest.raises(ConfigError, match=r"extraction.confidence, .logits or .hidden"):
        variant(extracted, tmp_path, teachers=body)


def test_a_report_shows_it(extracted: Path, tmp_path: Path) -> None:
    student = {"model": str(extracted.parent / "models/llama")}  # whose maps are fitted by ridge
    settings = {"training__max_steps": 2, "student": student, **ALONE}
    train(variant(extracted, tmp_path, name="h", **settings))
    train(variant(extracted, tmp_path, name="kv", training__max_steps=2))
    study = read_study([tmp_path])
    figures = {figure.name: figure for shown in sections(study, []).values() for figure in shown}
    assert {"error-by-layer-hidden", "explained-hidden", "error-by-layer-key"} <= figures.keys()
    assert "target hidden states" in figures["explained-hidden"].caption
