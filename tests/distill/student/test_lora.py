"""LoRA students: they are read where they were, learn alone, and load plainly afterwards."""

from __future__ import annotations

import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from kvdistill.attention.kv_capture import KVCapture
from kvdistill.config.training import LoraConfig, StudentConfig
from kvdistill.distill.student.build import build_student, train_tokenizer
from kvdistill.distill.student.lora import (
    adapt,
    is_adapted,
    load_adapter,
    merged_state,
    save_adapter,
)
from kvdistill.distill.train.checkpoint import load_weights, save_weights
from kvdistill.errors import MissingExtra, StudentError
from tests.distill.student.test_injection import STUDENTS

IDS = torch.arange(14).reshape(2, 7)


def plain(model_type: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **STUDENTS[model_type])
    return AutoModelForCausalLM.from_config(config).eval()


def adapted(model_type: str, **settings: Any) -> Any:
    """A student whose updates are not zero, as if it had learned."""
    student = adapt(plain(model_type), LoraConfig(rank=3, alpha=5.0, **settings), seed=1)
    torch.manual_seed(2)
    for name, parameter in student.named_parameters():
        if ".lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return student


def read(student: Any) -> list[Tensor]:
    with KVCapture(student)(queries=True) as found, torch.no_grad():
        logits = student(input_ids=IDS, use_cache=False).logits
    return [logits, *(x for qkv in found for x in qkv)]


@pytest.mark.parametrize("model_type", STUDENTS)
def test_the_merged_model_is_the_student_its_keys_and_values_too(
    model_type: str, tmp_path: Path
) -> None:
    student = adapted(model_type)
    whole = plain(model_type)
    before = read(whole)
    whole.load_state_dict(merged_state(student, student.state_dict()))
    learned = read(student)
    for ours, theirs, old in zip(learned, read(whole), before, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(ours, old, atol=1e-3)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_peft_reads_the_adapter(model_type: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    student = adapted(model_type)
    save_adapter(student, student.state_dict(), tmp_path)
    theirs = peft.PeftModel.from_pretrained(plain(model_type), str(tmp_path / "adapter"))
    with torch.no_grad():
        logits = theirs(input_ids=IDS).logits
    torch.testing.assert_close(logits, read(student)[0], atol=1e-5, rtol=1e-4)
    config = theirs.peft_config["default"]
    assert (config.r, config.lora_alpha, config.task_type) == (3, 5.0, "CAUSAL_LM")
    whole = theirs.merge_and_unload()
    ours = merged_state(student, student.state_dict())
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-6, rtol=1e-5)


def test_a_merged_state_comes_from_the_given_tensors_not_from_the_model() -> None:
    """As a sharded model's: its own parameters are parts, the gathered state is whole."""
    student = adapted("llama")
    state = {name: value.clone() for name, value in student.state_dict().items()}
    wanted = merged_state(student, state)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    found = merged_state(student, state)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert not any(parameter.any() for parameter in student.parameters())


def test_only_updates_learn_and_their_first_sum_is_the_model_itself() -> None:
    student = adapt(plain("llama"), LoraConfig(rank=2, target_modules=("k_proj", "v_proj")), 0)
    names = [name for name, parameter in student.named_parameters() if parameter.requires_grad]
    assert len(names) == 2 * 2 * 2
    assert all(".lora_" in name and ("k_proj" in name or "v_proj" in name) for name in names)
    torch.testing.assert_close(read(student)[0], read(plain("llama"))[0])
    with KVCapture(student)() as found:
        student(input_ids=IDS, use_cache=False)
    sum(key.square().sum() + value.square().sum() for _, key, value in found).backward()
    weight = student.model.layers[0].self_attn.k_proj
    assert bool((weight.lora_B["default"].weight.grad != 0).any())
    assert weight.base_layer.weight.grad is None


def test_the_same_seed_gives_the_same_updates() -> None:
    first, again, other = (adapt(plain("llama"), LoraConfig(), seed) for seed in (1, 1, 2))
    key = "model.layers.0.self_attn.k_proj.lora_A.default.weight"
    weights = [student.state_dict()[key] for student in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_every_linear_layer_but_the_output_is_adapted() -> None:
    student = adapt(plain("llama"), LoraConfig(), 0)
    assert is_adapted(student)
    assert not is_adapted(plain("llama"))
    assert not hasattr(student.lm_head, "lora_A")
    assert hasattr(student.model.layers[1].mlp.down_proj, "lora_A")


class Holder(nn.Module):
    """What a distiller is to its weights: a student and something beside it."""

    def __init__(self, student: Any) -> None:
        super().__init__()
        self.student, self.other = student, nn.Linear(2, 2)


def test_weights_are_saved_to_load_plainly_and_to_go_on(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["some text"], 280)
    ours = Holder(adapted("llama"))
    save_weights(ours, tokenizer, tmp_path)
    alone = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(read(alone)[0], read(ours.student)[0], atol=1e-5, rtol=1e-4)
    fresh = Holder(adapt(plain("llama"), LoraConfig(rank=3, alpha=5.0), seed=9))
    load_weights(fresh, tmp_path)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor), name


SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 290,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 64}
TIED = {"tie_word_embeddings": True}


@pytest.mark.parametrize(
    ("model_type", "settings", "targets"),
    [
        ("llama", {}, ("embed_tokens", "k_proj")),
        ("llama", TIED, ("embed_tokens", "lm_head")),
        ("llama", TIED, ("lm_head",)),
        ("gemma3_text", {}, ("embed_tokens",)),  # tied by default, scales its embeddings
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4}, ("wte", "c_attn")),
        ("mixtral", MOE, None),  # peft adapts its experts, too
        ("mixtral", MOE, ("experts.down_proj", "v_proj")),
        ("gpt_oss", MOE, ("gate_up_proj", "down_proj")),  # other order of dimensions, biases
    ],
)
def test_embeddings_and_experts_are_saved_as_they_were_trained(
    model_type: str, settings: dict[str, Any], targets: Any, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SMALL | settings)
    original = AutoModelForCausalLM.from_config(config).eval()
    tied = config.tie_word_embeddings

    def holder(seed: int) -> Holder:
        lora = LoraConfig(rank=3, alpha=5.0, target_modules=targets)
        return Holder(adapt(deepcopy(original), lora, seed).eval())

    ours = holder(1)
    trained = {n: p for n, p in ours.student.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        nn.init.normal_(parameter, std=0.2)
    tokenizer = train_tokenizer(["some text"], 280)
    save_weights(ours, tokenizer, tmp_path)

    def logits(model: Any) -> Tensor:
        with torch.no_grad():
            return model(input_ids=IDS, use_cache=False).logits

    wanted = logits(ours.student)
    assert not torch.allclose(wanted, logits(original), atol=1e-2)
    alone = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(alone), wanted, atol=1e-5, rtol=1e-4)
    ends = {"embed_tokens", "lm_head", "wte"} & {*(targets or ())}
    assert alone.config.tie_word_embeddings == (tied and not ends)
    theirs = peft.PeftModel.from_pretrained(deepcopy(original), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(theirs), wanted, atol=1e-5, rtol=1e-4)
    fresh = holder(9)
    load_weights(fresh, tmp_path)
    torch.testing.assert_close(logits(fresh.student), wanted, atol=0, rtol=0)


def test_what_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StudentError, match=r"k_projj.*down_proj.*q_proj"):
        adapt(plain("llama"), LoraConfig(target_modules=("k_projj",)), 0)
    torch.manual_seed(0)
    experts = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **SMALL | MOE))
    with pytest.raises(StudentError, match=r"lora_dropout") as caught:
        adapt(experts, LoraConfig(dropout=0.1, target_modules=("gate_up_proj",)), 0)
    assert "\n" not in str(caught.value)
    with pytest.raises(StudentError, match="not saved by a LoRA student"):
        load_adapter(adapted("llama"), tmp_path)
    student = adapted("llama")
    save_adapter(student, student.state_dict(), tmp_path)
    with pytest.raises(StudentError, match="another rank"):
        load_adapter(adapt(plain("llama"), LoraConfig(rank=4), 0), tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtra, match=r"kvdistill\[lora\]"):
        adapt(plain("llama"), LoraConfig(), 0)


def test_a_student_is_built_with_its_adapters(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["some text"], 280)
    torch.manual_seed(0)
    settings = STUDENTS["llama"] | {"vocab_size": len(tokenizer)}
    config = AutoConfig.for_model("llama", **settings)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    built = build_student(StudentConfig(model=str(tmp_path), lora=LoraConfig()), tokenizer, 0)
    assert is_adapted(built)
