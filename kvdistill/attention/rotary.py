"""Rotary embeddings: read from the model itself, applied in float32, to teachers and student alike.

RoFormer: Enhanced Transformer with Rotary Position Embedding (arXiv 2104.09864). No scaling scheme
is re-derived from a config: the model's own rotary module computes cos and sin at position 1, whose
angle *is* the frequency and whose length is the attention scaling. Where a buffer of the module
holds these frequencies, it is used instead: an angle of 1 radian is exact to 6e-8 only, an error
that position 1,000 multiplies by 1,000.

Stored teacher keys are not rotated, so they can be given the *student's* rotary embedding at the
student's positions. A pointwise K loss needs no rotation (rotating both sides by the same angles
leaves an MSE unchanged); attention maps and R-KV do.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from kvdistill.errors import ConfigError
from kvdistill.store.manifest import RotarySpec
from kvdistill.types import RopeMethod


def rotate(x: Tensor, position_ids: Tensor, spec: RotarySpec, length: int | None = None) -> Tensor:
    """Rotate ``x [..., T, D]`` at ``position_ids``, which broadcast to ``[..., T]``; float32.

    ``length`` is that of the text (T if not given), which longrope's and dynamic frequencies
    depend on.
    """
    inv_freq = frequencies(spec, x.shape[-2] if length is None else length, x.device)
    angle = position_ids[..., None].float() * inv_freq
    return _rotate_by(x, angle, spec.attention_scaling, spec.interleaved, spec.rotary_start)


def unrotate(
    x: Tensor, position_ids: Tensor, spec: RotarySpec, length: int | None = None
) -> Tensor:
    """Inverse of ``rotate``: exact up to float32 rounding, and only for float32 input."""
    inverse = spec.model_copy(update={"attention_scaling": 1.0 / spec.attention_scaling})
    return rotate(x, -position_ids, inverse, length)


def frequencies(spec: RotarySpec, length: int, device: torch.device) -> Tensor:
    """Angular frequencies ``[rotary_dim / 2]`` in a text of ``length`` tokens, on a device."""
    is_long = spec.trained_length is not None and length > spec.trained_length
    if is_long and spec.dynamic_factor is not None:
        stretch = spec.dynamic_factor, length, spec.trained_length
        return scale_frequencies(_on_device(spec.inv_freq, device), "dynamic", *stretch)
    return _on_device((is_long and spec.long_inv_freq) or spec.inv_freq, device)


@lru_cache(maxsize=256)
def _on_device(inv_freq: tuple[float, ...], device: torch.device) -> Tensor:
    """Copied once, rather than at every layer of every step."""
    with torch.inference_mode(False):
        return torch.tensor(inv_freq, device=device)


def _rotate_by(
    x: Tensor, angle: Tensor, attention_scaling: float, interleaved: bool, start: int = 0
) -> Tensor:
    """Rotate ``2·F`` channels of ``x [..., T, D]`` by ``angle [..., T, F]``; float32."""
    end = start + 2 * angle.shape[-1]
    cos, sin = angle.cos() * attention_scaling, angle.sin() * attention_scaling
    turning = x[..., start:end].float()
    if interleaved:
        first, second = turning[..., 0::2], turning[..., 1::2]
    else:
        first, second = turning.chunk(2, dim=-1)
    pair = first * cos - second * sin, second * cos + first * sin
    joined = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    if joined.shape == x.shape:
        return joined
    return torch.cat([x[..., :start].float(), joined, x[..., end:].float()], dim=-1)


def placements(specs: Sequence[RotarySpec], head_dim: int) -> list[RotarySpec]:
    """Rotations that fit a head: each on its first channels and, if partial, on its last."""
    fitting = [spec for spec in specs if spec.rotary_dim <= head_dim]
    ends = [
        spec.model_copy(update={"rotary_start": head_dim - spec.rotary_dim})
        for spec in fitting
        if spec.rotary_dim < head_dim
    ]
    return fitting + ends


def rotary_candidates(model: Any, num_layers: int) -> list[list[RotarySpec]]:
    """Rotations that the model's modules allow in each layer, likeliest first.

    A rotary module does not say whether channel pairs are halves or neighbours, nor whether a
    layer uses it at all; verification decides among the candidates.
    """
    modules = [m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding")]
    if not modules:
        table = _position_table(model)
        return [[] if table is None else [table]] * num_layers
    halves = [_read_module(modules[0], model, layer_idx) for layer_idx in range(num_layers)]
    ways: list[dict[str, Any]] = [{}, {"interleaved": True}]
    # NanoChat turns the other way round.
    return [
        [
            *(s.model_copy(update=way) for way in ways),
            s.model_copy(update={"inv_freq": tuple(-f for f in s.inv_freq)}),
        ]
        if s
        else []
        for s in halves
    ]


def _read_module(module: nn.Module, model: Any, layer_idx: int) -> RotarySpec | None:
    """Measure a rotary module at position 1, in float32, in a short text and in a long one.

    None for a layer of a type that the module does not rotate (Beam's full attention).
    """
    extra: dict[str, Any] = {}
    config = model.config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    if "layer_type" in inspect.signature(module.forward).parameters:
        extra["layer_type"] = config.layer_types[layer_idx]
        parameters = parameters.get(extra["layer_type"]) or parameters
        rotated: Any = getattr(module, "rope_type", None)
        if isinstance(rotated, dict) and extra["layer_type"] not in rotated:
            return None
    short = _measured(module, model, 1, extra)
    kind = parameters.get("rope_type")
    if kind == "longrope":
        trained_length = parameters["original_max_position_embeddings"]
        long = _measured(module, model, trained_length, extra)
        found: dict[str, Any] = {"long_inv_freq": long.inv_freq, "trained_length": trained_length}
        _measured(module, model, 1, extra)  # the module keeps the last text's frequencies
    elif kind == "dynamic":
        trained_length = config.max_position_embeddings
        found = {"dynamic_factor": parameters["factor"], "trained_length": trained_length}
    else:
        return short
    return short.model_copy(update=found)


def _measured(
    module: nn.Module, model: Any, last_position: int, extra: dict[str, Any]
) -> RotarySpec:
    """A module's rotation in a text that ends at a position."""
    device = next(model.buffers(), next(model.parameters())).device
    position_ids = torch.tensor([[1, last_position]], device=device)
    with torch.no_grad():
        output = module(torch.zeros(1, 1, 1, device=device), position_ids, **extra)
    # Llama 4 and DeepSeek V2 give complex numbers, gpt-oss an entry per pair, most others two.
    is_complex = isinstance(output, Tensor)
    parts = (output.real, output.imag) if is_complex else output
    cos, sin = (x[0, 0].flatten().double().cpu() for x in parts)
    half, once = cos.numel() // 2, slice(None)
    if not is_complex and torch.equal(cos[:half], cos[half:]):
        once = slice(half)
    elif not is_complex and torch.equal(cos[::2], cos[1::2]):
        once = slice(None, None, 2)
    measured = _spec(cos[once], sin[once])
    scaling = measured.attention_scaling
    stated = [x for name, x in vars(module).items() if name.endswith("attention_scaling")]
    stated = [x for x in stated if math.isclose(x, scaling, rel_tol=1e-5)]
    exact = {
        "inv_freq": _exact(module, measured.inv_freq),
        "attention_scaling": (*stated, scaling)[0],
    }
    return measured.model_copy(update=exact)


def _exact(module: nn.Module, measured: tuple[float, ...]) -> tuple[float, ...]:
    """The module's buffer that equals the measured frequencies, or these themselves."""
    wanted = torch.tensor(measured, dtype=torch.float64)
    for buffer in module.buffers():
        exact = buffer.double().cpu().flatten()
        if exact.shape == wanted.shape and torch.allclose(exact, wanted, rtol=1e-5, atol=2e-7):
            return tuple(exact.tolist())
    return measured


def _position_table(model: nn.Module) -> RotarySpec | None:
    """GPT-J and CodeGen hold a table ``[positions, sin | cos]`` in every attention module."""
    for module in model.modules():
        table = getattr(module, "embed_positions", None)
        if isinstance(table, Tensor) and table.ndim == 2 and table.shape[0] > 1:
            sin, cos = table[1].double().cpu().chunk(2)
            return _spec(cos, sin).model_copy(update={"interleaved": True})
    return None


def _spec(cos: Tensor, sin: Tensor) -> RotarySpec:
    scaling = float((cos**2 + sin**2).sqrt().mean())
    return RotarySpec(
        rotary_dim=2 * cos.numel(),
        inv_freq=tuple(torch.atan2(sin, cos).tolist()),
        attention_scaling=1.0 if abs(scaling - 1.0) < 1e-6 else scaling,
    )


def scale_frequencies(
    inv_freq: Tensor,
    method: RopeMethod,
    factor: float = 1.0,
    length: int | None = None,
    trained_length: int | None = None,
) -> Tensor:
    """Stretch rotary frequencies to another context length; ``[..., d/2]`` to the same.

    Args:
        inv_freq: angular frequencies of the student's embedding.
        method: ``student``: unchanged. ``linear``: divided by ``s`` (position interpolation,
            arXiv 2306.15595). ``ntk``: base times ``s^(d/(d−2))``, which keeps the fastest pair
            and divides the slowest by ``s``. ``dynamic``: ``ntk`` with ``s' = s·n/L − (s − 1)``
            once a text of ``n`` tokens exceeds the ``L`` trained on (both as in YaRN,
            arXiv 2309.00071).
        factor: ``s``, the ratio of context lengths.
        length: ``n``, for ``dynamic``.
        trained_length: ``L``, for ``dynamic``.

    Raises:
        ConfigError: ``factor`` is not positive, or a length that ``dynamic`` needs is missing.
    """
    if factor <= 0:
        raise ConfigError(f"alignment.rope: factor must be > 0, got {factor}")
    if method in ("none", "student"):
        return inv_freq
    if method == "linear":
        return inv_freq / factor
    if method == "dynamic":
        if length is None or trained_length is None:
            raise ConfigError("alignment.rope: dynamic needs length and trained_length")
        factor = factor * max(length / trained_length, 1.0) - (factor - 1)
    # base·s^(d/(d−2)) raised to −2i/d is the old frequency times s^(−2i/(d−2)).
    num_pairs = inv_freq.shape[-1]
    pair = torch.arange(num_pairs, device=inv_freq.device, dtype=inv_freq.dtype)
    return inv_freq * factor ** (-pair / max(num_pairs - 1, 1))
