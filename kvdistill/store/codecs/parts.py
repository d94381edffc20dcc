"""The stored arrays that an encoded kind consists of, and their names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kvdistill.types import Kind

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


def codes(dtype: str, logical: str) -> Part:
    """Codes, one element per channel."""
    return Part("", dtype, logical, "token", _head_dim)


def side(suffix: str, kind: Kind) -> Part:
    """Scales or zeros in fp16: keys per block and channel, values per token."""
    if kind == "key":
        return Part(suffix, "float16", "float16", "block", _head_dim)
    return one_per_token(suffix, "float16", "float16")


def one_per_token(suffix: str, dtype: str, logical: str) -> Part:
    """A number for all channels of a token."""
    return Part(suffix, dtype, logical, "token", _one)


def part_name(stem: str, suffix: str) -> str:
    """Name of a stored array: ``key``, ``key_scale``, ``g0/key_zero``."""
    return f"{stem}_{suffix}" if suffix else stem


def parts_of(arrays: Mapping[str, Any], stem: str) -> dict[str, Any]:
    """The parts of ``stem`` ("key", "g0/value", …) among named arrays, by suffix."""
    names = {suffix: part_name(stem, suffix) for suffix in ("", "scale", "zero")}
    return {suffix: arrays[name] for suffix, name in names.items() if name in arrays}


def _head_dim(head_dim: int) -> int:
    return head_dim


def _one(head_dim: int) -> int:
    return 1
