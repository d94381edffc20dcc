"""Codecs that only cast: lossless for a teacher of that dtype, 16 bits an element."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvdistill.store.codecs.parts import (
    TINY,
    Part,
    as_blocks,
    bits_to_float32,
    codes_part,
    half_at_least,
    per_token,
    side_part,
    to_float32,
)
from kvdistill.types import CodecName, Kind

if TYPE_CHECKING:
    import torch

    from kvdistill.store.codecs.parts import Array


@dataclass(frozen=True)
class Cast:
    """bf16 (stored as its bits: numpy and zarr have no such type) or fp16."""

    name: CodecName

    def parts(self, kind: Kind) -> tuple[Part, ...]:
        """The stored arrays."""
        if self.name == "bf16":
            return (codes_part("uint16", "bfloat16"),)
        return (codes_part("float16", "float16"),)

    def encode(self, x: torch.Tensor, kind: Kind) -> dict[str, torch.Tensor]:
        """``[..., T, D]`` of one sample → its cast; infinite beyond fp16's range."""
        import torch

        if self.name == "bf16":
            return {"": x.to(torch.bfloat16).view(torch.uint16)}
        return {"": x.to(torch.float16)}

    def decode(
        self, parts: Mapping[str, Array], kind: Kind, block_idx: Array | None = None
    ) -> Array:
        """``[..., T, D]`` codes, numpy or torch → float32 ``[..., T, D]``, the same bits."""
        if self.name == "bf16":
            return bits_to_float32(parts[""], "bfloat16")
        return to_float32(parts[""])


@dataclass(frozen=True)
class Symmetric:
    """Codes within ±``largest``: integers, or float8_e4m3fn stored as their bits."""

    name: CodecName
    largest: float

    def parts(self, kind: Kind) -> tuple[Part, ...]:
        """The stored arrays."""
        if self.name == "int8":
            return (codes_part("int8", "int8"), side_part("scale", kind))
        return (codes_part("uint8", "float8_e4m3fn"), side_part("scale", kind))

    def encode(self, x: torch.Tensor, kind: Kind) -> dict[str, torch.Tensor]:
        """``[..., T, D]`` of one sample → codes and scales.

        NaN, infinity and what exceeds fp16's range show in the scale, and are refused when the
        shard is published.
        """
        import torch

        x = x.float()
        if kind == "key":
            scale = half_at_least(as_blocks(x).abs().amax(dim=-2) / self.largest)
            steps = per_token(scale, x.shape[-2], None)
        else:
            scale = half_at_least(x.abs().amax(dim=-1, keepdim=True) / self.largest)
            steps = scale
        ratio = (x / steps.float().clamp_min(TINY)).nan_to_num(0, 0, 0)
        if self.name == "int8":
            return {"": ratio.round().to(torch.int8), "scale": scale}
        return {"": ratio.to(torch.float8_e4m3fn).view(torch.uint8), "scale": scale}

    def decode(
        self, parts: Mapping[str, Array], kind: Kind, block_idx: Array | None = None
    ) -> Array:
        """Codes ``[..., T, D]`` and scales, numpy or torch → float32 ``[..., T, D]``, same bits.

        Key scales are ``[..., blocks, D]``; ``block_idx [T]`` names every token's block where
        samples are packed, and is ``t // 64`` when omitted. Value scales are ``[..., T, 1]``.
        """
        stored, scale = parts[""], to_float32(parts["scale"])
        if kind == "key":
            scale = per_token(scale, stored.shape[-2], block_idx)
        integer = self.name == "int8"
        decoded: Array = (
            to_float32(stored) if integer else bits_to_float32(stored, "float8_e4m3fn")
        ) * scale
        return decoded


# MERGED-DOC store.codecs.symmetric
# ``x ≈ code · scale``: int8 and fp8. No zero point, so a decode is one multiplication.
