"""Student-to-teacher regression and standardisation against loops over layers."""

import pytest
import torch

from kvdistill.attention.geometry import HeadShape
from kvdistill.distill.project.projections import StudentToTeacher
from kvdistill.distill.targets import Standardise, TargetStatistics
from kvdistill.errors import GeometryError


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_one_linear_layer_per_layer(dtype):
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


def test_refuses_query_heads_of_the_student():
    with pytest.raises(GeometryError, match="query heads"):
        StudentToTeacher(1, HeadShape(2, 4), HeadShape(3, 5))(torch.zeros(1, 1, 8, 3, 4))


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


def test_dead_channels_and_layers_do_not_explode():
    variance = torch.ones(2, 1, 4)
    variance[0, 0, 1] = 0
    variance[1] = 0
    module = Standardise(TargetStatistics(torch.zeros(2, 1, 4), variance))
    out = module(torch.full((1, 2, 1, 3, 4), 1e-3))
    assert bool((out[:, 0].abs() <= 0.2).all())
    assert not out[:, 1].any()
