"""``x ≈ code · scale``: int8 and fp8. No zero point, so a decode is one multiplication."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvdistill.store.codecs.arrays import (
    TINY,
    as_blocks,
    bits_to_float32,
    half_at_least,
    per_token,
    to_float32,
)
from kvdistill.store.codecs.parts import Part, codes, side
from kvdistill.types import CodecName, Kind

if TYPE_CHECKING:
    import torch

    from kvdistill.store.codecs.arrays import Array


@dataclass(frozen=True)
class Symmetric:
    """Codes within ±``largest``: integers, or float8_e4m3fn stored as their bits."""

    name: CodecName
    largest: float

    def parts(self, kind: Kind) -> tuple[Part, ...]:
        """The stored arrays."""
        if self.name == "int8":
            return (codes("int8", "int8"), side("scale", kind))
        return (codes("uint8", "float8_e4m3fn"), side("scale", kind))

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
