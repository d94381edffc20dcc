"""A balance between teachers, against loops over teachers, samples and layers."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from kvdistill.attention.geometry import HeadShape
from kvdistill.config.distill import BalanceConfig
from kvdistill.distill.fuse.balance import FLOOR, MAX_FACTOR, TeacherBalance
from kvdistill.distill.losses.regression import Regression, regression_error
from kvdistill.distill.project.projections import StudentToTeacher

NAMES = ("strong", "weak", "third")
B, L, T, STUDENT = 4, 2, 6, HeadShape(2, 4)
SHAPES = (HeadShape(3, 5), HeadShape(1, 6), HeadShape(2, 2))
METHODS = ("none", "explained", "gradnorm", "pcgrad")


class Case:
    """Maps, targets and weights of some teachers for one student's keys."""

    def __init__(self, num_teachers: int = 2, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.student = torch.randn(B, L, 2, T, 4, dtype=torch.float64, requires_grad=True)
        shapes = SHAPES[:num_teachers]
        self.maps = [StudentToTeacher(L, STUDENT, shape, 3).double() for shape in shapes]
        for maps in self.maps:
            torch.nn.init.normal_(maps.hidden["down"], std=0.2)
        noise = [torch.randn(B, L, h, T, d, dtype=torch.float64) for h, d in shapes]
        rows = zip(self.maps, noise, range(num_teachers), strict=True)
        with torch.no_grad():  # the first teacher is nearly linear in the student, others less
            self.targets = [maps(self.student) + (0.2 + i) * x for maps, x, i in rows]
            for maps in self.maps:
                maps.weight_LIO += 0.1 * torch.randn_like(maps.weight_LIO)
        self.alpha = torch.rand(num_teachers, B, 1, T, dtype=torch.float64) + 0.1

    def leaves(self) -> list[torch.Tensor]:
        return [p for maps in self.maps for p in maps.parameters()]

    def error(self, balance: TeacherBalance | None, samples: slice = slice(None)) -> torch.Tensor:
        regressions = [
            Regression(
                maps.weight_LIO, maps.bias_LO, tuple(range(L)),
                lambda row, x=target: x[samples, row], alpha[samples], i,
                tuple(maps.hidden.values()),
            )
            for i, (maps, target, alpha) in enumerate(
                zip(self.maps, self.targets, self.alpha, strict=True)
            )
        ]  # fmt: skip
        balancing = balance.balancing("key") if balance is not None else None
        return regression_error(self.student[samples], regressions, "mse", balancing)

    def gradient(self, balance: TeacherBalance | None) -> torch.Tensor:
        (found,) = torch.autograd.grad(self.error(balance), self.student)
        return found

    def of_teacher(self, i: int) -> torch.Tensor:
        """The gradient ``[B, L, H, T, D]`` of one teacher's own error."""
        squares = (self.maps[i](self.student) - self.targets[i]).square().mean(dim=(2, 4))
        (found,) = torch.autograd.grad((squares * self.alpha[i]).sum() / L, self.student)
        return found


def made(method: str = "none", num_teachers: int = 2, **settings: Any) -> TeacherBalance:
    config = BalanceConfig(method=method, **settings)
    return TeacherBalance(config, NAMES[:num_teachers], L).double().train()


def settled(case: Case, method: str, **settings: Any) -> TeacherBalance:
    """A balance that has measured a step of the case."""
    balance = made(method, len(case.maps), **settings)
    case.error(balance)
    balance.end_step(lambda sums: sums)
    return balance


@pytest.mark.parametrize("num_teachers", [2, 3])
def test_explained_weighs_by_the_variance_that_is_explained(num_teachers: int) -> None:
    case = Case(num_teachers)
    balance = settled(case, "explained")
    shares = torch.zeros(num_teachers, L, dtype=torch.float64)
    for i, layer in itertools.product(range(num_teachers), range(L)):
        target = case.targets[i][:, layer]
        residual = case.maps[i](case.student)[:, layer] - target
        weight = case.alpha[i, :, 0][:, None, :, None]
        lost = (weight * residual.square()).sum() / (weight * target.square()).sum()
        shares[i, layer] = max(1 - float(lost.detach()), FLOOR)
    assert float(shares[0].min()) > 0.5 > float(shares[1].max())
    scale = shares / shares.mean(0)
    torch.testing.assert_close(balance.scale("key"), scale)
    torch.testing.assert_close(scale.mean(0), torch.ones(L, dtype=torch.float64))
    wanted = sum(
        scale[i].view(1, L, 1, 1, 1) * case.of_teacher(i) for i in range(num_teachers)
    )  # fmt: skip
    torch.testing.assert_close(case.gradient(balance), wanted)


@pytest.mark.parametrize("num_teachers", [2, 3])
def test_gradnorm_gives_gradients_of_equal_norm(num_teachers: int) -> None:
    case = Case(num_teachers)
    case.alpha = torch.full_like(case.alpha, 1 / num_teachers)
    balance = settled(case, "gradnorm")
    own = [case.of_teacher(i) for i in range(num_teachers)]
    norms = torch.stack([g.square().sum(dim=(0, 2, 3, 4)).sqrt() for g in own])
    assert float((norms[1] / norms[0]).min()) > 1.5
    balanced = [own[i] * balance.scale("key")[i].view(1, L, 1, 1, 1) for i in range(num_teachers)]
    for layer in range(L):
        found = [float(g[:, layer].norm()) for g in balanced]
        assert found == pytest.approx([float(norms[:, layer].mean())] * num_teachers)
    torch.testing.assert_close(case.gradient(balance), sum(balanced))


def test_gradnorm_is_relative_to_tokens_and_fusion_weights() -> None:
    """A teacher of few texts, or of little weight, keeps its part."""
    case = Case()
    (
        case.targets[1],
        case.maps[1],
    ) = case.targets[0], case.maps[0]
    case.alpha[0], case.alpha[1] = 0.75, 0.25
    case.alpha[1, 1:] = 0
    for maps in (0, 1):  # every sample is alike
        case.targets[maps] = case.targets[maps][:1].expand_as(case.targets[maps])
    case.student = case.student[:1].detach().expand(B, -1, -1, -1, -1).clone().requires_grad_()
    scale = settled(case, "gradnorm").scale("key")
    torch.testing.assert_close(scale, torch.ones_like(scale))


def test_gradnorm_is_bounded() -> None:
    case = Case()
    with torch.no_grad():
        case.targets[0] = case.maps[0](case.student) + 1e-6
    scale = settled(case, "gradnorm").scale("key")
    assert bool((scale[0] == MAX_FACTOR).all())


def test_pcgrad_equals_a_loop_and_leaves_no_conflict_of_two_teachers() -> None:
    conflicts = 0
    for num_teachers, seed in itertools.product((2, 3), range(6)):
        case = Case(num_teachers, seed)
        own = [case.of_teacher(i) for i in range(num_teachers)]
        wanted = torch.zeros_like(own[0])
        for b, layer in itertools.product(range(B), range(L)):
            at = [g[b, layer].flatten() for g in own]
            projected = []
            for i, gradient in enumerate(at):
                for j, other in enumerate(at):
                    inner = torch.dot(gradient, other)
                    if i != j and inner < 0:
                        conflicts += 1
                        gradient = gradient - inner / torch.dot(other, other) * other  # noqa: PLW2901
                projected.append(gradient)
            if num_teachers == 2:
                assert float(torch.dot(*projected)) >= -1e-12
                assert all(float(torch.dot(sum(projected), g)) >= -1e-12 for g in at)
            wanted[b, layer] = sum(projected).view(2, T, 4)
        torch.testing.assert_close(case.gradient(made("pcgrad", num_teachers)), wanted)
    assert conflicts > 20


def test_pcgrad_shows_how_often_teachers_conflict() -> None:
    case = Case(2)
    case.alpha[1, 2:] = 0  # they meet in two samples
    own = [case.of_teacher(i) for i in (0, 1)]
    inner = (own[0] * own[1]).sum(dim=(2, 3, 4))[:2]
    balance = settled(case, "pcgrad")
    assert 0 < int((inner < 0).sum()) < inner.numel()
    share = float((inner < 0).double().mean())
    figures = balance.figures()
    assert float(figures["conflict_strong"]) == pytest.approx(share)
    assert float(figures["conflict_weak"]) == pytest.approx(share)


@pytest.mark.parametrize("method", METHODS)
def test_errors_and_gradients_of_heads_are_those_without_a_balance(method: str) -> None:
    case = Case()
    balance = settled(case, method, factors={"weak": 0.1})
    error, plain = case.error(balance), case.error(None)
    assert torch.equal(error, plain)
    found, wanted = (torch.autograd.grad(x, case.leaves()) for x in (error, plain))
    for got, want in zip(found, wanted, strict=True):
        assert torch.equal(got, want)
    assert not torch.equal(case.gradient(balance), case.gradient(None))


@pytest.mark.parametrize("method", METHODS)
def test_a_teacher_outside_its_parts_changes_nothing_to_the_bit(method: str) -> None:
    alone, beside = Case(1), Case(2)
    beside.student, beside.maps[0], beside.targets[0] = (
        alone.student,
        alone.maps[0],
        alone.targets[0],
    )
    beside.alpha = torch.stack([alone.alpha[0], torch.zeros_like(alone.alpha[0])])
    one, two = (settled(case, method, factors={"weak": 3.0}) for case in (alone, beside))
    for _ in range(3):
        assert torch.equal(alone.gradient(one), beside.gradient(two))
        two.end_step(lambda sums: sums)
        one.end_step(lambda sums: sums)
    for figure in one.scale("key")[0], two.scale("key")[0]:
        assert torch.equal(figure, torch.ones_like(figure))


@pytest.mark.parametrize("method", METHODS)
def test_a_teacher_absent_from_a_step_keeps_its_figure(method: str) -> None:
    case = Case()
    balance = settled(case, method)
    before = balance.moments.clone()
    case.alpha[1] = 0
    case.error(balance)
    balance.end_step(lambda sums: sums)
    assert torch.equal(balance.moments[:, :, 1], before[:, :, 1])
    assert torch.equal(balance.moments, before) == (method in ("none", "pcgrad"))


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_and_ranks_equal_one_large_batch(method: str) -> None:
    case = Case(3)
    whole, cut = (made(method, 3, momentum=0.5, factors={"weak": 0.5}) for _ in range(2))
    for _ in range(3):
        wanted = case.gradient(whole)
        found = sum(
            torch.autograd.grad(case.error(cut, part), case.student)[0]
            for part in (slice(0, 1), slice(1, 4))
        )
        torch.testing.assert_close(found, wanted)
        for balance in (whole, cut):
            balance.end_step(lambda sums: sums)
        with torch.no_grad():
            case.student += 0.1 * torch.randn_like(case.student)
    torch.testing.assert_close(cut.moments, whole.moments)
    ranks = [made(method, 3) for _ in range(2)]
    for rank, part in zip(ranks, (slice(0, 1), slice(1, 4)), strict=True):
        case.error(rank, part)
    shares: list[torch.Tensor] = []
    for rank in ranks:
        rank.end_step(lambda sums: shares.append(sums) or sums)
    together = made(method, 3)
    together.end_step(lambda _: sum(shares))
    torch.testing.assert_close(together.moments, settled(case, method).moments)


def test_factors_and_spans_scale_a_teacher() -> None:
    case = Case()
    balance = made(factors={"weak": 0.25}, spans={"strong": (0.5, 1.0)})
    own = [case.of_teacher(i) for i in (0, 1)]
    torch.testing.assert_close(case.gradient(balance), 0.25 * own[1])
    balance.progress = 0.5
    torch.testing.assert_close(case.gradient(balance), own[0] + 0.25 * own[1])


def test_an_overflow_is_not_remembered() -> None:
    case = Case()
    balance = settled(case, "gradnorm")
    before = balance.moments.clone()
    case.error(balance)
    balance.end_step(lambda sums: torch.full_like(sums, torch.inf))
    assert torch.equal(balance.moments, before)


def test_evaluation_measures_nothing() -> None:
    assert made("gradnorm").eval().balancing("key") is None
    assert made().balancing("key") is None


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_balances_as_full_precision_does(method: str) -> None:
    case = Case()
    exact = settled(case, method, factors={"weak": 0.5})
    wanted = case.gradient(exact)
    case.student = case.student.detach().bfloat16().requires_grad_()
    case.targets = [x.float() for x in case.targets]
    for maps in case.maps:
        maps.float()
    half = made(method, factors={"weak": 0.5}).float()
    with torch.autocast("cpu", torch.bfloat16):
        case.error(half)
        half.end_step(lambda sums: sums)
        found = case.gradient(half)
    torch.testing.assert_close(half.moments.double(), exact.moments, rtol=0.02, atol=1e-6)
    assert float((found.double() - wanted).norm() / wanted.norm()) < 0.03
