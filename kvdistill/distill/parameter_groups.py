"""Parameters by weight decay and learning rate: matrices decay, projectors have their own rate."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from kvdistill.distill.weights import STUDENT_PREFIX


def parameter_groups(
    model: nn.Module,
    *,
    decaying: Collection[str],
    weight_decay: float,
    student_rate: float,
    other_rate: float,
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer, of parameters that learn.

    Args:
        model: a distiller, or a wrapper that keeps its names.
        decaying: names of parameters that decay.
        weight_decay: of those.
        student_rate: learning rate of the student.
        other_rate: learning rate of projectors, routers and gates.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = student_rate if name.startswith(STUDENT_PREFIX) else other_rate
            key = (weight_decay if name in decaying else 0.0, rate)
            groups.setdefault(key, []).append(parameter)
    return [{"params": p, "weight_decay": d, "lr": lr} for (d, lr), p in groups.items()]
