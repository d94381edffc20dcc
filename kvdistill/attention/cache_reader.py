"""The last resort, for an architecture that no adapter fits: its own cache, un-rotated in float32.

What must hold is checked rather than assumed. The same tokens are read at two places, ``p`` and
``p + SHIFT``. A rotation that is undone rightly leaves keys that do not know their place. Keys
that still do, while values do not, were rotated in a way that was not found: refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from kvdistill.attention.adapters import QKV
from kvdistill.attention.geometry import VerifiedLayer
from kvdistill.attention.hooks import OnLayer
from kvdistill.attention.rotary import candidates, unrotate
from kvdistill.errors import TeacherError
from kvdistill.store.manifest import RotarySpec

SHIFT: Final = 7


TOLERANCE: Final = 1e-4
"""Relative to the largest entry; rotations at two places differ by float32's rounding."""


def forward_through_cache(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    layers: Sequence[VerifiedLayer],
    on_layer: OnLayer,
) -> Tensor:
    """One pass over right-padded ``[B, T]`` with a cache, handed out layer by layer afterwards.

    Returns the final hidden state. Queries are not in a cache; ``on_layer`` gets keys in their
    place, which nothing that works without queries looks at.
    """
    output, cache = _run_with_cache(model, input_ids, attention_mask, position=0)
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    for layer in layers:
        key, value = _cache_entry(cache, layer.layer_idx)
        if layer.rotary is not None:
            key = unrotate(key, positions.to(key.device), layer.rotary)
        on_layer(layer.layer_idx, QKV(key, key, value))
    hidden: Tensor = output.last_hidden_state
    return hidden


def verify_cache(model: Any, input_ids: Tensor) -> tuple[list[VerifiedLayer], dict[int, str]]:
    """Find the rotation of every cached layer: ``(layers, {layer without keys: why})``.

    Raises:
        TeacherError: not float32, no cache, no way to say positions, or a rotation that none of
            the model's rotary modules explains.
    """
    if model.dtype != torch.float32:
        raise TeacherError(
            f"no adapter fits {type(model).__name__}, and its cache can be un-rotated in float32 "
            f"only, not {model.dtype}; set the teacher's dtype to float32"
        )
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise TeacherError(
            f"no adapter fits {type(model).__name__}, and it takes no position_ids, without "
            "which an un-rotated cache cannot be verified"
        )
    mask = torch.ones_like(input_ids)
    (_, here), (_, there) = (
        _run_with_cache(model, input_ids, mask, position=p) for p in (0, SHIFT)
    )
    rotations = candidates(model, len(here.layers))
    verified, skipped = [], {}
    for layer_idx, rotary in enumerate(rotations):
        if getattr(here.layers[layer_idx], "keys", None) is None:
            skipped[layer_idx] = f"{type(here.layers[layer_idx]).__name__} holds no keys"
            continue
        both = (_cache_entry(here, layer_idx), _cache_entry(there, layer_idx))
        verified.append(_verified_layer(model, layer_idx, both, rotary))
    if not verified:
        raise TeacherError(f"{type(model).__name__} keeps no keys in its cache")
    return verified, skipped


def _verified_layer(
    model: Any,
    layer_idx: int,
    both: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
    rotations: Sequence[RotarySpec],
) -> VerifiedLayer:
    (key, value), (moved_key, moved_value) = both
    positions = torch.arange(key.shape[2], device=key.device)
    options: list[tuple[float, RotarySpec | None]] = [(_relative_difference(key, moved_key), None)]
    for spec in rotations:
        if spec.rotary_dim <= key.shape[3]:
            turned_back = unrotate(moved_key, positions + SHIFT, spec)
            options.append(
                (_relative_difference(unrotate(key, positions, spec), turned_back), spec)
            )
    error, rotary = min(options, key=lambda option: option[0])
    knows_its_place = _relative_difference(value, moved_value) > TOLERANCE
    if error > TOLERANCE and not (knows_its_place and not rotations):
        raise TeacherError(
            f"no adapter fits {type(model).__name__}, and the keys in its cache cannot be "
            f"un-rotated: layer {layer_idx} still knows its position ({error:.1e}); this "
            "architecture needs an adapter of its own (kvdistill/attention/adapters.py)"
        )
    shape = (key.shape[1], key.shape[3], value.shape[3])
    # Absolute positions: keys and values know their place by right, and are kept as they are.
    return VerifiedLayer(
        layer_idx, *shape, rotary, scaling=key.shape[3] ** -0.5, error=min(error, 1.0)
    )


@torch.inference_mode()
def _run_with_cache(model: Any, input_ids: Tensor, mask: Tensor, position: int) -> tuple[Any, Any]:
    from transformers import DynamicCache

    positions = torch.arange(input_ids.shape[1], device=input_ids.device) + position
    # Without the model's config a cache keeps every token of sliding-window layers too.
    cache = DynamicCache()
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


def _relative_difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / one.abs().max().clamp_min(1e-30))
