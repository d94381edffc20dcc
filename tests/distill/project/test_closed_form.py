"""Closed forms: moments, PCA and ridge against the whole data matrix, and exact recoveries."""

import pytest
import torch

from kvdistill.attention.geometry import HeadShape
from kvdistill.distill.project.closed_form import PENALTIES, Moments, PilotMoments, fit_layer
from kvdistill.distill.project.projections import (
    FullProjection,
    LinearProjection,
    StudentToTeacher,
)
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


def tokens(x, mask, layer):
    return x[:, layer].transpose(1, 2).flatten(2)[mask]


def fitted(projection, pairs, init, held_out=0.0):
    """Fit every layer; ``held_out`` is the share of the tokens that the fit does not see."""
    generator = torch.Generator().manual_seed(1)
    shares = []
    for layer in range(LAYERS):
        moments = PilotMoments(projection.source.width, projection.target.width)
        for x, y, mask in pairs:
            rows = tokens(x, mask, layer), tokens(y, mask, layer)
            moments.add(*rows, torch.rand(len(rows[0]), generator=generator) < held_out)
        shares.append(fit_layer(projection, layer, moments, init))
    return shares


def test_merged_moments_equal_those_of_all_tokens():
    pairs = [(x, x[:, :, :2, :, :3] ** 2, mask) for x, mask in teacher_batches()]
    for layer in range(LAYERS):
        moments = Moments(SOURCE.width, TARGET.width)
        for x, y, mask in pairs:
            moments.add(tokens(x, mask, layer), tokens(y, mask, layer))
        x = torch.cat([flat(x, mask, layer) for x, _, mask in pairs])
        y = torch.cat([flat(y, mask, layer) for _, y, mask in pairs])
        (_, mean_y), (xx, xy) = moments.means(), moments.covariances()
        assert moments.count == len(x)
        close = {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(mean_y, y.mean(0), **close)
        centred = x - x.mean(0)
        torch.testing.assert_close(xx, centred.T @ centred / len(x), **close)
        torch.testing.assert_close(xy, centred.T @ (y - y.mean(0)) / len(x), **close)


def test_moments_are_exact_where_means_dwarf_the_spread():
    """Keys of models with a bias on keys: means of a hundred times the standard deviation."""
    torch.manual_seed(0)
    x = torch.randn(4000, 32) @ torch.randn(32, 32) + 1000 * torch.randn(32)
    y = x @ torch.randn(32, 8) / 30
    moments = Moments(32, 8)
    for rows in torch.arange(4000).split(170):
        moments.add(x[rows], y[rows])
    (xx, xy), (x, y) = moments.covariances(), (x.double(), y.double())
    centred = x - x.mean(0)
    for got, want in ((xx, centred.T @ centred), (xy, centred.T @ (y - y.mean(0)))):
        assert float((got - want / 4000).norm() / (want / 4000).norm()) < 1e-6


def noisy_pairs(noise, num=4):
    """Targets that are a linear map of the source plus noise of that standard deviation."""
    torch.manual_seed(0)
    truth = 0.3 * torch.randn(LAYERS, SOURCE.width, TARGET.width)
    for x, mask in teacher_batches(num, seed=5):
        y = torch.einsum("blti,lio->blto", x.transpose(2, 3).flatten(3), truth)
        y = y + noise * torch.randn_like(y)
        yield x, y.unflatten(-1, TARGET).transpose(2, 3), mask


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_the_share_explained_is_that_on_texts_the_fit_has_not_seen(noise):
    projection, pairs = StudentToTeacher(LAYERS, SOURCE, TARGET), list(noisy_pairs(noise, 30))
    shares = fitted(projection, pairs, "ridge", held_out=0.25)
    for layer, share in enumerate(shares):
        y = torch.cat([flat(y, mask, layer) for _, y, mask in pairs])
        expected = 1 - noise**2 * TARGET.width / float(y.var(0).sum())
        assert expected < 0.9 or not noise
        assert share == pytest.approx(expected, abs=0.02)


def test_the_share_explained_equals_that_of_a_separate_fit():
    pairs = list(noisy_pairs(0.5, 2))
    moments = PilotMoments(SOURCE.width, TARGET.width)
    for (x, y, mask), held_out in zip(pairs, (False, True), strict=True):
        rows = tokens(x, mask, 0), tokens(y, mask, 0)
        moments.add(*rows, torch.full((len(rows[0]),), held_out))
    share = fit_layer(StudentToTeacher(LAYERS, SOURCE, TARGET), 0, moments, "ridge")
    scores = []
    a, b = flat(pairs[0][0], pairs[0][2], 0), flat(pairs[0][1], pairs[0][2], 0)
    c, d = flat(pairs[1][0], pairs[1][2], 0), flat(pairs[1][1], pairs[1][2], 0)
    for penalty in PENALTIES:
        centred = a - a.mean(0)
        covariance = centred.T @ centred / len(a)
        loaded = covariance + penalty * covariance.diagonal().mean() * torch.eye(len(covariance))
        weight = torch.linalg.solve(loaded, centred.T @ (b - b.mean(0)) / len(a))
        error = ((c - a.mean(0)) @ weight + b.mean(0) - d).square().sum()
        scores.append(1 - float(error / (d - d.mean(0)).square().sum()))
    assert share == pytest.approx(max(scores), abs=1e-4)


def test_standardised_moments_give_the_map_of_standardised_input():
    pairs = list(noisy_pairs(0.3))
    mean, scale = torch.randn(SOURCE.width), torch.rand(SOURCE.width) + 0.5
    plain, scaled = (StudentToTeacher(LAYERS, SOURCE, TARGET) for _ in range(2))
    for projection in (plain, scaled):
        moments = PilotMoments(SOURCE.width, TARGET.width)
        for x, y, mask in pairs:
            ours = tokens(x, mask, 0)
            if projection is plain:
                ours = (ours - mean) * scale
            moments.add(ours, tokens(y, mask, 0), torch.zeros(len(ours), dtype=torch.bool))
        if projection is scaled:
            moments.standardise(mean, scale)
        fit_layer(projection, 0, moments, "ridge")
    close = {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(scaled.weight_LIO[0], plain.weight_LIO[0], **close)
    torch.testing.assert_close(scaled.bias_LO[0], plain.bias_LO[0], **close)


@pytest.mark.parametrize("target", [TARGET, HeadShape(2, 9)])
def test_pca_target_is_white_and_keeps_the_leading_directions(target):
    torch.manual_seed(0)
    batches = list(teacher_batches())
    projection = FullProjection(LAYERS, SOURCE, target)
    zeros = [torch.zeros(2, LAYERS, 2, x.shape[3], target.head_dim) for x, _ in batches]
    pairs = [(x, y, mask) for (x, mask), y in zip(batches, zeros, strict=True)]
    fitted(projection, pairs, "pca", held_out=0.25)
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
    fitted(projection, pairs, "ridge", held_out=0.25)
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
    shares = fitted(learned, pairs, "ridge", held_out=0.25)
    assert shares == pytest.approx([1, 1], abs=1e-3)
    x, y, _ = pairs[0]
    error = (learned(x) - y).square().mean() / y.var()
    assert error.item() < 1e-4


def test_two_step_pca_has_unit_variance_and_no_mean():
    batches = list(teacher_batches())
    projection = LinearProjection(LAYERS, SOURCE, TARGET)
    pairs = [(x, torch.zeros(2, LAYERS, 2, x.shape[3], 3), mask) for x, mask in batches]
    assert fitted(projection, pairs, "pca") == [None, None]
    for layer in range(LAYERS):
        out = torch.cat([flat(projection(x), mask, layer) for x, mask in batches]).detach()
        torch.testing.assert_close(out.mean(0), torch.zeros_like(out[0]), atol=1e-4, rtol=0)
        assert float(out.var(0, correction=0).mean()) == pytest.approx(1, rel=1e-3)


def test_a_dead_direction_is_not_blown_up():
    batches = [(x.index_fill(4, torch.tensor(1), 0.0), mask) for x, mask in teacher_batches()]
    projection = FullProjection(LAYERS, SOURCE, HeadShape(3, 4))
    fitted(projection, [(x, x, mask) for x, mask in batches], "pca")
    noise = torch.zeros(1, LAYERS, 3, 1, 4)
    noise[..., 1] = 1e-3
    moved = projection(noise) - projection(torch.zeros_like(noise))
    assert moved.abs().max().item() < 1e-2


@pytest.mark.parametrize("init", ["pca", "ridge"])
def test_an_empty_pilot_is_refused(init):
    moments = PilotMoments(2, 2)
    moments.add(torch.zeros(0, 2), torch.zeros(0, 2), torch.zeros(0, dtype=torch.bool))
    with pytest.raises(ConfigError, match="no token of the pilot is covered"):
        fit_layer(FullProjection(1, HeadShape(1, 2), HeadShape(1, 2)), 0, moments, init)
