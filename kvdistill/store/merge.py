"""One store from several that were extracted at different sites over the same corpus."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence

from kvdistill.errors import ShardCorrupt, StoreMismatch
from kvdistill.store.durable import publish_folder, staging_folder
from kvdistill.store.integrity import folder_records
from kvdistill.store.prototypes import copy_prototypes
from kvdistill.store.reader import KVStore
from kvdistill.store.writer import add_teacher


def merge(
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
                copied += _copy(source, target, teacher, shard_id)
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


def _copy(source: KVStore, target: KVStore, teacher: str, shard_id: str) -> bool:
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
