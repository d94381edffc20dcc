"""Codecs without a zero point: casts to 16 bits, and ``x ≈ code · scale`` in int8 and fp8."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvdistill.store.codecs.parts import (
    TINY,
    Part,
    as_blocks,
    bits_to_float32,
    half_at_least,
    half_part,
    per_token,
    to_float32,
)
from kvdistill.types import CodecName, Kind

if TYPE_CHECKING:
    import torch

    from kvdistill.store.codecs.parts import Array


@dataclass(frozen=True)
class Cast:
    """fp16, or bf16 stored as its bits, since numpy and zarr lack the type.

    Lossless for a teacher of the same dtype.
    """

    name: CodecName

    def parts(self, kind: Kind) -> tuple[Part, ...]:
        """The stored arrays."""
        if self.name == "bf16":
            return (Part("", "uint16", "bfloat16"),)
        return (Part("", "float16", "float16"),)

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
    """Codes within ±``largest``: int8, or float8_e4m3fn stored as its bits."""

    name: CodecName
    largest: float

    def parts(self, kind: Kind) -> tuple[Part, ...]:
        """The stored arrays."""
        if self.name == "int8":
            return (Part("", "int8", "int8"), half_part("scale", kind))
        return (Part("", "uint8", "float8_e4m3fn"), half_part("scale", kind))

    def encode(self, x: torch.Tensor, kind: Kind) -> dict[str, torch.Tensor]:
        """``[..., T, D]`` of one sample → codes and scales.

        NaN, infinity and values beyond fp16's range make the scale non-finite, which publication
        of the shard refuses.
        """
        import torch

        x = x.float()
        if kind == "key":
            scale = half_at_least(as_blocks(x).abs().amax(dim=-2) / self.largest)
            steps = per_token(scale, x.shape[-2])
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

        Key scales are ``[..., blocks, D]``, value scales ``[..., T, 1]``. ``block_idx [T]`` is
        every token's block where samples are packed; ``token // 64`` when None.
        """
        stored, scale = parts[""], to_float32(parts["scale"])
        is_int = self.name == "int8"
        codes = to_float32(stored) if is_int else bits_to_float32(stored, "float8_e4m3fn")
        if kind == "key":
            scale = per_token(scale, stored.shape[-2], block_idx)
        decoded: Array = codes * scale
        return decoded
