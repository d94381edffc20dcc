"""A student's adapter is verified on the student in hand, be its model type known or not."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kvdistill.attention.adapters import PLAIN
from kvdistill.attention.fitting import fit_adapter
from kvdistill.attention.geometry import position_limit, text_model
from kvdistill.attention.kv_capture import KVCapture, verify_student
from kvdistill.config.distill import AlignmentConfig, FusionConfig, LossConfig, ProjectionConfig
from kvdistill.distill.distiller import Distiller
from kvdistill.errors import StudentError
from kvdistill.types import KINDS, Kind
from tests.attention.families import DECODERS
from tests.extract.models import tiny_model

# The text model of Qwen2-VL has no head of its own.
CAUSAL = [name for name in DECODERS if name != "qwen2_vl, text"]


def student(name: str) -> Any:
    model_type, options = DECODERS[name]
    return tiny_model(model_type, head=True, **options).requires_grad_(True).train()


@pytest.mark.parametrize("name", CAUSAL)
def test_every_family_is_read_as_student_as_it_is_as_teacher(name: str) -> None:
    model = student(name)
    verified = verify_student(model)
    as_teacher = fit_adapter("t", text_model(model).eval(), None)
    capture = KVCapture(model)
    assert capture.adapter == verified.adapter == as_teacher.adapter
    shapes = capture.geometry.shapes
    assert capture.geometry.num_layers == len(as_teacher.layers)
    for layer in as_teacher.layers:
        assert shapes["key"] == (layer.num_key_value_heads, layer.key_head_dim)
        assert shapes["value"] == (layer.num_key_value_heads, layer.value_head_dim)
    with capture() as found:
        model(torch.arange(3, 16)[None], use_cache=False)
    assert len(found) == len(as_teacher.layers)
    for qkv in found:
        for kind in KINDS:
            num_heads, head_dim = shapes[kind]
            assert getattr(qkv, kind).shape == (1, num_heads, 13, head_dim)
    sum(key.square().sum() for _, key, _ in found).backward()
    taps = [tap for site in capture.sites for tap in site.taps]
    gradients = [p.grad for tap in taps for p in tap.parameters() if p.grad is not None]
    assert any(gradient.abs().sum() > 0 for gradient in gradients)


NORMED_BY_FLAG = {
    "cohere": {"use_qk_norm": True},
    "phi": {"qk_layernorm": True},
    "stablelm": {"qk_layernorm": True},
    "glm4_moe": {"use_qk_norm": True, "first_k_dense_replace": 4, "head_dim": 8},
}


@pytest.mark.parametrize("model_type", NORMED_BY_FLAG)
def test_norms_that_a_family_has_by_a_flag_are_passed_before_the_tap(model_type: str) -> None:
    """The student's taps, multiplied out, are its own attention; before the norm they are not."""
    options = DECODERS["llama"][1] | NORMED_BY_FLAG[model_type]
    model = tiny_model(model_type, head=True, **options)
    for parameter in model.parameters():
        parameter.copy_(torch.rand_like(parameter) - 0.3)
    as_teacher = fit_adapter("t", model.base_model, None)
    assert KVCapture(model).adapter == verify_student(model).adapter == as_teacher.adapter
    assert as_teacher.adapter.key_norm
    assert max(layer.error for layer in as_teacher.layers) < 1e-5


@pytest.mark.parametrize("name", CAUSAL)
def test_rewriting_is_seen_by_attention_and_own_keys_and_values_change_nothing(name: str) -> None:
    model = student(name).eval().requires_grad_(False)
    capture = KVCapture(model)
    ids = torch.arange(3, 16)[None]
    if "latent" in name:
        with (
            pytest.raises(StudentError, match=r"latents.*set losses\.inject to 0"),
            capture.rewriting(lambda own, layer, kind: own),
        ):
            pass
        return
    own = model(ids, use_cache=False).logits
    rewritten: set[tuple[int, str]] = set()

    def note(x: torch.Tensor, layer: int, kind: Kind) -> torch.Tensor:
        rewritten.add((layer, kind))
        return x

    with capture.rewriting(note):
        torch.testing.assert_close(model(ids, use_cache=False).logits, own, rtol=1e-5, atol=1e-6)
    layers = range(capture.geometry.num_layers)
    assert rewritten == {(layer, kind) for layer in layers for kind in KINDS}
    for layer, kind in rewritten:
        with capture.rewriting(lambda x, i, k, at=(layer, kind): x.flip(-1) if at == (i, k) else x):
            assert not torch.allclose(model(ids, use_cache=False).logits, own, rtol=1e-5, atol=1e-6)


def test_queries_are_captured_only_where_a_loss_needs_them() -> None:
    model = student("llama").requires_grad_(False)
    made: list[Any] = []
    model.model.layers[0].self_attn.q_proj.register_forward_hook(
        lambda module, args, output: made.append(weakref.ref(output))
    )
    batch = {"input_ids": torch.arange(3, 16)[None], "attention_mask": torch.ones(1, 13).long()}
    settings = {"alignment": AlignmentConfig(), "fusion": FusionConfig()}
    kept = []
    for weight in (0.0, 0.1):
        losses = LossConfig(attention_kl=weight)
        distiller = Distiller(
            model, [], projection=ProjectionConfig(mode="frozen"), losses=losses, **settings
        )
        with distiller.capture(queries=weight > 0) as found:
            model(**batch, use_cache=False)
        kept.append(made[-1]() is not None)
        output = distiller.run_student(batch)
        assert (output.query_BLQTD is None) == (weight == 0) == (found[0].query is None)
    assert kept == [False, True]


def test_random_states_and_training_modes_are_left_alone() -> None:
    model = student("gpt2, fused")  # with dropout
    model.transformer.h[1].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    verify_student(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_unknown_student_is_read_with_the_adapter_that_fits() -> None:
    known = KVCapture(student("qwen3"))
    model = student("qwen3")
    for layer in model.model.layers:
        torch.nn.init.uniform_(layer.self_attn.k_norm.weight, 0.5, 2.0)
    model.config.model_type = "never_heard_of"
    capture = KVCapture(model)
    assert capture.adapter == verify_student(model).adapter
    assert capture.adapter.key_norm
    assert capture.geometry == known.geometry


def test_an_unknown_student_is_located_before_its_weights_are_loaded() -> None:
    with torch.device("meta"):
        model = student("llama")
        model.config.model_type = "never_heard_of"
        assert KVCapture(model).geometry.num_layers == 3


def test_a_student_whose_taps_are_not_its_keys_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a new version of transformers moves a norm between tap and attention."""
    model = student("qwen3")
    for layer in model.model.layers:
        torch.nn.init.uniform_(layer.self_attn.k_norm.weight, 0.5, 2.0)
    monkeypatch.setattr("kvdistill.attention.kv_capture.adapters_for", lambda model: [PLAIN])
    with pytest.raises(StudentError, match=r"type 'qwen3' cannot be read.*layer 0") as caught:
        verify_student(model)
    assert "\n" not in str(caught.value)
    assert model.training


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: tiny_model("bert", **DECODERS["llama"][1]), "an encoder cannot be a student"),
    ],
)
def test_a_model_that_cannot_be_a_student_is_refused(model: Any, words: str) -> None:
    with pytest.raises(StudentError, match=words):
        KVCapture(model())


POSITIONS = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 24, "pad_token_id": 1,
    "ffn_dim": 32, "decoder_ffn_dim": 32, "embed_dim": 32, "rotary_dim": 8,
}  # fmt: skip


@pytest.mark.parametrize(
    "model_type",
    ["llama", "gemma3_text", "gpt_neox", "bloom", "falcon", "xglm", "gpt2", "opt", "gptj",
     "codegen", "ctrl", "biogpt", "openai-gpt", "gpt_bigcode", "roberta", "bert", "bart"],
)  # fmt: skip
def test_a_table_of_positions_is_found_where_longer_texts_fail(model_type: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **POSITIONS)
    model = AutoModelForCausalLM.from_config(config).eval()

    def runs(length: int) -> bool:
        ids = torch.arange(length)[None] % 60 + 2
        try:
            with torch.no_grad():
                model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        except (IndexError, RuntimeError):
            return False
        return True

    limit = position_limit(model)
    assert runs(limit or 40)
    assert runs((limit or 40) + 1) == (limit is None)
