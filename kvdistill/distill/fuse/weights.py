"""Several teachers as one target, ``KV = Σ_i α_i KV_i``, and what regularises the weights.

``alpha`` is ``[N, B, L, T]``; B, L and T may be 1 for "the same everywhere". A teacher *serves* a
token of a layer if it covers the token and teaches the layer. Elsewhere it drops out of the sum,
and the other weights are renormalised: a teacher that serves nothing changes nothing, and one
teacher fused is that teacher. What no teacher serves has no weight, no target and no loss.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from kvdistill.errors import GeometryError

NO_WEIGHT: Final = 1e-20
"""Total weight below which the serving teachers count equally; its inverse is still finite."""


def fixed_weights(weights: Sequence[float]) -> Tensor:
    """Given weights, at least one of them positive, scaled to sum to one: ``[N, 1, 1, 1]``."""
    alpha = torch.tensor(weights, dtype=torch.float32)
    return (alpha / alpha.sum()).view(-1, 1, 1, 1)


@dataclass(frozen=True, eq=False)
class ServedWeights:
    """What the fusion weights of a batch follow from."""

    raw_NBLT: Tensor | Callable[[Tensor], Tensor]
    """Weights ≥ 0 by the configured method, wherever a teacher serves; B, L, T may be 1. Or how
    they follow from where teachers serve."""
    serves_NBLT: Tensor
    """Where a teacher serves, bool."""
    kept_NB: Tensor | None = None
    """False where teacher dropout hides a teacher from a sample."""

    def alpha(self, among: Collection[int] | None = None, *, dropout: bool = True) -> Tensor:
        """Weights ``[N, B, L, T]``, with or without teacher dropout.

        They sum to one over the teachers (those with an index in ``among``, if given) where one of
        them serves, and are zero elsewhere.
        """
        serves = self.serves_NBLT
        if among is not None:
            layers = [x if i in among else torch.zeros_like(x) for i, x in enumerate(serves)]
            serves = torch.stack(layers)
        if dropout and self.kept_NB is not None:
            serves = drop_teachers(serves, self.kept_NB)
        raw = self.raw_NBLT(serves) if callable(self.raw_NBLT) else self.raw_NBLT
        return renormalise(raw, serves)


def renormalise(alpha_NBLT: Tensor, serves_NBLT: Tensor) -> Tensor:
    """Redistribute the weight of teachers that do not serve among those that do.

    Args:
        alpha_NBLT: weights ≥ 0; B, L, T may be 1.
        serves_NBLT: True where teacher ``n`` serves a token of a layer.

    Returns:
        ``[N, B, L, T]``: sums to one over teachers, or is all zero where no teacher
        serves. Teachers that serve count equally where a router gave all of them no weight.
    """
    present = torch.where(serves_NBLT, alpha_NBLT, 0.0)
    weightless = present.sum(0, keepdim=True) < NO_WEIGHT
    present = torch.where(weightless, serves_NBLT.to(present.dtype), present)
    total = present.sum(0, keepdim=True)
    return present / torch.where(total > 0, total, 1.0)


def fuse(alpha_NBLT: Tensor, teachers_BLHTD: Sequence[Tensor]) -> Tensor:
    """Weighted sum of aligned, projected teachers.

    Args:
        alpha_NBLT: weights from ``renormalise``; B, L, T may be 1.
        teachers_BLHTD: N tensors of one shape ``[B, L, H, T, D]``, finite.

    Returns:
        ``[B, L, H, T, D]``; zeros, which are no target, where no teacher serves.

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
    """Mean weight of each teacher over what any serves: ``[N]``, detached."""
    alpha = alpha_NBLT.detach()
    served = alpha.sum(0) > 0
    return alpha.sum(dim=(1, 2, 3)) / served.sum().clamp_min(1)


def entropy(alpha_NBLT: Tensor) -> Tensor:
    """``H(α) = −Σ_i α_i log α_i`` in nats: ``[B, L, T]`` float32.

    Added to the loss times ``+γ`` it makes routers ``specialized``, times ``−γ`` ``diverse``.
    B, L and T may be 1, as in ``alpha``. A weight of zero adds nothing and has no gradient.
    """
    alpha = alpha_NBLT.float()
    present = alpha > 0
    log = torch.where(present, alpha, 1.0).log()
    return -(alpha * log).sum(0)


def contested_entropy(weights: ServedWeights, wanted: Literal["specialized", "diverse"]) -> Tensor:
    """Sum of the entropy where two teachers serve, before dropout takes the choice away.

    Negative for ``diverse``.
    """
    contested_BLT = weights.serves_NBLT.sum(0) > 1
    total = torch.where(contested_BLT, entropy(weights.alpha(dropout=False)), 0.0).sum()
    return total if wanted == "specialized" else -total


def drop_teachers(serves_NBLT: Tensor, kept_NB: Tensor) -> Tensor:
    """Teacher dropout: hide a teacher from the samples where it is not kept, ``[N, B, L, T]`` bool.

    A token of a layer that would lose all its teachers keeps all of them. What is served, by whose
    number losses are divided and which is counted before the step, therefore does not change.
    """
    kept = serves_NBLT & kept_NB[:, :, None, None]
    return torch.where(kept.any(0), kept, serves_NBLT)
