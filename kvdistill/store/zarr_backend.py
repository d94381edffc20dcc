"""Shards as zarr v3 groups: compressed, readable by zarr, dask, tensorstore and zarrs alike.

Each array is one file by the sharding codec, cut into chunks of one layer, one head and about
1,024 tokens. ``crc32c`` comes after the compressor, because the sharding codec checks only its
index. A missing file reads as the fill value in every zarr reader, without an error: sizes are
checked against the commit before an array is touched, and the fill value is one that no valid
array holds, so that other readers see NaN or −128 and not plausible zeros.
``zarrs`` reads; zarr-python's own pipeline gives the same bits and is used where ``zarrs`` is
not installed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.storage import LocalStore

from kvdistill.errors import ShardCorrupt
from kvdistill.store.backend import OpenShard, Specs
from kvdistill.store.integrity import REMEDY, check_content, check_size
from kvdistill.store.manifest import Commit
from kvdistill.store.schema import ArraySpec

CHUNK_TOKENS: Final = 1024
FILL_VALUES: Final[dict[str, float]] = {
    "int8": -128,
    "uint8": 255,
    "uint16": 65535,
    "int32": -(2**31),
    "int64": -(2**63),
    "float16": float("nan"),
    "float32": float("nan"),
    "float64": float("nan"),
}
"""Never the content of a whole chunk, which would then not be written."""
FAST_PIPELINE: Final = "zarrs.ZarrsCodecPipeline"
PLAIN_PIPELINE: Final = "zarr.core.codec_pipeline.BatchedCodecPipeline"
_CONFIG_LOCK = threading.Lock()


class ZarrBackend:
    """``pipeline`` is the codec pipeline by import path; by default ``zarrs`` if installed."""

    def __init__(self, pipeline: str | None = None) -> None:
        fast = find_spec("zarrs") is not None
        self.pipeline = pipeline or (FAST_PIPELINE if fast else PLAIN_PIPELINE)

    def write(
        self,
        folder: Path,
        arrays: Mapping[str, np.ndarray],
        specs: Specs,
        attributes: Mapping[str, object],
    ) -> dict[str, str]:
        """See ``Backend.write``. zarr files are checked as files, so nothing is returned."""
        with _pipeline(self.pipeline):
            root = zarr.create_group(LocalStore(folder), attributes=dict(attributes))
            for prefix in sorted({name.rpartition("/")[0] for name in specs} - {""}):
                root.create_group(prefix)
            targets = {name: _create(root, spec) for name, spec in specs.items()}
        for name, target in targets.items():
            if target.size:
                target[...] = arrays[name]
        return {}

    def open(self, folder: Path, commit: Commit, specs: Specs) -> OpenShard:
        """See ``Backend.open``."""
        check_content(folder, "zarr.json", commit)
        with _pipeline(self.pipeline):
            root = zarr.open_group(LocalStore(folder, read_only=True), mode="r")
        return _ZarrShard(folder, commit, specs, root)


class _ZarrShard:
    def __init__(self, folder: Path, commit: Commit, specs: Specs, root: zarr.Group) -> None:
        self._folder, self._commit, self._specs, self._root = folder, commit, specs, root
        self._arrays: dict[str, zarr.Array[Any]] = {}
        self.attributes: Mapping[str, object] = dict(root.attrs)

    def read(
        self,
        name: str,
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        span: slice | None = None,
    ) -> np.ndarray:
        """See ``OpenShard.read``."""
        spec = self._specs[name]
        array = self._array(spec)
        if layers is None and heads is None and span is None:
            return self._get(array, (), spec)
        rest = (_bounds(heads), span or slice(None))[: len(spec.shape) - 1]
        pieces = [self._get(array, (run, *rest), spec) for run in _runs(layers, spec.shape[0])]
        out = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        if heads is None:
            return out
        return out[:, [head - heads[0] for head in heads]]

    def _array(self, spec: ArraySpec) -> zarr.Array[Any]:
        """Open an array once, after checking its metadata, shape, dtype and file size."""
        if spec.name not in self._arrays:
            check_content(self._folder, f"{spec.name}/zarr.json", self._commit)
            array = self._root[spec.name]
            if not isinstance(array, zarr.Array):
                raise ShardCorrupt(f"{self._folder / spec.name}: not a zarr array; {REMEDY}")
            if array.shape != spec.shape or array.dtype != np.dtype(spec.dtype):
                raise ShardCorrupt(
                    f"{self._folder / spec.name}: {array.dtype} {array.shape}, but the manifest "
                    f"asks for {spec.dtype} {spec.shape}; {REMEDY}"
                )
            if array.size:
                check_size(self._folder, _data_file(spec), self._commit)
            self._arrays[spec.name] = array
        return self._arrays[spec.name]

    def _get(self, array: zarr.Array[Any], index: tuple[slice, ...], spec: ArraySpec) -> np.ndarray:
        try:
            return np.asarray(array[index or ...])
        except (ValueError, RuntimeError) as error:
            raise ShardCorrupt(
                f"{self._folder / spec.name}: cannot be decoded ({error}); {REMEDY}"
            ) from error


def _data_file(spec: ArraySpec) -> str:
    """The one file of an array: chunk 0/0/… of the outer grid."""
    return "/".join([spec.name, "c", *("0" for _ in spec.shape)])


@contextmanager
def _pipeline(path: str) -> Iterator[None]:
    """Open or create arrays with this codec pipeline; they keep it for life.

    zarr's configuration is one per process, hence the lock; it is restored on the way out.
    """
    with _CONFIG_LOCK, zarr.config.set({"codec_pipeline.path": path}):
        yield


def _create(root: zarr.Group, spec: ArraySpec) -> zarr.Array[Any]:
    chunks = _chunks(spec)
    whole = tuple(-(-size // chunk) * chunk for size, chunk in zip(spec.shape, chunks, strict=True))
    return root.create_array(
        spec.name,
        shape=spec.shape,
        dtype=spec.dtype,
        chunks=chunks,
        shards=tuple(max(size, chunk) for size, chunk in zip(whole, chunks, strict=True)),
        filters=None,
        compressors=[
            BloscCodec(cname="zstd", clevel=1, shuffle="shuffle"),
            Crc32cCodec(),
        ],
        fill_value=FILL_VALUES[spec.dtype],
        attributes=dict(spec.attributes),
        dimension_names=spec.axes,
    )


def _chunks(spec: ArraySpec) -> tuple[int, ...]:
    """One layer and one head of about 1,024 tokens; scales of all heads together."""
    shape = tuple(max(size, 1) for size in spec.shape)
    if spec.group is None:
        return shape
    if len(shape) == 3 or shape[3] == 1:
        return (1, *shape[1:])
    pieces = -(-shape[2] // CHUNK_TOKENS)
    return (1, 1, -(-shape[2] // pieces), shape[3])


def _runs(layers: Sequence[int] | None, length: int) -> list[slice]:
    """Ascending positions as runs of neighbours: ``[0, 1, 4]`` → ``[0:2, 4:5]``."""
    if layers is None:
        return [slice(0, length)]
    runs: list[slice] = []
    for layer in layers:
        if runs and runs[-1].stop == layer:
            runs[-1] = slice(runs[-1].start, layer + 1)
        else:
            runs.append(slice(layer, layer + 1))
    return runs


def _bounds(heads: Sequence[int] | None) -> slice:
    return slice(None) if heads is None else slice(heads[0], heads[-1] + 1)
