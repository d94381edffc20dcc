"""Standardising, the banded product and targets by layer, against dense forms of everything."""

from __future__ import annotations

import pytest
import torch

from kvdistill.attention.geometry import HeadShape
from kvdistill.config.distill import ProjectionConfig
from kvdistill.distill.align.band import Band
from kvdistill.distill.align.layers import LayerMap, layer_map
from kvdistill.distill.align.resample import align_global
from kvdistill.distill.targets import (
    BandProduct,
    GroupSpace,
    Standardise,
    TargetStatistics,
    TeacherHead,
    TeacherSpace,
)
from kvdistill.store.codecs import CODECS
from kvdistill.types import CodecSpec
from tests.distill.dense import place

SAMPLES, COLUMNS, ROWS, HEADS, DIM = 2, 70, 9, 3, 8


MAPS = {
    "mixed": layer_map("uniform", 4, (2, 5, 6, 9, 11)),
    "more student layers": layer_map("ratio", 7, (0, 1)),
    "backwards": LayerMap((9, 2, 2), (9, 5, 5), (0.0, 0.25, 0.75)),
}


def random_band(b, rows, columns, width, dtype=torch.float32):
    start = torch.randint(0, max(columns - width + 1, 1), (b, rows))
    weight = torch.rand(b, rows, width, dtype=dtype)
    weight[:, ::3] = 0
    return Band(start, weight, weight.sum(-1) > 0)


def product(band, x_BHTD):
    return BandProduct(band, *x_BHTD.shape[1:3])(x_BHTD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 3])
def test_the_banded_product_equals_the_dense_one(dtype, width):
    torch.manual_seed(0)
    band = random_band(2, 9, 7, width, dtype)
    x = torch.randn(2, 3, 7, 5, dtype=dtype, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    out, expected = product(band, x), place(band, y[:, None])[:, 0]
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(expected)
    out.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(x.grad, y.grad)


def test_zero_weights_beyond_the_last_column_read_nothing():
    band = Band(
        torch.tensor([[0, 2, 2]]),
        torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]]),
        torch.tensor([[True, True, False]]),
    )
    x = torch.tensor([1.0, 5.0, 2.0]).view(1, 1, 3, 1).requires_grad_()
    out = product(band, x)
    assert out.flatten().tolist() == [1.0, 2.0, 0.0]
    out.sum().backward()
    assert x.grad.flatten().tolist() == [1.0, 0.0, 1.0]


def test_a_kv_that_is_not_contiguous():
    band = random_band(2, 4, 6, 2)
    x = torch.randn(2, 6, 5, 2).permute(0, 2, 1, 3)
    torch.testing.assert_close(product(band, x), product(band, x.contiguous()))


@pytest.mark.parametrize(("rows", "columns"), [(0, 4), (4, 0), (0, 0), (1, 1)])
def test_empty_and_single(rows, columns):
    band = Band(
        torch.zeros(2, rows, dtype=torch.long),
        torch.full((2, rows, 1), float(columns > 0)),
        torch.full((2, rows), columns > 0),
    )
    out = product(band, torch.ones(2, 3, columns, 5))
    assert out.shape == (2, 3, rows, 5)
    assert bool((out == float(columns > 0)).all())


def space(mapping, codec):
    shape = HeadShape(HEADS, DIM)
    statistics = TargetStatistics(
        torch.randn(len(mapping.needed), HEADS, DIM), torch.rand(len(mapping.needed), HEADS, DIM)
    )
    group = GroupSpace(
        "",
        tuple(range(len(mapping.lower))),
        mapping,
        dict.fromkeys(("key", "value"), shape),
        dict.fromkeys(("key", "value"), statistics),
    )
    return TeacherSpace("t", CodecSpec(key=codec, value=codec), (group,), causal=True)


@pytest.mark.parametrize("codec", ["int8", "int4", "bf16"])
@pytest.mark.parametrize("kind", ["key", "value"])
@pytest.mark.parametrize("case", MAPS)
def test_targets_by_layer_equal_everything_placed_at_once(case, kind, codec):
    torch.manual_seed(0)
    teacher = space(MAPS[case], codec)
    head = TeacherHead(teacher, kind, HeadShape(1, 4), ProjectionConfig(), projects=False)
    mapping = MAPS[case]
    x = torch.randn(SAMPLES, len(mapping.needed), HEADS, COLUMNS, DIM)
    parts = {"": CODECS[codec].encode(x, kind)}
    full = torch.ones(SAMPLES, ROWS).bool(), torch.ones(SAMPLES, COLUMNS).bool()
    band = align_global(*full)
    weight = band.weight.clone()
    weight[1, 4:] = 0  # not covered
    band = Band(band.start, weight, weight.sum(-1) > 0)
    decoded = head.standardise[0](CODECS[codec].decode(parts[""], kind))
    expected = place(band, mapping.apply(decoded))
    (layers,) = head.layers(parts, band)
    targets = layers.stacked()
    torch.testing.assert_close(targets, expected)
    assert not targets[1, :, :, 4:].any()
    (layers,) = head.layers(parts, band)
    for row in reversed(range(len(mapping.lower))):  # in any order
        torch.testing.assert_close(layers(row), expected[:, row])


def test_standardised_channels_have_unit_variance():
    torch.manual_seed(0)
    x = torch.randn(4, 2, 3, 50, 5) * torch.rand(2, 3, 1, 5) * 10 + torch.randn(2, 3, 1, 5)
    channels = x.transpose(2, 3).transpose(1, 2).flatten(0, 1)  # [B·T, L, H, D]
    module = Standardise(TargetStatistics(channels.mean(0), channels.var(0, correction=0)))
    out = module(x)
    torch.testing.assert_close(out.mean(dim=(0, 3)), torch.zeros(2, 3, 5), atol=1e-4, rtol=0)
    std = out.std(dim=(0, 3), correction=0)
    assert bool((std <= 1 + 1e-4).all())
    torch.testing.assert_close(std.median(), torch.tensor(1.0), atol=1e-4, rtol=0)
    assert not list(module.parameters())


def test_nearly_constant_channels_and_layers_are_not_amplified():
    variance = torch.ones(2, 1, 4)
    variance[0, 0, 1] = 0
    variance[1] = 0
    module = Standardise(TargetStatistics(torch.zeros(2, 1, 4), variance))
    out = module(torch.full((1, 2, 1, 3, 4), 1e-3))
    assert bool((out[:, 0].abs() <= 0.2).all())
    assert not out[:, 1].any()
