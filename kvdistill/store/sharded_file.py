"""One zarr array as one file: the sharding codec of zarr v3, written directly.

    chunk · crc32c · chunk · crc32c · …  then  (offset, length) of every chunk · crc32c

zarr, zarrs, tensorstore and dask read these files through the ``zarr.json`` beside them. Doing
it here is a page of code, and another for reading (``sharded_read``). Chunks are compressed only
where that pays; see docs/codecs.md. Every chunk is always written, so an absent one is damage.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Final

import google_crc32c
import numpy as np
from numcodecs import zstd

from kvdistill.errors import ShardCorrupt
from kvdistill.store.integrity import REMEDY

ZSTD_LEVEL: Final = 1
CRC_BYTES: Final = 4
Index = list[tuple[int, int]]
_ENTRY: Final = np.dtype([("offset", "<u8"), ("length", "<u8")])


@dataclass(frozen=True)
class Grid:
    """How an array is cut: its shape, its chunks' shape, dtype, padding and compression."""

    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    dtype: str
    fill: float
    compressed: bool

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Chunks along each axis."""
        return tuple(-(-n // c) for n, c in zip(self.shape, self.chunk, strict=True))

    @property
    def whole(self) -> tuple[int, ...]:
        """The shape rounded up to whole chunks: zarr's outer chunk."""
        return tuple(max(n, 1) * c for n, c in zip(self.counts, self.chunk, strict=True))


def write_array(path: Path, array: np.ndarray, grid: Grid) -> None:
    """Write all chunks and their index. The array must have the grid's shape and dtype."""
    entries = []
    offset = 0
    with path.open("wb") as file:
        for place in product(*(range(n) for n in grid.counts)):
            block = _sealed(_encoded(array[_box(place, grid.chunk)], grid))
            file.write(block)
            entries.append((offset, len(block)))
            offset += len(block)
        file.write(_sealed(np.array(entries, _ENTRY).tobytes()))


def read_index(path: Path, grid: Grid) -> Index:
    """Offset and length of every chunk, in C order, checked.

    Raises:
        ShardCorrupt: the index is truncated, damaged, or points outside the file.
    """
    num_bytes = math.prod(grid.counts) * _ENTRY.itemsize + CRC_BYTES
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - num_bytes))
        content = file.read()
    stored, seal = content[:-CRC_BYTES], content[-CRC_BYTES:]
    if len(content) != num_bytes or google_crc32c.value(stored) != int.from_bytes(seal, "little"):
        raise ShardCorrupt(f"{path}: its index does not match its checksum; {REMEDY}")
    index = np.frombuffer(stored, _ENTRY)
    if index.size and int((index["offset"] + index["length"]).max()) > size - num_bytes:
        raise ShardCorrupt(f"{path}: its index does not fit the file; {REMEDY}")
    entries: Index = index.tolist()
    return entries


def _box(place: Sequence[int], chunk: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(i * c, (i + 1) * c) for i, c in zip(place, chunk, strict=True))


def _encoded(piece: np.ndarray, grid: Grid) -> bytes:
    if piece.shape != grid.chunk:
        padded = np.full(grid.chunk, grid.fill, grid.dtype)
        padded[tuple(slice(0, n) for n in piece.shape)] = piece
        piece = padded
    raw = piece.astype(piece.dtype.newbyteorder("<"), copy=False).tobytes()
    return bytes(zstd.compress(raw, ZSTD_LEVEL)) if grid.compressed else raw


def _sealed(content: bytes) -> bytes:
    return b"".join([content, google_crc32c.value(content).to_bytes(CRC_BYTES, "little")])
