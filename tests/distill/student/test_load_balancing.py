"""Mixture-of-experts students train with the auxiliary loss that their own model defines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kvdistill.config.distill import AlignmentConfig, FusionConfig, LossConfig, ProjectionConfig
from kvdistill.distill.distiller import Distiller
from kvdistill.distill.losses.load_balancing import LoadBalancing
from kvdistill.errors import ConfigError

BASE = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 16,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "moe_k": 2, "decoder_sparse_step": 1, "pad_token_id": 0,
    "initializer_range": 0.3,
}  # fmt: skip
ATTENTION = {"layer_types": ["full_attention", "full_attention"]}
FOUR = {"num_hidden_layers": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {}, "olmoe": {}, "qwen2_moe": {}, "qwen3_moe": {}, "gpt_oss": {}, "granitemoe": {},
    "granitemoeshared": {}, "phimoe": {}, "flex_olmo": {}, "minimax_m2": {}, "ernie4_5_moe": {},
    "jetmoe": {}, "minimax": ATTENTION, "qwen3_next": ATTENTION, "qwen3_5_moe_text": ATTENTION,
    "granitemoe_swa": {}, "mellum": {}, "laguna": {}, "jamba": {}, "minimax_m3_vl_text": {},
    "qwen4_exp_text": {}, "flint": FOUR, "deepseek_v4": FOUR,
    "doge": {"is_moe": True, "num_experts": 16},
    "granitemoehybrid": {"layer_types": ["attention"] * 2, "mamba_n_heads": 4, "mamba_expand": 2},
    "dbrx": {
        "d_model": 32, "n_heads": 4, "n_layers": 2,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"moe_num_experts": 4, "moe_top_k": 2, "ffn_hidden_size": 16},
    },
}  # fmt: skip
IDS = torch.tensor([[5, 9, 3, 7, 11, 2], [4, 8, 6, 1, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])


def student(family: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**BASE, **FAMILIES.get(family, {})})
    return AutoModelForCausalLM.from_config(config)


def distiller(family: str, **losses: float) -> Distiller:
    return Distiller(
        student(family), [], alignment=AlignmentConfig(), projection=ProjectionConfig(),
        fusion=FusionConfig(), losses=LossConfig.model_validate({"key": 0, "value": 0, **losses}),
    )  # fmt: skip


def batch(rows: slice = slice(None)) -> dict[str, torch.Tensor]:
    labels = IDS.masked_fill(MASK == 0, -100)
    return {"input_ids": IDS[rows], "attention_mask": MASK[rows], "labels": labels[rows]}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_and_its_weight_are_those_of_the_model(family: str) -> None:
    """A model adds ``coefficient · loss`` to its own loss when it outputs router logits."""
    model = student(family).eval()
    inputs = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS, "use_cache": False}
    with torch.no_grad():
        plain = model(**inputs).loss
    output = model(**inputs, output_router_logits=True)
    found = LoadBalancing(model, None)
    loss = found(output, MASK)
    assert loss is not None
    assert float(loss.detach()) > 0
    torch.testing.assert_close(found.weight * loss, output.loss - plain, atol=2e-6, rtol=1e-3)
    loss.backward()
    assert any(bool(p.grad.any()) for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_a_student_of_experts_trains_with_it_by_default(family: str) -> None:
    trained = distiller(family)
    output = trained(batch())
    own = trained.student(**batch(), output_router_logits=True, use_cache=False)
    torch.testing.assert_close(output["parts"]["router_aux"], own.aux_loss)
    torch.testing.assert_close(output["loss"], own.loss, atol=1e-5, rtol=1e-5)
    assert float(output["kv"]) == 0


def test_it_can_be_scaled_and_switched_off() -> None:
    plain, scaled, off = (
        distiller("mixtral", **x)(batch()) for x in ({}, {"router_aux": 0.5}, {"router_aux": 0})
    )
    aux = plain["parts"]["router_aux"]
    torch.testing.assert_close(scaled["loss"], off["loss"] + 0.5 * aux)
    torch.testing.assert_close(plain["loss"], off["loss"] + 0.001 * aux)
    assert "router_aux" not in off["parts"]


def test_micro_batches_count_by_their_tokens() -> None:
    trained = distiller("mixtral")
    counts = trained.count(batch())
    each = [trained(batch(slice(i, i + 1)))["parts"]["router_aux"] for i in range(2)]
    parts = [trained(batch(slice(i, i + 1)), counts)["parts"]["router_aux"] for i in range(2)]
    torch.testing.assert_close(sum(parts), (5 * each[0] + 3 * each[1]) / 8)


def test_checkpointed_layers_have_the_same_gradients() -> None:
    found = []
    for checkpointing in (False, True):
        trained = distiller("qwen3_moe", router_aux=1.0).train()
        if checkpointing:
            trained.capture.checkpoint_activations()
        trained(batch())["loss"].backward()
        found.append({name: p.grad for name, p in trained.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


def test_a_weight_for_a_student_without_experts_is_refused() -> None:
    assert "router_aux" not in distiller("llama", router_aux=0)(batch())["parts"]
    with pytest.raises(ConfigError, match="'llama' has none; set it to 0"):
        distiller("llama", router_aux=0.1)


def test_experts_of_unknown_code_are_not_left_unbalanced_in_silence() -> None:
    stranger = type("Stranger", (), {"__module__": __name__})()
    stranger.router_aux_loss_coef, stranger.num_experts = 0.01, 4
    stranger.config = AutoConfig.for_model("mixtral")
    with pytest.raises(ConfigError, match="'mixtral' has one that cannot be computed; set it to 0"):
        LoadBalancing(stranger, None)
    assert LoadBalancing(stranger, 0).inputs == {}
