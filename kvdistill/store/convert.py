"""From one backend to the other, without a teacher: codes and scales are copied, not decoded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kvdistill.corpus import Shard
from kvdistill.errors import StoreError
from kvdistill.store.prototypes import copy_prototypes
from kvdistill.store.reader import KVStore
from kvdistill.store.writer import add_teacher, create, publish_shard
from kvdistill.types import Backend


def convert(
    source: KVStore,
    path: Path | str,
    backend: Backend,
    progress: Callable[[str, str], None] | None = None,
) -> KVStore:
    """Copy a store with every teacher's shards in another backend; returns the new store.

    Run again, it continues where it stopped. ``progress`` is called with teacher and shard.

    Raises:
        StoreError: source and target are the same folder, or the target cannot be written.
        StoreMismatch: the target holds another corpus or another extraction.
        ShardCorrupt: a source shard is damaged; those before it are in the target.
    """
    if Path(path).resolve() == source.paths.root.resolve():
        raise StoreError(f"{path}: a store cannot be converted onto itself; name another path")
    target = create(path, shards_of(source))
    for teacher in source.teachers():
        manifest = source.teacher(teacher).model_copy(update={"backend": backend})
        add_teacher(target, manifest)
        committed = source.committed(teacher) - target.committed(teacher)
        for shard_id in (shard_id for shard_id in source.shard_ids if shard_id in committed):
            if progress is not None:
                progress(teacher, shard_id)
            _copy_shard(source, target, teacher, shard_id)
        copy_prototypes(source, target, teacher)
    return target


def shards_of(store: KVStore) -> list[Shard]:
    """The corpus of a store, cut as its plan says."""
    return [
        Shard(plan.shard_id, plan.first_sample, store.samples(plan.shard_id))
        for plan in store.manifest.shards
    ]


def _copy_shard(source: KVStore, target: KVStore, teacher: str, shard_id: str) -> None:
    commit = source.commit(teacher, shard_id)
    publish_shard(
        target,
        teacher,
        shard_id,
        source.read_shard(teacher, shard_id),
        source.shard_statistics(teacher, shard_id),
        seconds=commit.seconds,
        attempt=commit.attempt,
    )
