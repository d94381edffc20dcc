"""Codec klt: the same bits everywhere, bits where they count, bases that belong to a teacher."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from kvdistill.errors import ShardCorrupt, StoreMismatch
from kvdistill.store.codecs.klt import Basis, Transform, fit_basis, layer_blocks, token_bytes
from kvdistill.store.derived import published_bases
from kvdistill.store.maintenance import convert_store, copy_store, merge_stores, verify_store
from kvdistill.store.place import Place
from kvdistill.store.reader import KVStore
from kvdistill.store.writer import create
from kvdistill.types import KINDS, CodecSpec, LayerGroup
from tests.store.made import make_bases, make_corpus, registered

GROUP = LayerGroup((0, 1, 2, 3, 5), 2, 8, 8)
SPEC = {"key": "klt", "value": "klt", "key_bits": 3.0, "value_bits": 2.0, "block_layers": 2}


def _correlated(num_tokens: int, seed: int, width: int = 80) -> torch.Tensor:
    """``[T, width]`` whose channels share a few directions, far from zero."""
    mix = torch.randn(width, width, generator=torch.Generator().manual_seed(9))
    mix *= torch.logspace(0, -2, width)[:, None]
    drawn = torch.randn(num_tokens, width, generator=torch.Generator().manual_seed(seed))
    return drawn @ mix + 3


@cache
def _transform(bits: float, block_layers: int = 3) -> Transform:
    spec = CodecSpec(key="klt", key_bits=bits, block_layers=block_layers)
    num_bytes = token_bytes(GROUP, "key", spec)
    pilot, blocks = _correlated(3000, 0).view(-1, 5, 16), []
    for layers in layer_blocks(GROUP.layers, block_layers):
        rows = [GROUP.layers.index(layer) for layer in layers]
        x = pilot[:, rows].flatten(1)
        blocks.append((layers, fit_basis(x, torch.ones(x.shape[1]), num_bytes)))
    return Transform(GROUP, num_bytes, tuple(blocks), GROUP.layers)


def _text(num_tokens: int, seed: int) -> torch.Tensor:
    """``[L, H, T, D]``."""
    return _correlated(num_tokens, seed).view(-1, 5, 2, 8).permute(1, 2, 0, 3)


@settings(max_examples=12, deadline=None)
@given(
    bits=st.sampled_from([0.3, 1.1, 2.2, 5.0, 8.0]),
    num_tokens=st.sampled_from([0, 1, 33]),
    size=st.sampled_from([1, 2, 5]),
    scale=st.sampled_from([1.0, 30.0]),
)
def test_numpy_and_torch_encode_and_decode_to_the_same_bits(bits, num_tokens, size, scale):
    codec, x = _transform(bits, size), _text(num_tokens, 1) * scale
    parts = codec.encode(x, "key")
    by_numpy = codec.encode(x.numpy(), "key")
    # A coefficient on the border of two codes may round to either.
    differ = (parts[""].numpy() != by_numpy[""]).mean() if num_tokens else 0
    assert differ <= 0.002
    decoded = codec.decode(parts, "key")
    assert decoded.shape == x.shape
    numpy_parts = {name: part.numpy() for name, part in parts.items()}
    np.testing.assert_array_equal(decoded.numpy(), codec.decode(numpy_parts, "key"))
    assert torch.equal(decoded[:, :, :1], x[:, :, :1].half().float())


def test_sums_are_exact_in_any_order():
    """Every partial sum of a decoder's product is an integer that float32 represents."""
    for bits in (1.0, 8.0):
        for _, basis in _transform(bits).blocks:
            largest = 2.0 ** basis.bits.astype(np.float64) - 1
            assert (largest @ np.abs(basis.basis.astype(np.float64))).max() < 2**24
            assert np.abs(basis.basis).max() > 100  # and not by rounding the basis away


def test_more_bits_and_more_layers_lower_the_error():
    x, found = _text(400, 5), {}
    for bits, size in ((1.0, 5), (2.0, 5), (4.0, 5), (2.0, 1)):
        codec = _transform(bits, size)
        error = codec.decode(codec.encode(x, "key"), "key") - x
        found[bits, size] = float(error.norm() / (x - x.mean(dim=2, keepdim=True)).norm())
    assert found[1.0, 5] > 1.5 * found[2.0, 5] > 3 * found[4.0, 5]
    assert found[2.0, 1] > 1.2 * found[2.0, 5]


def test_bits_go_to_the_channels_with_weight():
    x = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))
    weight = torch.ones(64)
    weight[:16] = 100.0
    basis = fit_basis(x[:3000], weight, 16)
    packed = basis.encode(x[3000:], 16)
    error = (basis.decode(basis.coefficients(packed), slice(0, 64)) - x[3000:]).square().mean(0)
    assert float(error[:16].mean()) < 0.1 * float(error[16:].mean())
    assert int(basis.bits.sum()) <= 16 * 8


def test_bytes_of_a_token_follow_from_the_rate():
    assert layer_blocks(tuple(range(30)), 12) == [
        tuple(range(10)),
        tuple(range(10, 20)),
        tuple(range(20, 30)),
    ]
    parts = _transform(2.5, 5).encode(_text(7, 1), "key")
    assert parts[""].shape == (1, 1, 7, 25)  # 80 channels


@pytest.mark.parametrize("backend", ["zarr", "safetensors"])
def test_a_stored_selection_is_that_of_the_whole(tmp_path: Path, build: Any, backend: str) -> None:
    store, made = build.store(tmp_path / "store", build.teacher(codec=SPEC, backend=backend))
    assert verify_store(store) == []
    values = made["00000"].values
    for kind in KINDS:
        whole = store.read_decoded("tiny", "00000", kind)
        want = torch.cat(values[kind], dim=2).numpy()
        assert np.square(whole - want).mean() < 0.5 * np.square(want).mean()
        some = store.read_decoded("tiny", "00000", kind, [1, 3], [1])
        np.testing.assert_array_equal(some, whole[1:, 1:])
        sample = store.read_sample("tiny", "s2", kind)
        np.testing.assert_array_equal(sample, whole[:, :, 130:])
        np.testing.assert_array_equal(sample[:, :, 0], values[kind][2][:, :, 0].half().float())
        later = store.read_sample("tiny", "s2", kind, [0], tokens=slice(3, 9))
        np.testing.assert_array_equal(later, sample[:1, :, 3:9])
        assert store.read_sample("tiny", "s1", kind).shape[2] == 0
    spec = store.read_shard("tiny", "00000", [3]).arrays
    assert spec["key"].shape[:2] == (1, 1)  # the block that holds layer 3


def test_bases_are_checked_and_copied_with_a_store(
    tmp_path: Path, build: Any, private_cache: Path
) -> None:
    store, _ = build.store(tmp_path / "store", build.teacher(codec=SPEC))
    want = store.read_decoded("tiny", "00001", "value")
    copy = convert_store(store, tmp_path / "mapped", "safetensors")
    np.testing.assert_array_equal(copy.read_decoded("tiny", "00001", "value"), want)
    url = f"file://{tmp_path}/bucket"
    assert copy_store(store, url)[1] == 2
    np.testing.assert_array_equal(KVStore.open(url).read_decoded("tiny", "00001", "value"), want)
    empty = create(tmp_path / "merged", make_corpus(2))
    assert merge_stores(empty, [store]) == 2
    np.testing.assert_array_equal(empty.read_decoded("tiny", "00001", "value"), want)

    path = store.paths.transform("tiny")
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(
        ShardCorrupt, match=r"transform\.safetensors: damaged.* restore it from a copy"
    ):
        KVStore.open(store.paths.root).read_decoded("tiny", "00001", "value")
    path.unlink()
    (finding,) = verify_store(KVStore.open(store.paths.root))
    assert "missing, and codec klt needs it" in finding.problem


def test_stores_that_were_fitted_apart_are_not_merged(tmp_path: Path, build: Any) -> None:
    store, _ = build.store(tmp_path / "store", build.teacher(codec=SPEC))
    other = create(tmp_path / "other", make_corpus(2))
    teacher = build.teacher(codec=SPEC)
    bases = {name: _halved(basis) for name, basis in make_bases(teacher).items()}
    published_bases(other.place, "tiny", "made", lambda: bases)
    registered(other, teacher)
    shutil.rmtree(store.paths.shards("tiny") / "00001")
    with pytest.raises(StoreMismatch, match="codec klt: fitted apart"):
        merge_stores(store, [other])


def _halved(basis: Basis) -> Basis:
    return Basis(basis.mean, basis.weight, basis.basis, basis.scale / 2, basis.bits)


def test_the_first_bases_win_but_for_those_of_another_extraction(tmp_path: Path, build: Any):
    bases = make_bases(build.teacher(codec=SPEC))
    others = {name: _halved(basis) for name, basis in bases.items()}
    place = Place(tmp_path / "store")
    first = published_bases(place, "tiny", "a", lambda: bases)
    assert published_bases(place, "tiny", "a", lambda: others) == first
    assert published_bases(place, "tiny", "b", lambda: others) != first


def test_settings_of_klt_are_refused_elsewhere_and_left_out_of_other_codecs():
    assert CodecSpec().model_dump(mode="json") == {"key": "int8", "value": "int8"}
    half = CodecSpec(key="int8", value="klt", value_bits=2)
    assert CodecSpec.model_validate(half.model_dump()) == half
    with pytest.raises(ValidationError, match="`key_bits` is for codec klt; got int8/int4"):
        CodecSpec(value="int4", key_bits=2)
