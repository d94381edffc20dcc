"""Two-step projection: every pair of shapes, exact for constructed cases."""

import pytest
import torch

from kvdistill.attention.geometry import HeadShape
from kvdistill.distill.align.resample import align_global
from kvdistill.distill.project.projections import LinearProjection, grouped_mean
from kvdistill.errors import GeometryError
from tests.distill.dense import place

PAIRS = [
    ((12, 128), (2, 128)),
    ((28, 128), (2, 64)),
    ((28, 128), (4, 128)),
    ((32, 64), (8, 64)),
    ((8, 64), (32, 64)),
    ((1, 256), (3, 64)),
    ((3, 64), (2, 32)),
    ((12, 32), (1, 64)),
]


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_every_pair_of_shapes(source, target):
    torch.manual_seed(0)
    projection = LinearProjection(2, HeadShape(*source), HeadShape(*target))
    x = torch.randn(2, 2, source[0], 3, source[1])
    out = projection(x)
    assert out.shape == (2, 2, target[0], 3, target[1])
    kept = min(source[1], target[1])
    heads = grouped_mean(source[0], target[0])
    expected = torch.einsum("blhtd,hg->blgtd", x[..., :kept], heads)
    torch.testing.assert_close(out[..., :kept], expected)
    assert not out[..., kept:].any()


@pytest.mark.parametrize(("num_from", "num_to"), [(12, 2), (28, 4), (32, 8), (6, 6), (5, 1)])
def test_grouped_mean_averages_each_group(num_from, num_to):
    x = torch.randn(num_from)
    expected = x.view(num_to, -1).mean(1)
    torch.testing.assert_close(x @ grouped_mean(num_from, num_to), expected)


@pytest.mark.parametrize(("num_from", "num_to"), [(8, 32), (1, 3), (2, 6)])
def test_more_heads_repeat(num_from, num_to):
    x = torch.randn(num_from)
    torch.testing.assert_close(
        x @ grouped_mean(num_from, num_to), x.repeat_interleave(num_to // num_from)
    )


@pytest.mark.parametrize(("num_from", "num_to"), [(3, 2), (2, 3), (12, 5), (7, 30)])
def test_other_ratios_share_heads_and_keep_constants(num_from, num_to):
    weights = grouped_mean(num_from, num_to)
    assert bool((weights >= 0).all())
    torch.testing.assert_close(weights.sum(0), torch.ones(num_to))
    assert bool((weights.sum(1) > 0).all())  # no teacher head is lost


def test_three_heads_into_two():
    expected = torch.tensor([[2 / 3, 0], [1 / 3, 1 / 3], [0, 2 / 3]])
    torch.testing.assert_close(grouped_mean(3, 2), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_plain_einsum_values_and_gradients(dtype):
    torch.manual_seed(0)
    projection = LinearProjection(3, HeadShape(4, 6), HeadShape(2, 5)).to(dtype)
    with torch.no_grad():
        for parameter in projection.parameters():
            parameter.normal_()
    x = torch.randn(2, 3, 4, 7, 6, dtype=dtype, requires_grad=True)
    out = projection(x)
    expected = torch.einsum(
        "blhtd,lde,lhg->blgte", x, projection.dim_LDE, projection.head_LHG
    ) + projection.bias_LGE.unsqueeze(2)
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(out)
    leaves = [x, *projection.parameters()]
    for got, want in zip(
        torch.autograd.grad((out * upstream).sum(), leaves),
        torch.autograd.grad((expected * upstream).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_layers_have_their_own_weights():
    projection = LinearProjection(2, HeadShape(2, 4), HeadShape(1, 4))
    with torch.no_grad():
        projection.dim_LDE[1] *= 3
    x = torch.randn(1, 1, 2, 5, 4).expand(1, 2, 2, 5, 4)
    out = projection(x)
    torch.testing.assert_close(out[:, 1], 3 * out[:, 0])


def test_projection_and_resampling_together():
    x = torch.randn(4, 1, 12, 80, 128)
    mask_s, mask_t = torch.ones(4, 50, dtype=torch.bool), torch.ones(4, 80, dtype=torch.bool)
    projection = LinearProjection(1, HeadShape(12, 128), HeadShape(2, 128))
    band = align_global(mask_s, mask_t)
    out = projection(place(band, x))
    assert out.squeeze(1).shape == (4, 2, 50, 128)
    torch.testing.assert_close(out, place(band, projection(x)))  # both are linear
    torch.testing.assert_close(out[..., 0, :], projection(x)[..., 0, :])
    torch.testing.assert_close(out[..., -1, :], projection(x)[..., -1, :])


def test_query_heads_are_refused_by_name():
    projection = LinearProjection(1, HeadShape(3, 64), HeadShape(2, 32))
    with pytest.raises(GeometryError, match="9 is 3 × 3, so these look like query heads"):
        projection(torch.zeros(1, 1, 9, 5, 64))


@pytest.mark.parametrize(
    "shape", [(1, 2, 3, 5, 64), (1, 1, 3, 5, 32), (1, 1, 2, 5, 64), (1, 3, 5, 64)]
)
def test_other_shapes_are_refused(shape):
    projection = LinearProjection(1, HeadShape(3, 64), HeadShape(2, 32))
    with pytest.raises(GeometryError, match=r"expected \[B, 1, 3, T, 64\]") as error:
        projection(torch.zeros(shape))
    assert "query heads" not in str(error.value)
