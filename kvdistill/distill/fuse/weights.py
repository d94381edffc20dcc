"""Several teachers as one target, ``KV = Σ_i α_i KV_i``, and what regularises the weights.

``alpha`` is ``[N, B, L, T]``; B, L and T may be 1 for "the same everywhere". A token that a teacher
does not cover drops out of its sum, and the other weights are renormalised: a teacher that covers
nothing changes nothing, and one teacher fused is that teacher.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvdistill.errors import GeometryError


def fixed_weights(weights: Sequence[float]) -> Tensor:
    """Given weights, at least one of them positive, scaled to sum to one: ``[N, 1, 1, 1]``."""
    alpha = torch.tensor(weights, dtype=torch.float32)
    return (alpha / alpha.sum()).view(-1, 1, 1, 1)


def renormalise(alpha_NBLT: Tensor, covered_NBT: Tensor) -> Tensor:
    """Redistribute the weight of teachers that do not cover a token among those that do.

    Args:
        alpha_NBLT: weights ≥ 0; B, L, T may be 1.
        covered_NBT: True where teacher ``n`` covers a token.

    Returns:
        ``[N, B, L, T]`` (L may be 1): sums to one over teachers, or is all zero where no teacher
        with any weight covers the token.
    """
    present = torch.where(covered_NBT.unsqueeze(2), alpha_NBLT, 0.0)
    total = present.sum(0, keepdim=True)
    return present / torch.where(total > 0, total, 1.0)


def fuse(alpha_NBLT: Tensor, teachers_BLHTD: Sequence[Tensor]) -> Tensor:
    """Weighted sum of aligned, projected teachers.

    Args:
        alpha_NBLT: weights from ``renormalise``; B, L, T may be 1.
        teachers_BLHTD: N tensors of one shape ``[B, L, H, T, D]``, finite.

    Returns:
        ``[B, L, H, T, D]``; zeros where no teacher covers a token.

    Raises:
        GeometryError: the teachers' shapes differ (they could broadcast silently), or not N.
    """
    shapes = [tuple(teacher.shape) for teacher in teachers_BLHTD]
    if len(set(shapes)) != 1 or len(shapes) != len(alpha_NBLT):
        raise GeometryError(
            f"fusion: expected {len(alpha_NBLT)} teachers of one shape [B, L, H, T, D], "
            f"got {shapes}; project them first"
        )
    first, *others = teachers_BLHTD
    alpha_NBLHTD = alpha_NBLT[:, :, :, None, :, None].to(first.dtype)
    fused = first * alpha_NBLHTD[0]
    for alpha, teacher in zip(alpha_NBLHTD[1:], others, strict=True):
        fused = torch.addcmul(fused, teacher, alpha)
    return fused


def mean_weights(alpha_NBLT: Tensor) -> Tensor:
    """Mean weight of each teacher over the tokens that any covers: ``[N]``, detached."""
    alpha = alpha_NBLT.detach()
    covered = alpha.sum(0) > 0
    return alpha.sum(dim=(1, 2, 3)) / covered.sum().clamp_min(1)


def entropy(alpha_NBLT: Tensor) -> Tensor:
    """``H(α) = −Σ_i α_i log α_i`` in nats, the mean over layers: ``[B, T]`` float32.

    Added to the loss times ``+γ`` it makes routers ``specialized``, times ``−γ`` ``diverse``.
    B and T may be 1, as in ``alpha``. A weight of zero adds nothing and has no gradient.
    """
    alpha = alpha_NBLT.float()
    present = alpha > 0
    log = torch.where(present, alpha, 1.0).log()
    return -(alpha * log).sum(0).mean(1)


def drop_teachers(covered_NBT: Tensor, chance: float) -> Tensor:
    """Teacher dropout: hide each teacher from each sample with ``chance``, ``[N, B, T]`` bool.

    A token that would lose all its teachers keeps all of them, so the number of covered tokens,
    by which losses are divided and which is counted before the step, does not change.
    """
    draw = torch.rand(covered_NBT.shape[:2], device=covered_NBT.device)
    kept = covered_NBT & (draw >= chance).unsqueeze(2)
    return torch.where(kept.any(0), kept, covered_NBT)
