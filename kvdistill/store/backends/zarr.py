"""Shards as zarr v3 groups, which zarr, zarrs, tensorstore, dask and xarray open as they are.

Each array is one file through the sharding codec, in chunks of one layer, one head and about
1,024 tokens. The sharding codec's checksum covers its index only, so every chunk ends with a
``crc32c`` of its own. zarr reads a missing file as fill values without an error, hence file sizes
are compared with the commit, and fill values are ones that no valid array holds: other readers
see NaN or -128 and not plausible zeros.

zarr-python writes. ``zarrs`` reads: its Rust pipeline is called directly, without zarr-python's
event loop, which costs more than a small read takes. Its thread pool does not survive a fork, so
a child of a process that has used it reads through zarr-python (about eight times slower), as does
an installation without zarrs.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from google_crc32c import value as _crc32c

from kvdistill.errors import ShardCorrupt
from kvdistill.store.backends import ArrayReader, Specs
from kvdistill.store.commit import REMEDY, check_size, checked_bytes
from kvdistill.store.format import ArraySpec
from kvdistill.store.manifest import Commit, json_object
from kvdistill.text import brief, shorten

if TYPE_CHECKING:
    from zarr import Array
    from zarr.abc.buffer import Buffer

CHUNK_TOKENS: Final = 1024

MAX_COMPRESSION: Final = 1 << 17
"""zstd stores a block of 128 kB in no less than a few bytes."""

FILL_VALUES: Final[dict[str, float]] = {
    "int8": -128,
    "uint8": 255,
    "uint16": 65535,
    "int32": -(2**31),
    "int64": -(2**63),
    "float16": math.nan,
    "float32": math.nan,
    "float64": math.nan,
}
"""Never in a valid array (for packed int4: never throughout one)."""

COMPRESSED_CODECS: Final = frozenset({None, "int4", "int4_v1"})
"""Codecs whose arrays zstd is worth its time for. None stands for token tables and statistics.
int4 shrinks from 0.28 to 0.25 of bf16. int8 would shrink by 5 % and bf16 by 24 %, at a fraction
of the reading speed."""


class ZarrBackend:
    """One zarr group per shard, one file per array."""

    def write(
        self,
        folder: Path,
        arrays: Mapping[str, np.ndarray],
        specs: Specs,
        attributes: Mapping[str, object],
    ) -> dict[str, str]:
        """See ``Backend.write``. zarr files are checked as files, so nothing is returned."""
        import zarr
        from zarr.codecs import Crc32cCodec, ZstdCodec
        from zarr.storage import MemoryStore

        # zarr's threads may still write after an error has been raised, so they write to memory.
        files: dict[str, Buffer] = {}
        group = zarr.create_group(MemoryStore(files), attributes=dict(attributes))
        for name, spec in specs.items():
            chunk = _chunk_shape(spec)
            compressed = spec.attributes.get("codec") in COMPRESSED_CODECS
            array = group.create_array(
                name,
                shape=spec.shape,
                dtype=spec.dtype,
                chunks=chunk,
                shards=tuple(
                    -(-max(n, 1) // c) * c for n, c in zip(spec.shape, chunk, strict=True)
                ),
                filters=None,
                compressors=[*([ZstdCodec(level=1)] if compressed else []), Crc32cCodec()],
                fill_value=FILL_VALUES[spec.dtype],
                attributes=dict(spec.attributes),
                dimension_names=spec.axes,
                config={"write_empty_chunks": True},
            )
            if math.prod(spec.shape):
                array[...] = arrays[name]
                _write_file(folder / _data_file(spec), files.pop(_data_file(spec)))
        for path, content in files.items():
            _write_file(folder / path, content)
        return {}

    def open(self, folder: Path, commit: Commit, specs: Specs) -> ArrayReader:
        """See ``Backend.open``."""
        _import_libraries()
        group = _metadata(folder / "zarr.json", checked_bytes(folder, "zarr.json", commit))
        attributes = group.get("attributes")
        if not isinstance(attributes, dict):
            raise ShardCorrupt(f"{folder / 'zarr.json'}: has no attributes; {REMEDY}")
        return _ZarrShard(folder, commit, specs, attributes)


class _ZarrShard:
    def __init__(
        self, folder: Path, commit: Commit, specs: Specs, attributes: Mapping[str, object]
    ) -> None:
        self._folder, self._commit, self._specs = folder, commit, specs
        self._arrays: dict[str, _ZarrArray] = {}
        self.attributes = attributes

    def read(
        self,
        name: str,
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        span: slice | None = None,
    ) -> np.ndarray:
        """See ``ArrayReader.read``."""
        spec = self._specs[name]
        rest = [slice(0, size) for size in spec.shape[1:]]
        if heads is not None:
            rest[0] = slice(heads[0], heads[-1] + 1)
        if span is not None:
            rest[1] = slice(*span.indices(spec.shape[2])[:2])
        boxes = [(run, *rest) for run in _contiguous_runs(layers, spec.shape[0])]
        length = sum(run.stop - run.start for run, *_ in boxes)
        shape = (length, *(axis.stop - axis.start for axis in rest))
        # Opened before ``out`` is allocated: the sizes of a damaged commit may be absurd.
        array = self._open(spec) if math.prod(shape) else None
        out = np.empty(shape, spec.dtype)
        if array is not None:
            array.read_into(out, boxes)
        if heads is not None and len(heads) < shape[1]:
            out = out[:, [head - heads[0] for head in heads]]
        return out

    def _open(self, spec: ArraySpec) -> _ZarrArray:
        """Open an array once, after checking its metadata and its file's size."""
        if spec.name not in self._arrays:
            name = f"{spec.name}/zarr.json"
            metadata = checked_bytes(self._folder, name, self._commit)
            array = _ZarrArray(self._folder, spec, metadata)
            check_size(self._folder, array.key, self._commit)
            compressed = self._commit.files[array.key].size_bytes
            if array.num_bytes > compressed * MAX_COMPRESSION:
                raise ShardCorrupt(
                    f"{self._folder / array.key}: {compressed} bytes cannot hold the "
                    f"{array.num_bytes:,} that its metadata declares; {REMEDY}"
                )
            array.refuse_bombs()
            self._arrays[spec.name] = array
        return self._arrays[spec.name]


class _ZarrArray:
    """One array in one file, read by zarrs, or by zarr-python where zarrs cannot be used."""

    def __init__(self, folder: Path, spec: ArraySpec, metadata: bytes) -> None:
        found = _metadata(folder / spec.name / "zarr.json", metadata)
        declared, expected = (found.get("shape"), found.get("data_type")), list(spec.shape)
        if declared != (expected, spec.dtype):
            raise ShardCorrupt(
                f"{folder / spec.name}: {brief(declared)}, but the manifest declares "
                f"{spec.dtype} {expected}; {REMEDY}"
            )
        self.key = _data_file(spec)
        self._folder, self._name, self._metadata = folder, spec.name, metadata.decode()
        self._path = folder / self.key
        self._file_shape, self._chunk, self._codecs = _layout(found, spec, folder / spec.name)
        self._chunk_bytes = math.prod(self._chunk) * np.dtype(spec.dtype).itemsize
        self._verified: set[int] = set()
        self.num_bytes = math.prod(self._file_shape) * np.dtype(spec.dtype).itemsize
        self._zarrs_pipeline: Any = None
        self._zarr_array: Array[Any] | None = None

    def refuse_bombs(self) -> None:
        """Raise ShardCorrupt for a chunk that is not one zstd frame of about the declared size."""
        if "zstd" not in self._codecs:
            return
        limit = 16 * self._chunk_bytes + (1 << 20)  # zstd may cut a block of 128 kB into 16
        with self._path.open("rb") as file:
            for first, length in self._chunks(file.fileno()):  # others are refused when read
                if length and _inflated(file.fileno(), first, first + length - 4, limit) > limit:
                    raise ShardCorrupt(
                        f"{self._path}: the chunk at byte {first} is not one zstd frame of the "
                        f"declared {self._chunk_bytes:,} bytes; {REMEDY}"
                    )

    def _chunks(self, file: int) -> list[tuple[int, int]]:
        """First byte and length of every chunk by the file's index; (0, 0) if not in the file."""
        index_bytes, size = 16 * (self.num_bytes // self._chunk_bytes), os.fstat(file).st_size
        index = _read_at(file, index_bytes, max(0, size - index_bytes - 4))
        places = struct.iter_unpack("<QQ", index[: len(index) & ~15])
        return [(first, n) if n >= 4 and first + n <= size else (0, 0) for first, n in places]

    def _verify(self, boxes: Sequence[tuple[slice, ...]]) -> None:
        """Compare chunks that are read for the first time with their checksums.

        zarrs does so only where a box is the whole file, which few reads are: not those of some
        layers, heads or tokens, nor those of a last chunk that the tokens do not fill.

        Raises:
            ValueError: a chunk is not in the file, or differs.
        """
        grid = [size // chunk for size, chunk in zip(self._file_shape, self._chunk, strict=True)]
        axes = [
            [range(a.start // n, -(-a.stop // n)) for a, n in zip(box, self._chunk, strict=True)]
            for box in boxes
        ]
        touched = {
            int(np.ravel_multi_index(at, grid)) for ranges in axes for at in product(*ranges)
        }
        if touched <= self._verified:
            return
        with self._path.open("rb") as file:
            places = self._chunks(file.fileno())
            for number in sorted(touched - self._verified):
                first, length = places[number]
                content = _read_at(file.fileno(), length, first)
                if not content or _crc32c(content[:-4]) != int.from_bytes(content[-4:], "little"):
                    raise ValueError(f"the chunk at byte {first} does not match its checksum")
                self._verified.add(number)

    def read_into(self, out: np.ndarray, boxes: Sequence[tuple[slice, ...]]) -> None:
        """Read boxes, one after the other along the first axis of ``out``.

        Raises:
            ShardCorrupt: the file is missing or truncated, or a checksum does not match.
        """
        targets, stop = [], 0
        for run, *_ in boxes:
            start, stop = stop, stop + run.stop - run.start
            targets.append((slice(start, stop), *(slice(0, size) for size in out.shape[1:])))
        try:
            if _zarrs_is_usable():
                self._read_with_zarrs(out, boxes, targets)
            else:
                self._read_with_zarr(out, boxes, targets)
        except (RuntimeError, ValueError, TypeError, LookupError, OSError) as error:
            raise ShardCorrupt(f"{self._path}: {shorten(str(error))}; {REMEDY}") from error
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # zarrs meets an impossible offset
                raise
            raise ShardCorrupt(f"{self._path}: {shorten(str(error))}; {REMEDY}") from None
        # After the read, because zarr takes a file that has vanished for one of fill values.
        if not self._path.exists():
            raise ShardCorrupt(f"{self._path}: missing; {REMEDY}")

    def _read_with_zarrs(
        self, out: np.ndarray, boxes: Sequence[tuple[slice, ...]], targets: Sequence[Any]
    ) -> None:
        from zarrs._internal import ChunkItem, CodecPipelineImpl

        self._verify(boxes)
        if self._zarrs_pipeline is None:
            from zarr.storage import LocalStore

            self._zarrs_pipeline = CodecPipelineImpl(
                self._metadata, store_config=LocalStore(self._folder), validate_checksums=True
            )
        items = [
            ChunkItem(
                key=self.key,
                chunk_subset=box,
                chunk_shape=self._file_shape,
                subset=target,
                shape=out.shape,
            )
            for box, target in zip(boxes, targets, strict=True)
        ]
        self._zarrs_pipeline.retrieve_chunks_and_apply_index(items, out)

    def _read_with_zarr(
        self, out: np.ndarray, boxes: Sequence[tuple[slice, ...]], targets: Sequence[Any]
    ) -> None:
        if self._zarr_array is None:
            import zarr
            from zarr.storage import LocalStore, StorePath

            path = StorePath(LocalStore(self._folder, read_only=True), self._name)
            self._zarr_array = zarr.Array.from_dict(path, json.loads(self._metadata))
        for box, target in zip(boxes, targets, strict=True):
            out[target] = self._zarr_array[box]


def _metadata(path: Path, content: bytes) -> dict[str, Any]:
    """A metadata document; ShardCorrupt if it is no JSON object."""
    try:
        return json_object(content)
    except ValueError as error:
        raise ShardCorrupt(f"{path}: {error}; {REMEDY}") from None


_CHUNK_KEYS: Final = {"name": "default", "configuration": {"separator": "/"}}


def _layout(
    metadata: Mapping[str, Any], spec: ArraySpec, where: Path
) -> tuple[list[int], list[int], list[str]]:
    """Shapes of an array's one file (axes rounded up to whole chunks) and of its chunks; codecs.

    Raises:
        ShardCorrupt: another grid, chunks of no positive whole size, or codecs never written here.
    """
    try:
        keys = metadata["chunk_key_encoding"]
        if keys not in ({"name": "default"}, _CHUNK_KEYS):
            raise ValueError(f"chunk keys {brief(keys)}")
        outer = metadata["chunk_grid"]["configuration"]["chunk_shape"]
        (sharding,) = metadata["codecs"]
        inner = sharding["configuration"]["chunk_shape"]
        codecs = [codec["name"] for codec in sharding["configuration"]["codecs"]]
        if codecs not in (["bytes", "crc32c"], ["bytes", "zstd", "crc32c"]):
            raise ValueError(f"codecs {brief(codecs)}")
        if not all(type(size) is int and size > 0 for size in inner):
            raise ValueError(f"chunks of {brief(inner)}")
        sizes = zip(spec.shape, inner, strict=True)
        if outer != [-(-max(size, 1) // chunk) * chunk for size, chunk in sizes]:
            raise ValueError(f"a file of {brief(outer)} in chunks of {brief(inner)}")
    except (LookupError, TypeError, ValueError) as error:
        raise ShardCorrupt(
            f"{where}: not the chunk grid of one file ({shorten(repr(error))}); {REMEDY}"
        ) from None
    return outer, inner, codecs


def _read_at(file: int, size: int, start: int) -> bytes:
    """As ``os.pread``, which may return less than there is; only the end of a file ends it."""
    found = bytearray()
    while piece := os.pread(file, size - len(found), start + len(found)):
        found += piece
    return bytes(found)


def _inflated(file: int, start: int, end: int, limit: int) -> int:
    """A bound on what one zstd frame (RFC 8878) inflates to; above ``limit`` if it is not one."""
    head = _read_at(file, 18, start)
    if head[:4] != b"\x28\xb5\x2f\xfd" or len(head) < 18:
        return limit + 1
    flags = head[4]
    has_window, id_bytes = not flags & 32, (0, 1, 2, 4)[flags & 3]
    size_bytes = (0 if has_window else 1, 2, 4, 8)[flags >> 6]
    at = 5 + has_window + id_bytes
    stated = int.from_bytes(head[at : at + size_bytes], "little")
    at, bound, is_last = start + at + size_bytes, 0, False
    while not is_last and at < end and bound <= limit:
        block = int.from_bytes(_read_at(file, 3, at), "little")
        is_last, kind, size = bool(block & 1), block >> 1 & 3, block >> 3
        at += 3 + (1 if kind == 1 else size)  # 0 raw, 1 one byte repeated, 2 compressed
        bound += 1 << 17 if kind == 2 else size
    at += 4 * (flags >> 2 & 1)
    return max(bound, stated) if is_last and at == end else limit + 1


_HAS_ZARRS: Final = find_spec("zarrs") is not None

_zarrs_process: Final[dict[str, int]] = {}

_imported: Final[set[str]] = set()

_IMPORT_LOCK: Final = Lock()
# A fork waits for an import in another thread, which its child could never finish.
os.register_at_fork(
    before=_IMPORT_LOCK.acquire,
    after_in_parent=_IMPORT_LOCK.release,
    after_in_child=_IMPORT_LOCK.release,
)


def _import_libraries() -> None:
    """Import what shards are read with, in one thread at a time.

    zarr's modules import each other in a circle: threads that import it together find them half
    initialised, or a deadlock of Python's module locks.
    """
    if _imported:
        return
    with _IMPORT_LOCK:
        import zarr.storage  # noqa: F401

        if _HAS_ZARRS:
            import zarrs._internal  # noqa: F401
        _imported.add("zarr")


def _zarrs_is_usable() -> bool:
    """Whether zarrs is installed and its threads, if it has started any, are this process's.

    They do not survive a fork, so a child of a process that has used zarrs would wait for ever.
    """
    return _HAS_ZARRS and _zarrs_process.setdefault("pid", os.getpid()) == os.getpid()


def _write_file(path: Path, content: Buffer) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.as_numpy_array().data)


def _data_file(spec: ArraySpec) -> str:
    """The one file of an array: chunk 0/0/... of the outer grid."""
    return "/".join([spec.name, "c", *("0" for _ in spec.shape)])


def _chunk_shape(spec: ArraySpec) -> tuple[int, ...]:
    """Codes: one layer and one head of about 1,024 tokens, cut evenly. Scales: one layer."""
    whole = tuple(max(size, 1) for size in spec.shape)
    if spec.group is None:
        return whole
    if spec.attributes.get("role") != "codes":
        return (1, *whole[1:])
    pieces = -(-whole[2] // CHUNK_TOKENS)
    return (1, 1, -(-whole[2] // pieces), whole[3])


def _contiguous_runs(positions: Sequence[int] | None, length: int) -> list[slice]:
    """Ascending positions as runs of neighbours: ``[0, 1, 4]`` → ``[0:2, 4:5]``."""
    if positions is None:
        return [slice(0, length)]
    runs: list[slice] = []
    for position in positions:
        if runs and runs[-1].stop == position:
            runs[-1] = slice(runs[-1].start, position + 1)
        else:
            runs.append(slice(position, position + 1))
    return runs
