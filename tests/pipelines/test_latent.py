"""The whole chain on tiny models: a latent student from a store, by config and command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner

from kvdistill.cli import cli
from kvdistill.config.experiment import Experiment
from kvdistill.config.load import load_experiment
from kvdistill.corpus.readers import load_corpus, read_files
from kvdistill.distill.data.stream import Rank
from kvdistill.distill.student.latent.latent_distiller import LatentDistiller
from kvdistill.distill.student.latent.model import LatentStudent
from kvdistill.distill.targets import Standardise
from kvdistill.distill.train.set_up import Assembled, assemble
from kvdistill.errors import ConfigError, StudentError
from kvdistill.pipelines.evaluate import evaluate_folder
from kvdistill.pipelines.extract import extract
from kvdistill.pipelines.run_folder import RunFolder
from kvdistill.pipelines.train import train
from kvdistill.store.reader import KVStore
from kvdistill.types import KINDS
from tests.pipelines.tiny import variant
from tests.slurm.experiment import CORPUS, write_experiment, write_models


@pytest.fixture(scope="session")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment file of a latent student that is its teacher's twin, and its store."""
    folder = tmp_path_factory.mktemp("latent")
    write_models(folder / "models")
    path = write_experiment(folder, folder / "models")
    body = yaml.safe_load(path.read_text(encoding="utf-8"))
    body |= {
        "preset": "kava",
        "teachers": {"llama": body["teachers"]["llama"]},
        "student": {"model": str(folder / "models/llama")},
        "latent": {"num_latents": 5, "iterations": 2, "projector_width": 16, "max_new_tokens": 4},
    }
    body["corpus"]["max_samples"] = 16
    body["extraction"]["hidden_at_cue"] = True
    body["training"] |= {"max_steps": 3, "batch_size": 3, "max_length": 160, "diagnostic_steps": 1}
    body["training"] |= {"log_steps": 1}
    path.write_text(yaml.safe_dump(body), encoding="utf-8")
    extract(load_experiment(path))
    return path


def assembled(experiment: Experiment) -> Assembled:
    store = KVStore.open(experiment.store)
    return assemble(experiment, store, load_corpus(experiment.corpus).train, Rank())


def losses(run: Assembled, **options: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    found: dict[str, Any] = run.distiller.eval()(next(iter(run.stream)), **options)
    return found


def logs(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "training_log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"latent__method": "codi"},
        {"latent__method": "pause", "latent__eviction": {"method": "random", "budget": 3}},
        {"latent__method": "none", "losses__key": 0, "losses__value": 0},
        {"projection__mode": "student_to_teacher", "losses__layer_std": False},
        {"projection__mode": "frozen", "projection__pilot_batches": 1},
        {"student": {"model": "{folder}/models/llama", "lora": {"rank": 2}}},
        {"student": {"tokenizer": "{folder}/models/llama", "architecture": {
            "model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2}},
         "projection__mode": "student_to_teacher", "losses__layer_std": False},
    ],
    ids=["kava", "codi", "pause", "none", "regression", "frozen", "lora", "another family"],
)  # fmt: skip
def test_every_form_trains_answers_and_comes_back(
    changes: dict[str, Any], thinking: Path, tmp_path: Path
) -> None:
    text = json.dumps(changes).replace("{folder}", str(thinking.parent))
    experiment = variant(thinking, tmp_path, **json.loads(text))
    report = train(experiment)
    assert {"eval_exact_match", "eval_forward_passes"} <= report.metrics.keys()
    parts = {"loss_cross_entropy", "loss_rationale", "loss_codi"}
    if experiment.losses.key:
        parts |= {"loss_key", "loss_value", "eviction_bites", "eviction_dropped", "gradient_share"}
    assert parts <= logs(report.folder)[0].keys()
    student = LatentStudent.from_pretrained(report.folder / "student")
    assert student.config == experiment.latent
    again = evaluate_folder(
        report.folder / "student", CORPUS, max_samples=3, max_length=160, batch_size=2,
        generate=True,
    )  # fmt: skip
    assert len(again.rows) == 3


def test_a_latent_student_of_experts_is_balanced_on_the_full_text(
    thinking: Path, tmp_path: Path
) -> None:
    shape = {
        "model_type": "mixtral", "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4,
    }  # fmt: skip
    changes = {"student": {"tokenizer": f"{thinking.parent}/models/llama", "architecture": shape}}
    run = assembled(variant(thinking, tmp_path, **changes))
    batch = next(iter(run.stream))
    output = run.distiller(batch)
    texts = {name: batch[name] for name in ("input_ids", "attention_mask")}
    own = run.distiller.student.backbone(**texts, output_router_logits=True).aux_loss
    torch.testing.assert_close(output["parts"]["router_aux"], own)
    with pytest.raises(ConfigError, match=r"give losses.rationale a weight"):
        assembled(variant(thinking, tmp_path, losses__rationale=0, **changes))


def test_codi_is_of_the_layers_and_teachers_that_fusion_counts(
    thinking: Path, tmp_path: Path
) -> None:
    def codi(**changes: Any) -> float:
        return float(losses(assembled(variant(thinking, tmp_path, **changes)))["parts"]["codi"])

    each = [codi(fusion__layers={"llama": [layer]}) for layer in range(3)]
    assert len(set(each)) == 3
    assert codi() == pytest.approx(sum(each) / 3, rel=1e-5)
    assert codi(fusion__layers={"llama": [0, 2]}) == pytest.approx((each[0] + each[2]) / 2)


@pytest.mark.parametrize(
    ("method", "stored"), [("similarity", "summaries"), ("confidence", "confidence")]
)
def test_latent_targets_are_fused(method: str, stored: str, tmp_path: Path) -> None:
    write_models(tmp_path / "models")
    path = write_experiment(tmp_path, tmp_path / "models")
    changes: dict[str, Any] = {
        "preset": "kava", "corpus__max_samples": 6, f"extraction__{stored}": True,
        "extraction__hidden_at_cue": True, "fusion__method": method,
        "latent": {"num_latents": 4, "iterations": 1, "projector_width": 16},
        "projection__mode": "student_to_teacher", "losses__layer_std": False,
    }  # fmt: skip
    extract(variant(path, tmp_path, **changes))
    found = losses(assembled(variant(path, tmp_path, **changes)), figures=True)
    torch.testing.assert_close(found["figures"]["alpha"].sum(), torch.tensor(1.0))
    if method == "confidence":  # of an encoder and a decoder, at equal shares
        torch.testing.assert_close(found["figures"]["alpha"], torch.tensor([0.5, 0.5]))
        with pytest.raises(ConfigError, match="granularity of latents is sample"):
            variant(path, tmp_path, **changes, fusion__granularity="token")
    assert {"key", "value", "codi"} <= found["parts"].keys()


def test_the_kv_loss_is_the_mean_error_over_kept_tokens(thinking: Path, tmp_path: Path) -> None:
    run = assembled(variant(thinking, tmp_path, losses__layer_std=False))
    distiller, batch = run.distiller, next(iter(run.stream))
    assert isinstance(distiller, LatentDistiller)
    view, targets = distiller.eval().run_student(batch), distiller.targets(batch["teachers"])
    covered = batch["teachers"]["llama"]["covered"]
    assert view.key_BLHTD.shape == targets["key"][0][0].shape == (3, 3, 2, 5, 16)
    total, count = 0.0, 0
    for b in range(3):
        for latent in range(5):
            if covered[b, latent]:
                gap = view.key_BLHTD[b, :, :, latent] - targets["key"][0][0][b, :, :, latent]
                total += float(gap.square().mean())
                count += 1
    assert float(distiller(batch)["parts"]["key"]) == pytest.approx(total / count, rel=1e-5)


def test_targets_are_the_stored_numbers_of_kept_tokens(thinking: Path, tmp_path: Path) -> None:
    eviction = {"method": "right_crop"}
    run = assembled(variant(thinking, tmp_path, latent__eviction=eviction))
    batch = next(iter(run.stream))
    targets = run.distiller.targets(batch["teachers"])
    store, found = KVStore.open(variant(thinking, tmp_path).store), 0
    for shard_id in store.shard_ids:
        tokens = store.read_shard("llama", shard_id).tokens
        for idx, sample in enumerate(store.samples(shard_id)):
            span = tokens.span(idx)
            first = int((tokens.segment[span] == 2).argmax())
            value = torch.from_numpy(
                store.read("llama", sample.sample_id, 1, 0, "value", tokens=slice(first, first + 5))
            )
            rows = targets["value"][0][0][:, 1, 0]
            found += int(any(torch.allclose(row, value, atol=1e-6) for row in rows))
    assert found == 3


def test_a_teacher_that_was_evicted_when_it_was_read_gives_its_slots(
    thinking: Path, tmp_path: Path
) -> None:
    method = {"method": "uniform"}
    model = str(thinking.parent / "models/llama")
    evicted = {"small": {"model": model, "eviction": {**method, "budget": 4}}}
    changes = {"latent__num_latents": 4, "latent__eviction": method, "losses__codi": 0.0}
    small = variant(thinking, tmp_path, teachers=evicted, **changes)
    extract(small)
    ours = assembled(small)
    whole = assembled(variant(thinking, tmp_path, **changes))
    batch, same = next(iter(ours.stream)), next(iter(whole.stream))
    for kind in KINDS:
        kept = ours.distiller.targets(batch["teachers"])[kind][0][0]
        chosen = whole.distiller.targets(same["teachers"])[kind][0][0]
        # int8 blocks hold other tokens there, so the codes' steps differ.
        torch.testing.assert_close(kept, chosen, atol=2e-2, rtol=2e-2)
    assert torch.equal(batch["teachers"]["small"]["covered"], same["teachers"]["llama"]["covered"])
    with pytest.raises(ConfigError, match="4 slots"):
        assembled(variant(thinking, tmp_path, teachers=evicted, latent__num_latents=3,
                          losses__codi=0.0))  # fmt: skip


def test_shuffled_targets_are_another_samples(thinking: Path, tmp_path: Path) -> None:
    own = assembled(variant(thinking, tmp_path))
    placebo = assembled(variant(thinking, tmp_path, latent__shuffle_targets=True))
    batch = next(iter(own.stream))
    ours = own.distiller.targets(batch["teachers"])["key"][0][0]
    theirs = placebo.distiller.targets(batch["teachers"])["key"][0][0]
    assert torch.equal(theirs, ours.roll(1, dims=0))
    assert not torch.equal(theirs, ours)


def test_losses_do_not_depend_on_how_a_step_is_cut(thinking: Path, tmp_path: Path) -> None:
    # layer_std and CODI's std are a batch's own, as in the paper, and so left out here.
    plain = {"losses__layer_std": False, "losses__codi": 0.0}
    run = assembled(variant(thinking, tmp_path, **plain))
    distiller, collate = run.distiller.eval(), run.stream.collate
    shard = run.stream.source.load(0)
    items = [shard.item(i) for i in range(3)]
    whole = collate(items)
    counts = {k: v.float() for k, v in distiller.count(whole).items()}
    cut = [distiller(collate([item]), counts)["loss"] for item in items]
    torch.testing.assert_close(sum(cut), distiller(whole, counts)["loss"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        distiller(whole)["loss"], distiller(whole, counts)["loss"], atol=1e-5, rtol=1e-5
    )


def test_a_batch_without_weight_has_no_loss(thinking: Path, tmp_path: Path) -> None:
    run = assembled(variant(thinking, tmp_path))
    batch = run.stream.collate.without_weight(next(iter(run.stream)))
    found = run.distiller.eval()(batch)
    assert float(found["loss"]) == 0
    assert all(float(number) == 0 for number in run.distiller.count(batch).values())


def test_gradients_reach_what_thinks_and_never_the_target(thinking: Path, tmp_path: Path) -> None:
    run = assembled(variant(thinking, tmp_path))
    found = losses(run)
    found["kv"].backward()
    student = run.distiller.student
    assert float(student.projector.layers[1].weight.grad.abs().max()) > 0
    assert float(student.latents_ME.grad.abs().max()) > 0
    assert run.distiller.targets(next(iter(run.stream))["teachers"])["key"][0][0].grad_fn is None
    assert not any(isinstance(m, Standardise) for m in run.distiller.modules())  # raw, as in KaVa


@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["full", "lora"])
def test_an_interrupted_run_ends_with_the_same_weights(
    lora: dict[str, int] | None, thinking: Path, tmp_path: Path
) -> None:
    changes = {"training__max_steps": 4, "training__save_steps": 2, "student__lora": lora}
    whole = train(variant(thinking, tmp_path / "whole", **changes))
    half = variant(thinking, tmp_path / "half", **changes)
    folder = train(half).folder
    shutil.rmtree(folder / "checkpoint-4")
    shutil.rmtree(folder / "student")
    record = RunFolder(folder).read_record()
    RunFolder(folder).write_record(record | {"finished": False})
    assert train(half).resumed
    ours = LatentStudent.from_pretrained(folder / "student").state_dict()
    for name, value in LatentStudent.from_pretrained(whole.folder / "student").state_dict().items():
        assert torch.equal(value, ours[name]), name


def test_the_command_line_answers_and_diagnoses(thinking: Path, tmp_path: Path) -> None:
    student = str(train(variant(thinking, tmp_path)).folder / "student")
    rows = tmp_path / "rows.jsonl"
    command = ["evaluate", student, str(CORPUS), "--max-samples", "24", "--json"]
    done = CliRunner().invoke(cli, [*command, "--generate", "--diagnose", "--samples", str(rows)])
    assert done.exit_code == 0, done.output
    metrics = json.loads(done.stdout.strip().splitlines()[-1])
    wanted = {"exact_match", "forward_passes", "exact_match_zeroed", "exact_match_shuffled",
              "exact_match_swapped", "probe_1", "commonest_1"}  # fmt: skip
    assert wanted <= metrics.keys()
    nearest = json.loads(rows.read_text().splitlines()[0])["nearest_tokens"]
    assert [len(latent) for latent in nearest] == [3] * 5
    with pytest.raises(StudentError, match="--generate"):
        evaluate_folder(
            Path(student), CORPUS, max_samples=2, max_length=64, batch_size=2, generate=False
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alignment__time": "tokens"}, "alignment.time: latent"),
        ({"latent__eviction": {"method": "full"}}, "right_crop"),
        ({"latent__eviction": {"budget": 6}}, "only 5 latents"),
        ({"latent__method": "none"}, "latent.method is none"),
        ({"losses__inject": 1.0}, "losses.inject"),
        ({"fusion__method": "mlp"}, "fusion"),
        ({"alignment__layers": "cka"}, "cka"),
        ({"extraction__hidden_at_cue": False}, "hidden_at_cue"),
        ({"extraction__importance": False}, "extraction.importance"),
        ({"training__gradient_checkpointing": True}, "gradient_checkpointing"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_starts(
    changes: dict[str, Any], message: str, thinking: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        variant(thinking, tmp_path, **changes)


def test_identity_needs_equal_shapes(thinking: Path, tmp_path: Path) -> None:
    small = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24,
             "num_hidden_layers": 2, "num_attention_heads": 2}  # fmt: skip
    student = {"tokenizer": str(thinking.parent / "models/llama"), "architecture": small}
    with pytest.raises(ConfigError, match="mode identity"):
        assembled(variant(thinking, tmp_path, student=student))


def test_the_corpus_of_this_test_has_rationales() -> None:
    assert all(dict(sample.segments)["rationale"] for sample in read_files(CORPUS, limit=16))
