"""One whole step of alignment, projection, fusion and loss is one graph: nothing breaks it."""

import pytest
import torch
from torch import Tensor

from kvdistill.attention.eviction import evict
from kvdistill.attention.geometry import HeadShape
from kvdistill.attention.rotary import rotate_layers
from kvdistill.distill.align.band import Band, apply_band
from kvdistill.distill.align.layers import layer_map
from kvdistill.distill.align.resample import align_global
from kvdistill.distill.fuse.router import Router
from kvdistill.distill.fuse.weights import entropy, fixed_weights, fuse, renormalise
from kvdistill.distill.losses.pointwise import cosine_error, kv_error
from kvdistill.distill.losses.weighting import reduce_tokens
from kvdistill.distill.project.projections import LinearProjection, StudentToTeacher

STUDENT, TEACHER = HeadShape(2, 4), HeadShape(3, 6)
MAPPING = layer_map("uniform", 2, range(3))


def place(teacher, band):
    return MAPPING.apply(apply_band(band, teacher), MAPPING.needed)


def inputs():
    torch.manual_seed(0)
    band = align_global(torch.ones(2, 7).bool(), torch.ones(2, 9).bool())
    return band, torch.randn(2, 2, 2, 7, 4, requires_grad=True), torch.randn(2, 2, 3, 9, 6)


def both_ways(step, *args):
    """Value and gradients of ``step`` as it is, and as one compiled graph."""
    leaves = [x for x in args if isinstance(x, Tensor) and x.requires_grad]
    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        value = run(*args)
        results.append((value, torch.autograd.grad(value, leaves) if leaves else ()))
    torch.testing.assert_close(results[0], results[1])


def test_student_to_teacher():
    head = StudentToTeacher(2, STUDENT, TEACHER)

    def step(start, weight, covered, student, teacher):
        target = place(teacher, Band(start, weight, covered))
        guess = head(student)
        return reduce_tokens(kv_error(guess, target) + cosine_error(guess, target), covered)

    band, student, teacher = inputs()
    both_ways(step, band.start, band.weight, band.covered, student, teacher)


def test_project_route_and_fuse():
    projection = LinearProjection(2, TEACHER, STUDENT)
    router = Router("gate", 2, 8, granularity="layer", num_layers=2)

    def step(band, student, teacher, hidden):
        start, weight, covered = band
        placed = place(teacher, Band(start, weight, covered))
        projected = projection(placed)
        alpha = renormalise(router(hidden), torch.stack([covered, covered]))
        fused = fuse(
            alpha, [projected, rotate_layers(projected, torch.arange(7)[None], torch.ones(2))]
        )
        return reduce_tokens(kv_error(student, fused), covered) + entropy(alpha).mean()

    band, student, teacher = inputs()
    hidden = torch.randn(2, 8, requires_grad=True)
    both_ways(step, (band.start, band.weight, band.covered), student, teacher, hidden)


@pytest.mark.parametrize("method", ["uniform", "random", "rkv", "rkv_original"])
def test_eviction(method):
    _, _, teacher = inputs()
    mask = torch.arange(9) < torch.tensor([[9], [4]])

    def step(key, importance, seed):
        return evict(
            method, mask, 2, 3, 4, key_BLHTD=key, importance_BLHT=importance, seed_B=seed
        ).keep(key)

    both_ways(step, teacher, torch.rand(2, 2, 3, 9), torch.arange(2))


def test_half_precision_autocast_gives_float32_losses():
    head, (band, student, teacher) = StudentToTeacher(2, STUDENT, TEACHER), inputs()
    router = Router("mlp", 2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        guess = head(student)
        target = place(teacher, band)
        error = kv_error(guess, target)
        alpha = router(torch.randn(2, 8))
    assert guess.dtype == torch.bfloat16
    assert error.dtype == alpha.dtype == torch.float32
    exact = kv_error(head(student), target)
    torch.testing.assert_close(error, exact, atol=0.05, rtol=0.05)
    reduce_tokens(error, band.covered).backward()
    assert bool(student.grad.isfinite().all())
    assert fixed_weights([1, 1]).dtype == torch.float32
