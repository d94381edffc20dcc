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

from kvdistill.store.manifest import RotarySpec


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
        halves = _read(modules[0], model, layer_idx)
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


def _read(module: nn.Module, model: nn.Module, layer_idx: int) -> RotarySpec:
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
