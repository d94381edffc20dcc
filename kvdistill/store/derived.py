"""Arrays of a teacher beside its shards: derived ones, and the bases of codec ``klt``.

    teachers/<name>/statistics.safetensors    channel statistics, summed over shards
    teachers/<name>/prototypes.safetensors    what routers compare a sample with
    teachers/<name>/transform.safetensors     bases by stem, block and name: key.0.mean …

**Derived arrays** are kept, checked, made again at need. Each states in its metadata what it was
derived from (ids and commits of the shards) and a checksum of its tensors. Whoever needs one
that is missing, damaged or of other shards derives it anew, and keeps it if the store is writable;
so a process that is killed between a teacher's last shard and its prototypes loses nothing.

**Bases** are published once, before the first shard: codes mean nothing without them, and a second
fit would give other ones. The first copy wins among concurrent tasks, the manifest states its
checksum, and a copy of a store copies the file.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from kvdistill.errors import ShardCorrupt, StoreError
from kvdistill.store.bucket import Bucket
from kvdistill.store.codecs import Transforms
from kvdistill.store.codecs.klt import Basis, Transform, layer_blocks, token_bytes
from kvdistill.store.commit import REMEDY, publish_file, replace_file, staging_folder
from kvdistill.store.format import group_prefix
from kvdistill.store.manifest import TeacherManifest
from kvdistill.types import KINDS

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


def _tensors_checksum(origin: str | None, arrays: Mapping[str, NDArray[Any]]) -> str:
    digest = xxhash.xxh3_64((origin or "").encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def blocks_of(manifest: TeacherManifest) -> dict[str, Transform]:
    """The layout of every array in ``klt``, by stem (``key``, ``g0/value``), without its bases."""
    codec, found = manifest.codec, {}
    for group_idx, group in enumerate(manifest.groups):
        for kind in (kind for kind in KINDS if getattr(codec, kind) == "klt"):
            num_bytes = token_bytes(group, kind, codec)
            stem = f"{group_prefix(manifest, group_idx)}{kind}"
            found[stem] = Transform(group, num_bytes, (), group.layers)
    return found


def with_bases(manifest: TeacherManifest, bases: Mapping[str, Basis]) -> dict[str, Transform]:
    """Complete codecs; ``bases`` by stem and block: ``key.0``."""
    found = blocks_of(manifest)
    for stem, layout in found.items():
        rows = layer_blocks(layout.layers, manifest.codec.block_layers)
        blocks = tuple((row, bases[f"{stem}.{i}"]) for i, row in enumerate(rows))
        found[stem] = replace(layout, blocks=blocks)
    return found


def published_bases(
    path: Path, origin: str, fit: Callable[[], Mapping[str, Basis]], bucket: Bucket | None = None
) -> str:
    """Checksum of the bases in ``path``, which are fitted unless there are some of this origin.

    Raises:
        StoreError: they cannot be written.
    """
    if _downloaded(path, bucket)[0] != origin:
        arrays = {f"{n}.{k}": getattr(x, k) for n, x in fit().items() for k in Basis.FIELDS}
        content = _as_file(origin, arrays)
        # Another origin's are of a task that was killed before it added a teacher.
        if not publish_once(path, content, bucket) and _downloaded(path, bucket)[0] != origin:
            replace_file(path, content)
            if bucket is not None:
                bucket.put(path, content)
    return _tensors_checksum(*_downloaded(path, bucket))


def publish_once(path: Path, content: bytes, bucket: Bucket | None) -> bool:
    """Write a file to a store, unless there is one already."""
    if bucket is not None:
        return bucket.create(path, content)
    with staging_folder(path.parents[2] / "tmp", path.name) as folder:
        (folder / path.name).write_bytes(content)
        return publish_file(folder / path.name, path)


def _downloaded(path: Path, bucket: Bucket | None) -> tuple[str | None, Arrays]:
    """Origin and arrays of a file, in a bucket as it is there now."""
    if bucket is not None and (content := bucket.read(path)) is not None:
        replace_file(path, content)
    return _sound_arrays(path)


def load_transforms(
    path: Path, manifest: TeacherManifest, bucket: Bucket | None = None
) -> Transforms:
    """The codecs of a teacher that is stored in ``klt``, after a check of the file; else none.

    Raises:
        ShardCorrupt: the file is missing, or not the one that the manifest states.
    """
    if not manifest.codec.transforms:
        return {}
    origin, arrays = _sound_arrays(path)
    if bucket is not None and _tensors_checksum(origin, arrays) != manifest.transform:
        origin, arrays = _downloaded(path, bucket)
    state = "missing" if not path.exists() else None if origin else "damaged"
    if state is None and _tensors_checksum(origin, arrays) != manifest.transform:
        state = "of another extraction"
    if state is not None:
        raise ShardCorrupt(
            f"{path}: {state}, and codec klt needs it; restore it from a copy of the store, or "
            "`kvdistill rm` the teacher and extract it again"
        )
    bases: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, array in arrays.items():
        stem, _, key = name.rpartition(".")
        bases[stem][key] = array
    return with_bases(manifest, {stem: Basis(**own) for stem, own in bases.items()})
