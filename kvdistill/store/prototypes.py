"""``teachers/<name>/prototypes.safetensors``: a few vectors per teacher, for routers.

Made of the shards' hidden summaries once all of them are there; making them again gives the
same, so the file is simply replaced. They are no sum over shards, so halves of a teacher that were
extracted apart have none: `kvdistill merge` makes them of the summaries, as extraction would have.
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


def hidden_summaries(
    store: KVStore, teacher: str
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Every sample's mean and first hidden state, in the order of the corpus: ``[N, E]`` each.

    Raises:
        ShardNotFound: the teacher was extracted without them, or lacks a shard.
    """
    manifest = store.teacher(teacher)
    if not manifest.has_summaries:
        raise ShardNotFound(
            f"{store.paths.root}: teacher {teacher!r} has no hidden summaries; extract it with "
            "extraction.summaries: true"
        )
    pieces = [
        store.read_shard(teacher, shard_id, manifest.layers[:1], kinds=()).arrays["hidden_summary"]
        for shard_id in store.shard_ids
    ]
    mean_NE, first_NE = np.concatenate(pieces, axis=1)
    return mean_NE, first_NE


def lacks_prototypes(store: KVStore, teacher: str) -> bool:
    """Whether prototypes could be made, since all summaries are there, but were not."""
    return (
        store.teacher(teacher).has_summaries
        and not store.missing(teacher)
        and not store.paths.prototypes(teacher).is_file()
    )


def copy_prototypes(source: KVStore, target: KVStore, teacher: str) -> None:
    """Bring a teacher's prototypes along with its last shard; nothing to do where it has none."""
    if source.paths.prototypes(teacher).is_file() and not target.missing(teacher):
        write_prototypes(target, teacher, read_prototypes(source, teacher))
