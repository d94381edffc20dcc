"""Prototypes: a few vectors per teacher that routers compare a sample with.

They are computed from the hidden summaries that every shard carries, in the teacher's own hidden
space and before any projection, once all shards are committed. The computation is repeatable, so
the file that keeps them is made again whenever it is missing (``derived.py``), as after a merge.
"""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray

from kvdistill.errors import ShardNotFound
from kvdistill.store.derived import derived_arrays
from kvdistill.store.reader import KVStore


def hidden_summaries(
    store: KVStore, teacher: str
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and first hidden state of every sample with tokens, in their order: ``[N, E]`` each.

    Raises:
        ShardNotFound: the teacher was extracted without them, or lacks a shard.
    """
    manifest, missing = store.teacher(teacher), store.missing(teacher)
    if missing:
        raise ShardNotFound(
            f"{store.where}: the prototypes of teacher {teacher!r} need all of its shards; "
            f"{len(missing)} are missing: run `kvdistill extract`"
        )
    if not manifest.has_summaries:
        raise ShardNotFound(
            f"{store.where}: teacher {teacher!r} has no hidden summaries; extract it with "
            "extraction.summaries: true"
        )
    pieces = []
    for shard_id in store.shard_ids:
        shard = store.read_shard(teacher, shard_id, manifest.layers[:1], kinds=())
        read = np.diff(shard.tokens.sample_ptr) > 0
        pieces.append(shard.arrays["hidden_summary"][:, read])
    mean_NE, first_NE = np.concatenate(pieces, axis=1)
    return mean_NE, first_NE


def prototypes(
    mean_NE: NDArray[np.float32], first_NE: NDArray[np.float32], num_centres: int
) -> dict[str, NDArray[np.float32]]:
    """Prototypes from every sample's mean and first hidden state.

    Returns float32 ``mean [E]``, ``cls [E]``, ``kmeans [k, E]`` with ``k <= num_centres``, and
    ``kmeans_share [k]``, the share of samples in each cluster, largest first.
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
    """Lloyd's algorithm from k-means++ seeds (Arthur and Vassilvitskii, 2007); repeatable.

    Returns:
        Centres ``[k, E]``, the largest cluster first, and each cluster's share of points ``[k]``.
        ``k`` is below ``num_centres`` where there are fewer distinct points.
    """
    from scipy.cluster.vq import kmeans2

    distinct = len(np.unique(points_NE, axis=0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # empty clusters, which are dropped below
        centres, owner = kmeans2(points_NE, min(num_centres, distinct), iter=100, minit="++", rng=0)
    count = np.bincount(owner, minlength=len(centres))
    order = np.argsort(-count, kind="stable")[: np.count_nonzero(count)]
    return centres[order], count[order] / len(points_NE)


def teacher_prototypes(
    store: KVStore, teacher: str, num_centres: int
) -> dict[str, NDArray[np.float32]]:
    """A complete teacher's prototypes by name, as ``prototypes`` returns them.

    Raises:
        ShardNotFound: the teacher was extracted without summaries, or lacks a shard.
    """
    return derived_arrays(
        store.place,
        store.paths.prototypes(teacher, store.part),
        f"{store.origin(teacher)} {num_centres}",
        lambda: dict(prototypes(*hidden_summaries(store, teacher), num_centres)),
    )
