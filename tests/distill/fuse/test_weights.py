"""Weighted sums of teachers, and what happens where one covers nothing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvdistill.distill.fuse.weights import fixed_weights, fuse, renormalise
from kvdistill.errors import GeometryError

SHAPE = (2, 3, 2, 5, 4)  # B, L, H, T, D


def teachers(num):
    return [torch.randn(SHAPE) for _ in range(num)]


def everywhere(num):
    return torch.ones(num, SHAPE[0], 1, SHAPE[3], dtype=torch.bool)


def test_constructed_case():
    a, b = torch.full(SHAPE, 1.0), torch.full(SHAPE, 5.0)
    alpha = renormalise(fixed_weights([3, 1]), everywhere(2))
    assert bool((fuse(alpha, [a, b]) == 2.0).all())


def test_one_teacher_fused_equals_itself():
    (only,) = teachers(1)
    assert torch.equal(fuse(renormalise(fixed_weights([0.3]), everywhere(1)), [only]), only)


def test_a_teacher_that_covers_nothing_changes_nothing():
    torch.manual_seed(0)
    a, b = teachers(2)
    absent = torch.full(SHAPE, 1e6)
    covered = everywhere(3)
    covered[2] = False
    with_absent = fuse(renormalise(fixed_weights([1, 2, 5]), covered), [a, b, absent])
    without = fuse(renormalise(fixed_weights([1, 2]), everywhere(2)), [a, b])
    torch.testing.assert_close(with_absent, without)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any), st.integers(0, 2**20))
def test_weights_sum_to_one_over_the_teachers_that_serve(weights, seed):
    generator = torch.Generator().manual_seed(seed)
    serves = torch.rand(len(weights), 2, 3, 5, generator=generator) < 0.5
    alpha = renormalise(fixed_weights(weights), serves)
    torch.testing.assert_close(alpha.sum(0), serves.any(0).float())
    assert not alpha.masked_fill(serves, 0).any()


def test_a_weight_that_underflows_leaves_no_served_token_without_a_target():
    """A sharp softmax gives one teacher all; where it serves nothing, the others teach."""
    logits = torch.tensor([0.0, 90.0, 300.0]).view(3, 1, 1, 1).requires_grad_()
    serves = torch.tensor([[1, 1, 0], [0, 1, 0], [0, 0, 1]]).bool().view(3, 1, 1, 3)
    alpha = renormalise(logits.softmax(0), serves)
    assert alpha[:, 0, 0].tolist() == [[1, 0.5, 0], [0, 0.5, 0], [0, 0, 1]]
    alpha.square().sum().backward()
    assert not logits.grad.any()


def test_per_token_weights_against_a_loop():
    torch.manual_seed(0)
    x = [t.double().requires_grad_() for t in teachers(3)]
    alpha = torch.rand(3, 2, 3, 5, dtype=torch.float64).softmax(0).requires_grad_()
    out = fuse(alpha, x)
    expected = torch.stack(
        [
            torch.stack(
                [
                    torch.stack(
                        [
                            sum(alpha[n, b, layer, t] * x[n][b, layer, :, t] for n in range(3))
                            for t in range(5)
                        ],
                        1,
                    )
                    for layer in range(3)
                ]
            )
            for b in range(2)
        ]
    )
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(out)
    mine = torch.autograd.grad((out * upstream).sum(), [alpha, *x])
    theirs = torch.autograd.grad((expected * upstream).sum(), [alpha, *x])
    for got, want in zip(mine, theirs, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("other", [[(2, 3, 2, 5, 3)], [(2, 3, 2, 1, 4)], [], [SHAPE, SHAPE]])
def test_only_as_many_teachers_of_one_shape_are_fused(other):
    teachers = [torch.zeros(shape) for shape in [SHAPE, *other]]
    with pytest.raises(GeometryError, match=r"2 teachers of one shape.+project them"):
        fuse(fixed_weights([1, 1]), teachers)
