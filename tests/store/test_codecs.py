"""Codecs: round trips within their bound, the same bits from numpy and torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvdistill.store.codecs import CODECS
from kvdistill.store.shard import BLOCK_TOKENS, block_idx, block_ptr

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
    name=st.sampled_from(sorted(CODECS)),
    kind=st.sampled_from(["key", "value"]),
    shape=shapes,
    seed=st.integers(0, 999),
    scale=st.sampled_from([0.0, 1e-7, 1e-3, 1.0, 100.0]),
)
def test_numpy_and_torch_decode_to_the_same_bits(name, kind, shape, seed, scale):
    codec = CODECS[name]
    parts = codec.encode(_random(shape, seed, scale), kind)
    by_torch = codec.decode(parts, kind)
    by_numpy = codec.decode_numpy({k: v.numpy() for k, v in parts.items()}, kind)
    assert by_torch.dtype == torch.float32
    assert by_numpy.dtype == np.float32
    assert by_torch.shape == shape
    np.testing.assert_array_equal(by_torch.numpy(), by_numpy)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["key", "value"]),
    shape=shapes,
    seed=st.integers(0, 999),
    scale=st.sampled_from([0.0, 1e-7, 1e-3, 1.0, 100.0]),
)
def test_int8_is_within_half_a_scale(kind, shape, seed, scale):
    x = _random(shape, seed, scale)
    codec = CODECS["int8"]
    parts = codec.encode(x, kind)
    error = (codec.decode(parts, kind) - x).abs()
    steps = parts["scale"].float()
    if kind == "key":
        steps = steps.repeat_interleave(BLOCK_TOKENS, dim=-2)[..., : shape[2], :]
    assert bool((error <= steps * 0.5001).all())


@pytest.mark.parametrize(("name", "bits"), [("bf16", 8), ("fp16", 11)])
def test_casts_are_within_half_a_unit(name, bits):
    x = _random((2, 2, 70, 8), 0, 1.0)
    error = (CODECS[name].decode(CODECS[name].encode(x, "key"), "key") - x).abs()
    assert bool((error <= x.abs() * 2.0**-bits + 2.0**-25).all())


@pytest.mark.parametrize("name", sorted(CODECS))
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


@pytest.mark.parametrize("name", sorted(CODECS))
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
