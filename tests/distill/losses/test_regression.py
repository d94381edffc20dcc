"""The fused regression against prediction, difference and norm: values and gradients."""

import pytest
import torch

from kvdistill.attention.geometry import HeadShape
from kvdistill.distill.losses.pointwise import kv_error
from kvdistill.distill.losses.regression import Regression, regression_error
from kvdistill.distill.project.projections import StudentToTeacher

STUDENT, TEACHERS = HeadShape(2, 4), (HeadShape(3, 5), HeadShape(1, 6))
SAMPLES, LAYERS, TOKENS = 3, 4, 7


def setting(dtype=torch.float64, by_layer=False, num_hidden=0):
    torch.manual_seed(0)
    student = torch.randn(SAMPLES, LAYERS, 2, TOKENS, 4, dtype=dtype, requires_grad=True)
    maps = [StudentToTeacher(LAYERS, STUDENT, shape, num_hidden).to(dtype) for shape in TEACHERS]
    for one in maps:
        for parameter in (one.bias_LO, *(one.hidden[name] for name in one.hidden if name != "up")):
            torch.nn.init.normal_(parameter)
    targets = [torch.randn(SAMPLES, LAYERS, h, TOKENS, d, dtype=dtype) for h, d in TEACHERS]
    alpha = torch.rand(2, SAMPLES, LAYERS if by_layer else 1, TOKENS, dtype=dtype)
    alpha[:, 1, :, 4:] = 0  # tokens that no teacher covers
    return student, maps, targets, alpha.requires_grad_()


def regressions(maps, targets, alpha, layers=tuple(range(LAYERS))):
    rows = [lambda row, x=x: x[:, row] for x in targets]
    return [
        Regression(m.weight_LIO, m.bias_LO, layers, row, a, i, tuple(m.hidden.values()))
        for i, (m, row, a) in enumerate(zip(maps, rows, alpha, strict=True))
    ]


def reference(student, maps, targets, alpha, distance):
    """One layer at a time, so that each has its own weight."""
    total = 0
    for one, target, weight in zip(maps, targets, alpha.expand(-1, -1, LAYERS, -1), strict=True):
        predicted = one(student)
        for layer in range(LAYERS):
            ours, theirs = predicted[:, layer].double(), target[:, layer].double()
            if distance == "mse":
                error = (ours - theirs).square()
            else:
                error = torch.nn.functional.smooth_l1_loss(ours, theirs, reduction="none")
            total = total + (weight[:, layer] * error.mean(dim=(1, 3))).sum() / LAYERS
    return total


@pytest.mark.parametrize("distance", ["mse", "smooth_l1"])
@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("num_hidden", [0, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_prediction_and_difference(dtype, num_hidden, by_layer, distance):
    student, maps, targets, alpha = setting(dtype, by_layer, num_hidden)
    leaves = [student, alpha, *(p for one in maps for p in one.parameters())]
    mine = 3 * regression_error(student, regressions(maps, targets, alpha), distance)
    theirs = 3 * reference(student, maps, targets, alpha, distance)
    torch.testing.assert_close(mine, theirs.to(dtype))
    found = torch.autograd.grad(mine, leaves, retain_graph=True)
    again = torch.autograd.grad(mine, leaves)  # a figure may ask twice
    wanted = torch.autograd.grad(theirs, leaves)
    for got, same, want in zip(found, again, wanted, strict=True):
        torch.testing.assert_close(got, want)
        assert torch.equal(got, same)


def test_a_squared_error_is_kv_error_weighted():
    student, maps, targets, alpha = setting(torch.float32)
    got = regression_error(student, regressions(maps, targets, alpha))
    errors = [kv_error(one(student), target) for one, target in zip(maps, targets, strict=True)]
    torch.testing.assert_close(got, (torch.stack(errors) * alpha).sum() / LAYERS)


def test_groups_of_layers_sum_to_the_whole():
    student, maps, targets, alpha = setting(by_layer=True)
    whole = regression_error(student, regressions(maps[:1], targets[:1], alpha[:1]))
    parts = []
    for layers in ((0, 3), (1, 2)):
        cut = StudentToTeacher(2, STUDENT, TEACHERS[0]).double()
        with torch.no_grad():
            cut.weight_LIO.copy_(maps[0].weight_LIO[list(layers)])
            cut.bias_LO.copy_(maps[0].bias_LO[list(layers)])
        parts += regressions([cut], [targets[0][:, list(layers)]], alpha[:1], layers)
    torch.testing.assert_close(regression_error(student, parts), whole)
    mine = torch.autograd.grad(regression_error(student, parts), student)
    torch.testing.assert_close(mine, torch.autograd.grad(whole, student))


def test_nothing_is_differentiated_that_need_not_be():
    student, maps, targets, alpha = setting()
    error = regression_error(student.detach(), regressions(maps, targets, alpha.detach()))
    error.backward()
    assert student.grad is None
    assert alpha.grad is None
    assert all(bool(p.grad.any()) for one in maps for p in one.parameters())
    with torch.no_grad():
        assert not regression_error(student, regressions(maps, targets, alpha)).requires_grad


def test_tokens_without_weight_have_no_gradient():
    student, maps, targets, alpha = setting()
    regression_error(student, regressions(maps, targets, alpha)).backward()
    assert not student.grad[1, :, :, 4:].any()
    assert bool((student.grad[0] != 0).all())


def test_a_hidden_layer_starts_as_the_linear_map_and_learns():
    student, (one, _), (target, _), alpha = setting(torch.float32, num_hidden=5)
    torch.nn.init.zeros_(one.hidden["down"])
    linear = StudentToTeacher(LAYERS, STUDENT, TEACHERS[0])
    linear.load_state_dict(one.state_dict(), strict=False)
    assert torch.equal(one(student), linear(student))
    regression_error(student, regressions([one], [target], alpha[:1])).backward()
    assert bool(one.hidden["down"].grad.any())


@pytest.mark.parametrize("num_hidden", [0, 5])
def test_autocast_multiplies_in_half_precision_and_sums_in_float32(num_hidden):
    student, maps, targets, alpha = setting(torch.float32, num_hidden=num_hidden)
    with torch.autocast("cpu", torch.bfloat16):
        error = regression_error(student, regressions(maps, targets, alpha))
    exact = reference(student, maps, targets, alpha, "mse")
    assert error.dtype == torch.float32
    torch.testing.assert_close(error.double(), exact, rtol=0.02, atol=0.02)
    (mine,) = torch.autograd.grad(error, student)
    (theirs,) = torch.autograd.grad(exact, student)
    assert mine.dtype == torch.float32
    assert float((mine - theirs).norm() / theirs.norm()) < 0.02
    half = student.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        regression_error(half, regressions(maps, targets, alpha)).backward()
    assert half.grad.dtype == torch.bfloat16
