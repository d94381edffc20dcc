"""Prototypes: k-means on known clusters, and what is computed from hidden summaries."""

from __future__ import annotations

import numpy as np

from kvdistill.store.prototypes import kmeans, prototypes


def test_kmeans_finds_separate_clouds_and_orders_them_by_size() -> None:
    generator = np.random.default_rng(1)
    true = np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    points = np.concatenate(
        [
            centre + generator.normal(0, 0.3, (n, 2))
            for centre, n in zip(true, (50, 30, 20), strict=True)
        ]
    )
    centres, share = kmeans(points, 3)
    np.testing.assert_allclose(centres, true, atol=0.3)
    np.testing.assert_allclose(share, [0.5, 0.3, 0.2])


def test_every_centre_is_the_mean_of_its_points() -> None:
    generator = np.random.default_rng(2)
    points = generator.normal(size=(200, 5))
    centres, _ = kmeans(points, 7)
    owner = ((points[:, None] - centres) ** 2).sum(-1).argmin(1)
    for k in range(len(centres)):
        np.testing.assert_allclose(centres[k], points[owner == k].mean(0), atol=1e-9)


def test_fewer_distinct_points_than_centres() -> None:
    centres, share = kmeans(np.repeat([[1.0], [2.0]], 4, axis=0), 8)
    assert sorted(centres.ravel()) == [1.0, 2.0]
    np.testing.assert_allclose(share, [0.5, 0.5])


def test_prototypes() -> None:
    generator = np.random.default_rng(3)
    mean, first = generator.normal(size=(2, 30, 4)).astype(np.float32)
    found = prototypes(mean, first, 5)
    np.testing.assert_allclose(found["mean"], mean.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["cls"], first.mean(0), rtol=1e-5, atol=1e-6)
    assert found["kmeans"].shape == (5, 4)
    assert {array.dtype for array in found.values()} == {np.dtype(np.float32)}
    again = prototypes(mean, first, 5)
    np.testing.assert_array_equal(found["kmeans"], again["kmeans"])
    assert found["kmeans_share"].sum() == np.float32(1)
    assert (np.diff(found["kmeans_share"]) <= 0).all()


def test_clusters_that_run_empty_are_dropped() -> None:
    """Lloyd's algorithm may take all points from a centre; its share must not be zero."""
    for seed in range(30):
        points = np.random.default_rng(seed).integers(0, 3, (12, 2)).astype(np.float64)
        centres, share = kmeans(points, 9)
        assert (share > 0).all()
        np.testing.assert_allclose(share.sum(), 1)
        assert len(centres) == len(share) <= len(np.unique(points, axis=0))
