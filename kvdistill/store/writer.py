"""Making a store: the frozen plan, its teachers, and shards that appear whole or not at all.

Every step may be run twice, and by several processes at once: creating the same plan, adding the
same teacher and publishing the same shard again change nothing. The first copy wins; a second
one is discarded, since both hold the same numbers up to the teacher's arithmetic.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import numpy as np

from kvdistill import __version__
from kvdistill.corpus import Shard, fingerprint
from kvdistill.errors import StoreError, StoreMismatch
from kvdistill.store.checks import check_shard
from kvdistill.store.durable import publish_file, publish_folder, staging_folder
from kvdistill.store.integrity import folder_records
from kvdistill.store.layout import COMMIT, MANIFEST, TEACHER, TEXTS, StorePaths
from kvdistill.store.manifest import Commit, ShardPlan, StoreManifest, TeacherManifest
from kvdistill.store.opened import BACKENDS
from kvdistill.store.reader import KVStore
from kvdistill.store.schema import TOKEN_COLUMNS, Counts, shard_arrays
from kvdistill.store.shard import EncodedShard
from kvdistill.store.statistics import ChannelStatistics
from kvdistill.types import KINDS

INFORMATIONAL: Final = frozenset({"versions", "adapter_error", "model", "revision"})
"""Teacher fields that may differ between tasks; the fingerprints decide what was extracted."""


def create(path: Path | str, shards: Sequence[Shard]) -> KVStore:
    """Create a store over these shards, or open the one that is already there.

    Raises:
        StoreMismatch: a store of another corpus, or of another cut, is there.
        StoreError: the path holds something else, or cannot be written.
    """
    paths = StorePaths(Path(path))
    plan = _plan(shards)
    if not paths.manifest.is_file():
        _publish_plan(paths, plan, shards)
    store = KVStore.open(paths.root)
    _refuse_other_plan(store, plan)
    return store


def add_teacher(store: KVStore, manifest: TeacherManifest) -> TeacherManifest:
    """Register a teacher; returns the manifest that is stored, which may be an earlier one.

    Raises:
        StoreMismatch: a teacher of this name was extracted differently; names both sides.
    """
    paths = store.paths
    if not paths.teacher_manifest(manifest.name).is_file():
        paths.teachers.mkdir(exist_ok=True)
        with staging_folder(paths.root / "tmp", manifest.name) as folder:
            (folder / TEACHER).write_text(manifest.to_json(), encoding="utf-8")
            # The teacher's folder may be there before it: array tasks leave word of themselves.
            publish_file(folder / TEACHER, paths.teacher_manifest(manifest.name))
    stored = store.teacher(manifest.name)
    _refuse_other_teacher(stored, manifest, store)
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
    """Write a shard aside and publish it by one rename; False if another copy was first.

    ``statistics`` are per ``"key"`` and ``"value"`` (``"g0/key"`` … with several groups), of
    the values before quantisation. ``attempt`` says where it was made; host and pid are added.

    Raises:
        GeometryError: arrays are missing, or their shapes or dtypes are not the declared ones.
        NonFiniteError: NaN or infinity; names layer, head and sample.
        StoreError: nothing could be written; nothing was published.
    """
    manifest = store.teacher(teacher)
    if store.is_committed(teacher, shard_id):
        return False
    arrays = {**_token_arrays(shard), **shard.arrays}
    arrays |= {f"{name}_statistics": stats.to_array() for name, stats in statistics.items()}
    counts = Counts(shard.tokens.num_samples, shard.tokens.num_tokens, shard.tokens.num_blocks)
    specs = shard_arrays(manifest, counts)
    check_shard(manifest, store.plan(shard_id), shard, arrays, specs)
    backend = BACKENDS[manifest.backend]
    with staging_folder(store.paths.temporary(teacher), shard_id) as folder:
        attributes = {"sample_ids": list(shard.tokens.sample_ids)}
        tensors = backend.write(folder, arrays, specs, attributes)
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
        (folder / COMMIT).write_text(commit.to_json(), encoding="utf-8")
        return publish_folder(folder, store.paths.shard(teacher, shard_id))


def _plan(shards: Sequence[Shard]) -> StoreManifest:
    return StoreManifest(
        created_by=f"kvdistill {__version__}",
        corpus_fingerprint=fingerprint(sample for shard in shards for sample in shard.samples),
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


def _publish_plan(paths: StorePaths, plan: StoreManifest, shards: Sequence[Shard]) -> None:
    root = paths.root
    if root.exists() and not (root.is_dir() and not any(root.iterdir())):
        raise StoreError(f"{root} exists and is not a kvdistill store; choose another path")
    with staging_folder(root.absolute().parent, f".{root.name}") as folder:
        staged = StorePaths(folder)
        staged.corpus.mkdir()
        staged.teachers.mkdir()
        for shard in shards:
            staged.samples(shard.shard_id).write_text(shard.to_jsonl(), encoding="utf-8")
        (folder / MANIFEST).write_text(plan.to_json(), encoding="utf-8")
        publish_folder(folder, root)


def _refuse_other_plan(store: KVStore, plan: StoreManifest) -> None:
    found = store.manifest
    if found.corpus_fingerprint != plan.corpus_fingerprint:
        raise StoreMismatch(
            f"{store.paths.root} was made from another corpus: fingerprint "
            f"{found.corpus_fingerprint[:12]}, the config's is {plan.corpus_fingerprint[:12]}; "
            "use another store path, or the corpus it was made from"
        )
    if found.shards != plan.shards:
        raise StoreMismatch(
            f"{store.paths.root} cuts this corpus into {len(found.shards)} shards, the config "
            f"into {len(plan.shards)}; a store is never cut again: restore the shard size it "
            "was made with, or use another store path"
        )


def _refuse_other_teacher(stored: TeacherManifest, asked: TeacherManifest, store: KVStore) -> None:
    ours = stored.model_dump(mode="json", exclude=set(INFORMATIONAL))
    theirs = asked.model_dump(mode="json", exclude=set(INFORMATIONAL))
    different = [name for name in ours if ours[name] != theirs[name]]
    if different:
        sides = "; ".join(
            f"{name}: stored {_short(ours[name])}, asked {_short(theirs[name])}"
            for name in different
        )
        raise StoreMismatch(
            f"{store.paths.root}: teacher {stored.name!r} was extracted differently ({sides}). "
            "Give the new extraction another name, or remove the old one with `kvdistill rm`"
        )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _token_arrays(shard: EncodedShard) -> dict[str, np.ndarray]:
    tokens = shard.tokens
    return {"sample_ptr": tokens.sample_ptr} | {
        name: getattr(tokens, name) for name in TOKEN_COLUMNS
    }


def _raw_bytes(manifest: TeacherManifest, counts: Counts) -> int:
    per_token = sum(
        len(group.layers) * group.num_key_value_heads * group.head_dim(kind)
        for group in manifest.groups
        for kind in KINDS
    )
    return 2 * per_token * counts.num_tokens
