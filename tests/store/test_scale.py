"""Large stores: opening reads two kinds of file, and memory does not grow with shards read."""

from __future__ import annotations

import gc
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvdistill.errors import NonFiniteError
from kvdistill.store.codecs import CODECS
from kvdistill.store.codecs.parts import part_name, parts_of
from kvdistill.store.reader import KVStore
from kvdistill.store.shard import EncodedShard, block_idx
from kvdistill.store.writer import add_teacher, create, publish_shard
from kvdistill.types import LayerGroup
from tests.store.made import ALONE


def test_opening_reads_manifests_and_folders_only(tmp_path: Path, build: Any) -> None:
    store = create(tmp_path / "store", build.corpus(300, 1))
    for name in ("a", "b", "c"):
        add_teacher(store, build.teacher(name=name))
        for shard_id in store.shard_ids[:-2]:
            (store.paths.shards(name) / shard_id).mkdir(parents=True)
    touched: list[str] = []
    watching = True

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event in ("open", "os.listdir", "os.scandir"):
            touched.append(str(arguments[0]))

    sys.addaudithook(watch)
    again = KVStore.open(tmp_path / "store")
    missing = {name: again.missing(name) for name in again.teachers()}
    watching = False
    assert all(len(names) == 2 for names in missing.values())
    mine = [path for path in touched if str(tmp_path) in path]
    assert 0 < len(mine) <= 10


def test_memory_does_not_grow_with_the_shards_read(
    tmp_path: Path, build: Any, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvdistill.store.reader.OPEN_SHARDS", 4)
    shards = build.corpus(16, 1)
    store = create(tmp_path / "store", shards)
    teacher = add_teacher(store, build.teacher(backend=backend))
    for shard in shards:
        one = build.shard(teacher, [shard.samples[0].sample_id], (1300,))
        publish_shard(store, "tiny", shard.shard_id, one.shard, one.statistics)
    ids = store.shard_ids
    one_shard = sum(array.nbytes for array in store.read_shard("tiny", ids[0]).arrays.values())

    def read(some: tuple[str, ...]) -> int:
        for shard_id in some:
            store.read_shard("tiny", shard_id)
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        early = read(ids[:6])
        late = read(ids[6:])
    finally:
        tracemalloc.stop()
    assert late - early < 3 * one_shard


geometry = st.builds(
    lambda layers, heads, dims: LayerGroup(tuple(range(layers)), heads, 2 * dims[0], 2 * dims[1]),
    st.integers(1, 3),
    st.integers(1, 3),
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    shape=st.tuples(
        geometry, st.lists(st.integers(0, 1100) | st.integers(0, 5), min_size=1, max_size=4)
    ),
    codecs=st.tuples(st.sampled_from(ALONE), st.sampled_from(ALONE)),
    backend=st.sampled_from(["zarr", "safetensors"]),
)
def test_any_shape_survives_any_codec_and_backend(
    tmp_path_factory: Any, build: Any, shape: Any, codecs: Any, backend: str
) -> None:
    group, lengths = shape
    root = tmp_path_factory.mktemp("any")
    shards = build.corpus(1, len(lengths))
    store = create(root / "store", shards)
    codec = {"key": codecs[0], "value": codecs[1]}
    teacher = add_teacher(store, build.teacher(backend=backend, groups=(group,), codec=codec))
    ids = [sample.sample_id for sample in shards[0].samples]
    one = build.shard(teacher, ids, lengths)
    publish_shard(store, "tiny", "00000", one.shard, one.statistics)
    back = KVStore.open(root / "store").read_shard("tiny", "00000")
    for name, array in one.shard.arrays.items():
        np.testing.assert_array_equal(back.arrays[name], array)
    for kind in ("key", "value"):
        chosen = CODECS[codec[kind]]
        idx = block_idx(back.tokens.sample_ptr)
        whole = chosen.decode(parts_of(back.arrays, kind), kind, idx)
        alone = np.concatenate(
            [chosen.decode(chosen.encode(x, kind), kind).numpy() for x in one.values[kind]], axis=2
        )
        np.testing.assert_array_equal(whole, alone)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    stored=st.tuples(st.sampled_from(ALONE), st.sampled_from(["zarr", "safetensors"])),
    kind=st.sampled_from(["key", "value"]),
    bad=st.tuples(
        st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        st.sampled_from([np.nan, np.inf, -np.inf]),
        st.tuples(st.integers(0, 2), st.integers(0, 1), st.integers(0, 69), st.integers(0, 3)),
    ),
)
def test_nothing_but_finite_numbers_enters_a_store(
    tmp_path_factory: Any, build: Any, stored: Any, kind: Any, bad: Any
) -> None:
    (codec, backend), (dtype, number, place) = stored, bad
    shards = build.corpus(1, 2)
    store = create(tmp_path_factory.mktemp("bad") / "store", shards)
    both = {"key": codec, "value": codec}
    teacher = add_teacher(store, build.teacher(backend=backend, codec=both))
    one = build.shard(teacher, ["s0", "s1"], (3, 70))
    x = one.values[kind][1].to(dtype)
    x[place] = number
    arrays = {name: array.copy() for name, array in one.shard.arrays.items()}
    for suffix, part in CODECS[codec].encode(x, kind).items():
        arrays[part_name(kind, suffix)][:, :, -part.shape[2] :] = part.numpy()
    layer = teacher.layers[place[0]]
    with pytest.raises(NonFiniteError, match=f"layer {layer}, head {place[1]}, sample 's1'"):
        publish_shard(
            store, "tiny", "00000", EncodedShard(one.shard.tokens, arrays), one.statistics
        )
    assert store.missing("tiny") == ["00000"]
