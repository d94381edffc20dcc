"""Rotating position-free keys, at any position, base or scaling.

Stored teacher keys are unrotated, so they can be given the *student's* rotary embedding at the
student's positions, whatever the teacher was trained with. A K loss does not need this (rotating
both sides by the same angles leaves an MSE unchanged); attention maps and injected caches do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvdistill.errors import ConfigError, GeometryError
from kvdistill.types import RopeMethod


def inverse_frequencies(rotary_dim: int, base: float = 10_000.0) -> Tensor:
    """``base^(−2i/d)`` for ``i = 0 … d/2 − 1``: ``[d/2]`` float32 (RoFormer, arXiv 2104.09864)."""
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim
    return (base**-exponent).float()


def scale_frequencies(
    inv_freq: Tensor,
    method: RopeMethod,
    factor: float = 1.0,
    length: int | None = None,
    trained_length: int | None = None,
) -> Tensor:
    """Stretch rotary frequencies to another context length; ``[..., d/2]`` to the same.

    Args:
        inv_freq: angular frequencies of the student's embedding.
        method: ``student``: as they are. ``linear``: divided by ``s`` (position interpolation,
            arXiv 2306.15595). ``ntk``: base times ``s^(d/(d−2))``, which leaves the fastest pair
            alone and divides the slowest by ``s``. ``dynamic``: ``ntk`` with
            ``s' = s·n/L − (s − 1)`` once a text of ``n`` tokens is longer than the ``L`` trained
            on (both as in YaRN, arXiv 2309.00071).
        factor: ``s``, the ratio of context lengths.
        length: ``n``, for ``dynamic``.
        trained_length: ``L``, for ``dynamic``.

    Raises:
        ConfigError: ``factor`` is not positive, or a length that ``dynamic`` needs is missing.
    """
    if factor <= 0:
        raise ConfigError(f"alignment.rope: factor must be > 0, got {factor}")
    if method in ("none", "student"):
        return inv_freq
    if method == "linear":
        return inv_freq / factor
    if method == "dynamic":
        if length is None or trained_length is None:
            raise ConfigError("alignment.rope: dynamic needs length and trained_length")
        factor = factor * max(length / trained_length, 1.0) - (factor - 1)
    # base·s^(d/(d−2)) raised to −2i/d is the old frequency times s^(−2i/(d−2)).
    num_pairs = inv_freq.shape[-1]
    pair = torch.arange(num_pairs, device=inv_freq.device, dtype=inv_freq.dtype)
    return inv_freq * factor ** (-pair / max(num_pairs - 1, 1))


def rotate(
    x_BLHTD: Tensor,
    position_BT: Tensor,
    inv_freq: Tensor,
    *,
    interleaved: bool = False,
    attention_scaling: float = 1.0,
) -> Tensor:
    """Apply a rotary embedding; the inverse is the same call with negated positions.

    Args:
        x_BLHTD: unrotated keys (or queries) ``[B, L, H, T, D]``.
        position_BT: positions ``[B, T]``, or ``[1, T]`` for all samples.
        inv_freq: ``[d/2]``, or ``[L, d/2]`` where layers differ; ``d ≤ D`` leading channels turn.
        interleaved: pairs are (0, 1), (2, 3), … (GPT-J) instead of (0, d/2), … (Llama).
        attention_scaling: factor on the rotated channels (YaRN).

    Returns:
        ``[B, L, H, T, D]`` in ``x``'s dtype; angles are float32.

    Raises:
        GeometryError: more channels turn than there are.
    """
    rotary_dim = 2 * inv_freq.shape[-1]
    if rotary_dim > x_BLHTD.shape[-1]:
        raise GeometryError(
            f"rope: {rotary_dim} channels to rotate, but head dim is {x_BLHTD.shape[-1]}"
        )
    freq_LF = inv_freq.float().reshape(-1, inv_freq.shape[-1])
    angle_BLTF = position_BT.float()[:, None, :, None] * freq_LF[None, :, None, :]
    cos = (angle_BLTF.cos() * attention_scaling).unsqueeze(2)
    sin = (angle_BLTF.sin() * attention_scaling).unsqueeze(2)
    turning, still = x_BLHTD[..., :rotary_dim].float(), x_BLHTD[..., rotary_dim:]
    if interleaved:
        first, second = turning[..., 0::2], turning[..., 1::2]
    else:
        first, second = turning.chunk(2, dim=-1)
    turned = first * cos - second * sin, second * cos + first * sin
    joined = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat([joined.to(x_BLHTD.dtype), still], dim=-1)
