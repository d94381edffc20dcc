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

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from kvdistill.errors import GeometryError
from kvdistill.store.codecs.parts import (
    TINY,
    Part,
    as_blocks,
    bits_to_float32,
    concatenate,
    half_at_least,
    half_at_most,
    one_per_token,
    per_token,
    side_part,
    to_float32,
)
from kvdistill.types import CodecName, Kind

if TYPE_CHECKING:
    import torch

    from kvdistill.store.codecs.parts import Array


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
            return (packed, side_part("scale", kind), side_part("zero", kind))
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
        step, start = (
            decode_line(scale, zero) if in_bytes else (to_float32(scale), to_float32(zero))
        )
        if kind == "value":
            return hadamard(codes * step + start)
        num_tokens = packed.shape[-2]
        product: Array = codes * per_token(step, num_tokens, block_idx)
        product += per_token(start, num_tokens, block_idx)
        return product

    def _values(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rotated = hadamard(x)
        scale, zero = fit_line(rotated)
        step, start = decode_line(scale, zero)
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
    step, start = (per_token(side_part.float(), x.shape[-2], None) for side_part in (scale, zero))
    return nearest_code(x, step, start), scale, zero


def _half_of(head_dim: int) -> int:
    if head_dim % 2:
        raise GeometryError(
            f"codec int4 packs two channels into a byte, but the head dim is {head_dim}; "
            "store this teacher with codec int8"
        )
    return head_dim // 2


def hadamard(x: Array) -> Array:
    """``x · H / sqrt(n)`` over the last axis, float32 ``[..., D]``; ``rotate(rotate(x)) ≈ x``."""
    lead, dim = x.shape[:-1], x.shape[-1]
    order = dim & -dim
    width = 1
    while width < order:
        pairs = x.reshape(*lead, dim // (2 * width), 2, width)
        even, odd = pairs[..., 0, :], pairs[..., 1, :]
        x = concatenate([(even + odd)[..., None, :], (even - odd)[..., None, :]], axis=-2)
        width *= 2
    scale = np.float32(1 / math.sqrt(order)).item()
    return x.reshape(*lead, dim) * scale


LARGEST: Final = 15
"""Codes are 0 to 15."""


MIDDLE: Final = LARGEST / 2


STEP: Final = "ufloat8_e5m3"
"""What the bits of a step mean: those of an fp16 without its sign and its last seven."""


UNIT: Final = 0.25
"""Of a step: what the middle is counted in."""


FARTHEST: Final = 127


SHORTER: Final = (0, 1, 2)
"""Steps that are tried: so many 8-bit floats below the one that covers the range."""


SHIFTS: Final = (0, -2, -1, 1, 2)
"""Middles that are tried, in units from the range's own."""


def nearest_code(x: torch.Tensor, step: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Codes of ``x`` on a line, uint8; values beyond its ends get the last code."""
    import torch

    ratio = ((x - start) / step.clamp_min(TINY)).nan_to_num(0, 0, 0)
    return ratio.round().clamp(0, LARGEST).to(torch.uint8)


def decode_line(scale: Array, zero: Array) -> tuple[Array, Array]:
    """Step and start, float32 and exact, of what ``fit`` returns; numpy or torch."""
    step = bits_to_float32(scale, STEP)
    start: Array = (to_float32(zero) * UNIT - MIDDLE) * step
    return step, start


def fit_line(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The line of least squared error for each row of float32 ``[..., D]``, of those tried.

    A row farther from zero than 32 steps gets longer ones, with which its middle can be told: its
    error is then about 2 % of its largest value. NaN and infinity show in the step's bits.

    Returns:
        Steps as bits, uint8 ``[..., 1]``, and middles in quarters of a step, int8 ``[..., 1]``.
    """
    import torch

    low, high = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)
    middle = low + (high - low) / 2
    needed = torch.maximum((high - low) / LARGEST, middle.abs() / (FARTHEST * UNIT))
    longest = _upper_byte(half_at_least(needed))
    scale, zero = longest, torch.zeros_like(longest, dtype=torch.int8)
    error = torch.full_like(low, torch.inf)
    for down in SHORTER:
        bits = longest - longest.clamp_max(down)
        step = bits_to_float32(bits, STEP)
        units = (middle / (step * UNIT).clamp_min(TINY)).nan_to_num(0, 0, 0).round()
        for shift in SHIFTS:
            tried = (units + shift).clamp(-FARTHEST, FARTHEST).to(torch.int8)
            found = _squared_error(x, *decode_line(bits, tried))
            better = found < error
            scale, zero = torch.where(better, bits, scale), torch.where(better, tried, zero)
            error = torch.where(better, found, error)
    return scale, zero


def _upper_byte(half: torch.Tensor) -> torch.Tensor:
    """The smallest 8-bit float that is not below a positive fp16; infinity and NaN stay."""
    import torch

    bits = half.view(torch.int16) & 0x7FFF
    return ((bits.int() + 127) >> 7).clamp_max(255).to(torch.uint8)


def _squared_error(x: torch.Tensor, step: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    decoded = nearest_code(x, step, start) * step + start
    return (decoded - x).square().sum(dim=-1, keepdim=True)


# MERGED-DOC store.codecs.hadamard
# The fast Walsh–Hadamard transform: orthonormal, symmetric, its own inverse.
#
# log2(D) rounds of additions and subtractions in a fixed order, so numpy and torch agree in every
# bit, which a matrix product would not. Where D is not a power of two, it is applied to blocks of
# the largest power of two that divides D.


# MERGED-DOC store.codecs.lines
# Lines through sixteen codes, ``code · step + start``, that take two bytes.
#
# The step is the upper byte of a positive fp16 (five exponent bits, three of mantissa); the
# start is
# kept as the middle of the range, in quarters of a step around zero. Both are coarse, so they
# are
# searched for: three steps from the one that covers ``[min, max]`` downwards, five middles
# each, and
# the line of least squared error stays. On SmolLM2's rotated values that is better than ``[min,
# max]`` refined by least squares in fp16 (relative error 8.3 against 8.4 %), since rounding a
# line matters less than which line it was, and takes half of the bytes.
