"""What keeps a router from deciding too early, or from not deciding at all."""

from __future__ import annotations

import torch
from torch import Tensor


def entropy(alpha_NBLT: Tensor) -> Tensor:
    """``H(α) = −Σ_i α_i log α_i`` in nats, the mean over layers: ``[B, T]`` float32.

    Added to the loss times ``+γ`` it makes routers ``specialized``, times ``−γ`` ``diverse``.
    B and T may be 1, as in ``alpha``. A weight of zero adds nothing and has no gradient.
    """
    alpha = alpha_NBLT.float()
    present = alpha > 0
    log = torch.where(present, alpha, 1.0).log()
    return -(alpha * log).sum(0).mean(1)


def drop_teachers(
    covered_NBT: Tensor, chance: float, generator: torch.Generator | None = None
) -> Tensor:
    """Silence teachers at random, per sample, so that none becomes indispensable: ``[N, B, T]``.

    A token that would lose everyone keeps everyone, so that as many tokens are covered as before:
    losses are divided by a number that is counted ahead of the step.
    """
    shape = covered_NBT.shape[:2]
    draw = torch.rand(shape, generator=generator, device=covered_NBT.device)
    kept = covered_NBT & (draw >= chance).unsqueeze(2)
    return torch.where(kept.any(0), kept, covered_NBT)
