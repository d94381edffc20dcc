"""Errors per token against loops; cross-entropy against its definition."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from kvdistill.attention.geometry import HeadShape
from kvdistill.distill.losses.pointwise import (
    IGNORED_LABEL,
    cosine_error,
    cross_entropy,
    kv_error,
    layer_std,
    num_predicted,
)
from kvdistill.distill.project.projections import StudentToTeacher
from kvdistill.errors import GeometryError

SHAPE = (2, 3, 2, 5, 4)


def pair(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(SHAPE, generator=generator).requires_grad_(),
        3 * torch.randn(SHAPE, generator=generator),
    )


@pytest.mark.parametrize("distance", ["mse", "smooth_l1"])
def test_errors_against_a_loop(distance):
    student, target = pair()
    got = kv_error(student, target, distance).detach()
    assert got.dtype == torch.float32
    for b in range(2):
        for layer, t in itertools.product(range(3), range(5)):
            total, d = 0.0, (student - target)[b, layer, :, t].flatten().tolist()
            for e in d:
                if distance == "mse":
                    total += e * e
                else:
                    total += 0.5 * e * e if abs(e) < 1 else abs(e) - 0.5
            assert float(got[b, layer, t]) == pytest.approx(total / len(d), rel=1e-5)


@pytest.mark.parametrize("distance", ["mse", "smooth_l1"])
def test_gradients_equal_those_of_the_plain_mean(distance):
    student, target = pair()
    with torch.no_grad():
        target[0, :, :, 0] = student[0, :, :, 0]  # a perfect token has a gradient of zero
    upstream = torch.rand(2, 3, 5)
    (got,) = torch.autograd.grad((kv_error(student, target, distance) * upstream).sum(), student)
    plain = (
        torch.nn.functional.mse_loss if distance == "mse" else torch.nn.functional.smooth_l1_loss
    )(student, target, reduction="none")
    (want,) = torch.autograd.grad((plain.mean(dim=(2, 4)) * upstream).sum(), student)
    torch.testing.assert_close(got, want)


def test_cosine_against_a_loop():
    student, target = pair()
    got = cosine_error(student, target).detach()
    for b in range(2):
        for layer, t in itertools.product(range(3), range(5)):
            total = 0.0
            for h in range(2):
                x, y = student[b, layer, h, t].tolist(), target[b, layer, h, t].tolist()
                dot = sum(i * j for i, j in zip(x, y, strict=True))
                total += 1 - dot / math.sqrt(sum(i * i for i in x) * sum(i * i for i in y))
            assert float(got[b, layer, t]) == pytest.approx(total / 2, rel=1e-4)


def test_cosine_of_zero_vectors_is_finite_with_finite_gradients():
    student = torch.zeros(SHAPE, requires_grad=True)
    loss = cosine_error(student, torch.zeros(SHAPE)).sum()
    loss.backward()
    assert math.isfinite(loss.item())
    assert bool(student.grad.isfinite().all())


def test_layer_std_counts_only_valid_elements():
    target = torch.randn(2, 3, 2, 5, 4)
    mask = torch.rand(2, 3, 5) < 0.6
    got = layer_std(target, mask)
    for layer in range(3):
        valid = target[:, layer].transpose(1, 2)[mask[:, layer]]
        torch.testing.assert_close(got[layer], valid.std(correction=0))


def test_layer_std_makes_a_loud_layer_count_like_a_quiet_one():
    student, target = pair()
    scale = torch.tensor([1.0, 10.0, 100.0])
    whole = kv_error(student, target, layer_std_L=scale)
    each = [kv_error(student[:, i : i + 1], target[:, i : i + 1]) / scale[i] for i in range(3)]
    torch.testing.assert_close(whole, torch.cat(each, 1))


def test_bfloat16_inputs_are_compared_in_float32():
    student, target = pair()
    got = kv_error(student.bfloat16(), target.bfloat16())
    expected = kv_error(student.bfloat16().float(), target.bfloat16().float())
    assert torch.equal(got, expected)


def test_shapes_that_would_broadcast_are_refused():
    student, target = pair()
    for loss in (kv_error, cosine_error):
        with pytest.raises(GeometryError, match="align and project first"):
            loss(student, target[:, :1])


def test_under_autocast_errors_are_float32_and_gradients_finite():
    torch.manual_seed(0)
    student, target = torch.randn(2, 2, 2, 7, 4, requires_grad=True), torch.randn(2, 2, 3, 7, 6)
    head = StudentToTeacher(2, HeadShape(2, 4), HeadShape(3, 6))
    with torch.autocast("cpu", torch.bfloat16):
        predicted = head(student)
        error = kv_error(predicted, target)
    assert predicted.dtype == torch.bfloat16
    assert error.dtype == torch.float32
    torch.testing.assert_close(error, kv_error(head(student), target), atol=0.05, rtol=0.05)
    error.mean().backward()
    assert bool(student.grad.isfinite().all())
    assert bool(student.grad.any())


def test_cross_entropy_predicts_the_next_label_and_skips_ignored_ones():
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 7, requires_grad=True)
    labels = torch.tensor(
        [[1, 2, IGNORED_LABEL, 3], [4, IGNORED_LABEL, IGNORED_LABEL, IGNORED_LABEL]]
    )
    wanted = [(0, 0, 2), (0, 2, 3)]  # the first label has no token before it
    log_p = logits.log_softmax(-1)
    expected = -sum(log_p[b, t, label] for b, t, label in wanted)
    assert int(num_predicted(labels)) == len(wanted)
    torch.testing.assert_close(cross_entropy(logits, labels, None), expected / 2)
    loss = cross_entropy(logits, labels, torch.tensor(8))
    torch.testing.assert_close(loss, expected / 8)
    loss.backward()
    assert bool(logits.grad[0, [0, 2]].all())
    assert not logits.grad[1].any()
    assert not logits.grad[0, [1, 3]].any()
