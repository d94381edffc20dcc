"""The Triton kernel of ``fused_residual.py``; imported only where Triton is installed.

One program holds ``BLOCK_T`` student tokens of one teacher head. A teacher's token is decoded,
standardised and weighted as it is read, so a target exists in registers alone.

    target[t]   = Σ_sides share Σ_w weight[t, w] · (decode(codes[first[t] + w]) − mean) / std
    residual[t] = prediction[t] − target[t]

The sides are the two stored layers that a student layer lies between.
"""

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl

PLAIN: Final = tl.constexpr(0)
E4M3: Final = tl.constexpr(1)
NIBBLES: Final = tl.constexpr(2)


@triton.jit
def _codes(codes, tokens, is_read, channels, DIM: tl.constexpr, FORMAT: tl.constexpr):
    """Rows ``tokens`` of the codes as float32 ``[BLOCK_T, BLOCK_D]``, 0 where not read."""
    if FORMAT == NIBBLES:
        high = channels >= DIM // 2
        at = tokens[:, None] * (DIM // 2) + tl.where(high, channels - DIM // 2, channels)[None, :]
        packed = tl.load(codes + at, mask=is_read, other=0).to(tl.int32)
        return ((packed >> tl.where(high, 4, 0)[None, :]) & 15).to(tl.float32)
    x = tl.load(codes + tokens[:, None] * DIM + channels[None, :], mask=is_read, other=0)
    if FORMAT == E4M3:  # as a half: its exponent has one bit more, and a bias of 15 instead of 7
        bits = x.to(tl.int32)
        half = (((bits & 128) << 8) | ((bits & 127) << 7)).to(tl.int16)
        return half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return x.to(tl.float32)


@triton.jit
def _hadamard(x, ROUNDS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """``codecs.int4.hadamard`` of ``[BLOCK_T, BLOCK_D]``, in the same order of additions."""
    scale: tl.constexpr = 2.0 ** (-0.5 * ROUNDS)
    for i in tl.static_range(ROUNDS):
        pairs = tl.reshape(x, (BLOCK_T, BLOCK_D // (2 << i), 2, 1 << i))
        even, odd = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
        pairs = tl.permute(tl.join(even + odd, even - odd), (0, 1, 3, 2))
        x = tl.reshape(pairs, (BLOCK_T, BLOCK_D))
    return x * scale


@triton.jit(
    do_not_specialize=["lower", "upper", "num_tokens", "num_columns", "num_blocks", "width"]
)
def residual_kernel(
    prediction,  # [B, T, H·D]
    slope,  # [B, T, H·D], out; may be ``prediction``
    figures,  # [1 or 3, H, B, T] float32, out: error, squared residual, squared target
    alpha,  # [B, T] float32
    codes,  # [B, L, H, T_t, D], or two channels of a byte
    step,  # [B, L, H, T_t] float32, or [B, L, H, blocks, D] float16
    start,  # as ``step``
    mean,  # [L, H, D] float32
    inverse_std,
    first,  # [B, T] int64: first teacher token
    weight,  # [B, T, W] float32
    lower,
    upper,
    fraction,
    num_layers,
    num_tokens,
    num_columns,
    num_blocks,
    width,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    FORMAT: tl.constexpr,
    HAS_STEP: tl.constexpr,
    HAS_START: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,  # tokens of a scale per channel; 0 where scales are per token
    ROTATED: tl.constexpr,  # log2 of the channels that a Hadamard matrix rotates together, or 0
    SIDES: tl.constexpr,
    SMOOTH_L1: tl.constexpr,
    MEASURES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Residual, error and gradient of one student layer against one teacher."""
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    head, sample = tl.program_id(1), tl.program_id(2).to(tl.int64)
    channels = tl.arange(0, BLOCK_D)
    is_token, is_channel = tokens < num_tokens, channels < DIM
    rows = sample * num_tokens + tokens
    begin = tl.load(first + rows, mask=is_token, other=0)
    target = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for side in tl.static_range(SIDES):
        if side == 0:
            layer, share = lower, 1.0 - fraction
        else:
            layer, share = upper, fraction
        channel = (layer * HEADS + head) * DIM + channels
        mean_D = tl.load(mean + channel, mask=is_channel, other=0.0)[None, :]
        scale_D = tl.load(inverse_std + channel, mask=is_channel, other=0.0)[None, :]
        stored = (sample * num_layers + layer) * HEADS + head
        placed = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        total = tl.zeros((BLOCK_T,), tl.float32)
        for w in range(width):
            column = tl.minimum(begin + w, num_columns - 1)
            is_weighed = is_token & (column >= 0)
            weight_T = tl.load(weight + rows * width + w, mask=is_weighed, other=0.0)
            is_read = is_weighed[:, None] & is_channel[None, :]
            x = _codes(codes, stored * num_columns + column, is_read, channels, DIM, FORMAT)
            if BLOCK_TOKENS > 0:
                block = stored * num_blocks + column // BLOCK_TOKENS
                at, mask = block[:, None] * DIM + channels[None, :], is_read
            else:
                at, mask = (stored * num_columns + column)[:, None], is_weighed[:, None]
            if HAS_STEP:
                x *= tl.load(step + at, mask=mask, other=0.0).to(tl.float32)
            if HAS_START:
                x += tl.load(start + at, mask=mask, other=0.0).to(tl.float32)
            if ROTATED == 0:
                x = (x - mean_D) * scale_D
            placed += tl.where(is_read, x, 0.0) * weight_T[:, None]
            total += weight_T
        if ROTATED > 0:  # a rotation commutes with the sum over tokens
            placed = _hadamard(placed, ROTATED, BLOCK_T, BLOCK_D)
            placed = (placed - mean_D * total[:, None]) * scale_D
        target += placed * share
    at = (rows[:, None] * HEADS + head) * DIM + channels[None, :]
    inside = is_token[:, None] & is_channel[None, :]
    residual = tl.load(prediction + at, mask=inside, other=0.0).to(tl.float32) - target
    residual = tl.where(inside, residual, 0.0)
    size = tl.abs(residual)
    error, gradient = residual * residual, residual
    if SMOOTH_L1:
        error = tl.where(size < 1.0, 0.5 * error, size - 0.5)
        gradient = tl.minimum(tl.maximum(residual, -1.0), 1.0)
    alpha_T = tl.load(alpha + rows, mask=is_token, other=0.0)
    tl.store(slope + at, (gradient * alpha_T[:, None]).to(slope.dtype.element_ty), mask=inside)
    num_rows = tl.num_programs(2).to(tl.int64) * num_tokens
    out = figures + head * num_rows + rows
    tl.store(out, tl.sum(error, 1), mask=is_token)
    if MEASURES:
        tl.store(out + HEADS * num_rows, tl.sum(residual * residual, 1), mask=is_token)
        tl.store(out + 2 * HEADS * num_rows, tl.sum(target * target, 1), mask=is_token)
