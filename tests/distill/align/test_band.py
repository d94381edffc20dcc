"""The banded product against a dense matrix product, values and gradients."""

import pytest
import torch

from kvdistill.distill.align.band import Band, apply_band
from kvdistill.errors import GeometryError


def random_band(b, rows, columns, width, dtype=torch.float32):
    start = torch.randint(0, max(columns - width + 1, 1), (b, rows))
    weight = torch.rand(b, rows, width, dtype=dtype)
    weight[:, ::3] = 0
    return Band(start, weight, weight.sum(-1) > 0)


def dense(band, columns):
    b, rows, width = band.weight.shape
    matrix = torch.zeros(b, rows, columns, dtype=torch.float64)
    for sample in range(b):
        for row in range(rows):
            for offset in range(width):
                at = int(band.start[sample, row]) + offset
                if at < columns:
                    matrix[sample, row, at] += band.weight[sample, row, offset].double()
    return matrix


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 3])
def test_equals_the_dense_product(dtype, width):
    torch.manual_seed(0)
    band = random_band(2, 9, 7, width, dtype)
    x = torch.randn(2, 3, 2, 7, 5, dtype=dtype, requires_grad=True)
    y = x.detach().double().requires_grad_()
    out = apply_band(band, x)
    expected = torch.einsum("bst,blhtd->blhsd", dense(band, 7), y)
    torch.testing.assert_close(out, expected.to(dtype))
    upstream = torch.randn_like(expected)
    out.backward(upstream.to(dtype))
    expected.backward(upstream)
    torch.testing.assert_close(x.grad, y.grad.to(dtype))


def test_weights_beyond_the_end_are_harmless():
    band = Band(
        torch.tensor([[0, 2, 2]]),
        torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]]),
        torch.tensor([[True, True, False]]),
    )
    x = torch.tensor([1.0, 5.0, 2.0]).view(1, 1, 1, 3, 1).requires_grad_()
    out = apply_band(band, x)
    assert out.flatten().tolist() == [1.0, 2.0, 0.0]
    out.sum().backward()
    assert x.grad.flatten().tolist() == [1.0, 0.0, 1.0]


def test_a_view_that_is_not_contiguous():
    band = random_band(2, 4, 6, 2)
    x = torch.randn(2, 6, 3, 5, 2).permute(0, 2, 4, 1, 3)
    torch.testing.assert_close(apply_band(band, x), apply_band(band, x.contiguous()))


@pytest.mark.parametrize(("rows", "columns"), [(0, 4), (4, 0), (0, 0), (1, 1)])
def test_empty_and_single(rows, columns):
    band = Band(
        torch.zeros(2, rows, dtype=torch.long),
        torch.full((2, rows, 1), float(columns > 0)),
        torch.full((2, rows), columns > 0),
    )
    out = apply_band(band, torch.ones(2, 3, 2, columns, 5))
    assert out.shape == (2, 3, 2, rows, 5)
    assert bool((out == float(columns > 0)).all())


def test_a_wrong_batch_is_refused():
    with pytest.raises(GeometryError, match=r"with B = 2, got \(3, 1, 1, 4, 5\)"):
        apply_band(random_band(2, 3, 4, 1), torch.zeros(3, 1, 1, 4, 5))
