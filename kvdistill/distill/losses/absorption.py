"""Detects that something other than the student absorbs the K/V loss.

A projector trained on the K/V loss can move the target to the student: the loss falls to nearly
nothing and teaches nothing. The loss itself does not show it; these figures do:

    target variance      falls when a projector shrinks the target to where the student already is
    explained variance   1 − error / target variance; it should grow
    gradient share       ‖∇ KV loss‖ / (‖∇ KV loss‖ + ‖∇ rest‖) on the student's parameters

Only the first is conclusive (measurements: ``docs/projection.md``): the gradient share falls to a
quarter with some fixed targets too, so a warning about it needs it to vanish almost completely.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import torch
from torch import Tensor

COLLAPSED: Final = {
    "target_variance": (
        0.5,
        "the projector is absorbing the loss, so a small KV loss means nothing; use "
        "projection.mode student_to_teacher or frozen, whose target cannot move",
    ),
    "gradient_share": (
        0.05,
        "the KV loss hardly moves the student any more; raise losses.key and losses.value, or "
        "expect the result of cross-entropy alone",
    ),
}
"""By figure, the share of its start below which it is a warning, and what that means."""


@torch.no_grad()
def target_variance(compared: Iterable[tuple[Tensor | Iterable[Tensor], Tensor]]) -> Tensor:
    """Weighted variance of each channel over tokens, the mean over channels: a float32 scalar.

    ``compared`` are targets ``[B, L, H, T, D]``, whole or layer by layer, with the weights
    ``[B, L, T]`` of their errors. A layer counts by its weight, as in the loss, so that
    ``1 − error / variance`` is meaningful.
    """
    total, total_weight = [], []
    for target, weight_BLT in compared:
        layers = target.unbind(1) if isinstance(target, Tensor) else target
        square, counts = [], []
        for target_BHTD, weight_BT in zip(layers, weight_BLT.unbind(1), strict=True):
            weight = weight_BT.float()[:, None, :, None]
            masked = torch.where(weight > 0, target_BHTD.float(), 0.0)
            count = weight.sum(dim=(0, 2), keepdim=True)
            mean = (weight * masked).sum(dim=(0, 2), keepdim=True)
            mean /= torch.where(count > 0, count, 1.0)
            square.append((weight * (masked - mean).square()).mean(dim=(1, 3)))
            counts.append(count.flatten())
        total.append(torch.stack(square, dim=1).sum())
        total_weight.append(torch.stack(counts, dim=1).sum())
    return torch.stack(total).sum() / torch.stack(total_weight).sum().clamp_min(1e-12)


def explained_variance(error: Tensor, variance: Tensor) -> Tensor:
    """``1 − error / variance`` of a mean squared error; a constant prediction scores 0."""
    return 1 - error / variance.clamp_min(1e-12)


def gradient_norm(loss: Tensor, parameters: Iterable[Tensor]) -> float:
    """Norm of ``loss``'s gradient on ``parameters``; the graph is retained.

    Costs a backward pass, so it is for logging steps. Parameters that the loss does not reach
    count as zero.
    """
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    if not wanted or not loss.requires_grad:
        return 0.0
    found = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
    squares = [g.float().square().sum() for g in found if g is not None]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def gradient_share(kv_loss: Tensor, rest: Tensor, parameters: Sequence[Tensor]) -> float:
    """Share of the KV loss in the student's gradient, in [0, 1]; both losses as weighted."""
    ours, others = gradient_norm(kv_loss, parameters), gradient_norm(rest, parameters)
    return ours / (ours + others) if ours + others > 0 else 0.0


class AbsorptionMonitor:
    """Compares figures with where they started and warns once when one of them has collapsed.

    ``update`` takes figures as they are logged. The mean of the first ``settle`` is the start, and
    the mean of the last ``settle`` is compared with it, so that one odd batch causes no warning.
    """

    def __init__(self, settle: int = 5) -> None:
        self.settle = settle
        self._seen: dict[str, list[float]] = {}
        self._warned: set[str] = set()

    def update(self, **figures: float) -> list[str]:
        """Add figures by the names of ``COLLAPSED``; returns new warnings."""
        warnings = []
        for name, value in figures.items():
            seen = self._seen.setdefault(name, [])
            seen.append(float(value))
            if len(seen) < 2 * self.settle or name in self._warned:
                continue
            start = sum(seen[: self.settle]) / self.settle
            now = sum(seen[-self.settle :]) / self.settle
            share, meaning = COLLAPSED[name]
            if now < share * start:
                self._warned.add(name)
                what = f"{name.replace('_', ' ')} fell from {start:.3g} to {now:.3g}"
                warnings.append(f"{what}: {meaning}")
        return warnings
