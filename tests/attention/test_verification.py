"""What is verified on a model in hand: its attention, an adapter, or as a last resort its cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kvdistill.attention import fitting
from kvdistill.attention.adapters import QKV
from kvdistill.attention.fitting import fit_adapter
from kvdistill.attention.geometry import VerifiedLayer
from kvdistill.attention.hooks import PROBE_KERNEL, capture
from kvdistill.attention.rotary import rotate
from kvdistill.attention.verification import CACHE, forward_through_cache
from kvdistill.errors import TeacherError
from kvdistill.pipelines.extract import extract
from kvdistill.store.reader import KVStore
from tests.attention.families import DECODERS, ENCODER_DECODERS, ENCODERS
from tests.extract.models import save_teacher, tiny_model
from tests.pipelines.test_teachers import make

FAMILIES = {**DECODERS, **ENCODERS, **ENCODER_DECODERS}
CASES = [(name, None) for name in (*DECODERS, *ENCODERS)]
CASES += [(name, stream) for name in ENCODER_DECODERS for stream in ("encoder", "decoder")]
BIASED = {"falcon, alibi", "t5"}

IDS = torch.arange(3, 42).reshape(3, 13)


def attention_weights(qkv: QKV, layer: VerifiedLayer, attention: Any) -> torch.Tensor:
    """Attention of one layer ``[B, HQ, T, T]``, from its taps and what was measured of it."""
    query, key, _ = qkv
    position = torch.arange(query.shape[2])
    if layer.rotary is not None:
        query, key = (rotate(x, position, layer.rotary) for x in (query, key))
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = layer.scaling * query @ key.mT
    if layer.softcap is not None:
        scores = layer.softcap * (scores / layer.softcap).tanh()
    if layer.bias is not None:
        scores = scores + layer.bias(position, position, len(position))
    distance = position[:, None] - position
    visible = torch.ones_like(distance, dtype=torch.bool)
    if layer.mask.causal:
        visible &= distance >= 0
    if layer.mask.sliding_window is not None:
        visible &= distance.abs() < layer.mask.sliding_window
    scores = scores.masked_fill(~visible, -torch.inf)
    if layer.sinks is None:
        return scores.softmax(-1)
    sink = getattr(attention, layer.sinks)[:, None, None].expand_as(scores[..., :1])
    return torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]


@pytest.mark.parametrize(("name", "stream"), CASES, ids=lambda value: value or "self")
def test_attention_is_what_was_measured(name: str, stream: Any) -> None:
    """Scale, soft cap, causality and window give the model's own attention weights."""
    model_type, options = FAMILIES[name]
    model = tiny_model(model_type, **options)
    for parameter in model.parameters():
        parameter.mul_(3.0)  # scores that a soft cap and a scale matter for
    if model._can_set_attn_implementation():
        model.set_attn_implementation("eager")
    else:  # before it is measured: eager Falcons add ALiBi twice
        model.config._attn_implementation = "eager"
    verified = fit_adapter("t", model, stream)
    assert {layer.bias is not None for layer in verified.layers} == {name in BIASED}
    assert max(layer.attention_error for layer in verified.layers) < 1e-5
    ids = torch.arange(3, 16)[None]
    inputs: dict[str, Any] = {"input_ids": ids} | ({"decoder_input_ids": ids} if stream else {})
    seen: dict[int, QKV] = {}
    with capture(verified.sites, seen.__setitem__):
        output = model(**inputs, output_attentions=True)
    own = output[{"encoder": "encoder_attentions", "decoder": "decoder_attentions"}.get(
        stream, "attentions"
    )]  # fmt: skip
    own = [weights for weights in own if weights is not None]
    if len(own) > len(verified.layers):  # of linear layers, or with the keys of an earlier layer
        own = [own[layer.layer_idx] for layer in verified.layers]
    for weights, layer, site in zip(own, verified.layers, verified.sites, strict=True):
        expected = attention_weights(seen[layer.layer_idx], layer, site.attention)
        torch.testing.assert_close(expected, weights, rtol=1e-3, atol=1e-5)


def test_settings_differ_between_layers_and_families() -> None:
    """The test above would pass if nothing was ever measured and nothing ever masked."""

    def layers(name: str) -> list[VerifiedLayer]:
        model_type, options = FAMILIES[name]
        return fit_adapter("t", tiny_model(model_type, **options), None).layers

    assert [layer.mask.sliding_window for layer in layers("gemma3, sliding")] == [4, None, 4]
    assert [layer.softcap for layer in layers("gemma2, sliding")] == [50.0] * 3
    assert [layer.mask.sliding_window for layer in layers("llama")] == [None] * 3
    assert {
        layer.mask.causal for name in ("gptj, interleaved", "llama") for layer in layers(name)
    } == {True}
    assert {layer.mask.causal for layer in layers("bert")} == {False}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_model_keeps_its_own_kernel(implementation: str) -> None:
    model = tiny_model("llama", **DECODERS["llama"][1])
    model.set_attn_implementation(implementation)
    before = model(IDS).last_hidden_state
    fit_adapter("t", model, None)
    assert model.config._attn_implementation == implementation
    assert torch.equal(model(IDS).last_hidden_state, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_probe_is_dispatched_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers passes queries, keys and settings of a layer to a registered kernel."""
    from transformers import AttentionInterface

    called: list[str] = []
    register = AttentionInterface.register

    def counting(name: str, kernel: Any) -> None:
        def wrapped(*args: Any, **options: Any) -> Any:
            called.append(name)
            return kernel(*args, **options)

        register(name, wrapped)

    monkeypatch.setattr(AttentionInterface, "register", counting)
    fit_adapter("t", tiny_model("llama", **DECODERS["llama"][1]), None)
    assert called == [PROBE_KERNEL] * 3
    fit_adapter("t", tiny_model("gptj", **DECODERS["gptj, interleaved"][1]), None)
    assert len(called) == 3


def stranger(name: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[Any, Any]:
    """A model whose family is unknown and which no adapter fits; and how it is really read."""
    model_type, own = DECODERS[name]
    model = tiny_model(model_type, **{**own, **options})
    known = fit_adapter("t", model, None)
    monkeypatch.setattr(fitting, "adapters_for", lambda *args: [])
    monkeypatch.setattr(fitting, "known_adapters", lambda model: ())
    return model, known


@pytest.mark.parametrize(
    "name",
    ["llama", "gemma3, sliding", "pythia, partial rotary", "gptj, interleaved", "gpt2, fused",
     "smollm3, layers without rotary"],
)  # fmt: skip
def test_equals_what_the_adapter_taps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, known = stranger(name, monkeypatch)
    verified = fit_adapter("t", model, None)
    assert verified.adapter == CACHE
    tapped: dict[int, Any] = {}
    with capture(known.sites, tapped.__setitem__):
        own = model(IDS).last_hidden_state
    cached: dict[int, Any] = {}
    mask = torch.ones_like(IDS)
    hidden = forward_through_cache(model, IDS, mask, verified.layers, cached.__setitem__)
    torch.testing.assert_close(hidden, own, rtol=1e-4, atol=1e-5)
    assert cached.keys() == tapped.keys()
    for layer_idx, qkv in tapped.items():
        torch.testing.assert_close(cached[layer_idx].key, qkv.key, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(cached[layer_idx].value, qkv.value, rtol=1e-4, atol=1e-5)


def test_a_rotation_that_is_not_found_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = stranger("llama", monkeypatch)
    monkeypatch.setattr(
        "kvdistill.attention.verification.rotary_candidates",
        lambda model, num_layers: [[]] * num_layers,
    )
    with pytest.raises(TeacherError, match="those of layer 0 still depend on their position"):
        fit_adapter("t", model, None)


def test_a_wrong_rotation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, known = stranger("llama", monkeypatch)
    wrong = known.layers[0].rotary.model_copy(update={"interleaved": True})
    monkeypatch.setattr(
        "kvdistill.attention.verification.rotary_candidates",
        lambda model, num_layers: [[wrong]] * num_layers,
    )
    with pytest.raises(TeacherError, match="still depend on their position"):
        fit_adapter("t", model, None)


def test_only_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = stranger("llama", monkeypatch)
    with pytest.raises(TeacherError, match="float32 only"):
        fit_adapter("t", model.bfloat16(), None)


def test_extracted_without_importance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_teacher(tmp_path / "t")
    extract(make(tmp_path, {}, importance=False))
    (tmp_path / "store").rename(tmp_path / "tapped")
    stranger("llama", monkeypatch)
    with pytest.raises(TeacherError, match="set extraction"):
        extract(make(tmp_path, {}))
    extract(make(tmp_path, {}, importance=False))
    for kind in ("key", "value"):
        one, other = (
            KVStore.open(tmp_path / name).read("t", "00000001", 1, 0, kind)
            for name in ("store", "tapped")
        )
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=0.02, atol=0.02)
