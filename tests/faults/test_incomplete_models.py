"""Weights that a model lacks or does not use, and settings that it does not have, are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig

from kvdistill import LatentStudent
from kvdistill.config.experiment import LatentConfig
from kvdistill.config.training import StudentConfig
from kvdistill.distill.student.build import build_student, check_student
from kvdistill.errors import KVDistillError, StudentError, TeacherError
from kvdistill.extract.teacher import load_teacher
from tests.extract.models import tiny_model, tiny_tokenizer
from tests.pipelines.test_teachers import make, save_teacher

SIZES = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
LLAMA = {"model_type": "llama", **SIZES}


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the weights that a folder holds."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def set_layers(folder: Path, number: int) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": number}))


def headless(folder: Path) -> None:
    AutoModel.from_config(LlamaConfig(**SIZES)).save_pretrained(folder)


def encoder(folder: Path) -> None:
    tiny_model("bert", **{k: v for k, v in SIZES.items() if "key_value" not in k}).save_pretrained(
        folder
    )


def with_value_head(folder: Path) -> None:
    edit(folder, lambda w: w.update({"v_head.summary.weight": torch.zeros(1, 32)}))


LACKING = r"\d+ parameters of \w+ are missing \({}.*would be random; give a checkpoint"
UNUSED = r"\d+ parameters are not used by \w+ \({}.*would be dropped"
FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no head": (headless, LACKING.format("lm_head.weight")),
    "an encoder": (encoder, LACKING.format("cls.")),
    "a layer too few": (lambda f: set_layers(f, 3), LACKING.format(r"model\.layers\.2\.")),
    "a layer too many": (lambda f: set_layers(f, 1), UNUSED.format(r"model\.layers\.1\.")),
    "another head": (with_value_head, UNUSED.format(r"v_head\.summary\.weight")),
}


def save_student(folder: Path) -> None:
    tiny_model("llama", head=True, **SIZES).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def one_line(error: KVDistillError) -> bool:
    return "\n" not in str(error) and len(str(error)) <= 500


@pytest.mark.parametrize("fault", FAULTS)
def test_a_student_whose_weights_are_not_its_configs_is_refused(tmp_path: Path, fault: str) -> None:
    damage, words = FAULTS[fault]
    save_student(tmp_path)
    damage(tmp_path)
    with pytest.raises(StudentError, match=words) as caught:
        build_student(StudentConfig(model=str(tmp_path)), tiny_tokenizer(), 0)
    assert str(tmp_path) in str(caught.value)
    assert one_line(caught.value)


def test_tied_and_known_leftover_weights_are_no_fault(tmp_path: Path) -> None:
    save_student(tmp_path)
    edit(
        tmp_path,
        lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}),
    )
    build_student(StudentConfig(model=str(tmp_path)), tiny_tokenizer(), 0)
    tied = tiny_model("llama", head=True, **SIZES, tie_word_embeddings=True)
    tied.save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    build_student(StudentConfig(model=str(tmp_path / "tied")), tiny_tokenizer(), 0)


def test_a_latent_student_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    student = LatentStudent(tiny_model("llama", head=True, **SIZES), LatentConfig())
    student.save_pretrained(tmp_path)
    assert LatentStudent.from_pretrained(tmp_path).config == student.config
    edit(tmp_path, lambda w: w.pop("lm_head.weight"))
    with pytest.raises(StudentError, match=LACKING.format("lm_head.weight")):
        LatentStudent.from_pretrained(tmp_path)


def test_a_teacher_with_layers_that_its_config_does_not_use_is_refused(tmp_path: Path) -> None:
    save_teacher(tmp_path / "t")
    set_layers(tmp_path / "t", 1)
    with pytest.raises(TeacherError, match=UNUSED.format(r"layers\.1\.")) as caught:
        load_teacher("t", make(tmp_path, {}))
    assert one_line(caught.value)


def test_a_teacher_may_leave_out_its_head(tmp_path: Path) -> None:
    whole = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    save_teacher(tmp_path / "t")
    whole.save_pretrained(tmp_path / "t")
    assert load_teacher("t", make(tmp_path, {})).manifest.layers == (0, 1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hiden_size": 64}, "'hiden_size'; did you mean 'hidden_size'"),
        ({"num_layers": 7}, "'num_layers'; did you mean"),
        ({"rope_parameter": {}}, "'rope_parameter'; did you mean 'rope_parameters'"),
    ],
)
def test_a_misspelt_setting_of_an_architecture_is_refused(
    settings: dict[str, Any], words: str
) -> None:
    config = StudentConfig(architecture={**LLAMA, **settings}, tokenizer="unused")
    for build in (check_student, lambda c, t: build_student(c, t, 0)):
        with pytest.raises(StudentError, match=words) as caught:
            build(config, tiny_tokenizer())
        assert one_line(caught.value)
        assert "student.architecture" in str(caught.value)


@pytest.mark.parametrize(
    "architecture",
    [
        {**LLAMA, "head_dim": 16, "rope_theta": 5e5, "attention_dropout": 0.0},
        {**LLAMA, "model_type": "qwen2", "head_dim": 16},  # read, although no field of Qwen2Config
        {**LLAMA, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4},
        {"model_type": "gpt2", "hidden_size": 32, "num_hidden_layers": 2, "n_head": 4},
    ],
)
def test_settings_that_a_model_has_are_accepted(architecture: dict[str, Any]) -> None:
    check_student(StudentConfig(architecture=architecture, tokenizer="unused"), tiny_tokenizer())
