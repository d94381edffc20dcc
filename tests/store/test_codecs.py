"""Codecs: round trips within their bound, the same bits from numpy and torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard as hadamard_matrix

from kvdistill.errors import GeometryError
from kvdistill.store.codecs import CODECS
from kvdistill.store.codecs.int4 import hadamard
from kvdistill.store.codecs.parts import bits_to_float32
from kvdistill.store.shard import BLOCK_TOKENS, block_idx, block_ptr
from tests.store.made import ALONE

shapes = st.tuples(
    st.integers(1, 3), st.integers(1, 3), st.integers(0, 140), st.sampled_from([2, 4, 12, 64])
)


def _random(shape: tuple[int, ...], seed: int, scale: float) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    if x.numel():
        x.view(-1)[:: max(1, x.numel() // 5)] *= 30
    return x


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(ALONE),
    kind=st.sampled_from(["key", "value"]),
    shape=shapes,
    seed=st.integers(0, 999),
    scale=st.sampled_from([0.0, 1e-7, 1e-3, 1.0, 100.0]),
)
def test_numpy_and_torch_decode_to_the_same_bits(name, kind, shape, seed, scale):
    codec = CODECS[name]
    parts = codec.encode(_random(shape, seed, scale), kind)
    by_torch = codec.decode(parts, kind)
    by_numpy = codec.decode({k: v.numpy() for k, v in parts.items()}, kind)
    assert by_torch.dtype == torch.float32
    assert by_numpy.dtype == np.float32
    assert by_torch.shape == shape
    np.testing.assert_array_equal(by_torch.numpy(), by_numpy)


@settings(max_examples=60, deadline=None)
@given(
    coded=st.sampled_from([("int8", "key"), ("int8", "value"), ("int4", "key")]),
    shape=shapes,
    seed=st.integers(0, 999),
    range_=st.tuples(
        st.sampled_from([0.0, 1e-7, 1e-3, 1.0, 100.0]), st.sampled_from([0.0, 1.0, -1000.3])
    ),
)
def test_integer_codecs_are_within_half_a_scale(coded, shape, seed, range_):
    """Values in int4 are not: they trade the largest error for the mean one."""
    (name, kind), (scale, offset) = coded, range_
    x = _random(shape, seed, scale) + offset
    codec = CODECS[name]
    parts = codec.encode(x, kind)
    decoded = codec.decode(parts, kind)
    steps = parts["scale"].float()
    if kind == "key":
        steps = steps.repeat_interleave(BLOCK_TOKENS, dim=-2)[..., : shape[2], :]
    rounding = (abs(offset) + 30 * scale) * shape[-1] * 1e-6
    assert bool(((decoded - x).abs() <= steps * 0.5001 + rounding).all())


@given(kind=st.sampled_from(["key", "value"]), shape=shapes, seed=st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_fp8_is_within_its_mantissa(kind, shape, seed):
    x = _random(shape, seed, 1.0)
    parts = CODECS["fp8_e4m3"].encode(x, kind)
    error = (CODECS["fp8_e4m3"].decode(parts, kind) - x).abs()
    steps = parts["scale"].float()
    if kind == "key":
        steps = steps.repeat_interleave(BLOCK_TOKENS, dim=-2)[..., : shape[2], :]
    assert bool((error <= x.abs() * 2.0**-4 + steps * 2.0**-9).all())


def test_numpy_decodes_every_fp8_value_like_torch():
    bits = torch.arange(256, dtype=torch.uint8)
    by_torch = bits.view(torch.float8_e4m3fn).float().numpy()
    by_numpy = bits_to_float32(bits.numpy(), "float8_e4m3fn")
    np.testing.assert_array_equal(by_numpy, by_torch)


@pytest.mark.parametrize("dim", [1, 2, 12, 64, 80])
def test_the_rotation_is_its_own_inverse_and_keeps_lengths(dim):
    x = torch.randn(3, 5, dim, generator=torch.Generator().manual_seed(dim))
    torch.testing.assert_close(hadamard(hadamard(x)), x, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(hadamard(x).norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize("shape", [(64,), (3, 0, 64), (2, 2500, 96), (5, 7)])
def test_the_rotation_has_the_same_bits_in_numpy_and_torch(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    np.testing.assert_array_equal(hadamard(x.numpy()), hadamard(x).numpy(), strict=True)


def test_the_rotation_is_a_hadamard_matrix():
    matrix = hadamard(torch.eye(64)) * 8
    torch.testing.assert_close(matrix, torch.from_numpy(hadamard_matrix(64)).float())


def test_the_rotation_helps_values_with_an_outlier_channel():
    x = torch.randn(1, 1, 256, 64, generator=torch.Generator().manual_seed(0))
    x[..., 5] *= 20
    rotated = CODECS["int4"]
    error = (rotated.decode(rotated.encode(x, "value"), "value") - x).square().mean()
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    plain = ((x - low) / (high - low) * 15).round() / 15 * (high - low) + low
    assert error < 0.5 * (plain - x).square().mean()


@settings(max_examples=40, deadline=None)
@given(
    shape=shapes,
    seed=st.integers(0, 999),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 100.0]),
    offset=st.sampled_from([0.0, 5.0, -300.0]),
)
@pytest.mark.parametrize("name", ["int4", "int4_v1"])
def test_int4_values_are_within_the_step_that_covers_their_range(name, shape, seed, scale, offset):
    rotated = _random(shape, seed, scale) + offset * scale
    x = hadamard(rotated)
    got = (CODECS[name].decode(CODECS[name].encode(x, "value"), "value") - x).square().sum(dim=-1)
    low, high = rotated.amin(-1), rotated.amax(-1)
    step = torch.maximum((high - low) / 15, ((low + high) / 2).abs() / 31.75)
    # Steps have three bits of mantissa, and end 2^-17; the middle is off by an eighth of one.
    largest = 0.625 * 1.125 * step + 2.0**-17
    bound = x.shape[-1] * largest**2 + x.square().sum(dim=-1) * 1e-6
    assert bool((got <= bound + 1e-12).all())


def test_searched_int4_values_have_a_smaller_error_than_min_max():
    x = _random((2, 2, 64, 64), 0, 1.0).clamp(-4, 4)
    low, high = (hadamard(x).amin(-1, keepdim=True), hadamard(x).amax(-1, keepdim=True))
    plain = ((hadamard(x) - low) / (high - low) * 15).round() / 15 * (high - low) + low
    got = hadamard(CODECS["int4"].decode(CODECS["int4"].encode(x, "value"), "value"))
    assert (got - hadamard(x)).square().mean() < 0.93 * (plain - hadamard(x)).square().mean()


def test_scale_and_zero_of_a_value_take_one_byte_each():
    parts = {part.suffix: part for part in CODECS["int4"].parts("value")}
    assert (parts["scale"].dtype, parts["zero"].dtype) == ("uint8", "int8")
    assert {part.width(64) for suffix, part in parts.items() if suffix} == {1}


def test_eight_bit_steps_are_the_upper_byte_of_an_fp16():
    bits = torch.arange(256, dtype=torch.uint8)
    by_torch = bits_to_float32(bits, "ufloat8_e5m3")
    np.testing.assert_array_equal(by_torch.numpy(), bits_to_float32(bits.numpy(), "ufloat8_e5m3"))
    assert by_torch[0b01111_000] == 1.0
    assert by_torch[0b01111_001] == 1.125
    assert by_torch[0b11111_000].isinf()
    assert by_torch[0b11111_001:].isnan()[:7].all()


def test_int4_refuses_an_odd_head_dim():
    with pytest.raises(GeometryError, match="head dim is 5; store this teacher with codec int8"):
        CODECS["int4"].encode(torch.zeros(1, 1, 3, 5), "key")


@pytest.mark.parametrize(("name", "bits"), [("bf16", 8), ("fp16", 11)])
def test_casts_are_within_half_a_unit(name, bits):
    x = _random((2, 2, 70, 8), 0, 1.0)
    error = (CODECS[name].decode(CODECS[name].encode(x, "key"), "key") - x).abs()
    assert bool((error <= x.abs() * 2.0**-bits + 2.0**-25).all())


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("kind", ["key", "value"])
def test_a_packed_shard_and_a_padded_batch_decode_alike(name, kind):
    codec = CODECS[name]
    lengths = [130, 0, 64, 5]
    samples = [_random((2, 3, n, 8), seed, 1.0) for seed, n in enumerate(lengths)]
    encoded = [codec.encode(x, kind) for x in samples]
    alone = [codec.decode(parts, kind) for parts in encoded]

    ptr = np.concatenate([[0], np.cumsum(lengths)])
    packed = {
        part.suffix: torch.cat([parts[part.suffix] for parts in encoded], dim=2)
        for part in codec.parts(kind)
    }
    whole = codec.decode(packed, kind, torch.from_numpy(block_idx(ptr)))
    torch.testing.assert_close(whole, torch.cat(alone, dim=2), rtol=0, atol=0)

    longest = max(lengths)
    padded = {}
    for part in codec.parts(kind):
        size = longest if part.per == "token" else -(-longest // BLOCK_TOKENS)
        batch = [parts[part.suffix] for parts in encoded]
        out = torch.zeros(len(batch), 2, 3, size, batch[0].shape[-1], dtype=batch[0].dtype)
        for row, one in zip(out, batch, strict=True):
            row[:, :, : one.shape[2]] = one
        padded[part.suffix] = out
    decoded = codec.decode(padded, kind)
    for row, one in zip(decoded, alone, strict=True):
        torch.testing.assert_close(row[:, :, : one.shape[2]], one, rtol=0, atol=0)


@pytest.mark.parametrize("name", ALONE)
def test_neighbours_do_not_change_a_samples_codes(name):
    x = _random((1, 1, 64, 8), 0, 1.0)
    longer = torch.cat([x, _random((1, 1, 64, 8), 1, 50.0)], dim=2)
    alone, together = CODECS[name].encode(x, "key"), CODECS[name].encode(longer, "key")
    for part in CODECS[name].parts("key"):
        size = alone[part.suffix].shape[2]
        assert torch.equal(alone[part.suffix], together[part.suffix][:, :, :size])


def test_blocks_restart_at_every_sample():
    ptr = np.array([0, 130, 130, 194, 195])
    assert block_ptr(ptr).tolist() == [0, 3, 3, 4, 5]
    idx = block_idx(ptr)
    assert idx[[0, 63, 64, 127, 128, 129, 130, 193, 194]].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4]
