"""How keys and values become bytes, and back.

Keys get a scale per channel and block of 64 tokens, values a scale per token: key outliers sit
in channels, value outliers in tokens (KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV
Cache, arXiv 2402.02750). Scales are fp16, rounded so that no value is ever clipped: the error
of an integer codec is at most half a scale. A codec is frozen data; there is one per name.

Encoding runs in torch, where the teacher runs. Decoding is written once with operators that
numpy and torch share, so both give the same bits: every step is one IEEE operation.
torch is imported lazily: looking into a store does not need it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from kvdistill.store.manifest import CodecName
from kvdistill.store.shard import BLOCK_TOKENS
from kvdistill.types import Kind

if TYPE_CHECKING:
    import torch

    Tensor = torch.Tensor

Per = Literal["token", "block"]


@dataclass(frozen=True)
class Part:
    """One stored array of an encoded kind, ``[layer, head, token or block, width]``."""

    suffix: str
    """Empty for the codes; ``scale`` or ``zero`` otherwise."""
    dtype: str
    """numpy dtype of the stored array."""
    logical: str
    """What the bits mean, where numpy has no name for it."""
    per: Per
    width: Callable[[int], int]
    """Width of the last axis, given the head dim."""


def part_name(kind_name: str, suffix: str) -> str:
    """Name of a stored array: ``key``, ``key_scale``, ``g0/key_zero``."""
    return f"{kind_name}_{suffix}" if suffix else kind_name


def parts_of(arrays: Mapping[str, Any], kind_name: str) -> dict[str, Any]:
    """The parts of ``kind_name`` ("key", "g0/value", …) among named arrays, by suffix."""
    names = {suffix: part_name(kind_name, suffix) for suffix in ("", "scale", "zero")}
    return {suffix: arrays[name] for suffix, name in names.items() if name in arrays}


@dataclass(frozen=True)
class Float:
    """Lossless after a cast: bf16 (stored as its bits) or fp16."""

    name: CodecName

    def parts(self, kind: Kind) -> tuple[Part, ...]:
        """The stored arrays."""
        dtype, logical = ("uint16", "bfloat16") if self.name == "bf16" else ("float16", "float16")
        return (Part("", dtype, logical, "token", _full),)

    def encode(self, x: Tensor, kind: Kind) -> dict[str, Tensor]:
        """``[..., T, D]`` of one sample → its cast. Beyond fp16's range: infinite."""
        import torch

        if self.name == "fp16":
            return {"": x.to(torch.float16)}
        return {"": x.to(torch.bfloat16).view(torch.uint16)}

    def decode(
        self, parts: Mapping[str, Tensor], kind: Kind, block_idx: Tensor | None = None
    ) -> Tensor:
        """``[..., T, D]`` codes → float32 ``[..., T, D]``."""
        import torch

        codes = parts[""]
        return (codes.view(torch.bfloat16) if self.name == "bf16" else codes).float()

    def decode_numpy(
        self, parts: Mapping[str, np.ndarray], kind: Kind, block_idx: np.ndarray | None = None
    ) -> np.ndarray:
        """The same in numpy, the same bits."""
        codes = parts[""]
        if self.name == "bf16":
            return (codes.astype(np.uint32) << 16).view(np.float32)
        return codes.astype(np.float32)


@dataclass(frozen=True)
class Symmetric:
    """``x ≈ code · scale``: int8."""

    name: CodecName
    largest: float

    def parts(self, kind: Kind) -> tuple[Part, ...]:
        """The stored arrays."""
        return (Part("", "int8", "int8", "token", _full), _side("scale", kind))

    def encode(self, x: Tensor, kind: Kind) -> dict[str, Tensor]:
        """``[..., T, D]`` of one sample → codes and scales. NaN or Inf end up in the scale."""
        import torch

        x = x.float()
        if kind == "key":
            scale = _half_at_least(_blocks(x).abs().amax(dim=-2) / self.largest)
            steps = _spread(scale, x.shape[-2])
        else:
            scale = _half_at_least(x.abs().amax(dim=-1, keepdim=True) / self.largest)
            steps = scale
        codes = torch.round(x / steps.float().clamp_min(_TINY))
        return {"": codes.nan_to_num(0, 0, 0).to(torch.int8), "scale": scale}

    def decode(
        self, parts: Mapping[str, Tensor], kind: Kind, block_idx: Tensor | None = None
    ) -> Tensor:
        """Codes ``[..., T, D]`` and scales → float32 ``[..., T, D]``.

        Key scales are ``[..., blocks, D]``; ``block_idx [T]`` names every token's block where
        samples are packed, and is ``t // 64`` when omitted. Value scales are ``[..., T, 1]``.
        """
        codes, scale = parts[""].float(), parts["scale"].float()
        return codes * (_spread(scale, codes.shape[-2], block_idx) if kind == "key" else scale)

    def decode_numpy(
        self, parts: Mapping[str, np.ndarray], kind: Kind, block_idx: np.ndarray | None = None
    ) -> np.ndarray:
        """The same in numpy, the same bits."""
        codes = parts[""].astype(np.float32)
        scale = parts["scale"].astype(np.float32)
        if kind == "key":
            scale = np.take(scale, _token_blocks(codes.shape[-2], block_idx), axis=-2)
        return np.asarray(codes * scale)


Codec = Float | Symmetric
CODECS: Final[dict[CodecName, Codec]] = {
    "bf16": Float("bf16"),
    "fp16": Float("fp16"),
    "int8": Symmetric("int8", 127.0),
}

_TINY: Final = 2.0**-24
"""Smallest positive fp16: the scale of a block that is all zero divides by it, not by zero."""


def _full(head_dim: int) -> int:
    return head_dim


def _one(head_dim: int) -> int:
    return 1


def _side(suffix: str, kind: Kind) -> Part:
    if kind == "key":
        return Part(suffix, "float16", "float16", "block", _full)
    return Part(suffix, "float16", "float16", "token", _one)


def _blocks(x: Tensor) -> Tensor:
    """``[..., T, D]`` → ``[..., ceil(T / 64), 64, D]``, the last token repeated as padding."""
    import torch

    num_tokens = x.shape[-2]
    missing = -num_tokens % BLOCK_TOKENS
    if missing:
        last = x[..., -1:, :].expand(*x.shape[:-2], missing, x.shape[-1])
        x = torch.cat([x, last], dim=-2)
    return x.reshape(*x.shape[:-2], x.shape[-2] // BLOCK_TOKENS, BLOCK_TOKENS, x.shape[-1])


def _half_at_least(scale: Tensor) -> Tensor:
    """The smallest fp16 that is not below ``scale >= 0``; NaN and Inf stay."""
    import torch

    half = scale.to(torch.float16)
    below = half.float() < scale
    return (half.view(torch.int16) + below.to(torch.int16)).view(torch.float16)


def _token_blocks(num_tokens: int, block_idx: np.ndarray | None) -> np.ndarray:
    return np.arange(num_tokens) // BLOCK_TOKENS if block_idx is None else block_idx


def _spread(scale: Tensor, num_tokens: int, block_idx: Tensor | None = None) -> Tensor:
    """Block scales ``[..., blocks, D]`` → one per token ``[..., T, D]``."""
    import torch

    if block_idx is None:
        block_idx = torch.arange(num_tokens, device=scale.device) // BLOCK_TOKENS
    return scale.index_select(-2, block_idx)
