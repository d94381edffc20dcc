"""Arrays of a teacher beside its shards: derived ones, and the bases of codec ``klt``.

    teachers/<name>/statistics.safetensors    channel statistics, summed over shards
    teachers/<name>/prototypes.safetensors    what routers compare a sample with
    teachers/<name>/statistics.<digest>.…     of some shards of the plan alone: their ids' digest
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
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from kvdistill.errors import ShardCorrupt, StoreError
from kvdistill.store.codecs import Transforms
from kvdistill.store.codecs.klt import Basis, Transform, layer_blocks, token_bytes
from kvdistill.store.format import group_prefix
from kvdistill.store.manifest import TeacherManifest
from kvdistill.store.place import Place
from kvdistill.types import KINDS

Arrays = dict[str, NDArray[Any]]


def derived_arrays(place: Place, path: Path, origin: str, derive: Callable[[], Arrays]) -> Arrays:
    """The arrays in ``path`` if they are sound and of this origin; derived and kept otherwise."""
    stated, arrays = _sound_arrays(path)
    if stated != origin and place.refresh(path):
        stated, arrays = _sound_arrays(path)
    if stated == origin:
        return arrays
    arrays = derive()
    content = _as_file(origin, arrays)
    with contextlib.suppress(StoreError):  # a read-only or full store goes without
        place.keep(path, content)
    return arrays


def is_sound(path: Path) -> bool:
    """Whether a derived file is whole; what it was derived from does not matter."""
    return _sound_arrays(path)[0] is not None


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
    place: Place, teacher: str, origin: str, fit: Callable[[], Mapping[str, Basis]]
) -> str:
    """Checksum of a teacher's bases, which are fitted unless there are some of this origin.

    Raises:
        StoreError: they cannot be written.
    """
    path = place.paths.transform(teacher)
    if _current_arrays(place, path)[0] != origin:
        arrays = {f"{n}.{k}": getattr(x, k) for n, x in fit().items() for k in Basis.FIELDS}
        content = _as_file(origin, arrays)
        # Another origin's are of a task that was killed before it added a teacher.
        if not place.create(path, content) and _current_arrays(place, path)[0] != origin:
            place.keep(path, content)
    return _tensors_checksum(*_current_arrays(place, path))


def _current_arrays(place: Place, path: Path) -> tuple[str | None, Arrays]:
    """Origin and arrays of a file, in a bucket as it is there now."""
    place.refresh(path)
    return _sound_arrays(path)


def load_transforms(place: Place, manifest: TeacherManifest) -> Transforms:
    """The codecs of a teacher that is stored in ``klt``, after a check of the file; else none.

    Raises:
        ShardCorrupt: the file is missing, or not the one that the manifest states.
    """
    if not manifest.codec.transforms:
        return {}
    path = place.paths.transform(manifest.name)
    origin, arrays = _sound_arrays(path)
    if _tensors_checksum(origin, arrays) != manifest.transform and place.refresh(path):
        origin, arrays = _sound_arrays(path)
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
