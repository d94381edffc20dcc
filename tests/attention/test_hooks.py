"""Every family against what transformers itself keeps or computes, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer

from kvdistill.attention.adapters import QKV, adapters_for
from kvdistill.attention.fitting import first_fitting
from kvdistill.attention.geometry import VerifiedLayer
from kvdistill.attention.hooks import capture, find_sites
from kvdistill.attention.rotary import rotate, unrotate
from kvdistill.attention.verification import verify_adapter
from kvdistill.errors import AdapterError
from kvdistill.types import Stream
from tests.attention.families import DECODERS, ENCODER_DECODERS, ENCODERS
from tests.extract.models import tiny_model

LENGTHS = (11, 7, 1, 9)
STREAMS: tuple[Stream, ...] = ("encoder", "decoder", "cross")


def padded(side: str) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and position ids of four unequal sequences, `[B, T]` each."""
    torch.manual_seed(1)
    ids = torch.randint(3, 60, (len(LENGTHS), max(LENGTHS)))
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        mask[row, slice(0, length) if side == "right" else slice(-length, None)] = 1
    return ids * mask, mask, (mask.cumsum(-1) - 1).clamp(min=0)


def verified(model: Any, stream: Stream | None = None) -> tuple[list[Any], list[VerifiedLayer]]:
    fitting = first_fitting(model, adapters_for(model, stream))
    return fitting.sites, fitting.layers


def captured(model: Any, found: list[Any], **inputs: Any) -> tuple[dict[int, QKV], Any]:
    seen: dict[int, QKV] = {}
    with capture(found, seen.__setitem__), torch.no_grad():
        output = model(**inputs)
    return seen, output


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", DECODERS)
def test_decoder_equals_own_cache_unrotated(name: str, side: str) -> None:
    model_type, options = DECODERS[name]
    model = tiny_model(model_type, **options)
    found, layers = verified(model)
    ids, mask, positions = padded(side)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if side == "left" and model_type != "opt":  # which derives them from the mask
        inputs["position_ids"] = positions
    cache = DynamicCache(config=model.config)
    # Every token is kept of sliding layers, not just the window.
    cache.layers = [DynamicLayer() if getattr(x, "is_sliding", False) else x for x in cache.layers]
    inputs["past_key_values"] = None if model_type == "minimax" else cache
    seen, output = captured(model, found, **inputs, use_cache=True)
    cache = output.past_key_values  # MiniMax makes its own
    where = mask.bool()
    for layer in layers:
        cached = cache.layers[layer.layer_idx]
        key, value = cached.keys, cached.values
        if "latent" in name:  # which caches what keys and values are computed from
            key, value = model.layers[layer.layer_idx].self_attn.expand_kv(key, value)
        if layer.rotary is not None:
            key = unrotate(key, positions[:, None], layer.rotary)
        groups = key.shape[1] // layer.num_key_value_heads  # Falcon caches repeated heads
        real = where[:, None, :, None]
        for ours, theirs in (
            (seen[layer.layer_idx].key, key),
            (seen[layer.layer_idx].value, value),
        ):
            torch.testing.assert_close(
                ours * real, theirs[:, ::groups] * real, rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_equals_own_attention_inputs(name: str, side: str) -> None:
    model_type, options = ENCODERS[name]
    model = tiny_model(model_type, **options)
    found, layers = verified(model)
    ids, mask, positions = padded(side)
    rotated_at = torch.arange(ids.shape[1])[None] if side == "right" else positions
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if model_type == "modernbert":
        inputs["position_ids"] = rotated_at.expand_as(ids)
    with recorded_attention() as products:
        seen, _ = captured(model, found, **inputs)
    real = mask.bool()[:, None, :, None]
    assert len(products) == len(layers)
    for layer, (_, key, value) in zip(layers, products, strict=True):
        ours = seen[layer.layer_idx]
        turned = ours.key
        if layer.rotary is not None:
            turned = rotate(turned, rotated_at[:, None], layer.rotary)
        torch.testing.assert_close(turned * real, key * real, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.value * real, value * real, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_encoder_decoder_streams(name: str, stream: Stream, side: str) -> None:
    model_type, options = ENCODER_DECODERS[name]
    model = tiny_model(model_type, **options)
    found, layers = verified(model, stream)
    ids, mask, _ = padded(side)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    with recorded_attention() as products:
        seen, _ = captured(
            model,
            found,
            input_ids=ids,
            attention_mask=mask,
            decoder_input_ids=ids[:, :5],
            past_key_values=cache,
            use_cache=True,
        )
    for layer in layers:
        if stream == "encoder":
            _, key, value = products[layer.layer_idx]
        else:
            part = (
                cache.self_attention_cache if stream == "decoder" else (cache.cross_attention_cache)
            )
            key, value = part.layers[layer.layer_idx].keys, part.layers[layer.layer_idx].values
        assert seen[layer.layer_idx].key.shape[2] == (5 if stream == "decoder" else ids.shape[1])
        torch.testing.assert_close(seen[layer.layer_idx].key, key, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(seen[layer.layer_idx].value, value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["granite", "opt, scaled queries", "gemma2, sliding", "llama"])
def test_scores_are_scaled_as_the_model_scales_them(name: str) -> None:
    model_type, options = DECODERS[name]
    model = tiny_model(model_type, **options)
    expected = {"granite": 0.3, "gemma2": 256**-0.5}.get(model_type, 8**-0.5)
    assert [layer.scaling for layer in verified(model)[1]] == pytest.approx([expected] * 3)


def test_hybrid_layers_are_skipped_by_name() -> None:
    model_type, options = DECODERS["lfm2, hybrid"]
    model = tiny_model(model_type, **options)
    found, skipped = find_sites(model, adapters_for(model)[0])
    assert [site.layer_idx for site in found] == [1]
    assert skipped.keys() == {0, 2}
    assert "Lfm2DecoderLayer" in skipped[0]


def test_layers_without_rotary_are_told_apart() -> None:
    model_type, options = DECODERS["smollm3, layers without rotary"]
    layers = verified(tiny_model(model_type, **options))[1]
    assert [layer.rotary is None for layer in layers] == [False, True, False]


def test_an_adapter_that_misses_a_norm_is_refused() -> None:
    model_type, options = DECODERS["qwen3"]
    model = tiny_model(model_type, **options)
    for layer in model.layers:
        torch.nn.init.uniform_(layer.self_attn.k_norm.weight, 0.5, 2.0)
    plain = adapters_for(tiny_model("llama", **DECODERS["llama"][1]))[0]
    found, _ = find_sites(model, plain)
    with pytest.raises(AdapterError, match=r"layer 0: tapped queries, keys or values differ"):
        verify_adapter(model, found)


def test_an_unknown_architecture_is_tried_and_verified() -> None:
    model_type, options = DECODERS["qwen3"]
    model = tiny_model(model_type, **options)
    model.config.model_type = "never_heard_of"
    fits = []
    for adapter in adapters_for(model):
        try:
            found, _ = find_sites(model, adapter)
            verify_adapter(model, found)
        except AdapterError:
            continue
        fits.append(adapter)
    assert fits
    assert fits[0].key_norm


def test_hooks_are_gone_after_an_error() -> None:
    model = tiny_model("llama", **DECODERS["llama"][1])
    found, _ = find_sites(model, adapters_for(model)[0])

    def fail(layer_idx: int, qkv: QKV) -> None:
        raise ArithmeticError

    with pytest.raises(ArithmeticError), capture(found, fail):
        model(torch.arange(3, 16)[None])
    assert not any(module._forward_hooks for module in model.modules())


@contextmanager
def recorded_attention() -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """Arguments of every scaled_dot_product_attention call, in order."""
    calls: list[tuple[Tensor, Tensor, Tensor]] = []
    original = F.scaled_dot_product_attention

    def record(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append((query, key, value))
        return original(query, key, value, *args, **kwargs)

    F.scaled_dot_product_attention = record  # type: ignore[assignment]
    try:
        yield calls
    finally:
        F.scaled_dot_product_attention = original  # type: ignore[assignment]
