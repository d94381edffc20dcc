"""An adapter is used only after it reproduces what the model's own attention is given.

A few tokens run through the model while the arguments of every attention product are recorded.
The tapped Q and K, rotated by the model's frequencies in float32, and the tapped V must equal
them. The same run measures what no config states uniformly: which layers rotate, whether channel
pairs are halves or neighbours, how scores are scaled and soft-capped, and what a query may see.

A teacher that no adapter fits is read from its own cache, un-rotated in float32. There the same
tokens are read at two positions, ``p`` and ``p + SHIFT``: keys that are un-rotated correctly are
equal at both. Where keys still differ although values do not, the rotation was not found, and the
teacher is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from kvdistill.attention.adapters import QKV, Adapter, separate
from kvdistill.attention.attention_rule import AttentionRule, MaskRule, OwnBias, fit_rule
from kvdistill.attention.geometry import VerifiedLayer
from kvdistill.attention.hooks import AttentionInputs, OnLayer, Site, attention_probe, capture
from kvdistill.attention.rotary import placements, rotary_candidates, rotate, unrotate
from kvdistill.errors import AdapterError
from kvdistill.store.manifest import RotarySpec

TOLERANCE: Final = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest difference, relative to the largest entry, that rounding explains."""
PROBE_TOKENS: Final = 13
"""Length of the verification run; prime, so that no other axis is mistaken for the token axis."""


def verify_adapter(model: Any, sites: Sequence[Site]) -> list[VerifiedLayer]:
    """Run a few tokens through a model and compare taps and attention inputs at every site.

    Layers whose attention runs without their own keys and values (Gemma 3n) are left out.

    Raises:
        AdapterError: a layer's tapped tensors are not what its attention is given.
    """
    rotations = rotary_candidates(model, max(site.layer_idx for site in sites) + 1)
    tapped: dict[int, QKV] = {}
    with attention_probe(model, sites) as seen, capture(sites, tapped.__setitem__):
        run_probe(model)
    verified = []
    for site in sites:
        if site.layer_idx in seen and site.layer_idx not in tapped:
            continue
        if site.layer_idx not in seen:
            raise AdapterError(
                f"layer {site.layer_idx}: the attention product of {type(site.attention).__name__} "
                "was not observed; it runs neither through transformers' AttentionInterface nor "
                "through scaled_dot_product_attention or matmul"
            )
        compared = tapped[site.layer_idx], seen[site.layer_idx], rotations[site.layer_idx]
        verified.append(_compare_layer(site, sites, *compared))
    if not verified:
        raise AdapterError(f"no layer of {type(model).__name__} computes keys and values")
    return verified


@torch.no_grad()
def run_probe(model: Any) -> None:
    """A pass over a few random tokens, through every stream of the model."""
    inputs = {"input_ids": probe_ids(model)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :-2]
    model(**inputs, attention_mask=torch.ones_like(inputs["input_ids"]), use_cache=False)


def probe_ids(model: Any) -> Tensor:
    """Ordinary tokens that differ from those 7 places before: ``[1, PROBE_TOKENS]``.

    All of them differ where the vocabulary suffices.
    """
    config = model.config.get_text_config()
    named = {**model.config.to_dict(), **config.to_dict()}
    ids_of = [v for k, v in named.items() if k.endswith(("token_id", "token_index"))]
    special = {i for ids in ids_of for i in (ids if isinstance(ids, list | tuple) else [ids])}
    generator = torch.Generator().manual_seed(0)
    vocab_size = model.get_input_embeddings().weight.shape[0]
    order = torch.randperm(min(vocab_size, config.vocab_size), generator=generator).tolist()
    ordinary = [i for i in order if i not in special]
    chosen = (ordinary if len(ordinary) > 1 else order)[:PROBE_TOKENS]
    chosen = chosen[:6] if len(chosen) == 7 else chosen
    ids = [chosen[i % len(chosen)] for i in range(PROBE_TOKENS)]
    return torch.tensor([ids], device=model.get_input_embeddings().weight.device)


def _compare_layer(
    site: Site,
    sites: Sequence[Site],
    taps: QKV,
    seen: AttentionInputs,
    rotations: Sequence[RotarySpec],
) -> VerifiedLayer:
    options: list[tuple[float, float, RotarySpec | None]] = []
    for spec in (*placements(rotations, taps.key.shape[-1]), None):
        query, factor = _scaled_like(_rotated(taps.query, spec), seen.query)
        error = max(
            _input_difference(query, seen.query),
            _input_difference(_rotated(taps.key, spec), seen.key),
            _input_difference(taps.value.float(), seen.value),
        )
        options.append((error, factor, spec))
    error, factor, spec = min(options, key=lambda option: option[0])
    tolerance = TOLERANCE[taps.key.dtype]
    if not error <= tolerance:
        raise AdapterError(
            f"adapter {site.adapter.name!r} does not fit {type(site.attention).__name__}, layer "
            f"{site.layer_idx}: tapped queries, keys or values differ from the attention's own "
            f"inputs by {error:.1e} (relative), where rounding explains {tolerance:.0e}; this "
            "architecture needs an adapter of its own (kvdistill/attention/adapters.py)"
        )
    return VerifiedLayer(
        site.layer_idx,
        num_key_value_heads=taps.key.shape[1],
        key_head_dim=taps.key.shape[-1],
        value_head_dim=taps.value.shape[-1],
        error=error,
        **vars(_attention_rule(site, sites, seen, spec, factor)),
    )


def _attention_rule(
    site: Site,
    sites: Sequence[Site],
    seen: AttentionInputs,
    rotary: RotarySpec | None,
    factor: float,
) -> AttentionRule:
    """What a layer does with its queries and keys; ``factor`` is on the queries already."""
    weights, names = seen.probabilities, dict(site.attention.named_parameters(recurse=False))
    mask = seen.mask
    if mask is None:
        looks_ahead = weights is not None and bool(weights.triu(1).any())
        mask = MaskRule(site.adapter.is_causal if weights is None else not looks_ahead)
    sinks = next((name for name, own in names.items() if own is seen.sinks), None)
    stated = [getattr(site.attention, name, None) for name in ("scaling", "softmax_scale")]
    scalings = [x for x in stated if isinstance(x, float)] + [seen.query.shape[-1] ** -0.5, 1.0]
    rules = [
        AttentionRule(
            rotary=rotary, scaling=factor * scaling, mask=mask, softcap=seen.softcap, sinks=name
        )
        for scaling in (scalings if seen.scaling is None else [seen.scaling])
        # Granite's sink scales the output, and leaves the weights as they are.
        for name in dict.fromkeys((sinks, None))
    ]
    # T5's first layer holds the bias of all, UMT5's layers one each.
    learned = [
        s.attention for s in (site, sites[0]) if hasattr(s.attention, "relative_attention_bias")
    ]
    biases = [OwnBias(attention) for attention in learned if hasattr(attention, "compute_bias")]
    return fit_rule(
        rules, seen.query.float() / factor, seen.key, weights, sinks_Q=seen.sinks, biases=biases
    )


def _rotated(x: Tensor, spec: RotarySpec | None) -> Tensor:
    if spec is None:
        return x.float()
    return rotate(x, torch.arange(x.shape[-2], device=x.device), spec)


def _scaled_like(query: Tensor, seen: Tensor) -> tuple[Tensor, float]:
    """Find and apply the factor on queries of models that scale before the product (OPT)."""
    if query.shape != seen.shape:
        return query, 1.0
    factor = float((query * seen.float()).sum() / (query * query).sum().clamp_min(1e-30))
    factor = 1.0 if abs(factor - 1.0) < 1e-3 else factor
    return query * factor, factor


def _input_difference(tapped: Tensor, seen: Tensor) -> float:
    """Relative to the largest entry; attention may have repeated key/value heads for queries."""
    if tapped.shape != seen.shape:
        repeats, rest = divmod(seen.shape[1], tapped.shape[1])
        if rest or not repeats:
            return float("inf")
        tapped = tapped.repeat_interleave(repeats, dim=1)
        if tapped.shape != seen.shape:
            return float("inf")
    return _relative_difference(seen.float(), tapped)


def _relative_difference(reference: Tensor, other: Tensor) -> float:
    return float((reference - other).abs().max() / reference.abs().max().clamp_min(1e-30))


CACHE: Final = Adapter("own cache, un-rotated", layers="", attention="", taps=(), cut=separate)
"""Stands for the absence of an adapter: keys and values come from the model's own cache."""
SHIFT: Final = 7
CACHE_TOLERANCE: Final = 1e-4
"""Relative to the largest entry; rotations at two positions differ by float32 rounding."""


def forward_through_cache(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    layers: Sequence[VerifiedLayer],
    on_layer: OnLayer,
    *,
    position: int = 0,
) -> Tensor:
    """One pass over right-padded ``[B, T]`` with a cache, handed out layer by layer afterwards.

    Returns the final hidden state. A cache holds no queries: ``on_layer`` receives the keys in
    their place, so nothing that needs queries may be computed from this.
    """
    output, cache = _run_with_cache(model, input_ids, attention_mask, position)
    positions = torch.arange(input_ids.shape[1], device=input_ids.device) + position
    for layer in layers:
        key, value = _cache_entry(cache, layer.layer_idx)
        if layer.rotary is not None:
            key = unrotate(key, positions.to(key.device), layer.rotary)
        on_layer(layer.layer_idx, QKV(key, key, value))
    hidden: Tensor = output.last_hidden_state
    return hidden


def verify_cache(model: Any) -> tuple[list[VerifiedLayer], dict[int, str]]:
    """Find the rotation of every cached layer: ``(layers, {layer without keys: why})``.

    Raises:
        AdapterError: the model is not in float32, has no cache or takes no positions, or none of
            its rotary modules explains the cached keys.
    """
    unfit = f"no adapter fits {type(model).__name__}, and"
    if model.dtype != torch.float32:
        raise AdapterError(
            f"{unfit} its cache can be un-rotated in float32 only, not {model.dtype}; set the "
            "teacher's dtype to float32"
        )
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise AdapterError(
            f"{unfit} it takes no position_ids, without which an un-rotated cache cannot be "
            "verified"
        )
    ids = probe_ids(model)
    mask = torch.ones_like(ids)
    (_, here), (_, there) = (_run_with_cache(model, ids, mask, position=p) for p in (0, SHIFT))
    verified, skipped = [], {}
    for layer_idx, rotations in enumerate(rotary_candidates(model, len(here.layers))):
        if getattr(here.layers[layer_idx], "keys", None) is None:
            skipped[layer_idx] = f"{type(here.layers[layer_idx]).__name__} holds no keys"
            continue
        near, far = _cache_entry(here, layer_idx), _cache_entry(there, layer_idx)
        layer = _cached_layer(layer_idx, near, far, rotations)
        if layer is None:
            raise AdapterError(
                f"{unfit} the keys in its cache cannot be un-rotated: those of layer {layer_idx} "
                "still depend on their position; this architecture needs an adapter of its own "
                "(kvdistill/attention/adapters.py)"
            )
        verified.append(layer)
    if not verified:
        raise AdapterError(f"{unfit} its cache holds no keys")
    for layer_idx in range(len(here.layers), model.config.get_text_config().num_hidden_layers):
        skipped[layer_idx] = "no cache of its own: it attends to keys and values of another layer"
    return verified, skipped


def _cached_layer(
    layer_idx: int,
    near: tuple[Tensor, Tensor],
    far: tuple[Tensor, Tensor],
    rotations: Sequence[RotarySpec],
) -> VerifiedLayer | None:
    """Keys and values of the same tokens ``SHIFT`` positions apart → how they are rotated."""
    (key, value), (far_key, far_value) = near, far
    num_tokens = key.shape[2]
    positions = torch.arange(num_tokens, device=key.device)
    options: list[tuple[float, RotarySpec | None]] = [(_relative_difference(key, far_key), None)]
    for spec in placements(rotations, key.shape[3]):
        far_unrotated = unrotate(far_key, positions + SHIFT, spec, num_tokens + SHIFT)
        error = _relative_difference(unrotate(key, positions, spec), far_unrotated)
        options.append((error, spec))
    error, rotary = min(options, key=lambda option: option[0])
    # Absolute positions: keys and values depend on their position, and are stored as they are.
    value_moves = _relative_difference(value, far_value) > CACHE_TOLERANCE
    is_absolute = not rotations and value_moves
    # In a rotary model, what moves is no value but a part of the keys (latent attention's cache).
    if not is_absolute and (error > CACHE_TOLERANCE or value_moves):
        return None
    shape = key.shape[1], key.shape[3], value.shape[3]
    scaling = key.shape[3] ** -0.5
    mask = MaskRule(causal=True)
    return VerifiedLayer(
        layer_idx, *shape, min(error, 1.0), rotary=rotary, scaling=scaling, mask=mask
    )


@torch.inference_mode()
def _run_with_cache(model: Any, input_ids: Tensor, mask: Tensor, position: int) -> tuple[Any, Any]:
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    positions = torch.arange(input_ids.shape[1], device=input_ids.device) + position
    cache = DynamicCache(config=model.config)
    # Every token is kept, of layers with a sliding window too.
    cache.layers = [DynamicLayer() if getattr(x, "is_sliding", False) else x for x in cache.layers]
    output = model(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=positions.expand_as(input_ids),
        past_key_values=cache,
        use_cache=True,
    )
    return output, cache


def _cache_entry(cache: Any, layer_idx: int) -> tuple[Tensor, Tensor]:
    layer = cache.layers[layer_idx]
    return layer.keys, layer.values
