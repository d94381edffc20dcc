"""dask, xarray and the summary, against decoding everything by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvdistill.errors import GeometryError, ShardNotFound
from kvdistill.store.codecs import CODECS
from kvdistill.store.codecs.parts import parts_of
from kvdistill.store.lazy_arrays import dask_array, dataset
from kvdistill.store.shard import block_idx
from kvdistill.store.summary import (
    importance_histogram,
    largest_norms,
    plot_teacher,
    summarise_teacher,
)
from kvdistill.store.writer import create
from tests.store.made import statistics_of


def whole(made: Any, kind: str, stem: str = "") -> np.ndarray:
    """Decoded ``[L, H, T, D]`` of all shards together."""
    parts = []
    for one in made.values():
        codec = CODECS["int8"]
        idx = block_idx(one.shard.tokens.sample_ptr)
        parts.append(codec.decode(parts_of(one.shard.arrays, stem + kind), kind, idx))
    return np.concatenate(parts, axis=2)


def test_dask_is_all_shards_in_order(tmp_path: Path, build: Any, backend: str) -> None:
    store, made = build.store(tmp_path / "store", build.teacher(backend=backend), num_shards=3)
    key = whole(made, "key")
    lazy = dask_array(store, "tiny", "key")
    assert lazy.dtype == np.float32
    assert lazy.shape == key.shape
    np.testing.assert_array_equal(lazy.compute(), key)
    np.testing.assert_array_equal(
        dask_array(store, "tiny", "key", layer=3, head=1).compute(), key[2, 1]
    )
    np.testing.assert_array_equal(dask_array(store, "tiny", "key", layer=1).compute(), key[1])
    assert max(lazy.chunks[2]) == 194
    assert set(lazy.chunks[0]) == {1}


def test_xarray_names_every_dimension(tmp_path: Path, build: Any) -> None:
    predicted = {"has_confidence": True, "num_logits": 2}
    store, made = build.store(tmp_path / "store", build.teacher(has_importance=True, **predicted))
    data = dataset(store, "tiny")
    assert data["top_ids"].dims == ("token", "rank")
    for name in ("nll", "entropy", "top_ids", "top_logprobs", "rest_logprob"):
        stored = np.concatenate([m.shard.arrays[name] for m in made.values()])
        np.testing.assert_array_equal(data[name].values, stored)
    assert data["key"].dims == ("layer", "head", "token", "key_dim")
    assert data["value"].sizes["value_dim"] == 4
    assert data["layer"].values.tolist() == [0, 1, 3]
    one = data["value"].sel(layer=3, head=0)
    mine = one.isel(token=(data["sample"] == "s3").values)
    np.testing.assert_array_equal(mine.values, whole(made, "value")[2, 0, 194:324])
    importance = np.concatenate([m.shard.arrays["importance"] for m in made.values()], axis=2)
    np.testing.assert_array_equal(data["importance"].values, importance.astype(np.float32))
    assert dataset(store, "tiny", layers=[1])["key"].sizes["layer"] == 1


def test_layers_of_different_geometry_are_asked_for_by_name(tmp_path: Path, build: Any) -> None:
    store, made = build.store(tmp_path / "store", build.teacher(groups=build.two_groups))
    with pytest.raises(GeometryError, match=r"not of one geometry; choose from one of \[\[0, 2\]"):
        dask_array(store, "tiny", "key")
    got = dask_array(store, "tiny", "key", layer=1).compute()
    np.testing.assert_array_equal(got, whole(made, "key", "g1/")[0])
    with pytest.raises(GeometryError, match="head 3"):
        dask_array(store, "tiny", "key", layer=1, head=3)


def test_a_teacher_without_shards_has_no_array(tmp_path: Path, build: Any) -> None:
    from kvdistill.store.writer import add_teacher

    store = create(tmp_path / "store", build.corpus())
    add_teacher(store, build.teacher())
    with pytest.raises(ShardNotFound, match="no shard yet"):
        dask_array(store, "tiny", "key")


def test_the_summary_tells_what_is_there(tmp_path: Path, build: Any, backend: str) -> None:
    teacher = build.teacher(backend=backend, has_importance=True)
    store, made = build.store(tmp_path / "store", teacher)
    summary = summarise_teacher(store, "tiny")
    assert (summary.shards, summary.samples, summary.tokens) == (2, 6, 388)
    assert summary.raw_bytes == 388 * 3 * 2 * (8 + 4) * 2
    files = [p for p in store.paths.shards("tiny").rglob("*") if p.is_file()]
    data = sum(path.stat().st_size for path in files if path.name != "COMMIT.json")
    assert summary.stored_bytes == sum(summary.bytes_by_array.values()) == data
    values = np.concatenate([x for m in made.values() for x in m.values["key"]], axis=2)
    want = np.sqrt((values.astype(np.float64) ** 2).sum(-1).mean(-1))
    got = np.array([summary.rms["key"][layer] for layer in (0, 1, 3)])
    np.testing.assert_allclose(got, want, rtol=1e-6)
    norms = np.sqrt((whole(made, "value") ** 2).sum(-1)).max(-1)
    largest = largest_norms(store, "tiny", "value")
    np.testing.assert_allclose([largest[layer] for layer in (0, 1, 3)], norms, rtol=1e-6)
    counts, _ = importance_histogram(store, "tiny")
    stored = [one.shard.arrays["importance"] for one in made.values()]
    assert counts.sum() == sum(np.count_nonzero(array) for array in stored)
    plot_teacher(summary, (counts, np.logspace(-8, 0, 33)), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_an_outlier_channel_is_named(tmp_path: Path, build: Any) -> None:
    from kvdistill.store.writer import add_teacher, publish_shard

    store = create(tmp_path / "store", build.corpus(1))
    teacher = add_teacher(store, build.teacher())
    one = build.shard(teacher, ["s0", "s1", "s2"], build.lengths)
    loud = [x.clone() for x in one.values["key"]]
    for x in loud:
        x[2, 1, :, 5] *= 40
    statistics = {**one.statistics, "key": statistics_of(loud)}
    publish_shard(store, "tiny", "00000", one.shard, statistics)
    (outlier,) = summarise_teacher(store, "tiny").outliers
    assert (outlier.kind, outlier.layer, outlier.head, outlier.channel) == ("key", 3, 1, 5)
    assert outlier.ratio == pytest.approx(40, rel=0.3)
