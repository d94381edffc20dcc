"""Lines through sixteen codes, ``code · step + start``, that take two bytes.

The step is the upper byte of a positive fp16 (five exponent bits, three of mantissa); the start is
kept as the middle of the range, in quarters of a step around zero. Both are coarse, so they are
searched for: three steps from the one that covers ``[min, max]`` downwards, five middles each, and
the line of least squared error stays. On SmolLM2's rotated values that is better than ``[min,
max]`` refined by least squares in fp16 (relative error 8.3 against 8.4 %), since rounding a refined
line matters less than which line it was, and takes half of the bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kvdistill.store.codecs.arrays import TINY, bits_to_float32, half_at_least, to_float32

if TYPE_CHECKING:
    import torch

    from kvdistill.store.codecs.arrays import Array

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


def line(scale: Array, zero: Array) -> tuple[Array, Array]:
    """Step and start, float32 and exact, of what ``fit`` returns; numpy or torch."""
    step = bits_to_float32(scale, STEP)
    start: Array = (to_float32(zero) * UNIT - MIDDLE) * step
    return step, start


def fit(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
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
            found = _squared_error(x, *line(bits, tried))
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
