"""Routers: shapes, sums, near-uniform starts, and that they can learn to distinguish teachers."""

import math

import pytest
import torch

from kvdistill.distill.fuse.router import Router
from kvdistill.distill.fuse.weights import drop_teachers, entropy, fuse, renormalise

METHODS = ["mlp", "gate", "attention"]
SHAPES = {"sample": (3, 4, 1, 1), "layer": (3, 4, 5, 1), "token": (3, 4, 1, 7)}


def router(method, granularity="sample", **given):
    torch.manual_seed(0)
    return Router(method, 3, 8, granularity=granularity, num_layers=5, **given)


def hidden(granularity):
    return torch.randn(4, 7, 8) if granularity == "token" else torch.randn(4, 8)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("granularity", SHAPES)
def test_weights_sum_to_one_and_start_near_uniform(method, granularity):
    alpha = router(method, granularity)(hidden(granularity) * 50)
    assert alpha.shape == SHAPES[granularity]
    torch.testing.assert_close(alpha.sum(0), torch.ones(SHAPES[granularity][1:]))
    assert bool((alpha - 1 / 3).abs().max() < 0.03)
    assert not torch.equal(alpha[0], alpha[1])


@pytest.mark.parametrize("method", METHODS)
def test_each_sample_is_routed_on_its_own(method):
    module, x = router(method, "token"), hidden("token")
    torch.testing.assert_close(module(x)[:, 2:3], module(x[2:3]))
    torch.testing.assert_close(module(x)[..., 3:4], module(x[:, 3:4]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("granularity", SHAPES)
def test_gradients_reach_every_parameter(method, granularity):
    module = router(method, granularity, num_tasks=2)
    alpha = module(hidden(granularity), torch.tensor([0, 1, 2, 1]))
    (alpha * torch.randn_like(alpha)).sum().backward()
    for name, parameter in module.named_parameters():
        assert bool((parameter.grad != 0).any()), name


@pytest.mark.parametrize("method", METHODS)
def test_weights_are_float32_under_autocast(method):
    module, x = router(method), hidden("sample")
    with torch.autocast("cpu", torch.bfloat16):
        alpha = module(x)
    assert alpha.dtype == torch.float32
    assert torch.equal(alpha, module(x))


def test_a_task_tag_can_decide():
    module = router("mlp", num_tasks=2)
    x = torch.zeros(2, 8)
    optimizer = torch.optim.Adam(module.parameters(), 0.05)
    for _ in range(60):
        alpha = module(x, torch.tensor([1, 2]))[:, :, 0, 0]
        loss = -(alpha[0, 0].log() + alpha[2, 1].log())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    alpha = module(x, torch.tensor([1, 2]))[:, :, 0, 0]
    assert alpha[0, 0] > 0.9
    assert alpha[2, 1] > 0.9


@pytest.mark.parametrize("method", METHODS)
def test_a_noise_teacher_loses_its_weight_when_the_target_is_known(method):
    torch.manual_seed(1)
    module = router(method, "layer")
    optimizer = torch.optim.Adam(module.parameters(), 0.03)
    everywhere = torch.ones(3, 4, 1, 6, dtype=torch.bool)
    for _ in range(150):
        signal = torch.randn(4, 5, 2, 6, 3)
        teachers = [signal, signal, torch.randn_like(signal) * 2]
        alpha = renormalise(module(torch.randn(4, 8)), everywhere)
        loss = (fuse(alpha, teachers) - signal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert module(torch.randn(50, 8))[2].mean().item() < 0.05


def test_entropy_by_hand():
    alpha = torch.tensor([[1.0, 0.5], [0.0, 0.5]]).view(2, 2, 1, 1).requires_grad_()
    got = entropy(alpha)
    torch.testing.assert_close(got, torch.tensor([0.0, math.log(2)]).view(2, 1, 1))
    got.sum().backward()
    assert bool(alpha.grad.isfinite().all())


def test_teacher_dropout_leaves_no_token_without_a_teacher():
    serves = torch.rand(3, 400, 2, 5) < 0.7
    serves[1, :200] = False
    kept = torch.rand(3, 400) < 0.5
    dropped = drop_teachers(serves, kept)
    assert torch.equal(dropped.any(0), serves.any(0))  # no token of a layer loses its only teacher
    left = (serves & kept[:, :, None, None]).any(0)
    assert torch.equal(dropped[:, left], (serves & kept[:, :, None, None])[:, left])
    assert torch.equal(dropped[:, ~left], serves[:, ~left])
    assert 0.2 < (serves & ~dropped).float().mean() / serves.float().mean() < 0.5
