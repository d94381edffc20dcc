"""The student: capture of unrotated keys and values, with gradients, checkpointing included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kvdistill.attention.kv_capture import KVCapture
from kvdistill.config.training import StudentConfig
from kvdistill.distill.student.build import build_student, train_tokenizer
from kvdistill.errors import StudentError

LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 300,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 300}
QWEN3 = {**LLAMA, "model_type": "qwen3"}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["some text to learn from"], 290)


def make(options: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**options))


@pytest.mark.parametrize("options", [LLAMA, GPT2, QWEN3], ids=["llama", "gpt2", "qwen3"])
def test_values_equal_the_cache_and_keys_equal_it_before_rotation(options: dict[str, Any]) -> None:
    student = make(options).eval()
    ids = torch.randint(0, 300, (2, 7))
    capture = KVCapture(student)
    with capture() as found:
        cache = student(ids, use_cache=True).past_key_values
    geometry = capture.geometry
    assert len(found) == geometry.num_layers == len(cache.layers)
    for (_, key, value), layer in zip(found, cache.layers, strict=True):
        assert key.shape == (
            2,
            geometry.shapes["key"].num_heads,
            7,
            geometry.shapes["key"].head_dim,
        )
        torch.testing.assert_close(value, layer.values)
        # Position 0 is rotated by nothing, whatever the model's positions are.
        torch.testing.assert_close(key[:, :, 0], layer.keys[:, :, 0])
        norms = [x.norm(dim=-1) for x in (key, layer.keys)]
        torch.testing.assert_close(*norms)  # a rotation keeps lengths


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_flow_through_what_is_captured(checkpointing: bool) -> None:
    student = make(LLAMA).train()
    if checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    with KVCapture(student)() as found:
        student(torch.randint(0, 300, (1, 5)), use_cache=False)
    assert len(found) == 3
    sum(key.square().sum() + value.square().sum() for _, key, value in found).backward()
    gradient = student.model.layers[0].self_attn.k_proj.weight.grad
    assert gradient is not None and gradient.abs().sum() > 0  # noqa: PT018


def test_hooks_are_gone_after_an_error() -> None:
    student = make(LLAMA)
    capture = KVCapture(student)
    with pytest.raises(RuntimeError), capture():
        raise RuntimeError
    with capture() as found:
        student(torch.zeros(1, 2, dtype=torch.long))
    assert len(found) == 3


def test_the_same_seed_gives_the_same_student(tokenizer: Any) -> None:
    config = StudentConfig(architecture=LLAMA, tokenizer="unused")
    first, again, other = (build_student(config, tokenizer, seed) for seed in (1, 1, 2))
    weights = [model.model.layers[0].mlp.up_proj.weight for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (StudentConfig(model="/nonexistent/model"), "cannot build the student"),
        (StudentConfig(architecture={"model_type": "lama"}, tokenizer="t"), "lama"),
        (StudentConfig(architecture={**LLAMA, "vocab_size": 10}, tokenizer="t"), "got 10, "),
    ],
)
def test_an_impossible_student_is_refused(
    config: StudentConfig, words: str, tokenizer: Any
) -> None:
    with pytest.raises(StudentError, match=words):
        build_student(config, tokenizer, 0)


def test_a_student_without_keys_and_values_is_refused() -> None:
    mamba = make(
        {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 30}
    )
    with pytest.raises(StudentError, match="mamba"):
        KVCapture(mamba)
