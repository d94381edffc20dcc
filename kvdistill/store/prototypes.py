"""``teachers/<name>/prototypes.safetensors``: a few vectors per teacher, for routers.

Made of the shards' hidden summaries once all of them are there; making them again gives the
same, so the file is simply replaced. They are no sum over shards, so halves of a teacher that were
extracted apart have none: `kvdistill merge` makes them of the summaries, as extraction would have.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save

from kvdistill.errors import ShardNotFound
from kvdistill.store.commit import flush, staging_folder
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


MAX_ROUNDS: Final = 100


def prototypes(
    mean_NE: NDArray[np.float32], first_NE: NDArray[np.float32], num_centres: int
) -> dict[str, NDArray[np.float32]]:
    """Prototypes of a teacher from every sample's mean and first hidden state.

    Returns float32 ``mean [E]``, ``cls [E]``, ``kmeans [k, E]`` with ``k <= num_centres``, and
    ``kmeans_share [k]``, the share of samples that each centre stands for, largest first.
    """
    centres, share = kmeans(mean_NE.astype(np.float64), num_centres)
    return {
        "mean": mean_NE.mean(axis=0, dtype=np.float64).astype(np.float32),
        "cls": first_NE.mean(axis=0, dtype=np.float64).astype(np.float32),
        "kmeans": centres.astype(np.float32),
        "kmeans_share": share.astype(np.float32),
    }


def kmeans(
    points_NE: NDArray[np.float64], num_centres: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Lloyd's algorithm from k-means++ seeds (Arthur and Vassilvitskii, 2007), repeatable.

    Returns centres ``[k, E]``, the fullest first, and the share of points of each ``[k]``.
    Fewer centres than asked for where there are fewer distinct points.
    """
    centres = _seeds(points_NE, num_centres)
    owner = _nearest(points_NE, centres)
    for _ in range(MAX_ROUNDS):
        used = np.unique(owner)
        centres = np.stack([points_NE[owner == k].mean(axis=0) for k in used])
        moved = _nearest(points_NE, centres)
        if np.array_equal(moved, np.searchsorted(used, owner)):
            break
        owner = moved
    count = np.bincount(_nearest(points_NE, centres), minlength=len(centres))
    order = np.argsort(-count, kind="stable")
    return centres[order], count[order] / len(points_NE)


def _seeds(points_NE: NDArray[np.float64], num_centres: int) -> NDArray[np.float64]:
    """Each next seed is drawn with the squared distance to the seeds so far as its weight."""
    generator = np.random.default_rng(0)
    chosen = [points_NE[generator.integers(len(points_NE))]]
    distance = np.full(len(points_NE), np.inf)
    while len(chosen) < num_centres:
        distance = np.minimum(distance, ((points_NE - chosen[-1]) ** 2).sum(axis=1))
        total = distance.sum()
        if total == 0:
            break
        chosen.append(points_NE[generator.choice(len(points_NE), p=distance / total)])
    return np.stack(chosen)


def _nearest(points_NE: NDArray[np.float64], centres_KE: NDArray[np.float64]) -> NDArray[np.intp]:
    """Without ``|x|²``, which is the same for every centre."""
    distance = (centres_KE**2).sum(axis=1) - 2 * points_NE @ centres_KE.T
    nearest: NDArray[np.intp] = distance.argmin(axis=1)
    return nearest


# MERGED-DOC extract.prototypes
# What a teacher is like, in a few vectors that a router can compare a sample with.
#
# ``mean`` over time and samples, ``cls`` (first tokens), and the centres of k-means over the
# samples' means. All in the teacher's own hidden space, before any projection.
