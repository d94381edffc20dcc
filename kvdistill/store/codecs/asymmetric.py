"""``x ≈ code · scale + zero``: int4, two codes a byte.

A channel of keys often sits far from zero, so the range ``[min, max]`` is spent, not ``±max``, and
scale and zero are fp16: models with a bias on their keys put a channel hundreds of steps away.
Groups of keys run along tokens, and a batch's padding, which repeats a token, must not change the
result: hence ``[min, max]`` and no better line.

Values are rotated by a Hadamard matrix first, which spreads an outlier channel over all of them
(QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs, arXiv 2404.00456); the matrix is its own
inverse. Rotated values lie around zero and are near a Gaussian, for which ``[min, max]`` is a
little too wide: a search finds a token's line, which takes two bytes (``lines.py``).

A byte of codes holds channel ``i`` in its low and channel ``i + D/2`` in its high four bits, so
that unpacking is a concatenation and not an interleaving.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvdistill.errors import GeometryError
from kvdistill.store.codecs.arrays import (
    as_blocks,
    concatenate,
    half_at_least,
    half_at_most,
    per_token,
    to_float32,
)
from kvdistill.store.codecs.hadamard import rotate
from kvdistill.store.codecs.lines import LARGEST, STEP, fit, line, nearest_code
from kvdistill.store.codecs.parts import Part, one_per_token, side
from kvdistill.types import CodecName, Kind

if TYPE_CHECKING:
    import torch

    from kvdistill.store.codecs.arrays import Array


@dataclass(frozen=True)
class Asymmetric:
    """Four-bit codes with a scale and a zero."""

    name: CodecName
    wide: bool = False
    """Whether scales and zeros of values are fp16 too, as in stores of format 1."""

    def parts(self, kind: Kind) -> tuple[Part, ...]:
        """The stored arrays."""
        packed = Part("", "uint8", "uint4 pairs (i, i + D/2)", "token", _half_of)
        if kind == "key" or self.wide:
            return (packed, side("scale", kind), side("zero", kind))
        scale = one_per_token("scale", "uint8", STEP)
        return (packed, scale, one_per_token("zero", "int8", "middle in quarters of a step"))

    def encode(self, x: torch.Tensor, kind: Kind) -> dict[str, torch.Tensor]:
        """``[..., T, D]`` of one sample → packed codes ``[..., T, D/2]``, scales and zeros.

        Raises:
            GeometryError: D is odd.
        """
        _half_of(x.shape[-1])
        codes, scale, zero = (_keys if kind == "key" else self._values)(x.float())
        half = codes.shape[-1] // 2
        return {"": codes[..., :half] | codes[..., half:] << 4, "scale": scale, "zero": zero}

    def decode(
        self, parts: Mapping[str, Array], kind: Kind, block_idx: Array | None = None
    ) -> Array:
        """Packed codes, scales and zeros, numpy or torch → float32 ``[..., T, D]``, same bits.

        Shapes of scales and zeros, and ``block_idx``, are those of ``Symmetric.decode``.
        """
        packed, scale, zero = (parts[suffix] for suffix in ("", "scale", "zero"))
        codes = to_float32(concatenate([packed & LARGEST, packed >> 4], axis=-1))
        in_bytes = kind == "value" and not self.wide
        step, start = line(scale, zero) if in_bytes else (to_float32(scale), to_float32(zero))
        if kind == "value":
            return rotate(codes * step + start)
        num_tokens = packed.shape[-2]
        product: Array = codes * per_token(step, num_tokens, block_idx)
        product += per_token(start, num_tokens, block_idx)
        return product

    def _values(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rotated = rotate(x)
        scale, zero = fit(rotated)
        step, start = line(scale, zero)
        if self.wide:
            scale, zero = step.half(), start.half()
            start = zero.float()
        return nearest_code(rotated, step, start), scale, zero


def _keys(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, and a scale and a zero that cover each block's range."""
    import torch

    blocks = as_blocks(x)
    low, high = blocks.amin(dim=-2), blocks.amax(dim=-2)
    zero = half_at_most(low)
    # A constant group takes one step from zero to itself, not fifteen: nearly exact.
    steps = torch.where(high > low, LARGEST, 1)
    scale = half_at_least((high - zero.float()) / steps)
    step, start = (per_token(side.float(), x.shape[-2], None) for side in (scale, zero))
    return nearest_code(x, step, start), scale, zero


def _half_of(head_dim: int) -> int:
    if head_dim % 2:
        raise GeometryError(
            f"codec int4 packs two channels into a byte, but the head dim is {head_dim}; "
            "store this teacher with codec int8"
        )
    return head_dim // 2
