"""Shards as one safetensors file each, read by mapping it into memory: no decoding, no copy.

Every layer and head has its own tensors, ``layer.05.head.00.key`` ``[T, D]`` and so on, which
any safetensors reader finds by name. They lie in order, so all layers and heads of one array are
one piece of memory and a whole-shard read is a view; the map is private, so writing to a view
changes no file. Nothing is compressed: the speed of memory for the size of the codes.

Sizes are checked on opening, and each tensor's checksum when it is first touched.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Final

import numpy as np
import xxhash

from kvdistill.errors import ShardCorrupt
from kvdistill.store.backends import OpenShard, Specs
from kvdistill.store.commit import REMEDY, check_size
from kvdistill.store.format import ArraySpec
from kvdistill.store.manifest import Commit

FILE: Final = "shard.safetensors"


HEADER: Final = "__header__"


DTYPES: Final = {
    "int8": "I8",
    "uint8": "U8",
    "uint16": "U16",
    "int32": "I32",
    "int64": "I64",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
}


class SafetensorsBackend:
    """One memory-mapped file per shard."""

    def write(
        self,
        folder: Path,
        arrays: Mapping[str, np.ndarray],
        specs: Specs,
        attributes: Mapping[str, object],
    ) -> dict[str, str]:
        """See ``Backend.write``; returns the checksum of every tensor and of the header."""
        header = _header(specs, attributes)
        checksums = {HEADER: xxhash.xxh3_64_hexdigest(header)}
        with (folder / FILE).open("wb") as file:
            file.write(header)
            for spec in _ordered(specs):
                array = np.ascontiguousarray(arrays[spec.name])
                for name, index in _tensors(spec):
                    tensor = array[index]
                    file.write(tensor.data if tensor.size else b"")
                    checksums[name] = _tensor_checksum(tensor)
        return checksums

    def open(self, folder: Path, commit: Commit, specs: Specs) -> OpenShard:
        """See ``Backend.open``."""
        check_size(folder, FILE, commit)
        path = folder / FILE
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        header = _found_header(data)
        if xxhash.xxh3_64_hexdigest(header) != commit.tensors.get(HEADER):
            raise ShardCorrupt(f"{path}: its header is not the committed one; {REMEDY}")
        entries = json.loads(header[8:])
        if not _header_fits(entries, specs, len(data) - len(header)):
            raise ShardCorrupt(f"{path}: its tensors are not what the manifest asks for; {REMEDY}")
        arrays = {spec.name: _view(data, spec, at) for spec, at in _offsets(specs, len(header))}
        attributes = json.loads(entries["__metadata__"]["attributes"])
        return _MappedShard(path, commit, specs, arrays, attributes)


class _MappedShard:
    def __init__(
        self,
        path: Path,
        commit: Commit,
        specs: Specs,
        arrays: Mapping[str, np.ndarray],
        attributes: Mapping[str, object],
    ) -> None:
        self._path, self._commit, self._specs, self._arrays = path, commit, specs, arrays
        self._checked: set[str] = set()
        self.attributes = attributes

    def read(
        self,
        name: str,
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        span: slice | None = None,
    ) -> np.ndarray:
        """See ``OpenShard.read``. Neighbouring layers and all heads come without a copy."""
        spec, array = self._specs[name], self._arrays[name]
        self._check(spec, array, layers, heads)
        if span is not None:
            array = array[:, :, span]
        if layers is not None:
            array = array[_along(layers)]
        return array if heads is None else array[:, _along(heads)]

    def _check(
        self,
        spec: ArraySpec,
        array: np.ndarray,
        layers: Sequence[int] | None,
        heads: Sequence[int] | None,
    ) -> None:
        for name, index in _tensors(spec, layers, heads):
            if name in self._checked:
                continue
            if _tensor_checksum(array[index]) != self._commit.tensors.get(name):
                raise ShardCorrupt(
                    f"{self._path}: tensor {name} does not match its checksum; {REMEDY}"
                )
            self._checked.add(name)


def _along(positions: Sequence[int]) -> slice | list[int]:
    """Neighbours as a slice, which gives a view; others as a list, which copies."""
    first, last = positions[0], positions[-1]
    return slice(first, last + 1) if last - first + 1 == len(positions) else list(positions)


def _ordered(specs: Specs) -> list[ArraySpec]:
    """Widest elements first, so that every tensor is aligned; then by name."""
    return sorted(specs.values(), key=lambda spec: (-np.dtype(spec.dtype).itemsize, spec.name))


def _tensors(
    spec: ArraySpec, layers: Sequence[int] | None = None, heads: Sequence[int] | None = None
) -> Iterator[tuple[str, Any]]:
    """Tensor names of an array, with their index into it."""
    if spec.group is None:
        yield spec.name, ...
        return
    stem = spec.name.rpartition("/")[2]
    layers = range(spec.shape[0]) if layers is None else layers
    heads = range(spec.shape[1]) if heads is None else heads
    for layer_idx, head in product(layers, heads):
        yield f"layer.{spec.group.layers[layer_idx]:02d}.head.{head:02d}.{stem}", (layer_idx, head)


def _offsets(specs: Specs, start: int) -> Iterator[tuple[ArraySpec, int]]:
    for spec in _ordered(specs):
        yield spec, start
        start += _num_bytes(spec.shape, spec.dtype)


def _num_bytes(shape: Sequence[int], dtype: str) -> int:
    return math.prod(shape) * np.dtype(dtype).itemsize


def _header(specs: Specs, attributes: Mapping[str, object]) -> bytes:
    """The file up to its data, padded to 64 bytes."""
    entries: dict[str, Any] = {"__metadata__": {"attributes": json.dumps(attributes)}}
    for spec, at in _offsets(specs, 0):
        for number, (name, _) in enumerate(_tensors(spec)):
            entries[name] = _header_entry(spec, at, number)
    body = json.dumps(entries, separators=(",", ":")).encode()
    body += b" " * (-(8 + len(body)) % 64)
    return struct.pack("<Q", len(body)) + body


def _header_entry(spec: ArraySpec, at: int, number: int) -> dict[str, Any]:
    """What the header says of an array's tensor ``number``; the array begins at ``at``."""
    logical = str(spec.attributes.get("logical_dtype"))
    shape = spec.shape if spec.group is None else spec.shape[2:]
    size = _num_bytes(shape, spec.dtype)
    return {
        "dtype": DTYPES.get(logical, DTYPES[spec.dtype]),
        "shape": list(shape),
        "data_offsets": [at + number * size, at + (number + 1) * size],
    }


def _header_fits(entries: Mapping[str, Any], specs: Specs, num_bytes: int) -> bool:
    """Whether every array begins where, and is what, the manifest asks for, and nothing more.

    Tensors of one array follow each other, so its first and the file's size settle the rest.
    """
    total = sum(_num_bytes(spec.shape, spec.dtype) for spec in specs.values())
    return total == num_bytes and all(
        entries.get(next(_tensors(spec))[0]) == _header_entry(spec, at, 0)
        for spec, at in _offsets(specs, 0)
    )


def _found_header(data: mmap.mmap) -> bytes:
    length = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else 0
    return data[: 8 + min(length, len(data))]


def _view(data: mmap.mmap, spec: ArraySpec, offset: int) -> np.ndarray:
    return np.ndarray(spec.shape, spec.dtype, buffer=data, offset=offset)


def _tensor_checksum(tensor: np.ndarray) -> str:
    return xxhash.xxh3_64_hexdigest(tensor.data if tensor.size else b"")
