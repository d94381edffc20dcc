"""One zarr array as one file: the sharding codec of zarr v3, written directly.

    chunk · crc32c · chunk · crc32c · …  then  (offset, length) of every chunk · crc32c

zarr, zarrs, tensorstore and dask read these files through the ``zarr.json`` beside them. Doing
it here is a page of code, and another for reading (``sharded_read``). Chunks are compressed only
where that pays; see docs/codecs.md. Every chunk is always written, so an absent one is damage.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, Final, NamedTuple

import google_crc32c
import numpy as np
from numcodecs import zstd

from kvdistill.errors import ShardCorrupt
from kvdistill.store.buffers import empty
from kvdistill.store.commit import REMEDY

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


BATCH_BYTES: Final = 1 << 20
"""Read at a time: much longer than a system call takes, and no more than a cache holds."""


BATCH_CHUNKS: Final = 256
"""Two buffers each, and the kernel takes 1,024."""


class _Piece(NamedTuple):
    """What is wanted of one chunk."""

    entry: int
    """The chunk's place in the index."""
    target: np.ndarray
    """Where it goes: as bytes, if it is the beginning of the chunk in one piece."""
    inside: tuple[slice, ...] | None
    """Which part of the chunk, where it is not the beginning."""


def read_box(path: Path, grid: Grid, index: Index, box: Sequence[range]) -> np.ndarray:
    """A box of the array, in the box's shape.

    Raises:
        ShardCorrupt: a chunk is truncated, damaged or missing.
    """
    out = empty([len(axis) for axis in box], grid.dtype)
    if not out.size:
        return out
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for batch in _batches(_pieces(grid, box, out), index):
            _read_run(batch, index, grid, descriptor, path)
    finally:
        os.close(descriptor)
    return out


def _batches(pieces: Iterator[_Piece], index: Index) -> Iterator[list[_Piece]]:
    """Runs of pieces whose chunks lie one after the other in the file."""
    batch: list[_Piece] = []
    size, end = 0, -1
    for piece in pieces:
        offset, length = index[piece.entry]
        if batch and (offset != end or size >= BATCH_BYTES or len(batch) == BATCH_CHUNKS):
            yield batch
            batch, size = [], 0
        batch.append(piece)
        size, end = size + length, offset + length
    yield batch


def _read_run(batch: list[_Piece], index: Index, grid: Grid, descriptor: int, path: Path) -> None:
    """Read a run of chunks, check them and put them in place."""
    buffers: list[Any] = []
    for piece in batch:
        length = index[piece.entry][1]
        if piece.inside is None and not grid.compressed and piece.target.nbytes <= length:
            buffers += (piece.target, np.empty(length - piece.target.nbytes, np.uint8))
        else:
            buffers += (np.empty(max(length - CRC_BYTES, 0), np.uint8), np.empty(4, np.uint8))
    expected = sum(index[piece.entry][1] for piece in batch)
    if os.preadv(descriptor, buffers, index[batch[0].entry][0]) != expected:
        raise ShardCorrupt(f"{path}: it ends within a chunk; {REMEDY}")
    for piece, stored, rest in zip(batch, buffers[::2], buffers[1::2], strict=True):
        checksum = google_crc32c.value(stored)
        if len(rest) > CRC_BYTES:
            checksum = google_crc32c.extend(checksum, rest[:-CRC_BYTES])
        if checksum != int.from_bytes(rest[-CRC_BYTES:].tobytes(), "little"):
            raise ShardCorrupt(f"{path}: a chunk does not match its checksum; {REMEDY}")
        if stored is not piece.target:
            _place(_decoded_chunk(stored, grid, path), piece)


def _place(chunk: np.ndarray, piece: _Piece) -> None:
    if piece.inside is None:
        piece.target[...] = chunk.reshape(-1).view(np.uint8)[: piece.target.size]
    else:
        piece.target[...] = chunk[piece.inside]


def _decoded_chunk(stored: np.ndarray, grid: Grid, path: Path) -> np.ndarray:
    num_bytes = math.prod(grid.chunk) * np.dtype(grid.dtype).itemsize
    try:
        raw = zstd.decompress(stored) if grid.compressed else stored
    except RuntimeError as error:
        raise ShardCorrupt(f"{path}: a chunk cannot be decompressed ({error}); {REMEDY}") from error
    if len(raw) != num_bytes:
        raise ShardCorrupt(f"{path}: a chunk of {len(raw)} bytes, expected {num_bytes}; {REMEDY}")
    return np.frombuffer(raw, np.dtype(grid.dtype).newbyteorder("<")).reshape(grid.chunk)


def _pieces(grid: Grid, box: Sequence[range], out: np.ndarray) -> Iterator[_Piece]:
    """What the box takes of every chunk that it meets, in the order of the file."""
    sizes = zip(grid.counts, box, grid.shape, strict=True)
    cut = [axis for axis, (n, some, all_) in enumerate(sizes) if n > 1 or len(some) < all_]
    axis = cut[-1] if cut else 0
    in_rows = all(size == 1 for size in grid.chunk[:axis])
    if in_rows and box[axis].start % grid.chunk[axis] == 0:
        return _row_pieces(grid, box, out, axis)
    return _box_pieces(grid, box, out)


def _row_pieces(grid: Grid, box: Sequence[range], out: np.ndarray, axis: int) -> Iterator[_Piece]:
    """Chunks that are cut along one axis, from their beginnings: pieces of contiguous rows."""
    flat: np.ndarray = out.reshape(-1).view(np.uint8)
    inner = math.prod(grid.shape[axis + 1 :]) * out.itemsize
    step, row = grid.chunk[axis] * inner, len(box[axis]) * inner
    strides = [math.prod(grid.counts[i + 1 :]) for i in range(axis)]
    first = box[axis].start // grid.chunk[axis]
    for number, place in enumerate(product(*box[:axis])):
        entry = first + sum(i * stride for i, stride in zip(place, strides, strict=True))
        begin, end = number * row, (number + 1) * row
        for i, start in enumerate(range(begin, end, step)):
            yield _Piece(entry + i, flat[start : min(start + step, end)], None)


def _box_pieces(grid: Grid, box: Sequence[range], out: np.ndarray) -> Iterator[_Piece]:
    for cuts in product(*_cuts(grid, box)):
        target = out[tuple(cut.target for cut in cuts)]
        yield _Piece(sum(cut.entry for cut in cuts), target, tuple(cut.inside for cut in cuts))


class _Cut(NamedTuple):
    """What a box and one chunk share along one axis."""

    entry: int
    """What this axis adds to the chunk's place in the index."""
    inside: slice
    target: slice


def _cuts(grid: Grid, box: Sequence[range]) -> list[list[_Cut]]:
    """Per axis, the chunks that share an element with the box."""
    cuts = []
    for axis, (wanted, chunk) in enumerate(zip(box, grid.chunk, strict=True)):
        step = math.prod(grid.counts[axis + 1 :])
        numbers = range(wanted.start // chunk, -(-wanted.stop // chunk))
        cuts.append([_axis_cut(i, i * step, chunk, wanted) for i in numbers])
    return cuts


def _axis_cut(number: int, entry: int, chunk: int, wanted: range) -> _Cut:
    first = number * chunk
    start, stop = max(first, wanted.start), min(first + chunk, wanted.stop)
    inside = slice(start - first, stop - first)
    return _Cut(entry, inside, slice(start - wanted.start, stop - wanted.start))


# MERGED-DOC store.sharded_read
# Reading a box of a sharded file: many chunks by one system call, each straight to its place.
#
# What a reader pays is the system calls, the passage of the interpreter's lock between threads at
# each of them, and Python per chunk; summing up and copying run at the speed of memory. So chunks
# that lie one after the other in the file are read by one scattering ``preadv`` of about a
# megabyte, the checksums between them into four bytes of their own, and are summed up while they
# are still in the cache. No event loop, no thread pool: a reader may be forked, and shared.
