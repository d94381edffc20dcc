"""``x ≈ code · scale + zero``: int4, two codes a byte.

A channel of keys often sits far from zero, so the range ``[min, max]`` is spent, not ``±max``.
Values are rotated by a Hadamard matrix first, which spreads an outlier channel over all of them
(QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs, arXiv 2404.00456); the matrix is its own
inverse. Rotated values are near a Gaussian, for which ``[min, max]`` is a little too wide: a few
rounds of least squares (codes for a line, then the line for these codes; Lloyd, Least Squares
Quantization in PCM, 1982) take 5 % off the error. Keys keep ``[min, max]``: their groups run along
tokens, and a batch's padding, which repeats a token, must not change the result.

A byte holds channel ``i`` in its low and channel ``i + D/2`` in its high four bits, so
that unpacking is a concatenation and not an interleaving.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from kvdistill.errors import GeometryError
from kvdistill.store.codecs.arrays import (
    TINY,
    as_blocks,
    concatenate,
    half_at_least,
    half_at_most,
    per_token,
    to_float32,
)
from kvdistill.store.codecs.hadamard import rotate
from kvdistill.store.codecs.parts import Part, side
from kvdistill.types import CodecName, Kind

if TYPE_CHECKING:
    import torch

    from kvdistill.store.codecs.arrays import Array

LARGEST: Final = 15
ROUNDS: Final = 4


@dataclass(frozen=True)
class Asymmetric:
    """Four-bit codes with a scale and a zero."""

    name: CodecName

    def parts(self, kind: Kind) -> tuple[Part, ...]:
        """The stored arrays."""
        packed = Part("", "uint8", "uint4 pairs (i, i + D/2)", "token", _half_of)
        return (packed, side("scale", kind), side("zero", kind))

    def encode(self, x: torch.Tensor, kind: Kind) -> dict[str, torch.Tensor]:
        """``[..., T, D]`` of one sample → packed codes ``[..., T, D/2]``, scales and zeros.

        Raises:
            GeometryError: D is odd.
        """
        import torch

        _half_of(x.shape[-1])
        x = x.float() if kind == "key" else rotate(x.float())
        groups = as_blocks(x) if kind == "key" else x[..., None]
        low, high = groups.amin(dim=-2), groups.amax(dim=-2)
        zero = half_at_most(low)
        # A constant group takes one step from zero to itself, not fifteen: nearly exact.
        steps = torch.where(high > low, LARGEST, 1)
        scale = half_at_least((high - zero.float()) / steps)
        step, start = scale.float(), zero.float()
        if kind == "key":
            step, start = (per_token(side, x.shape[-2], None) for side in (step, start))
        if kind == "value":
            scale, zero = _refined(x, scale, zero)
            step, start = scale.float(), zero.float()
        codes = _quantised(x, step, start)
        half = codes.shape[-1] // 2
        return {"": codes[..., :half] | codes[..., half:] << 4, "scale": scale, "zero": zero}

    def decode(
        self, parts: Mapping[str, Array], kind: Kind, block_idx: Array | None = None
    ) -> Array:
        """Packed codes, scales and zeros, numpy or torch → float32 ``[..., T, D]``, same bits.

        Shapes of scales and zeros, and ``block_idx``, are those of ``Symmetric.decode``.
        """
        packed = parts[""]
        codes = to_float32(concatenate([packed & LARGEST, packed >> 4], axis=-1))
        scale, zero = to_float32(parts["scale"]), to_float32(parts["zero"])
        if kind == "value":
            return rotate(codes * scale + zero)
        num_tokens = packed.shape[-2]
        product: Array = codes * per_token(scale, num_tokens, block_idx)
        product += per_token(zero, num_tokens, block_idx)
        return product


def _quantised(x: torch.Tensor, step: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    import torch

    ratio = ((x - start) / step.clamp_min(TINY)).nan_to_num(0, 0, 0)
    return ratio.round().clamp(0, LARGEST).to(torch.uint8)


def _refined(
    x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zeros ``[..., 1]`` of less squared error over the last axis, where found."""
    import torch

    best, error = (scale, zero), _squared_error(x, scale, zero)
    mean = x.mean(dim=-1, keepdim=True)
    for _ in range(ROUNDS):
        codes = _quantised(x, scale.float(), zero.float()).float()
        middle = codes.mean(dim=-1, keepdim=True)
        spread = (codes - middle).square().sum(dim=-1, keepdim=True)
        slope = ((codes - middle) * (x - mean)).sum(dim=-1, keepdim=True) / spread
        scale, zero = slope.to(torch.float16), (mean - slope * middle).to(torch.float16)
        found = _squared_error(x, scale, zero)
        better = found < error
        best = torch.where(better, scale, best[0]), torch.where(better, zero, best[1])
        error = torch.where(better, found, error)
    return best


def _squared_error(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    step, start = scale.float(), zero.float()
    decoded = _quantised(x, step, start) * step + start
    return (decoded - x).square().sum(dim=-1, keepdim=True)


def _half_of(head_dim: int) -> int:
    if head_dim % 2:
        raise GeometryError(
            f"codec int4 packs two channels into a byte, but the head dim is {head_dim}; "
            "store this teacher with codec int8"
        )
    return head_dim // 2
