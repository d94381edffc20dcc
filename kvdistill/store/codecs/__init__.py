"""Codecs: the stored form of keys and values.

A codec is frozen data, one per name: the arrays it stores (``parts``), ``encode`` and ``decode``.
Keys have a scale per channel and block of 64 tokens, values a scale per token, since the outliers
of keys lie in channels and those of values in tokens (KIVI: A Tuning-Free Asymmetric 2bit
Quantization for KV Cache, arXiv 2402.02750). Scales are fp16 and rounded up, so no value is
clipped and the error of an integer codec is at most half a scale; int4's values are the exception,
which trade the largest error for a smaller mean error.

Encoding runs in torch, on the teacher's device. Decoding is written once for numpy and torch, with
operations that are exact or a single IEEE rounding, so both return the same bits. torch is
imported lazily: reading a store with numpy does not need it.

    bf16, fp16   16 bits   lossless after the cast
    int8          8 bits   symmetric; the default
    fp8_e4m3      8 bits   symmetric with float codes: better for outliers, worse on average
    int4          4 bits   asymmetric; values after a Hadamard rotation
    klt        1 to 5 bits   principal components of several layers, fitted per teacher: see klt.py
    int4_v1       4 bits   int4 of format 1: fp16 scales and zeros of values
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from kvdistill.store.codecs.int4 import Asymmetric
from kvdistill.store.codecs.klt import Transform
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
from kvdistill.types import CodecName, CodecSpec, Kind

if TYPE_CHECKING:
    import torch

    from kvdistill.store.codecs.parts import Array


@dataclass(frozen=True)
class Cast:
    """fp16, or bf16 as its bits (numpy and zarr lack it); lossless for a teacher of that dtype."""

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
    """``x ≈ code · scale``, codes within ±``largest``: int8, or float8_e4m3fn as its bits."""

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
        if kind != "value":
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

        Value scales are ``[..., T, 1]``, others ``[..., blocks, D]``. ``block_idx [T]`` is
        every token's block where samples are packed; ``token // 64`` when None.
        """
        stored, scale = parts[""], to_float32(parts["scale"])
        is_int = self.name == "int8"
        codes = to_float32(stored) if is_int else bits_to_float32(stored, "float8_e4m3fn")
        if kind != "value":
            scale = per_token(scale, stored.shape[-2], block_idx)
        decoded: Array = codes * scale
        return decoded


Codec = Cast | Symmetric | Asymmetric | Transform

CODECS: Final[dict[CodecName, Codec]] = {
    "bf16": Cast("bf16"),
    "fp16": Cast("fp16"),
    "int8": Symmetric("int8", largest=127.0),
    "fp8_e4m3": Symmetric("fp8_e4m3", largest=448.0),
    "int4": Asymmetric("int4"),
    "klt": Transform(),
    "int4_v1": Asymmetric("int4_v1", half_values=True),
}

Transforms = Mapping[str, Transform]
"""A teacher's fitted ``klt`` codecs by the stem of their arrays: ``key``, ``g0/value`` …"""


def codec_of(spec: CodecSpec, kind: Kind, transforms: Transforms, prefix: str = "") -> Codec:
    """The codec of a kind in one group of a teacher's layers."""
    name: CodecName = getattr(spec, kind)
    return transforms[f"{prefix}{kind}"] if name == "klt" else CODECS[name]


def by_layer(codec: Codec, parts: Mapping[str, Array], kind: Kind) -> Callable[[int], Array]:
    """Decoding of one row of parts ``[B, L, …]`` at a time: float32 ``[B, H, T, D]``."""
    if isinstance(codec, Transform):
        return codec.by_layer(parts, kind)
    return lambda row: codec.decode({name: x[:, row] for name, x in parts.items()}, kind)
