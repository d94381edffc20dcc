"""Closed forms: moments, PCA and ridge against the whole data matrix, and exact recoveries."""

import pytest
import torch

from kvdistill.attention.geometry import HeadShape
from kvdistill.distill.project.closed_form import PilotMoments, initialise
from kvdistill.distill.project.projections import FullProjection, LinearProjection
from kvdistill.errors import ConfigError

SOURCE, TARGET, LAYERS = HeadShape(3, 4), HeadShape(2, 3), 2


def teacher_batches(num=5, seed=0):
    """Correlated KV of uneven length with masks; channels of very different spread."""
    generator = torch.Generator().manual_seed(seed)
    mix = 0.2 * torch.randn(LAYERS, SOURCE.width, SOURCE.width, generator=generator)
    mix += torch.diag(torch.linspace(0.5, 2, SOURCE.width))
    for i in range(num):
        x = torch.randn(2, LAYERS, 40 + i, SOURCE.width, generator=generator)
        x = torch.einsum("blti,lio->blto", x, mix) + 3
        mask = torch.rand(2, 40 + i, generator=generator) < 0.8
        yield x.view(2, LAYERS, 40 + i, *SOURCE).transpose(2, 3), mask


def flat(x, mask, layer):
    return x[:, layer].transpose(1, 2).flatten(2)[mask].double()


def moments_of(pairs, target=TARGET):
    moments = PilotMoments(LAYERS, SOURCE.width, target.width)
    for x, y, mask in pairs:
        moments.add(x, y, mask)
    return moments


def test_merged_moments_equal_those_of_all_tokens():
    batches = list(teacher_batches())
    pairs = [(x, x[:, :, :2, :, :3] ** 2, mask) for x, mask in batches]
    moments = moments_of(pairs)
    (_, mean_y), (xx, xy) = moments.means(), moments.covariances()
    for layer in range(LAYERS):
        x = torch.cat([flat(x, mask, layer) for x, _, mask in pairs])
        y = torch.cat([flat(y, mask, layer) for _, y, mask in pairs])
        assert moments.count == len(x)
        torch.testing.assert_close(mean_y[layer], y.mean(0))
        centred = x - x.mean(0)
        torch.testing.assert_close(xx[layer], centred.T @ centred / len(x))
        torch.testing.assert_close(xy[layer], centred.T @ (y - y.mean(0)) / len(x))


@pytest.mark.parametrize("target", [TARGET, HeadShape(2, 9)])
def test_pca_target_is_white_and_keeps_the_leading_directions(target):
    torch.manual_seed(0)
    batches = list(teacher_batches())
    projection = FullProjection(LAYERS, SOURCE, target)
    moments = moments_of(
        [(x, torch.zeros(2, LAYERS, 2, x.shape[3], target.head_dim), mask) for x, mask in batches],
        target,
    )
    initialise(projection, moments, "pca")
    for layer in range(LAYERS):
        out = torch.cat([flat(projection(x), mask, layer) for x, mask in batches]).detach()
        torch.testing.assert_close(out.mean(0), torch.zeros_like(out[0]), atol=1e-4, rtol=0)
        covariance = torch.cov(out.T, correction=0)
        if target.width <= SOURCE.width:
            torch.testing.assert_close(
                covariance, torch.eye(target.width).double(), atol=1e-3, rtol=0
            )
        else:  # spread out: every channel takes part, and the total is as if all were unit
            assert bool((covariance.diagonal() > 0.05).all())
            assert float(covariance.trace()) == pytest.approx(target.width, rel=1e-3)
        x = torch.cat([flat(x, mask, layer) for x, mask in batches])
        leading = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[: target.width]
        weight = projection.weight_LIO[layer].detach().double()
        outside = weight - leading.T @ (leading @ weight)
        assert float(outside.norm() / weight.norm()) < 1e-4


def test_ridge_recovers_a_linear_student():
    torch.manual_seed(0)
    truth, offset = torch.randn(LAYERS, SOURCE.width, TARGET.width), torch.randn(TARGET)
    pairs = []
    for x, mask in teacher_batches():
        y = torch.einsum("blti,lio->blto", x.transpose(2, 3).flatten(3), truth)
        pairs.append((x, y.unflatten(-1, TARGET).transpose(2, 3) + offset[:, None], mask))
    projection = FullProjection(LAYERS, SOURCE, TARGET)
    initialise(projection, moments_of(pairs), "ridge")
    x, y, mask = pairs[0]
    error = (projection(x) - y).square().mean() / y.var()
    assert error.item() < 1e-4


def test_ridge_recovers_a_student_of_two_steps():
    torch.manual_seed(0)
    true = LinearProjection(LAYERS, SOURCE, TARGET)
    with torch.no_grad():
        for parameter in true.parameters():
            parameter.normal_()
    pairs = [(x, true(x).detach(), mask) for x, mask in teacher_batches()]
    learned = LinearProjection(LAYERS, SOURCE, TARGET)
    initialise(learned, moments_of(pairs), "ridge")
    x, y, _ = pairs[0]
    error = (learned(x) - y).square().mean() / y.var()
    assert error.item() < 1e-4


def test_two_step_pca_has_unit_variance_and_no_mean():
    batches = list(teacher_batches())
    projection = LinearProjection(LAYERS, SOURCE, TARGET)
    moments = moments_of([(x, torch.zeros(2, LAYERS, 2, x.shape[3], 3), m) for x, m in batches])
    initialise(projection, moments, "pca")
    for layer in range(LAYERS):
        out = torch.cat([flat(projection(x), mask, layer) for x, mask in batches]).detach()
        torch.testing.assert_close(out.mean(0), torch.zeros_like(out[0]), atol=1e-4, rtol=0)
        assert float(out.var(0, correction=0).mean()) == pytest.approx(1, rel=1e-3)


def test_a_dead_direction_is_not_blown_up():
    batches = [(x.index_fill(4, torch.tensor(1), 0.0), mask) for x, mask in teacher_batches()]
    projection = FullProjection(LAYERS, SOURCE, HeadShape(3, 4))
    moments = moments_of([(x, x, mask) for x, mask in batches], HeadShape(3, 4))
    initialise(projection, moments, "pca")
    noise = torch.zeros(1, LAYERS, 3, 1, 4)
    noise[..., 1] = 1e-3
    moved = projection(noise) - projection(torch.zeros_like(noise))
    assert moved.abs().max().item() < 1e-2


def test_an_empty_pilot_is_refused():
    moments = PilotMoments(1, 2, 2)
    moments.add(torch.zeros(1, 1, 1, 3, 2), torch.zeros(1, 1, 1, 3, 2), torch.zeros(1, 3) > 0)
    with pytest.raises(ConfigError, match="no token of the pilot is covered"):
        initialise(FullProjection(1, HeadShape(1, 2), HeadShape(1, 2)), moments, "ridge")
