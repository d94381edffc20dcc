"""Full, bottleneck, student-to-teacher and shared-space maps: shapes, references, gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kvdistill.attention.geometry import HeadShape
from kvdistill.distill.project.projections import (
    BottleneckProjection,
    FullProjection,
    LinearProjection,
    SpaceAdapter,
    StudentToTeacher,
)
from kvdistill.errors import GeometryError

PAIRS = [((12, 8), (2, 8)), ((1, 16), (3, 4)), ((3, 4), (12, 2))]


def flat(x, layer):
    return x[:, layer].transpose(1, 2).flatten(2)


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_full_starts_as_the_two_step_map(source, target):
    x = torch.randn(2, 3, source[0], 5, source[1])
    full = FullProjection(3, HeadShape(*source), HeadShape(*target))
    steps = LinearProjection(3, HeadShape(*source), HeadShape(*target))
    torch.testing.assert_close(full(x), steps(x))


@pytest.mark.parametrize(("source", "target"), PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bottleneck_equals_a_loop_over_layers(source, target, dtype):
    torch.manual_seed(0)
    module = BottleneckProjection(3, HeadShape(*source), HeadShape(*target), 0.7).to(dtype)
    with torch.no_grad():
        module.down_bias_LO.normal_()
        module.up_bias_LO.normal_()
    x = torch.randn(2, 3, source[0], 5, source[1], dtype=dtype)
    out = module(x)
    assert out.shape == (2, 3, target[0], 5, target[1])
    for layer in range(3):
        inner = F.gelu(flat(x, layer) @ module.down_LIO[layer] + module.down_bias_LO[layer])
        expected = inner @ module.up_LIO[layer] + module.up_bias_LO[layer]
        torch.testing.assert_close(flat(out, layer), expected)


def test_the_middle_follows_from_both_widths():
    assert BottleneckProjection(1, HeadShape(4, 16), HeadShape(2, 8), 0.5).inner == (1, 16)


def test_orthogonal_keeps_lengths():
    torch.manual_seed(0)
    full = FullProjection(1, HeadShape(2, 3), HeadShape(2, 6), "orthogonal")
    x = torch.randn(1, 1, 2, 5, 3)
    torch.testing.assert_close(flat(full(x), 0).norm(dim=-1), flat(x, 0).norm(dim=-1))


@pytest.mark.parametrize("model", [HeadShape(3, 4), HeadShape(1, 5)])
def test_a_wide_enough_space_loses_nothing_at_first(model):
    torch.manual_seed(0)
    adapter = SpaceAdapter(2, model, HeadShape(2, 8))
    x = torch.randn(2, 2, *model[:1], 6, model[1])
    z = adapter(x)
    assert z.shape == (2, 2, 2, 6, 8)
    torch.testing.assert_close(adapter.out_of(z), x, atol=1e-5, rtol=1e-5)
    assert float(adapter.round_trip_error(x).max()) < 1e-9


def test_a_narrow_space_keeps_its_share_of_the_variance():
    torch.manual_seed(0)
    adapter = SpaceAdapter(1, HeadShape(4, 8), HeadShape(1, 8))
    x = torch.randn(8, 1, 4, 200, 8)
    assert float(adapter.round_trip_error(x).mean()) == pytest.approx(0.75, abs=0.02)


def test_every_map_refuses_query_heads():
    shape = HeadShape(2, 4), HeadShape(1, 4)
    x = torch.zeros(1, 1, 6, 3, 4)
    for module in (
        FullProjection(1, *shape),
        BottleneckProjection(1, *shape),
        SpaceAdapter(1, *shape),
    ):
        with pytest.raises(GeometryError, match="query heads"):
            module(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_student_to_teacher_equals_one_linear_layer_per_layer(dtype):
    torch.manual_seed(0)
    source, target = HeadShape(2, 4), HeadShape(3, 5)
    head = StudentToTeacher(2, source, target).to(dtype)
    with torch.no_grad():
        head.bias_LO.normal_()
    x = torch.randn(2, 2, 2, 6, 4, dtype=dtype, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    out = head(x)
    assert out.shape == (2, 2, 3, 6, 5)
    expected = torch.zeros_like(out)
    for layer in range(2):
        flat = torch.cat([y[:, layer, h] for h in range(2)], dim=-1)
        guess = flat @ head.weight_LIO[layer] + head.bias_LO[layer]
        for h in range(3):
            expected[:, layer, h] = guess[..., 5 * h : 5 * h + 5]
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(out)
    mine = torch.autograd.grad((out * upstream).sum(), [x, *head.parameters()])
    theirs = torch.autograd.grad((expected * upstream).sum(), [y, *head.parameters()])
    for got, want in zip(mine, theirs, strict=True):
        torch.testing.assert_close(got, want)


def test_student_to_teacher_refuses_query_heads():
    with pytest.raises(GeometryError, match="query heads"):
        StudentToTeacher(1, HeadShape(2, 4), HeadShape(3, 5))(torch.zeros(1, 1, 8, 3, 4))
