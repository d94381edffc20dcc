"""``teachers/<name>/prototypes.safetensors``: a few vectors per teacher, for routers.

Made of the shards' hidden summaries once all of them are there; making them again gives the
same, so the file is simply replaced.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save

from kvdistill.errors import ShardNotFound
from kvdistill.store.durable import flush, staging_folder
from kvdistill.store.reader import KVStore


def write_prototypes(
    store: KVStore, teacher: str, prototypes: dict[str, NDArray[np.float32]]
) -> None:
    """Write a teacher's prototypes; readers see the old file or the new one.

    Raises:
        StoreError: it cannot be written.
    """
    final = store.paths.prototypes(teacher)
    with staging_folder(store.paths.temporary(teacher), "prototypes") as folder:
        staged = folder / final.name
        staged.write_bytes(save(prototypes))
        flush(staged)
        staged.replace(final)
        flush(final.parent)


def read_prototypes(store: KVStore, teacher: str) -> dict[str, NDArray[np.float32]]:
    """Prototypes by name: ``mean [E]``, ``cls [E]``, ``kmeans [k, E]``, ``kmeans_share [k]``.

    Raises:
        ShardNotFound: the teacher has none.
    """
    path = store.paths.prototypes(teacher)
    if not path.is_file():
        raise ShardNotFound(
            f"{store.paths.root}: teacher {teacher!r} has no prototypes; extract it with "
            "extraction.summaries: true, and all of its shards"
        )
    found: dict[str, NDArray[np.float32]] = load_file(path)
    return found


def copy_prototypes(source: KVStore, target: KVStore, teacher: str) -> None:
    """Bring a teacher's prototypes along with its last shard; nothing to do where it has none."""
    if source.paths.prototypes(teacher).is_file() and not target.missing(teacher):
        write_prototypes(target, teacher, read_prototypes(source, teacher))
