"""Shards as zarr v3 groups, which zarr, zarrs, tensorstore, dask and xarray open as they are.

Each array is one file by the sharding codec, cut into chunks of one layer, one head and about
1,024 tokens. ``crc32c`` closes every chunk, because the sharding codec checks only its index.
A missing file reads as the fill value in every zarr reader, without an error: sizes are checked
against the commit before an array is touched, and the fill value is one that no valid array
holds, so that other readers see NaN or −128 and not plausible zeros.

The metadata is plain JSON and the files are read and written by ``sharded_file``: neither zarr
nor its event loop is loaded, so a reader may be forked and shared between threads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from kvdistill.errors import ShardCorrupt
from kvdistill.store.backends import OpenShard, Specs
from kvdistill.store.backends.sharded_file import (
    ZSTD_LEVEL,
    Grid,
    read_box,
    read_index,
    write_array,
)
from kvdistill.store.commit import REMEDY, check_size, checked_bytes
from kvdistill.store.format import ArraySpec
from kvdistill.store.manifest import Commit

CHUNK_TOKENS: Final = 1024


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
"""What zstd is worth its time for: token tables and the like, and int4, which it brings to 0.25 of
bf16 from 0.28. It takes 5 % off int8 and 24 % off bf16, and makes reading several times slower."""


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
        _write_json(folder, {"node_type": "group", "attributes": dict(attributes)})
        for prefix in {name.rpartition("/")[0] for name in specs} - {""}:
            _write_json(folder / prefix, {"node_type": "group", "attributes": {}})
        for name, spec in specs.items():
            grid = _chunk_grid(spec)
            _write_json(folder / name, _array_metadata(spec, grid))
            if math.prod(grid.shape):
                path = folder / _data_file(spec)
                path.parent.mkdir(parents=True)
                write_array(path, arrays[name], grid)
        return {}

    def open(self, folder: Path, commit: Commit, specs: Specs) -> OpenShard:
        """See ``Backend.open``."""
        group = _read_json(folder, "zarr.json", commit)
        return _ZarrShard(folder, commit, specs, group["attributes"])


class _ZarrShard:
    def __init__(
        self, folder: Path, commit: Commit, specs: Specs, attributes: Mapping[str, object]
    ) -> None:
        self._folder, self._commit, self._specs = folder, commit, specs
        self._opened: dict[str, tuple[Path, Grid, Any]] = {}
        self.attributes = attributes

    def read(
        self,
        name: str,
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        span: slice | None = None,
    ) -> np.ndarray:
        """See ``OpenShard.read``."""
        spec = self._specs[name]
        if not math.prod(spec.shape):
            empty = np.empty(spec.shape, spec.dtype)
            return np.asarray(empty[_empty_index(spec, layers, heads, span)])
        path, grid, index = self._open(spec)
        box = [range(size) for size in spec.shape]
        if span is not None:
            box[2] = range(spec.shape[2])[span]
        if heads is not None:
            box[1] = range(heads[0], heads[-1] + 1)
        pieces = [
            read_box(path, grid, index, [run, *box[1:]])
            for run in _contiguous_runs(layers, spec.shape[0])
        ]
        out = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        whole = heads is None or len(box[1]) == len(heads)
        return out if whole else out[:, [head - box[1].start for head in heads or ()]]

    def _open(self, spec: ArraySpec) -> tuple[Path, Grid, Any]:
        """Open an array once, after checking its metadata and its file's size."""
        if spec.name not in self._opened:
            found = _read_json(self._folder, f"{spec.name}/zarr.json", self._commit)
            grid = _found_grid(found, spec)
            if grid is None:
                raise ShardCorrupt(
                    f"{self._folder / spec.name}: not the array that the manifest asks for, "
                    f"{spec.dtype} {spec.shape}; {REMEDY}"
                )
            check_size(self._folder, _data_file(spec), self._commit)
            path = self._folder / _data_file(spec)
            self._opened[spec.name] = path, grid, read_index(path, grid)
        return self._opened[spec.name]


_FORMAT: Final = {"zarr_format": 3}


_CHUNK_CODECS: Final = (["bytes", "crc32c"], ["bytes", "zstd", "crc32c"])


def _write_json(folder: Path, body: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**_FORMAT, **body}, indent=1, ensure_ascii=False)
    (folder / "zarr.json").write_text(text, encoding="utf-8")


def _read_json(folder: Path, name: str, commit: Commit) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(checked_bytes(folder, name, commit))
    return body


def _array_metadata(spec: ArraySpec, grid: Grid) -> dict[str, Any]:
    """The array's ``zarr.json``: https://zarr-specs.readthedocs.io/en/latest/v3/core/."""
    endian = {"endian": "little"}
    zstd = {"name": "zstd", "configuration": {"level": ZSTD_LEVEL, "checksum": False}}
    chunk_codecs = [
        {"name": "bytes", "configuration": endian},
        *([zstd] if grid.compressed else []),
        {"name": "crc32c"},
    ]
    sharding = {
        "chunk_shape": list(grid.chunk),
        "codecs": chunk_codecs,
        "index_codecs": [{"name": "bytes", "configuration": endian}, {"name": "crc32c"}],
        "index_location": "end",
    }
    return {
        "node_type": "array",
        "shape": list(grid.shape),
        "data_type": grid.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(grid.whole)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": "NaN" if math.isnan(grid.fill) else grid.fill,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "attributes": dict(spec.attributes),
        "dimension_names": list(spec.axes),
    }


def _data_file(spec: ArraySpec) -> str:
    """The one file of an array: chunk 0/0/… of the outer grid."""
    return "/".join([spec.name, "c", *("0" for _ in spec.shape)])


def _chunk_grid(spec: ArraySpec) -> Grid:
    """Codes: one layer and one head of about 1,024 tokens. Scales: one layer."""
    chunk = tuple(max(size, 1) for size in spec.shape)
    if spec.group is not None and spec.attributes.get("role") == "codes":
        pieces = -(-chunk[2] // CHUNK_TOKENS)
        chunk = (1, 1, -(-chunk[2] // pieces), chunk[3])
    elif spec.group is not None:
        chunk = (1, *chunk[1:])
    compressed = spec.attributes.get("codec") in COMPRESSED_CODECS
    return Grid(spec.shape, chunk, spec.dtype, FILL_VALUES[spec.dtype], compressed)


def _found_grid(found: dict[str, Any], spec: ArraySpec) -> Grid | None:
    """The grid that a ``zarr.json`` describes; None if it is not what ``spec`` asks for.

    Chunks and compression are taken from the file: older and newer choices stay readable.
    """
    try:
        (sharding,) = found["codecs"]
        inner = sharding["configuration"]
        chunk, outer = inner["chunk_shape"], found["chunk_grid"]["configuration"]["chunk_shape"]
        names = [codec["name"] for codec in inner["codecs"]]
        same = (found["shape"], found["data_type"]) == (list(spec.shape), spec.dtype)
    except (KeyError, TypeError, ValueError):
        return None
    if not same or sharding["name"] != "sharding_indexed" or names not in _CHUNK_CODECS:
        return None
    fill = FILL_VALUES[spec.dtype]
    grid = Grid(spec.shape, tuple(chunk), spec.dtype, fill, compressed="zstd" in names)
    return grid if len(chunk) == len(spec.shape) and list(grid.whole) == outer else None


def _empty_index(
    spec: ArraySpec,
    layers: Sequence[int] | None,
    heads: Sequence[int] | None,
    span: slice | None,
) -> tuple[Any, ...]:
    """An orthogonal index into an array without elements: only shapes matter."""
    axes = [slice(None) for _ in spec.shape]
    for axis, chosen in enumerate((layers, heads)):
        if chosen is not None:
            axes[axis] = slice(0, len(chosen))
    if span is not None:
        axes[2] = span
    return tuple(axes)


def _contiguous_runs(layers: Sequence[int] | None, length: int) -> list[range]:
    """Ascending positions as runs of neighbours: ``[0, 1, 4]`` → ``[0:2, 4:5]``."""
    if layers is None:
        return [range(length)]
    runs: list[range] = []
    for layer in layers:
        if runs and runs[-1].stop == layer:
            runs[-1] = range(runs[-1].start, layer + 1)
        else:
            runs.append(range(layer, layer + 1))
    return runs
