"""What a teacher is like, in a few vectors that a router can compare a sample with.

``mean`` over time and samples, ``cls`` (first tokens), and the centres of k-means over the
samples' means. All in the teacher's own hidden space, before any projection.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

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
