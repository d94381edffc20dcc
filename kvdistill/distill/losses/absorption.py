"""Is the student learning, or has something else absorbed the loss?

A projector that is trained on the K/V loss can bring the target to the student instead of the
student to the target: the loss falls to nearly nothing and teaches nothing. The loss itself does
not show it; these figures do:

    target variance      mean over channels of the target's variance over tokens; it falls when a
                         projector shrinks the target to where the student already is
    explained variance   1 − error / target variance; it should grow
    gradient share       ‖∇ KV loss‖ / (‖∇ KV loss‖ + ‖∇ rest‖) on the student's parameters

Only the first is a verdict. On real KV (``docs/projection.md``) it fell to a sixth within 200
steps with a joint projector and stayed within 7 % with every fixed target, while the gradient
share fell to a quarter with some fixed targets too, so it warns only when nearly nothing is left.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvdistill.errors import ConfigError

COLLAPSED = {"target_variance": 0.5, "gradient_share": 0.05}
"""Warn when a figure falls below this share of where it started."""


MEANING = {
    "target_variance": (
        "the projector is absorbing the loss, and a small KV loss then means nothing. Use "
        "projection.mode student_to_teacher or frozen, whose target cannot move"
    ),
    "gradient_share": (
        "the KV loss hardly moves the student any more; raise losses.key and losses.value, or "
        "expect what cross-entropy alone would give"
    ),
}


def target_variance(target_BLHTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Variance of each channel over valid tokens, the mean over channels: a float32 scalar."""
    target = target_BLHTD.detach().float()
    mask = mask_BT[:, None, None, :, None]
    count = mask_BT.sum().clamp_min(1)
    mean = torch.where(mask, target, 0.0).sum(dim=(0, 3), keepdim=True) / count
    square = torch.where(mask, (target - mean).square(), 0.0).sum(dim=(0, 3)) / count
    return square.mean()


def explained_variance(error: Tensor | float, variance: Tensor | float) -> float:
    """``1 − error / variance`` of a mean squared error: 0 is what a constant guess scores."""
    return 1 - float(error) / max(float(variance), 1e-12)


def gradient_norm(loss: Tensor, parameters: Iterable[Tensor]) -> float:
    """Norm of ``loss``'s gradient on ``parameters``; the graph stays usable.

    Costs a backward pass, so this is for logging steps. Parameters that the loss does not reach
    count as zero.
    """
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    if not wanted or not loss.requires_grad:
        return 0.0
    found = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
    squares = [g.float().square().sum() for g in found if g is not None]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def gradient_share(kv_loss: Tensor, rest: Tensor, parameters: Sequence[Tensor]) -> float:
    """Share of the KV loss in what moves the student, in [0, 1]; both losses as weighted."""
    ours, others = gradient_norm(kv_loss, parameters), gradient_norm(rest, parameters)
    return ours / (ours + others) if ours + others > 0 else 0.0


@dataclass
class AbsorptionMonitor:
    """Remembers where figures started, and says so once when one of them has collapsed.

    ``update`` takes figures as they are logged; the first ``settle`` of them make the start, and
    a mean over as many recent ones is compared with it, so that one odd batch warns of nothing.
    """

    settle: int = 5
    _seen: dict[str, list[float]] = field(default_factory=dict)
    _warned: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        if self.settle < 1:
            raise ConfigError(f"absorption monitor: settle must be at least 1, got {self.settle}")

    def update(self, **figures: float) -> list[str]:
        """Add figures by the names of ``COLLAPSED``; returns new warnings.

        Raises:
            ConfigError: a figure that nothing is known about.
        """
        unknown = sorted(figures.keys() - COLLAPSED.keys())
        if unknown:
            raise ConfigError(f"absorption monitor: {unknown}; it knows {sorted(COLLAPSED)}")
        warnings = []
        for name, value in figures.items():
            seen = self._seen.setdefault(name, [])
            seen.append(float(value))
            if len(seen) < 2 * self.settle or name in self._warned:
                continue
            start = sum(seen[: self.settle]) / self.settle
            now = sum(seen[-self.settle :]) / self.settle
            if now < COLLAPSED[name] * start:
                self._warned.add(name)
                warnings.append(_warning(name, start, now))
        return warnings


def _warning(name: str, start: float, now: float) -> str:
    return f"{name.replace('_', ' ')} fell from {start:.3g} to {now:.3g}: {MEANING[name]}"
