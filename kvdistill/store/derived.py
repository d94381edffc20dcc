"""Arrays derived from all committed shards of a teacher: kept, checked, and made again at need.

    teachers/<name>/statistics.safetensors    channel statistics, summed over shards
    teachers/<name>/prototypes.safetensors    what routers compare a sample with

No commit lists these files, and nothing is lost with them. Each states in its metadata what it was
derived from (ids and commits of the shards) and a checksum of its tensors. Whoever needs one
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
from kvdistill.store.bucket import Bucket
from kvdistill.store.commit import REMEDY, replace_file

Arrays = dict[str, NDArray[Any]]


def origin_of(shard_ids: Sequence[str], commit_text: Callable[[str], bytes]) -> str:
    """A digest of shards and their commits; ShardCorrupt if one has lost its commit."""
    digest = xxhash.xxh3_64()
    for shard_id in shard_ids:
        try:
            digest.update(shard_id.encode() + commit_text(shard_id))
        except FileNotFoundError as error:
            raise ShardCorrupt(f"{error.filename}: {error.strerror}; {REMEDY}") from None
    return digest.hexdigest()


def derived_arrays(
    path: Path, origin: str, derive: Callable[[], Arrays], bucket: Bucket | None = None
) -> Arrays:
    """The arrays in ``path``, or in the bucket that it caches, if they are sound and of this
    origin; derived and kept in both otherwise.
    """
    stated, arrays = _sound_arrays(path)
    if stated != origin and bucket is not None and (content := bucket.read(path)) is not None:
        replace_file(path, content)
        stated, arrays = _sound_arrays(path)
    if stated == origin:
        return arrays
    arrays = derive()
    content = _as_file(origin, arrays)
    with contextlib.suppress(StoreError):  # a read-only or full store goes without
        replace_file(path, content)
        if bucket is not None:
            bucket.put(path, content)
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


def _as_file(origin: str, arrays: Mapping[str, NDArray[Any]]) -> bytes:
    kept = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    metadata = {"origin": origin, "checksum": _tensors_checksum(origin, kept)}
    return bytes(save(kept, metadata))


def _tensors_checksum(origin: str, arrays: Mapping[str, NDArray[Any]]) -> str:
    digest = xxhash.xxh3_64(origin.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
