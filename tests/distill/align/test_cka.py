"""CKA by its kernel form, and the assignment by trying every one."""

from itertools import combinations_with_replacement

import pytest
import torch

from kvdistill.distill.align.layers import linear_cka, monotone_map
from kvdistill.errors import ConfigError, GeometryError


def kernel_cka(x, y):
    """HSIC of linear kernels, the definition."""
    n = len(x)
    centre = torch.eye(n, dtype=torch.float64) - 1 / n
    k, m = (centre @ (z.double() @ z.double().T) @ centre for z in (x, y))
    return float((k * m).sum() / ((k * k).sum() * (m * m).sum()).sqrt())


def test_equals_the_kernel_form():
    torch.manual_seed(0)
    x, y = torch.randn(3, 40, 5), torch.randn(4, 40, 7) + 2
    got = linear_cka(x, y)
    for i in range(3):
        for j in range(4):
            assert float(got[i, j]) == pytest.approx(kernel_cka(x[i], y[j]), rel=1e-4)


def test_a_rotated_and_scaled_layer_is_itself():
    torch.manual_seed(0)
    teacher = torch.randn(5, 300, 6)
    turn = torch.linalg.qr(torch.randn(6, 6)).Q
    similarity = linear_cka(3 * teacher[[0, 2, 3]] @ turn + 1, teacher)
    torch.testing.assert_close(similarity[[0, 1, 2], [0, 2, 3]], torch.ones(3))
    assert monotone_map(similarity, [1, 2, 4, 6, 9]).lower == (1, 4, 6)


@pytest.mark.parametrize("seed", range(8))
def test_assignment_is_the_best_monotone_one(seed):
    similarity = torch.rand(4, 5, generator=torch.Generator().manual_seed(seed))
    best = max(
        combinations_with_replacement(range(5), 4),
        key=lambda way: sum(float(similarity[i, j]) for i, j in enumerate(way)),
    )
    assert monotone_map(similarity, range(5)).lower == best


def test_fewer_teacher_layers_than_student_layers():
    mapping = monotone_map(torch.rand(6, 2), [3, 7])
    assert len(mapping.lower) == 6
    assert list(mapping.lower) == sorted(mapping.lower)
    assert set(mapping.needed) <= {3, 7}


def test_errors():
    with pytest.raises(GeometryError, match="align them first"):
        linear_cka(torch.zeros(1, 3, 2), torch.zeros(1, 4, 2))
    with pytest.raises(ConfigError, match="finite similarities"):
        monotone_map(torch.full((2, 2), float("nan")), [0, 1])
