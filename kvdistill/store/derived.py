"""Arrays derived from all committed shards of a teacher: kept, checked, and made again at need.

    teachers/<name>/statistics.safetensors    channel statistics, summed over shards
    teachers/<name>/prototypes.safetensors    what routers compare a sample with

No commit lists these files, and nothing is lost with them. Each states in its metadata what it was
derived from (ids and commit times of the shards) and a checksum of its tensors. Whoever needs one
that is missing, damaged or of other shards derives it anew, and keeps it if the store is writable;
so a process that is killed between a teacher's last shard and its prototypes loses nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from kvdistill.errors import ShardCorrupt, StoreError
from kvdistill.store.commit import REMEDY, replace_file
from kvdistill.store.format import COMMIT

Arrays = dict[str, NDArray[Any]]


def origin_of(teacher: Path, shard_ids: Sequence[str]) -> str:
    """A digest of which shards are committed, and when; ShardCorrupt if one has lost its commit."""
    digest = xxhash.xxh3_64()
    for shard_id in shard_ids:
        path = teacher / "shards" / shard_id / COMMIT
        try:
            digest.update(f"{shard_id} {path.stat().st_mtime_ns}\n".encode())
        except OSError as error:
            raise ShardCorrupt(f"{path}: {error.strerror}; {REMEDY}") from None
    return digest.hexdigest()


def derived_arrays(path: Path, origin: str, derive: Callable[[], Arrays]) -> Arrays:
    """The arrays in ``path`` if they are sound and of this origin; derived and kept otherwise."""
    stated, arrays = _sound_arrays(path)
    if stated == origin:
        return arrays
    arrays = derive()
    _write(path, origin, arrays)
    return arrays


def is_sound(path: Path) -> bool:
    """Whether a derived file is absent or whole; what it was derived from does not matter."""
    return not path.exists() or _sound_arrays(path)[0] is not None


def _sound_arrays(path: Path) -> tuple[str | None, Arrays]:
    """Origin and arrays of a file; no origin where it is missing or damaged."""
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, KeyError):
        return None, {}
    origin = metadata.get("origin")
    if origin is None or metadata.get("checksum") != _tensors_checksum(origin, arrays):
        return None, {}
    return origin, arrays


def _write(path: Path, origin: str, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Publish the arrays; a read-only or full store goes without."""
    kept = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    metadata = {"origin": origin, "checksum": _tensors_checksum(origin, kept)}
    with contextlib.suppress(StoreError):
        replace_file(path, save(kept, metadata))


def _tensors_checksum(origin: str, arrays: Mapping[str, NDArray[Any]]) -> str:
    digest = xxhash.xxh3_64(origin.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
