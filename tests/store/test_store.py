"""Write a shard, read it back: the whole, a part of it, and what must be refused."""

from __future__ import annotations

import json
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest

from kvdistill.errors import (
    GeometryError,
    NonFiniteError,
    ShardCorrupt,
    ShardNotFound,
    StoreError,
    StoreFormatError,
    StoreMismatch,
    StoreNotFound,
)
from kvdistill.store.channel_statistics import ChannelStatistics
from kvdistill.store.codecs import CODECS
from kvdistill.store.codecs.parts import parts_of
from kvdistill.store.manifest import FORMAT_VERSION, RotarySpec
from kvdistill.store.reader import KVStore
from kvdistill.store.shard import block_idx
from kvdistill.store.writer import add_teacher, create, publish_shard
from tests.store.made import ALONE


@pytest.fixture(params=["one", "two", "everything"])
def teacher(request: pytest.FixtureRequest, build: Any, backend: str) -> Any:
    if request.param == "one":
        return build.teacher(backend=backend)
    if request.param == "two":
        return build.teacher(
            backend=backend, groups=build.two_groups, codec={"key": "bf16", "value": "fp16"}
        )
    stored = {"has_importance": True, "has_hidden_at_cue": True, "has_confidence": True}
    return build.teacher(backend=backend, own_text=True, num_logits=3, **stored)


def test_what_went_in_comes_out(tmp_path: Any, build: Any, teacher: Any) -> None:
    store, made = build.store(tmp_path / "store", teacher)
    assert store.missing("tiny") == []
    for shard_id, one in made.items():
        back = KVStore.open(tmp_path / "store").read_shard("tiny", shard_id)
        assert back.arrays.keys() == one.shard.arrays.keys()
        for name, array in one.shard.arrays.items():
            np.testing.assert_array_equal(back.arrays[name], array)
            assert back.arrays[name].dtype == array.dtype
        assert back.tokens.sample_ids == one.shard.tokens.sample_ids
        for column in ("sample_ptr", "token_ids", "char_start", "char_end", "segment"):
            np.testing.assert_array_equal(
                getattr(back.tokens, column), getattr(one.shard.tokens, column)
            )
        assert back.texts == one.shard.texts


def test_selection_equals_slicing_the_whole(tmp_path: Any, build: Any, backend: str) -> None:
    store, _ = build.store(tmp_path / "store", build.teacher(backend=backend, has_importance=True))
    whole = store.read_shard("tiny", "00000").arrays
    part = store.read_shard("tiny", "00000", layers=[3, 0], heads=[1], kinds=["value"]).arrays
    assert set(part) == {"value", "value_scale", "importance"}
    for name, array in part.items():
        np.testing.assert_array_equal(array, whole[name][[0, 2]][:, [1]])


def test_selected_layers_of_one_group_leave_the_other_out(
    tmp_path: Any, build: Any, backend: str
) -> None:
    store, _ = build.store(
        tmp_path / "store", build.teacher(backend=backend, groups=build.two_groups)
    )
    part = store.read_shard("tiny", "00001", layers=[1])
    assert {name.split("/")[0] for name in part.arrays} == {"g1"}


def test_random_access_equals_decoding_the_shard(tmp_path: Any, build: Any, teacher: Any) -> None:
    store, made = build.store(tmp_path / "store", teacher)
    shard = made["00001"].shard
    for group_idx, group in enumerate(teacher.groups):
        prefix = f"g{group_idx}/" if len(teacher.groups) > 1 else ""
        for kind in ("key", "value"):
            codec = CODECS[getattr(teacher.codec, kind)]
            whole = codec.decode(
                parts_of(shard.arrays, prefix + kind), kind, block_idx(shard.tokens.sample_ptr)
            )
            for i, layer in enumerate(group.layers):
                for sample_idx, sample_id in enumerate(shard.tokens.sample_ids):
                    own = whole[i, 0][shard.tokens.span(sample_idx)]
                    for tokens in (slice(None), slice(60, 70), slice(-3, None), slice(5, 5)):
                        got = store.read("tiny", sample_id, layer, 0, kind, tokens=tokens)
                        np.testing.assert_array_equal(got, own[tokens])
                        assert got.dtype == np.float32


def test_a_sample_is_read_as_it_lies_in_its_shard(tmp_path: Any, build: Any, backend: str) -> None:
    store, _ = build.store(tmp_path / "store", build.teacher(backend=backend))
    ptr = store.token_table("tiny", "00000").sample_ptr
    whole = store.read_decoded("tiny", "00000", "value")
    for i, tokens in enumerate((slice(60, 129), slice(None), slice(-3, None))):
        want = whole[:, :, ptr[i] : ptr[i + 1]][:, :, tokens]
        got = store.read_sample("tiny", f"s{i}", "value", tokens=tokens)
        np.testing.assert_array_equal(got, want)
        got = store.read_sample("tiny", f"s{i}", "value", [0, 3], [1], tokens=tokens)
        np.testing.assert_array_equal(got, want[[0, 2]][:, [1]])


def test_a_sample_of_several_geometries_is_read_one_at_a_time(tmp_path: Any, build: Any) -> None:
    store, _ = build.store(tmp_path / "store", build.teacher(groups=build.two_groups))
    assert store.read_sample("tiny", "s0", "key", [0, 2]).shape == (2, 1, 130, 8)
    with pytest.raises(GeometryError, match=r"\[0, 1, 2\] are not of one geometry"):
        store.read_sample("tiny", "s0", "key")


def test_decoded_values_are_near_the_teachers(tmp_path: Any, build: Any, backend: str) -> None:
    store, made = build.store(tmp_path / "store", build.teacher(backend=backend))
    got = store.read("tiny", "s0", 3, 1, "key")
    want = made["00000"].values["key"][0][2, 1].numpy()
    assert np.abs(got - want).max() < 0.01 * np.abs(want).max()


def test_statistics_are_those_of_all_values(tmp_path: Any, build: Any, teacher: Any) -> None:
    store, made = build.store(tmp_path / "store", teacher)
    merged = store.statistics("tiny")
    for name, stats in merged.items():
        every = np.concatenate([x.numpy() for m in made.values() for x in m.values[name]], axis=2)
        np.testing.assert_allclose(stats.mean, every.mean(axis=2, dtype=np.float64), atol=1e-9)
        np.testing.assert_allclose(stats.variance, every.astype(np.float64).var(axis=2), rtol=1e-9)
        assert stats.count == every.shape[2]


def test_creating_adding_and_publishing_twice_changes_nothing(
    tmp_path: Any, build: Any, backend: str
) -> None:
    teacher = build.teacher(backend=backend)
    store, made = build.store(tmp_path / "store", teacher)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    again = create(tmp_path / "store", build.corpus())
    add_teacher(again, teacher.model_copy(update={"versions": {"torch": "3"}}))
    one = made["00000"]
    assert not publish_shard(again, "tiny", "00000", one.shard, one.statistics)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()} == before
    assert not any((tmp_path / "store" / "teachers" / "tiny" / "tmp").iterdir())
    assert store.teacher("tiny") == teacher


def test_missing_shards_of_an_interrupted_extraction_are_listed(tmp_path: Any, build: Any) -> None:
    shards = build.corpus(4)
    store = create(tmp_path / "store", shards)
    teacher = add_teacher(store, build.teacher())
    assert store.missing("tiny") == ["00000", "00001", "00002", "00003"]
    with pytest.raises(ShardNotFound, match="has no shard yet"):
        store.statistics("tiny")
    ids = [sample.sample_id for sample in shards[2].samples]
    one = build.shard(teacher, ids, build.lengths)
    assert publish_shard(store, "tiny", "00002", one.shard, one.statistics)
    assert store.missing("tiny") == ["00000", "00001", "00003"]
    assert store.committed("tiny") == {"00002"}
    with pytest.raises(ShardNotFound, match="has not committed shard 00001"):
        store.read_shard("tiny", "00001")


def test_the_corpus_is_in_the_store(tmp_path: Any, build: Any) -> None:
    shards = build.corpus()
    store = create(tmp_path / "store", shards)
    assert [store.samples(shard.shard_id) for shard in shards] == [s.samples for s in shards]
    assert store.find("s4") == ("00001", 1)
    path = tmp_path / "store" / "corpus" / "00001.jsonl"
    path.write_text(path.read_text().replace("0123", "0124", 1))
    with pytest.raises(ShardCorrupt, match=r"00001\.jsonl"):
        store.samples("00001")


def test_another_plan_is_refused(tmp_path: Any, build: Any) -> None:
    create(tmp_path / "store", build.corpus(2, 3))
    with pytest.raises(StoreMismatch, match="another corpus"):
        create(tmp_path / "store", build.corpus(3, 3))
    with pytest.raises(StoreMismatch, match="into 2 shards, the config into 3"):
        create(tmp_path / "store", build.corpus(3, 2))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(StoreError, match="not a kvdistill store"):
        create(tmp_path / "other", build.corpus())


@pytest.mark.parametrize("factor", [1 + 3e-7, 1 - 2e-6, 1 + 1e-3])
def test_measured_numbers_may_differ_by_rounding(tmp_path: Any, build: Any, factor: float) -> None:
    """Another kind of node measures rotations a little differently."""

    def teacher(by: float) -> Any:
        spec = RotarySpec(rotary_dim=4, inv_freq=(by, by * 1e-4), attention_scaling=1.2079441 * by)
        return build.teacher(position_encoding="rotary", rotary={0: spec, 1: spec})

    store = create(tmp_path / "store", build.corpus())
    first = add_teacher(store, teacher(1.0))
    if abs(factor - 1) < 1e-4:
        assert add_teacher(store, teacher(factor)) == first
    else:
        with pytest.raises(StoreMismatch, match="rotary: stored"):
            add_teacher(store, teacher(factor))


def test_another_teacher_of_the_same_name_is_refused(tmp_path: Any, build: Any) -> None:
    store = create(tmp_path / "store", build.corpus())
    add_teacher(store, build.teacher())
    with pytest.raises(StoreMismatch, match=r"model: stored 'models/tiny'.* other parameters"):
        add_teacher(store, build.teacher(weights_fingerprint="v" * 64))


def test_what_is_not_there_is_named(tmp_path: Any, build: Any) -> None:
    with pytest.raises(StoreNotFound, match="no store at"):
        KVStore.open(tmp_path)
    store, _ = build.store(tmp_path / "store", build.teacher())
    with pytest.raises(ShardNotFound, match=r"no teacher 'other'; it has \['tiny'\]"):
        store.teacher("other")
    with pytest.raises(ShardNotFound, match="no shard '9'"):
        store.read_shard("tiny", "9")
    with pytest.raises(ShardNotFound, match="no sample 'x'"):
        store.read("tiny", "x", 0, 0, "key")
    with pytest.raises(GeometryError, match=r"stores the layers \[0, 1, 3\]"):
        store.read_shard("tiny", "00000", layers=[2])
    with pytest.raises(GeometryError, match="2 key/value heads"):
        store.read("tiny", "s0", 0, 2, "key")


def test_a_newer_format_names_both_versions(tmp_path: Any, build: Any) -> None:
    create(tmp_path / "store", build.corpus())
    path = tmp_path / "store" / "kvstore.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 7}))
    with pytest.raises(StoreFormatError, match=rf"version 7, .* reads up to {FORMAT_VERSION}"):
        KVStore.open(tmp_path / "store")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("codec", ALONE)
def test_non_finite_values_are_refused_by_layer_and_head(
    tmp_path: Any, build: Any, bad: float, codec: str
) -> None:
    shards = build.corpus(1)
    store = create(tmp_path / "store", shards)
    teacher = add_teacher(store, build.teacher(codec={"key": codec, "value": codec}))
    one = build.shard(teacher, ["s0", "s1", "s2"], build.lengths)
    for kind in ("key", "value"):
        x = one.values[kind][2].clone()
        x[1, 0, 7, 2] = bad
        arrays = dict(one.shard.arrays)
        for suffix, part in CODECS[codec].encode(x, kind).items():
            name = f"{kind}_{suffix}" if suffix else kind
            whole = arrays[name].copy()
            whole[:, :, -part.shape[2] :] = part.numpy()
            arrays[name] = whole
        poisoned = type(one.shard)(one.shard.tokens, arrays)
        with pytest.raises(NonFiniteError, match=f"{kind}.* layer 1, head 0, sample 's2'"):
            publish_shard(store, "tiny", "00000", poisoned, one.statistics)
    assert store.missing("tiny") == ["00000"]


@pytest.mark.parametrize(("token", "refused"), [(0, False), (130, False), (129, True)])
def test_only_the_first_token_of_a_sample_may_have_no_prediction(
    tmp_path: Any, build: Any, token: int, refused: bool
) -> None:
    store = create(tmp_path / "store", build.corpus(1))
    teacher = add_teacher(store, build.teacher(has_confidence=True, num_logits=2))
    one = build.shard(teacher, ["s0", "s1", "s2"], build.lengths)
    one.shard.arrays["top_logprobs"][token, 1] = np.nan
    with pytest.raises(NonFiniteError, match="sample 's0', rank 1") if refused else nullcontext():
        publish_shard(store, "tiny", "00000", one.shard, one.statistics)
        np.testing.assert_array_equal(
            store.token_array("tiny", "00000", "top_ids"), one.shard.arrays["top_ids"]
        )


def test_a_shard_that_deviates_from_its_manifest_is_refused(tmp_path: Any, build: Any) -> None:
    store = create(tmp_path / "store", build.corpus(1))
    teacher = add_teacher(store, build.teacher())
    one = build.shard(teacher, ["s0", "s1", "s2"], build.lengths)
    arrays = dict(one.shard.arrays)

    def publish(arrays: Any, statistics: Any = one.statistics) -> None:
        shard = type(one.shard)(one.shard.tokens, arrays)
        publish_shard(store, "tiny", "00000", shard, statistics)

    with pytest.raises(GeometryError, match=r"missing: \['key_scale'\]"):
        publish({k: v for k, v in arrays.items() if k != "key_scale"})
    with pytest.raises(GeometryError, match=r"not declared by the manifest: \['importance'\]"):
        publish({**arrays, "importance": np.zeros((3, 2, 194), np.float16)})
    with pytest.raises(GeometryError, match="key is float32"):
        publish({**arrays, "key": arrays["key"].astype(np.float32)})
    with pytest.raises(GeometryError, match="key_statistics"):
        publish(arrays, {**one.statistics, "key": ChannelStatistics(0, *np.zeros((2, 3, 4, 8)))})
    short = build.shard(teacher, ["s0", "s1"], [3, 4])
    with pytest.raises(GeometryError, match="2 samples, but the plan has 3"):
        publish_shard(store, "tiny", "00000", short.shard, short.statistics)
    assert store.missing("tiny") == ["00000"]
