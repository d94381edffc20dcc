"""Rotary embeddings of a teacher: read from the model itself, applied in float32.

RoFormer: Enhanced Transformer with Rotary Position Embedding (arXiv 2104.09864). Rather than
re-deriving every scaling scheme from its config, the model's own rotary module is asked for
cos and sin at position 1: their angle *is* the frequency and their length the scaling. Where the
module keeps these frequencies in a buffer, that is taken: an angle of 1 radian is known to 6e-8,
which a position of 1,000 multiplies.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from kvdistill.errors import ConfigError, GeometryError
from kvdistill.store.manifest import RotarySpec
from kvdistill.types import RopeMethod


def candidates(model: nn.Module, num_layers: int) -> list[list[RotarySpec]]:
    """Per layer, the rotations that the model's modules make possible, likeliest first.

    Whether pairs are halves or neighbours, and whether a layer rotates at all, is not said by
    the module; verification decides among the candidates.
    """
    modules = [m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding")]
    if not modules:
        table = _position_table(model)
        return [[] if table is None else [table]] * num_layers
    found: list[list[RotarySpec]] = []
    for layer_idx in range(num_layers):
        halves = _read_module(modules[0], model, layer_idx)
        found.append([halves, halves.model_copy(update={"interleaved": True})])
    return found


def rotate(x: Tensor, position_ids: Tensor, spec: RotarySpec) -> Tensor:
    """Rotate ``x [..., T, D]`` at ``position_ids``, which broadcasts to ``[..., T]``. float32."""
    angle = position_ids[..., None].float() * torch.tensor(spec.inv_freq, device=x.device)
    cos, sin = angle.cos() * spec.attention_scaling, angle.sin() * spec.attention_scaling
    turned, rest = x[..., : spec.rotary_dim].float(), x[..., spec.rotary_dim :].float()
    if spec.interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned.chunk(2, dim=-1)
    pair = (first * cos - second * sin, second * cos + first * sin)
    joined = torch.stack(pair, dim=-1).flatten(-2) if spec.interleaved else torch.cat(pair, dim=-1)
    return torch.cat([joined, rest], dim=-1) if rest.shape[-1] else joined


def unrotate(x: Tensor, position_ids: Tensor, spec: RotarySpec) -> Tensor:
    """The inverse of ``rotate``: exact to float32's rounding, and only in float32."""
    inverse = spec.model_copy(
        update={
            "inv_freq": tuple(-f for f in spec.inv_freq),
            "attention_scaling": 1.0 / spec.attention_scaling,
        }
    )
    return rotate(x, position_ids, inverse)


def _read_module(module: nn.Module, model: nn.Module, layer_idx: int) -> RotarySpec:
    """Ask a rotary module for cos and sin at position 1, in float32."""
    device = next(model.buffers(), next(model.parameters())).device
    extra: dict[str, Any] = {}
    if "layer_type" in inspect.signature(module.forward).parameters:
        config: Any = model.config
        extra["layer_type"] = config.get_text_config().layer_types[layer_idx]
    position_ids = torch.ones(1, 1, dtype=torch.long, device=device)
    with torch.no_grad():
        cos, sin = module(torch.zeros(1, 1, 1, device=device), position_ids, **extra)
    cos, sin = cos.flatten().double().cpu(), sin.flatten().double().cpu()
    half = cos.numel() // 2
    doubled = torch.equal(cos[:half], cos[half:])
    pick = slice(0, half) if doubled else slice(0, None, 2)
    measured = _spec(cos[pick], sin[pick])
    return measured.model_copy(update={"inv_freq": _exact(module, measured.inv_freq)})


def _exact(module: nn.Module, measured: tuple[float, ...]) -> tuple[float, ...]:
    """The buffer that holds these frequencies, or what was measured."""
    wanted = torch.tensor(measured, dtype=torch.float64)
    for buffer in module.buffers():
        exact = buffer.double().cpu().flatten()
        if exact.shape == wanted.shape and torch.allclose(exact, wanted, rtol=1e-5, atol=2e-7):
            return tuple(exact.tolist())
    return measured


def _position_table(model: nn.Module) -> RotarySpec | None:
    """GPT-J and CodeGen keep a table ``[positions, sin | cos]`` in every attention module."""
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


def inverse_frequencies(rotary_dim: int, base: float = 10_000.0) -> Tensor:
    """``base^(−2i/d)`` for ``i = 0 … d/2 − 1``: ``[d/2]`` float32 (RoFormer, arXiv 2104.09864)."""
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim
    return (base**-exponent).float()


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
        method: ``student``: as they are. ``linear``: divided by ``s`` (position interpolation,
            arXiv 2306.15595). ``ntk``: base times ``s^(d/(d−2))``, which leaves the fastest pair
            alone and divides the slowest by ``s``. ``dynamic``: ``ntk`` with
            ``s' = s·n/L − (s − 1)`` once a text of ``n`` tokens is longer than the ``L`` trained
            on (both as in YaRN, arXiv 2309.00071).
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


def rotate_layers(
    x_BLHTD: Tensor,
    position_BT: Tensor,
    inv_freq: Tensor,
    *,
    interleaved: bool = False,
    attention_scaling: float = 1.0,
) -> Tensor:
    """Apply a rotary embedding; the inverse is the same call with negated positions.

    Args:
        x_BLHTD: unrotated keys (or queries) ``[B, L, H, T, D]``.
        position_BT: positions ``[B, T]``, or ``[1, T]`` for all samples.
        inv_freq: ``[d/2]``, or ``[L, d/2]`` where layers differ; ``d ≤ D`` leading channels turn.
        interleaved: pairs are (0, 1), (2, 3), … (GPT-J) instead of (0, d/2), … (Llama).
        attention_scaling: factor on the rotated channels (YaRN).

    Returns:
        ``[B, L, H, T, D]`` in ``x``'s dtype; angles are float32.

    Raises:
        GeometryError: more channels turn than there are.
    """
    rotary_dim = 2 * inv_freq.shape[-1]
    if rotary_dim > x_BLHTD.shape[-1]:
        raise GeometryError(
            f"rope: {rotary_dim} channels to rotate, but head dim is {x_BLHTD.shape[-1]}"
        )
    freq_LF = inv_freq.float().reshape(-1, inv_freq.shape[-1])
    angle_BLTF = position_BT.float()[:, None, :, None] * freq_LF[None, :, None, :]
    cos = (angle_BLTF.cos() * attention_scaling).unsqueeze(2)
    sin = (angle_BLTF.sin() * attention_scaling).unsqueeze(2)
    turning, still = x_BLHTD[..., :rotary_dim].float(), x_BLHTD[..., rotary_dim:]
    if interleaved:
        first, second = turning[..., 0::2], turning[..., 1::2]
    else:
        first, second = turning.chunk(2, dim=-1)
    turned = first * cos - second * sin, second * cos + first * sin
    joined = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat([joined.to(x_BLHTD.dtype), still], dim=-1)


# MERGED-DOC distill.alignment.rope
# Rotating position-free keys, at any position, base or scaling.
#
# Stored teacher keys are unrotated, so they can be given the *student's* rotary embedding at the
# student's positions, whatever the teacher was trained with. A K loss does not need this (rotating
# both sides by the same angles leaves an MSE unchanged); attention maps and injected caches do.
