"""One zarr array as one file: the sharding codec of zarr v3, written and read directly.

    chunk · crc32c · chunk · crc32c · …  then  (offset, length) of every chunk · crc32c

zarr, zarrs, tensorstore and dask read these files through the ``zarr.json`` beside them. Doing
it here is a page of code, and several times faster than either codec pipeline: a chunk goes from
the file to its place in the result with one copy and one checksum, without an event loop
(`benchmarks/store.py` measures both). Chunks are compressed only where that pays; see
docs/codecs.md. Every chunk is always written, so an absent one is damage.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Final

import google_crc32c
import numpy as np
from numcodecs import zstd
from numpy.typing import NDArray

from kvdistill.errors import ShardCorrupt
from kvdistill.store.integrity import REMEDY

ZSTD_LEVEL: Final = 1
_CRC_BYTES: Final = 4
_ENTRY: Final = np.dtype([("offset", "<u8"), ("length", "<u8")])


@dataclass(frozen=True)
class Grid:
    """How an array is cut: its shape, its chunks' shape, dtype, padding and compression."""

    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    dtype: str
    fill: float
    compressed: bool

    @property
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
            box = _box(place, grid.chunk)
            block = _sealed(_encoded(array[box], grid))
            file.write(block)
            entries.append((offset, len(block)))
            offset += len(block)
        file.write(_sealed(np.array(entries, _ENTRY).tobytes()))


def read_index(path: Path, grid: Grid) -> NDArray[np.void]:
    """Offsets and lengths of all chunks, checked: one entry per chunk in C order.

    Raises:
        ShardCorrupt: the index is truncated, damaged, or points outside the file.
    """
    num_bytes = math.prod(grid.counts) * _ENTRY.itemsize + _CRC_BYTES
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - num_bytes))
        index = np.frombuffer(_opened(file.read(), path, "its index"), _ENTRY)
    ends = index["offset"] + index["length"]
    if index.size != math.prod(grid.counts) or (index.size and int(ends.max()) > size - num_bytes):
        raise ShardCorrupt(f"{path}: its index does not fit the file; {REMEDY}")
    return index


def read_box(path: Path, grid: Grid, index: NDArray[np.void], box: Sequence[range]) -> np.ndarray:
    """A box of the array, in the box's shape.

    Raises:
        ShardCorrupt: a chunk is truncated, damaged or missing.
    """
    out = np.empty(tuple(len(axis) for axis in box), grid.dtype)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for place in _touched(grid, box):
            entry = index[np.ravel_multi_index(place, grid.counts)]
            stored = os.pread(descriptor, int(entry["length"]), int(entry["offset"]))
            chunk = _decoded(_opened(stored, path, f"chunk {place}"), grid, path)
            inside, target = _overlap(place, grid.chunk, box)
            out[target] = chunk[inside]
    finally:
        os.close(descriptor)
    return out


def _box(place: Sequence[int], chunk: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(i * c, (i + 1) * c) for i, c in zip(place, chunk, strict=True))


def _touched(grid: Grid, box: Sequence[range]) -> Iterator[tuple[int, ...]]:
    """Chunks that share an element with the box; none where the box is empty."""
    return product(
        *(
            range(axis.start // c, -(-axis.stop // c) if len(axis) else axis.start // c)
            for axis, c in zip(box, grid.chunk, strict=True)
        )
    )


def _overlap(
    place: Sequence[int], chunk: Sequence[int], box: Sequence[range]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """What of a chunk lies in the box, as slices of the chunk and of the box."""
    inside, target = [], []
    for i, c, axis in zip(place, chunk, box, strict=True):
        start, stop = max(i * c, axis.start), min((i + 1) * c, axis.stop)
        inside.append(slice(start - i * c, stop - i * c))
        target.append(slice(start - axis.start, stop - axis.start))
    return tuple(inside), tuple(target)


def _encoded(piece: np.ndarray, grid: Grid) -> bytes:
    if piece.shape != grid.chunk:
        padded = np.full(grid.chunk, grid.fill, grid.dtype)
        padded[tuple(slice(0, n) for n in piece.shape)] = piece
        piece = padded
    raw = piece.astype(piece.dtype.newbyteorder("<"), copy=False).tobytes()
    return bytes(zstd.compress(raw, ZSTD_LEVEL)) if grid.compressed else raw


def _decoded(stored: bytes, grid: Grid, path: Path) -> np.ndarray:
    num_bytes = math.prod(grid.chunk) * np.dtype(grid.dtype).itemsize
    try:
        raw = zstd.decompress(stored) if grid.compressed else stored
    except RuntimeError as error:
        raise ShardCorrupt(f"{path}: a chunk cannot be decompressed ({error}); {REMEDY}") from error
    if len(raw) != num_bytes:
        raise ShardCorrupt(f"{path}: a chunk of {len(raw)} bytes, expected {num_bytes}; {REMEDY}")
    return np.frombuffer(raw, np.dtype(grid.dtype).newbyteorder("<")).reshape(grid.chunk)


def _sealed(content: bytes) -> bytes:
    return b"".join([content, google_crc32c.value(content).to_bytes(_CRC_BYTES, "little")])


def _opened(sealed: bytes, path: Path, what: str) -> bytes:
    content, seal = sealed[:-_CRC_BYTES], sealed[-_CRC_BYTES:]
    if len(seal) != _CRC_BYTES or google_crc32c.value(content) != int.from_bytes(seal, "little"):
        raise ShardCorrupt(f"{path}: {what} does not match its checksum; {REMEDY}")
    return content
