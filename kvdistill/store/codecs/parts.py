"""What codecs are made of: the stored parts, and operations common to numpy and torch.

An encoded kind consists of *parts*: codes, and where the codec has them a scale and a zero, each
an array ``[layer, head, token or block, width]``. The operations are those that numpy and torch
spell differently. Each is exact or a single correctly rounded IEEE operation, so both libraries
return the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

import numpy as np

from kvdistill.errors import GeometryError
from kvdistill.store.shard import BLOCK_TOKENS
from kvdistill.types import Kind

if TYPE_CHECKING:
    import torch

    Array = TypeVar("Array", np.ndarray, torch.Tensor)

TINY: Final = 2.0**-24
"""The smallest positive fp16: replaces a scale of zero as a divisor."""


@dataclass(frozen=True)
class Part:
    """One stored array of an encoded kind, ``[layer, head, token or block, width]``."""

    suffix: str
    """Empty for the codes, else ``scale``, ``zero`` or ``exact``."""
    dtype: str
    """numpy dtype of the stored array."""
    logical: str
    """Type of the numbers that the stored bits represent, where numpy lacks it."""
    per: Literal["token", "block", "sample"] = "token"
    """What the third axis counts."""
    channels: Literal["each", "pairs", "all", "packed"] = "each"
    """What one element covers: a channel, channels ``i`` and ``i + D/2``, all of a token, or one
    byte of several layers (``klt``)."""

    def width(self, head_dim: int) -> int:
        """Length of the last axis.

        Raises:
            GeometryError: pairs of an odd head dim.
        """
        if self.channels == "pairs" and head_dim % 2:
            raise GeometryError(
                f"codec int4 packs two channels into a byte, but the head dim is {head_dim}; "
                "store this teacher with codec int8"
            )
        widths = {"each": head_dim, "pairs": head_dim // 2, "all": 1, "packed": 0}
        return widths[self.channels]


def half_part(suffix: str, kind: Kind) -> Part:
    """Scales or zeros in fp16: of values per token, of others per block and channel."""
    if kind != "value":
        return Part(suffix, "float16", "float16", "block")
    return Part(suffix, "float16", "float16", channels="all")


def part_name(stem: str, suffix: str) -> str:
    """Name of a stored array: ``key``, ``key_scale``, ``g0/key_zero``."""
    return f"{stem}_{suffix}" if suffix else stem


def parts_of(arrays: Mapping[str, Any], stem: str) -> dict[str, Any]:
    """The parts of ``stem`` ("key", "g0/value", …) among named arrays, by suffix."""
    names = {suffix: part_name(stem, suffix) for suffix in ("", "scale", "zero", "exact")}
    return {suffix: arrays[name] for suffix, name in names.items() if name in arrays}


def to_float32(x: Array) -> Array:
    """Numbers to float32; exact for every stored dtype."""
    return x.astype(np.float32) if isinstance(x, np.ndarray) else x.float()


def bits_to_float32(bits: Array, logical: str) -> Array:
    """Stored bits of ``bfloat16``, ``float8_e4m3fn`` or ``ufloat8_e5m3`` to float32; exact."""
    if isinstance(bits, np.ndarray):
        if logical == "bfloat16":
            return (bits.astype(np.uint32) << 16).view(np.float32)
        if logical == "ufloat8_e5m3":
            return (bits.astype(np.uint16) << 7).view(np.float16).astype(np.float32)
        return np.take(_e4m3_values(), bits)
    import torch

    if logical == "ufloat8_e5m3":
        return (bits.to(torch.int16) << 7).view(torch.float16).float()
    return bits.view(getattr(torch, logical)).float()


@cache
def _e4m3_values() -> np.ndarray:
    """All 256 float8_e4m3fn values: sign, 4 exponent bits (bias 7), 3 mantissa bits."""
    bits = np.arange(256)
    exponent, mantissa = (bits >> 3) & 15, bits & 7
    normal = 2.0 ** (exponent - 7.0) * (1 + mantissa / 8)
    value = np.where(exponent == 0, 2.0**-6 * mantissa / 8, normal)
    value[(bits & 127) == 127] = np.nan
    return np.where(bits >= 128, -value, value).astype(np.float32)


def concatenate(pieces: list[Array], axis: int) -> Array:
    """Join along one axis."""
    if isinstance(pieces[0], np.ndarray):
        return np.concatenate(pieces, axis=axis)
    import torch

    return torch.cat(pieces, dim=axis)


def per_token(x: Array, num_tokens: int, block_idx: Array | None = None) -> Array:
    """Scales or zeros per block ``[..., blocks, D]`` → per token ``[..., T, D]``.

    ``block_idx [T]`` is every token's block; ``token // 64`` when None.
    """
    if isinstance(x, np.ndarray):
        idx = np.arange(num_tokens) // BLOCK_TOKENS if block_idx is None else block_idx
        return np.take(x, idx, axis=-2)
    import torch

    if block_idx is None:
        block_idx = torch.arange(num_tokens, device=x.device) // BLOCK_TOKENS
    return x.index_select(-2, block_idx)


def as_blocks(x: torch.Tensor) -> torch.Tensor:
    """``[..., T, D]`` → ``[..., ceil(T / 64), 64, D]``, padded with the last token."""
    import torch

    missing = -x.shape[-2] % BLOCK_TOKENS
    if missing:
        last = x[..., -1:, :].expand(*x.shape[:-2], missing, x.shape[-1])
        x = torch.cat([x, last], dim=-2)
    return x.reshape(*x.shape[:-2], x.shape[-2] // BLOCK_TOKENS, BLOCK_TOKENS, x.shape[-1])


def half_at_least(x: torch.Tensor) -> torch.Tensor:
    """The smallest fp16 that is not below ``x >= 0``; keeps NaN and infinity."""
    import torch

    half = x.to(torch.float16)
    below = (half.float() < x).to(torch.int16)
    return (half.view(torch.int16) + below).view(torch.float16)


def half_at_most(x: torch.Tensor) -> torch.Tensor:
    """The largest fp16 that is not above ``x``; keeps NaN and infinity."""
    import torch

    half = x.to(torch.float16)
    bits = half.view(torch.int16)
    above = (half.float() > x).to(torch.int16)
    return (bits + torch.where(bits < 0, above, -above)).view(torch.float16)
