"""Whole runs with teachers whose values have a width of their own, and with hybrid students."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from kvdistill.config.distill import LatentConfig
from kvdistill.config.training import StudentConfig
from kvdistill.distill.student.build import build_student, check_student, load_student_tokenizer
from kvdistill.distill.student.latent.model import LatentStudent
from kvdistill.errors import StudentError, TeacherError
from kvdistill.pipelines.extract import extract
from kvdistill.pipelines.train import train
from kvdistill.store.reader import KVStore
from tests.attention.families import DECODERS, ENCODER_DECODERS
from tests.extract.models import save_teacher, tiny_tokenizer
from tests.extract.test_loading import quantised_folder, save_multimodal
from tests.pipelines.test_modes import assembled
from tests.pipelines.test_teachers import make, only_shard
from tests.pipelines.tiny import variant
from tests.slurm.experiment import write_experiment, write_models

LONG = {"max_position_embeddings": 1024}
STUDENTS = (
    "lfm2, hybrid",
    "qwen3_next, hybrid",
    "jamba, hybrid",
    "nemotron_h, hybrid",
    "kimi_linear, latent, hybrid",
    "falcon, MQA",
    "deepseek_v3, latent",
    "llama4, norm after rotary",
)
REFUSES_INJECTION = {"kimi_linear, latent, hybrid", "deepseek_v3, latent"}


def architecture(family: str) -> dict[str, Any]:
    """Its settings, without those that the table shares among families and this one lacks."""
    model_type, options = DECODERS[family]
    has = {field.name for field in fields(CONFIG_MAPPING[model_type])} | {"head_dim"}
    has |= set(CONFIG_MAPPING[model_type].attribute_map)
    own = {name: value for name, value in options.items() if name in has - {"vocab_size"}}
    return {"model_type": model_type, **own, **LONG}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of a teacher with latent attention and of a hybrid one, in 4 bits."""
    folder = tmp_path_factory.mktemp("families")
    write_models(folder / "models")
    path = write_experiment(folder, folder / "models")
    for name, family in (("latent", "deepseek_v3, latent"), ("hybrid", "qwen3_next, hybrid")):
        model_type, options = DECODERS[family]
        save_teacher(folder / name, model_type, base={}, **{**options, **LONG})
    extract(variant(path, folder, **settings(folder)))
    return path


def settings(folder: Path) -> dict[str, Any]:
    teachers = {name: {"model": str(folder / name)} for name in ("latent", "hybrid")}
    return {
        "teachers": teachers,
        "corpus__max_samples": 8,
        "corpus__eval_samples": 2,
        "extraction__codec": {"key": "int4", "value": "int4"},
    }


def test_values_of_their_own_width_are_stored_as_the_teacher_has_them(stored: Path) -> None:
    manifest = KVStore.open(stored.parent / "store").teacher("latent")
    (group,) = manifest.groups
    assert (group.num_key_value_heads, group.key_head_dim, group.value_head_dim) == (4, 12, 6)
    assert {spec.rotary_start for spec in manifest.rotary.values()} == {8}
    assert {spec.rotary_dim for spec in manifest.rotary.values()} == {4}
    hybrid = KVStore.open(stored.parent / "store").teacher("hybrid")
    assert hybrid.layers == (1,)
    assert sorted(hybrid.skipped_layers) == [0, 2]


MODES: dict[str, dict[str, Any]] = {
    "student_to_teacher": {"losses__cosine": 0.1, "losses__relation": 0.1},
    "frozen": {"projection__mode": "frozen", "projection__init": "ridge", "losses__inject": 1.0},
    "shared_space": {"projection__mode": "shared_space", "losses__round_trip": 1.0},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", STUDENTS)
def test_a_student_of_any_family_learns_from_them(
    stored: Path, tmp_path: Path, family: str, mode: str
) -> None:
    changes = {
        **settings(stored.parent),
        **MODES[mode],
        "student__architecture": architecture(family),
        "training__gradient_checkpointing": True,
    }
    if "losses__inject" in changes and family in REFUSES_INJECTION:
        with pytest.raises(StudentError, match=r"set losses\.inject to 0"):
            assembled(stored, tmp_path, **changes)
        return
    run = assembled(stored, tmp_path, **changes)
    config = variant(stored, tmp_path, **changes).student
    checked = check_student(config, run.stream.collate.tokenizer)
    geometry = run.distiller.capture.geometry
    assert geometry == checked
    assert geometry.num_layers == (1 if "hybrid" in family else 3)
    losses = run.distiller(next(iter(run.stream)))
    assert torch.isfinite(losses["loss"])
    losses["kv"].backward()
    for site in run.distiller.capture.sites:
        learned = [p.grad for tap in site.taps for p in tap.parameters() if p.grad is not None]
        assert sum(float(grad.abs().sum()) for grad in learned) > 0


def test_a_hybrid_student_with_lora_trains_and_is_saved(stored: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    save_teacher(tmp_path / "lfm2", head=True, base={}, **architecture("lfm2, hybrid"))
    changes = {
        **settings(stored.parent),
        "student": {"model": str(tmp_path / "lfm2"), "lora": {"rank": 2}},
        "training__gradient_checkpointing": True,
        "training__max_steps": 2,
    }
    report = train(variant(stored, tmp_path / "runs", **changes))
    student = AutoModelForCausalLM.from_pretrained(report.folder / "student")
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "lfm2").state_dict()
    changed = {n for n, p in student.state_dict().items() if not torch.equal(p, first[n])}
    assert any("self_attn" in name for name in changed)


def test_several_hidden_states_a_token_are_refused(stored: Path, tmp_path: Path) -> None:
    """Gemma 3n: keys and values are read, what needs one hidden state is not available."""
    family = "gemma3n, shared layers"
    model_type, options = DECODERS[family]
    save_teacher(tmp_path / "t", model_type, base={}, **options)
    with pytest.raises(TeacherError, match=r"extraction\.hidden_at_cue.*set it to false"):
        only_shard(make(tmp_path, {}, hidden_at_cue=True))
    changes = {"student__architecture": architecture(family), "fusion__method": "mlp"}
    run = assembled(stored, tmp_path, **settings(stored.parent), **changes)
    with pytest.raises(StudentError, match=r"fusion\.method mlp.*use fixed"):
        run.distiller(next(iter(run.stream)))


def test_the_language_model_of_a_multimodal_student_trains_alone(
    stored: Path, tmp_path: Path
) -> None:
    save_multimodal(tmp_path / "gemma", "gemma3")
    changes = {
        **settings(stored.parent),
        "student": {"model": str(tmp_path / "gemma")},
        "training__max_steps": 2,
    }
    report = train(variant(stored, tmp_path / "runs", **changes))
    student, first = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (report.folder / "student", tmp_path / "gemma")
    )
    changed = {name for name, weight in student.items() if not torch.equal(weight, first[name])}
    assert any("language_model" in name for name in changed)
    assert not any("vision" in name or "projector" in name for name in changed)


@pytest.mark.parametrize(
    ("save", "words"),
    [
        (lambda folder: save_multimodal(folder, "qwen2_vl"), "no causal language model of type"),
        (lambda folder: quantised_folder(folder, "gptq", {"bits": 4}), "quantised by gptq"),
        (lambda folder: save_teacher(folder, "t5", **ENCODER_DECODERS["t5"][1]), "no causal"),
    ],
)
def test_a_folder_that_cannot_be_trained_is_refused(save: Any, words: str, tmp_path: Path) -> None:
    save(tmp_path)
    for build in (check_student, lambda config, tokenizer: build_student(config, tokenizer, 0)):
        with pytest.raises(StudentError, match=words) as caught:
            build(StudentConfig(model=str(tmp_path)), tiny_tokenizer())
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "family", ["lfm2, hybrid", "falcon_h1, hybrid", "jamba, hybrid", "gemma3n, shared layers"]
)
def test_a_recurrent_student_cannot_have_latents(stored: Path, family: str) -> None:
    tokenizer = load_student_tokenizer(str(stored.parent / "models" / "llama"))
    config = StudentConfig(tokenizer="t", architecture=architecture(family))
    student = build_student(config, tokenizer, seed=0)
    with pytest.raises(StudentError, match="do not keep keys and values alone"):
        LatentStudent(student, LatentConfig())
