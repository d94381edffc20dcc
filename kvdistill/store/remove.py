"""Removing a teacher: out of sight by one rename, then deleted."""

from __future__ import annotations

from kvdistill.store.durable import staging_folder
from kvdistill.store.reader import KVStore


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
