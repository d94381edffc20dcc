"""One zarr array as one file: the sharding codec of zarr v3, written and read directly.

    chunk · crc32c · chunk · crc32c · …  then  (offset, length) of every chunk · crc32c

zarr, zarrs, tensorstore and dask read these files through the ``zarr.json`` beside them. Doing
it here is a page of code: a chunk goes from the file to its place in the result without a copy in
between, and without an event loop, so readers may be forked. It is several times faster than
zarr-python's own pipeline; zarrs is as fast on a quiet machine and slower on a loaded one
(`benchmarks/store.py` measures both). Chunks are compressed only where that pays; see
docs/codecs.md. Every chunk is always written, so an absent one is damage.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Final, NamedTuple

import google_crc32c
import numpy as np
from numcodecs import zstd

from kvdistill.errors import ShardCorrupt
from kvdistill.store.buffers import empty
from kvdistill.store.integrity import REMEDY

ZSTD_LEVEL: Final = 1
_CRC_BYTES: Final = 4
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
            box = _box(place, grid.chunk)
            block = _sealed(_encoded(array[box], grid))
            file.write(block)
            entries.append((offset, len(block)))
            offset += len(block)
        file.write(_sealed(np.array(entries, _ENTRY).tobytes()))


def read_index(path: Path, grid: Grid) -> Index:
    """Offset and length of every chunk, in C order, checked.

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
    entries: Index = index.tolist()
    return entries


def read_box(path: Path, grid: Grid, index: Index, box: Sequence[range]) -> np.ndarray:
    """A box of the array, in the box's shape.

    What is wanted of an uncompressed chunk is read straight into its place where it is one piece.

    Raises:
        ShardCorrupt: a chunk is truncated, damaged or missing.
    """
    out = empty([len(axis) for axis in box], grid.dtype)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for cuts in product(*_cuts(grid, box)):
            offset, length = index[sum(cut.entry for cut in cuts)]
            view = out[tuple(cut.target for cut in cuts)]
            if not grid.compressed and view.flags.c_contiguous and _is_prefix(cuts, grid.chunk):
                _read_into(view, length, descriptor, offset, path)
            else:
                stored = _opened(os.pread(descriptor, length, offset), path, "a chunk")
                view[...] = _decoded(stored, grid, path)[tuple(cut.inside for cut in cuts)]
    finally:
        os.close(descriptor)
    return out


def _read_into(view: np.ndarray, length: int, descriptor: int, offset: int, path: Path) -> None:
    """The beginning of an uncompressed chunk, from the file to its place without a copy."""
    flat: np.ndarray = view.reshape(-1).view(np.uint8)
    rest = bytearray(max(0, length - flat.nbytes))
    found = os.preadv(descriptor, [flat.data, rest], offset)
    checksum = google_crc32c.extend(google_crc32c.value(flat), bytes(rest[:-_CRC_BYTES]))
    if found != length or checksum != int.from_bytes(rest[-_CRC_BYTES:], "little"):
        raise ShardCorrupt(f"{path}: a chunk does not match its checksum; {REMEDY}")


def _is_prefix(cuts: Sequence[_Cut], chunk: Sequence[int]) -> bool:
    """Whether what is wanted of a chunk lies at its beginning, in one piece."""
    partial = [axis for axis, cut in enumerate(cuts) if not cut.whole]
    if not partial:
        return True
    return cuts[partial[0]].inside.start == 0 and (
        len(partial) == 1 and all(size == 1 for size in chunk[: partial[0]])
    )


def _box(place: Sequence[int], chunk: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(i * c, (i + 1) * c) for i, c in zip(place, chunk, strict=True))


class _Cut(NamedTuple):
    """What a box and one chunk share along one axis."""

    entry: int
    """What this axis adds to the chunk's place in the index."""
    inside: slice
    target: slice
    whole: bool


def _cuts(grid: Grid, box: Sequence[range]) -> list[list[_Cut]]:
    """Per axis, the chunks that share an element with the box; none where the box is empty."""
    cuts = []
    for axis, (wanted, chunk) in enumerate(zip(box, grid.chunk, strict=True)):
        step = math.prod(grid.counts[axis + 1 :])
        numbers = range(wanted.start // chunk, -(-wanted.stop // chunk)) if len(wanted) else ()
        cuts.append([_cut(i, i * step, chunk, wanted) for i in numbers])
    return cuts


def _cut(number: int, entry: int, chunk: int, wanted: range) -> _Cut:
    first = number * chunk
    start, stop = max(first, wanted.start), min(first + chunk, wanted.stop)
    inside = slice(start - first, stop - first)
    target = slice(start - wanted.start, stop - wanted.start)
    return _Cut(entry, inside, target, stop - start == chunk)


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
