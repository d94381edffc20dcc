"""Arrays whose memory is used again: reading shard after shard must not fault pages in anew.

A fresh array of a hundred megabytes costs more in page faults than the read that fills it, and
glibc returns blocks of that size to the system at once. Here memory comes back to a small pool
when the last array on it is gone. Bounded: what the pool keeps beyond ``MAX_KEPT_BYTES`` is freed.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

MIN_BYTES: Final = 1 << 20
"""Smaller arrays come from the heap, which reuses them already."""


MAX_KEPT_BYTES: Final = 1 << 30


# Only atomic operations of a deque: a block may come back from any thread, inside any statement.
_kept: deque[np.ndarray] = deque()


class _Block:
    """Memory on loan. Not an array, so that every view keeps it and not what lies beneath."""

    def __init__(self, memory: np.ndarray) -> None:
        self._memory = memory
        self.__array_interface__: dict[str, Any] = memory.__array_interface__

    def __del__(self) -> None:
        if _kept is None:  # the interpreter is ending, and globals are gone
            return
        _kept.append(self._memory)
        while sum(memory.nbytes for memory in tuple(_kept)) > MAX_KEPT_BYTES:
            try:
                _kept.popleft()
            except IndexError:
                return


def empty(shape: Sequence[int], dtype: str) -> np.ndarray:
    """Like ``np.empty``; large arrays may reuse memory that no other array refers to."""
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    if num_bytes < MIN_BYTES:
        return np.empty(tuple(shape), dtype)
    size = _size_class(num_bytes)
    memory = _taken(size)
    block = _Block(np.empty(size, np.uint8) if memory is None else memory)
    return np.asarray(block)[:num_bytes].view(dtype).reshape(tuple(shape))


def _taken(size: int) -> np.ndarray | None:
    """A kept block of this size or up to half as much more, or None."""
    for _ in range(len(_kept)):
        try:
            memory = _kept.popleft()
        except IndexError:
            return None
        if size <= memory.nbytes <= size + size // 2:
            return memory
        _kept.append(memory)
    return None


def _size_class(num_bytes: int) -> int:
    """Round up to one of eight steps per doubling, so that shards of like size share blocks."""
    step = 1 << max(0, num_bytes.bit_length() - 4)
    return -(-num_bytes // step) * step
