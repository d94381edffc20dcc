"""One store from several that were extracted at different sites over the same corpus."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from kvdistill.corpus.samples import Shard
from kvdistill.errors import ShardCorrupt, StoreError, StoreMismatch
from kvdistill.store.commit import folder_records, publish_folder, staging_folder
from kvdistill.store.prototypes import copy_prototypes
from kvdistill.store.reader import KVStore
from kvdistill.store.writer import add_teacher, create, publish_shard
from kvdistill.types import Backend


def merge_stores(
    target: KVStore,
    sources: Sequence[KVStore],
    progress: Callable[[str, str], None] | None = None,
) -> int:
    """Copy into ``target`` every shard of the sources that it lacks; returns how many.

    Files are copied as they are and checked against their commit before publication, so a copy
    is the original, byte for byte. Plans and teachers are compared before a shard is copied.
    Statistics are sums over shards and so are complete with them; prototypes come along where a
    source has them, and where every source had a part, see ``prototypes.lacks_prototypes``.
    Notes of attempts, failures and what was put aside stay where they were made.

    Raises:
        StoreMismatch: another corpus, another cut, or a teacher of one name extracted
            differently; names both sides.
        ShardCorrupt: a source's shard does not match its commit.
    """
    for source in sources:
        _refuse_other_corpus(target, source)
    for source in sources:
        for teacher in source.teachers():
            add_teacher(target, source.teacher(teacher))
    copied = 0
    for source in sources:
        for teacher in source.teachers():
            for shard_id in sorted(source.committed(teacher) - target.committed(teacher)):
                if progress is not None:
                    progress(teacher, shard_id)
                copied += _copy_files(source, target, teacher, shard_id)
            copy_prototypes(source, target, teacher)
    return copied


def _refuse_other_corpus(target: KVStore, source: KVStore) -> None:
    ours, theirs = target.manifest, source.manifest
    if ours.corpus_fingerprint != theirs.corpus_fingerprint or ours.shards != theirs.shards:
        raise StoreMismatch(
            f"{source.paths.root} holds corpus {theirs.corpus_fingerprint[:12]} in "
            f"{len(theirs.shards)} shards, {target.paths.root} holds "
            f"{ours.corpus_fingerprint[:12]} in {len(ours.shards)}; only stores over the same "
            "corpus, cut alike, can be merged"
        )


def _copy_files(source: KVStore, target: KVStore, teacher: str, shard_id: str) -> bool:
    origin = source.paths.shard(teacher, shard_id)
    commit = source.commit(teacher, shard_id)
    with staging_folder(target.paths.temporary(teacher), shard_id) as folder:
        shutil.copytree(origin, folder, dirs_exist_ok=True)
        if folder_records(folder) != commit.files:
            raise ShardCorrupt(
                f"{origin}: its files do not match its commit; run `kvdistill verify` on "
                f"{source.paths.root}"
            )
        return publish_folder(folder, target.paths.shard(teacher, shard_id))


def convert_store(
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


def remove_teacher(store: KVStore, teacher: str) -> None:
    """Delete everything of one teacher. A crash leaves it whole, or a folder under ``tmp/``.

    Raises:
        ShardNotFound: no such teacher; names those that exist.
        StoreError: the store is read-only.
    """
    store.teacher(teacher)
    with staging_folder(store.paths.root / "tmp", teacher) as folder:
        store.paths.teacher(teacher).rename(folder / teacher)
    store.forget(teacher)


# MERGED-DOC store.convert
# From one backend to the other, without a teacher: codes and scales are copied, not decoded.


# MERGED-DOC store.remove
# Removing a teacher: out of sight by one rename, then deleted.
