"""The monitor warns where a joint projector absorbs the loss, and is quiet where it cannot."""

import pytest
import torch
from torch import nn

from kvdistill.attention.geometry import HeadShape
from kvdistill.distill.losses.absorption import (
    AbsorptionMonitor,
    explained_variance,
    gradient_norm,
    gradient_share,
    target_variance,
)
from kvdistill.distill.losses.pointwise import kv_error
from kvdistill.distill.project.projections import FullProjection, StudentToTeacher


def test_target_variance_counts_what_is_served_by_its_weight():
    torch.manual_seed(0)
    x = torch.randn(3, 2, 2, 7, 4) * torch.tensor([1.0, 2.0, 3.0, 4.0]) + 5
    weight = torch.rand(3, 2, 7) * (torch.rand(3, 2, 7) < 0.6)
    x = x.masked_fill(weight[:, :, None, :, None] == 0, float("nan"))
    total = 0.0
    for layer in range(2):
        rows, w = x[:, layer].transpose(1, 2).reshape(21, 8), weight[:, layer].flatten()
        rows, w = rows[w > 0], w[w > 0]
        mean = (w[:, None] * rows).sum(0) / w.sum()
        total += (w[:, None] * (rows - mean).square()).sum(0).mean()
    torch.testing.assert_close(target_variance([(x, weight)]), total / weight.sum())
    unserved = [(x, weight), (torch.full_like(x, torch.nan), torch.zeros_like(weight))]
    torch.testing.assert_close(target_variance(unserved), total / weight.sum())


def test_explained_variance():
    error = torch.tensor([0.25, 2.0])
    assert explained_variance(error, torch.tensor(1.0)).tolist() == [0.75, -1.0]


def test_gradient_share_by_hand_and_the_graph_survives():
    a, b = torch.tensor([3.0], requires_grad=True), torch.tensor([1.0], requires_grad=True)
    kv, rest = 3 * a.sum() + 4 * b.sum(), 5 * a.sum()
    assert gradient_norm(kv, [a, b]) == pytest.approx(5)
    assert gradient_share(kv, rest, [a, b]) == pytest.approx(0.5)
    assert gradient_share(kv, rest, [b]) == 1.0
    assert gradient_share(kv.detach(), rest.detach(), [a, b]) == 0.0
    (kv + rest).backward()
    assert float(a.grad) == 8


def test_one_warning_when_a_figure_stays_low_none_for_one_odd_batch():
    monitor = AbsorptionMonitor(settle=2)
    warned = [monitor.update(target_variance=v) for v in (1, 1, 1, 0.01, 1, 0.9, 0.8)]
    assert not any(warned)
    warned = [monitor.update(target_variance=v) for v in (0.1, 0.1, 0.1, 0.1)]
    assert [len(warnings) for warnings in warned] == [1, 0, 0, 0]
    assert "fell from 1 to 0.45" in warned[0][0]
    assert "student_to_teacher or frozen" in warned[0][0]


def test_a_share_that_halves_is_no_alarm_but_one_that_vanishes_is():
    """Cross-entropy gradients grow while a student learns; that alone is not absorption."""
    monitor = AbsorptionMonitor(settle=2)
    assert not any(monitor.update(gradient_share=s) for s in (0.3, 0.3, 0.1, 0.07, 0.06))
    warned = [monitor.update(gradient_share=s) for s in (0.01, 0.005, 0.005)]
    assert sum(map(len, warned)) == 1


def train(joint, steps=200):
    """A small student against a teacher beyond its capacity: warnings, explained variance, loss.

    Joint: the teacher is projected to the student by a map that learns too. Otherwise the
    student's KV is regressed onto the standardised teacher.
    """
    torch.manual_seed(0)
    teacher_shape, student_shape = HeadShape(2, 8), HeadShape(1, 4)
    student = nn.Linear(6, 4)
    nn.init.normal_(student.weight, std=0.02)
    truth = torch.randn(6, 16)
    projector = (
        FullProjection(1, teacher_shape, student_shape)
        if joint
        else StudentToTeacher(1, student_shape, teacher_shape)
    )
    optimizer = torch.optim.Adam([*student.parameters(), *projector.parameters()], 0.01)
    monitor, warnings, history = AbsorptionMonitor(), [], []
    everywhere = torch.ones(16, 1, 1)
    for step in range(steps):
        text = torch.randn(16, 6)
        teacher = (text @ truth / 6**0.5 + 0.5 * torch.randn(16, 16)).view(16, 1, 2, 1, 8)
        own = student(text).view(16, 1, 1, 1, 4)
        guess, target = (own, projector(teacher)) if joint else (projector(own), teacher)
        loss = kv_error(guess, target).mean()
        if step % 5 == 0:
            variance = target_variance([(target, everywhere)])
            history.append(float(explained_variance(loss.detach(), variance)))
            warnings += monitor.update(target_variance=float(variance))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return warnings, history, loss.item()


def test_joint_training_is_caught_and_a_fixed_target_is_not():
    warnings, _, loss = train(joint=True)
    assert len(warnings) == 1
    assert loss < 0.1  # a loss that looks like success
    quiet, history, _ = train(joint=False)
    assert quiet == []
    assert sum(history[-5:]) / 5 > sum(history[:5]) / 5 + 0.2
