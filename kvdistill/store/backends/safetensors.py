"""Shards as one memory-mapped safetensors file each: no decoding and, as a rule, no copy.

Every layer and head has tensors of its own, ``layer.05.head.00.key`` ``[T, D]`` and so on, which
any safetensors reader finds by name. The library chooses their order in the file; where those of
a selection lie at equal distances, as they do for layers of one geometry, the selection is a
strided view of the map. The map is private, so writing to a view changes no file. Nothing is
compressed: the speed of memory for the size of the codes.

Sizes and the header's checksum are verified on opening, a tensor's when it is first read.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Final

import ml_dtypes
import numpy as np
import xxhash

from kvdistill.errors import ShardCorrupt
from kvdistill.store.backends import ArrayReader, Specs
from kvdistill.store.commit import REMEDY, check_size
from kvdistill.store.format import ArraySpec
from kvdistill.store.manifest import Commit

FILE: Final = "shard.safetensors"

HEADER: Final = "__header__"
"""Under this name a commit holds the checksum of everything before the first tensor."""

LOGICAL_DTYPES: Final = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
}
"""What safetensors declares in place of the integers that hold these bits in memory."""


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
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        tensors: dict[str, np.ndarray] = {}
        for spec in specs.values():
            array = np.ascontiguousarray(arrays[spec.name])
            logical = str(spec.attributes.get("logical_dtype"))
            array = array.view(LOGICAL_DTYPES.get(logical, array.dtype))
            for position, name in np.ndenumerate(_tensor_names(spec)):
                tensors[name] = array[position]
        try:
            save_file(tensors, folder / FILE, {"attributes": json.dumps(attributes)})
        except SafetensorError as error:
            raise _as_os_error(error) from error
        checksums = {name: _checksum(tensor) for name, tensor in tensors.items()}
        start = _header_bytes(folder / FILE, specs)
        checksums[HEADER] = _checksum(np.fromfile(folder / FILE, np.uint8, start))
        return checksums

    def open(self, folder: Path, commit: Commit, specs: Specs) -> ArrayReader:
        """See ``Backend.open``."""
        from safetensors import safe_open

        check_size(folder, FILE, commit)
        path = folder / FILE
        start = _header_bytes(path, specs)
        data = np.memmap(path, np.uint8, mode="c").view(np.ndarray)
        if start < 0 or _checksum(data[:start]) != commit.tensors.get(HEADER):
            raise ShardCorrupt(f"{path}: its header does not match its checksum; {REMEDY}")
        names = {name: _tensor_names(spec) for name, spec in specs.items()}
        sizes = {tensor: _num_bytes(specs[name]) for name in specs for tensor in names[name].flat}
        with safe_open(path, framework="np") as file:
            in_order = file.offset_keys()
            if set(in_order) != sizes.keys() or not all(
                file.get_slice(names[name].flat[0]).get_shape() == list(_tensor_shape(spec))
                for name, spec in specs.items()
            ):
                raise ShardCorrupt(f"{path}: its tensors are not those of the manifest; {REMEDY}")
            attributes = json.loads(file.metadata()["attributes"])
        starts = accumulate((sizes[tensor] for tensor in in_order), initial=start)
        offsets = dict(zip(in_order, starts, strict=False))
        return _MappedShard(path, specs, attributes, data, names, offsets, commit.tensors)


@dataclass(frozen=True, eq=False)
class _MappedShard:
    path: Path
    specs: Specs
    attributes: Mapping[str, object]
    data: np.ndarray
    """uint8, the whole file."""
    names: Mapping[str, np.ndarray]
    """Tensor names of every array, ``[layer, head]``, or 0-d where it is one tensor."""
    offsets: Mapping[str, int]
    """First byte of every tensor."""
    checksums: Mapping[str, str]
    verified: set[str] = field(default_factory=set)

    def read(
        self,
        name: str,
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        span: slice | None = None,
    ) -> np.ndarray:
        """See ``ArrayReader.read``. A view of the map where the tensors lie at equal distances."""
        if self.path.stat().st_size < len(self.data):  # reading the map would be a SIGBUS
            raise ShardCorrupt(f"{self.path}: truncated since it was opened; {REMEDY}")
        spec, names = self.specs[name], self.names[name]
        if layers is not None:
            names = names[layers]
        if heads is not None:
            names = names[:, heads]
        offsets = [self._verified_offset(tensor, spec) for tensor in names.flat]
        steps = _equal_steps(offsets, names.shape)
        if steps is not None:
            array = self._view(spec, offsets[0], names.shape, steps)
            return array if span is None else array[:, :, span]
        tensors = [self._view(spec, offset)[span or slice(None)] for offset in offsets]
        return np.stack(tensors).reshape(*names.shape, *tensors[0].shape)

    def _verified_offset(self, tensor: str, spec: ArraySpec) -> int:
        """First byte of a tensor, which is compared with its checksum when it is first read.

        Raises:
            ShardCorrupt: they differ.
        """
        start = self.offsets[tensor]
        if tensor not in self.verified:
            content = self.data[start : start + _num_bytes(spec)]
            if _checksum(content) != self.checksums.get(tensor):
                raise ShardCorrupt(
                    f"{self.path}: tensor {tensor} does not match its checksum; {REMEDY}"
                )
            self.verified.add(tensor)
        return start

    def _view(
        self, spec: ArraySpec, offset: int, lead: Sequence[int] = (), steps: Sequence[int] = ()
    ) -> np.ndarray:
        """A grid ``lead`` of the array's tensors, ``steps`` bytes apart, without a copy."""
        inner = _tensor_shape(spec)
        itemsize = np.dtype(spec.dtype).itemsize
        strides = [itemsize * math.prod(inner[axis + 1 :]) for axis in range(len(inner))]
        return np.ndarray((*lead, *inner), spec.dtype, self.data, offset, (*steps, *strides))


def _equal_steps(offsets: Sequence[int], shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Distance of neighbours along each axis of ``shape``; None where it varies."""
    if len(offsets) == 1:
        return (0,) * len(shape)
    grid = np.reshape(offsets, shape) - offsets[0]
    layer_step, head_step = int(grid[:2, 0][-1]), int(grid[0, :2][-1])
    regular = np.add.outer(np.arange(shape[0]) * layer_step, np.arange(shape[1]) * head_step)
    return (layer_step, head_step) if (grid == regular).all() else None


def _tensor_names(spec: ArraySpec) -> np.ndarray:
    """Names of an array's tensors: object ``[layer, head]``, or 0-d where it is one tensor."""
    if spec.group is None:
        return np.array(spec.name, object)
    stem = spec.name.rpartition("/")[2]
    heads = [f"head.{head:02d}.{stem}" for head in range(spec.group.num_key_value_heads)]
    return np.array(
        [[f"layer.{layer:02d}.{head}" for head in heads] for layer in spec.group.layers], object
    )


def _tensor_shape(spec: ArraySpec) -> tuple[int, ...]:
    return spec.shape if spec.group is None else spec.shape[2:]


def _num_bytes(spec: ArraySpec) -> int:
    """Size of one of the array's tensors."""
    return math.prod(_tensor_shape(spec)) * np.dtype(spec.dtype).itemsize


def _header_bytes(path: Path, specs: Specs) -> int:
    """Where the tensors begin: the format has no gaps between them, and nothing after them."""
    sizes = (math.prod(spec.shape) * np.dtype(spec.dtype).itemsize for spec in specs.values())
    return path.stat().st_size - sum(sizes)


def _checksum(content: np.ndarray) -> str:
    # xxhash takes neither a buffer of a dtype from ml_dtypes nor an empty one.
    return xxhash.xxh3_64_hexdigest(
        content.reshape(-1).view(np.uint8).data if content.size else b""
    )


def _as_os_error(error: Exception) -> OSError:
    """The system's error inside a ``SafetensorError``, which is not an ``OSError``."""
    code = re.search(r"os error (\d+)", str(error))
    number = int(code[1]) if code else 0
    return OSError(number, os.strerror(number) if code else str(error))
