"""Writing a store: the frozen plan, its teachers, and shards, published whole or not at all.

Every step is idempotent and safe under concurrency: creating the same plan, adding the same
teacher and publishing the same shard again change nothing. The first copy of a shard wins and a
second one is discarded; both hold the same numbers up to the teacher's arithmetic. Before
publication a shard is checked against its manifest and the plan.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import numpy as np

from kvdistill import __version__
from kvdistill.corpus.samples import Shard, corpus_fingerprint
from kvdistill.errors import GeometryError, NonFiniteError, StoreMismatch, StoreNotFound
from kvdistill.store.channel_statistics import ChannelStatistics
from kvdistill.store.commit import folder_records, staging_folder
from kvdistill.store.format import (
    TEXTS,
    TOKEN_COLUMNS,
    UNPREDICTED,
    ArraySpec,
    Counts,
    shard_arrays,
)
from kvdistill.store.identity import differences, refusal
from kvdistill.store.manifest import Commit, ShardPlan, StoreManifest, TeacherManifest
from kvdistill.store.open_place import open_place
from kvdistill.store.open_shard import BACKENDS
from kvdistill.store.reader import KVStore
from kvdistill.store.shard import EncodedShard, TokenTable, block_ptr

_EXPONENT_BITS: Final[dict[object, int]] = {"bfloat16": 0x7F80, "ufloat8_e5m3": 0xF8}
"""Exponent bits of floats that are stored as integers: all set in NaN and infinity."""


def create(path: Path | str, shards: Sequence[Shard]) -> KVStore:
    """Create a store over these shards, or open the one that exists.

    Raises:
        StoreMismatch: the store at ``path`` has another corpus or another plan.
        StoreError: the path holds something else, or cannot be written.
    """
    plan = _plan(shards)
    store = planned(path, plan, ((x.shard_id, x.to_jsonl().encode()) for x in shards))
    found = store.manifest
    if found.corpus_fingerprint != plan.corpus_fingerprint:
        raise StoreMismatch(
            f"{path} was made from another corpus: fingerprint "
            f"{found.corpus_fingerprint[:12]}, the config's is {plan.corpus_fingerprint[:12]}; "
            "use another store path, or the corpus it was made from"
        )
    if found.shards != plan.shards:
        raise StoreMismatch(
            f"{path} divides this corpus into {len(found.shards)} shards, the config into "
            f"{len(plan.shards)}; the plan of a store is fixed: restore the shard size it was made "
            "with, or use another store path"
        )
    return store


def _plan(shards: Sequence[Shard]) -> StoreManifest:
    return StoreManifest(
        created_by=f"kvdistill {__version__}",
        corpus_fingerprint=corpus_fingerprint(s for shard in shards for s in shard.samples),
        shards=tuple(
            ShardPlan(
                shard_id=shard.shard_id,
                first_sample=shard.first_sample,
                num_samples=len(shard.samples),
                num_chars=shard.num_chars,
                sha256=sha256(shard.to_jsonl().encode()).hexdigest(),
            )
            for shard in shards
        ),
    )


def planned(path: Path | str, plan: StoreManifest, texts: Iterable[tuple[str, bytes]]) -> KVStore:
    """The store at a path, of whatever plan; if there is none, a new one without teachers."""
    with suppress(StoreNotFound):
        return KVStore.open(path)
    open_place(path, new=True).publish_plan(plan, texts)
    return KVStore.open(path)


def add_teacher(store: KVStore, manifest: TeacherManifest) -> TeacherManifest:
    """Register a teacher; returns the stored manifest, which may be an earlier one.

    Raises:
        StoreMismatch: a teacher of this name was extracted differently; names both sides.
    """
    if not store.has_teacher(manifest.name):
        path = store.paths.teacher_manifest(manifest.name)
        store.place.create(path, manifest.to_json().encode())
    stored = store.teacher(manifest.name)
    if different := differences(store, manifest.name, manifest.model_dump(mode="json")):
        raise StoreMismatch(refusal(store, manifest.name, different))
    return stored


def publish_shard(
    store: KVStore,
    teacher: str,
    shard_id: str,
    shard: EncodedShard,
    statistics: Mapping[str, ChannelStatistics],
    *,
    seconds: float = 0.0,
    attempt: Mapping[str, Any] | None = None,
) -> bool:
    """Write a shard to a staging folder and publish it by one rename; False if one exists.

    Args:
        store: the store.
        teacher: a registered teacher.
        shard_id: a shard of the plan.
        shard: tokens and encoded arrays.
        statistics: of the values before quantisation, by ``"key"`` and ``"value"``
            (``"g0/key"`` … with several geometries).
        seconds: duration of the extraction, for the record.
        attempt: further provenance; host and process id are added.

    Raises:
        GeometryError: arrays are missing, or their shapes or dtypes are not the declared ones.
        NonFiniteError: NaN or infinity; names layer, head and sample.
        StoreError: nothing could be written; nothing was published.
    """
    manifest = store.teacher(teacher)
    if store.is_committed(teacher, shard_id):
        return False
    arrays = {name: getattr(shard.tokens, name) for name in ("sample_ptr", *TOKEN_COLUMNS)}
    arrays |= shard.arrays
    arrays |= {f"{name}_statistics": stats.to_array() for name, stats in statistics.items()}
    counts = Counts(shard.tokens.num_samples, shard.tokens.num_tokens, shard.tokens.num_blocks)
    specs = shard_arrays(manifest, counts)
    _validate_shard(manifest, store.plan(shard_id), shard.tokens, arrays, specs)
    with staging_folder(store.paths.temporary(teacher), shard_id) as folder:
        attributes = {"sample_ids": list(shard.tokens.sample_ids)}
        tensors = BACKENDS[manifest.backend].write(folder, arrays, specs, attributes)
        if shard.texts is not None:
            lines = "".join(sample.to_json() + "\n" for sample in shard.texts)
            (folder / TEXTS).write_text(lines, encoding="utf-8")
        commit = Commit(
            shard_id=shard_id,
            teacher=teacher,
            extraction_fingerprint=manifest.extraction_fingerprint,
            num_samples=counts.num_samples,
            num_tokens=counts.num_tokens,
            num_blocks=counts.num_blocks,
            raw_bytes=_raw_bytes(manifest, counts),
            files=folder_records(folder),
            tensors=tensors,
            seconds=seconds,
            attempt={"host": socket.gethostname(), "pid": os.getpid(), **(attempt or {})},
        )
        return store.place.publish_shard(folder, commit)


def _raw_bytes(manifest: TeacherManifest, counts: Counts) -> int:
    """Size of the keys, values and hidden states in bf16."""
    shapes = ((g, manifest.shape(g, kind)) for g in manifest.groups for kind in manifest.kinds)
    per_token = sum(len(group.layers) * heads * dim for group, (heads, dim) in shapes)
    return 2 * per_token * counts.num_tokens


def _validate_shard(
    manifest: TeacherManifest,
    plan: ShardPlan,
    tokens: TokenTable,
    arrays: Mapping[str, np.ndarray],
    specs: Mapping[str, ArraySpec],
) -> None:
    where = f"teacher {manifest.name!r}, shard {plan.shard_id}"
    if tokens.num_samples != plan.num_samples:
        raise GeometryError(
            f"{where}: {tokens.num_samples} samples, but the plan has {plan.num_samples}"
        )
    ptr = tokens.sample_ptr
    rises = ptr.ndim == 1 and ptr.size > 0 and ptr[0] == 0 and bool((np.diff(ptr) >= 0).all())
    if not rises or ptr[-1] != tokens.num_tokens:
        raise GeometryError(
            f"{where}: sample_ptr must rise from 0 to {tokens.num_tokens} tokens, got {ptr!r}"
        )
    missing, unknown = sorted(specs.keys() - arrays.keys()), sorted(arrays.keys() - specs.keys())
    if missing or unknown:
        raise GeometryError(
            f"{where}: arrays missing: {missing or 'none'}; not declared by the manifest: "
            f"{unknown or 'none'}; expected {sorted(specs)}"
        )
    for name, spec in specs.items():
        array = arrays[name]
        if array.shape != spec.shape or array.dtype != np.dtype(spec.dtype):
            raise GeometryError(
                f"{where}: {name} is {array.dtype} {array.shape}, but the manifest declares "
                f"{spec.dtype} {spec.shape} {spec.axes}"
            )
        check_finite(array, spec, tokens, where)


def check_finite(array: np.ndarray, spec: ArraySpec, tokens: TokenTable, where: str) -> None:
    """Refuse NaN and infinity in stored floats; those of integer codes are in the scales.

    Raises:
        NonFiniteError: names array, layer, head and sample of the first one.
    """
    exponent = _EXPONENT_BITS.get(spec.attributes.get("logical_dtype"))
    if exponent is not None:
        finite = (array & exponent) != exponent
    elif array.dtype.kind == "f":
        finite = np.isfinite(array)
        if UNPREDICTED in spec.attributes:
            finite[tokens.sample_ptr[:-1][np.diff(tokens.sample_ptr) > 0]] = True
    else:
        return
    if finite.all():
        return
    first = tuple(int(i) for i in np.unravel_index(int(np.argmin(finite)), array.shape))
    place = ", ".join(_axis_name(spec, *at, tokens) for at in zip(spec.axes, first, strict=True))
    raise NonFiniteError(
        f"{where}: {spec.name} is not finite, or beyond fp16's range, at {place}; check the "
        "teacher's dtype, or store with codec bf16"
    )


def _axis_name(spec: ArraySpec, name: str, i: int, tokens: TokenTable) -> str:
    if name in ("token", "block"):
        ptr = block_ptr(tokens.sample_ptr) if name == "block" else tokens.sample_ptr
        return f"sample {tokens.sample_ids[int(np.searchsorted(ptr, i, side='right')) - 1]!r}"
    return f"{name} {spec.group.layers[i] if spec.group and name == 'layer' else i}"
