"""Which evaluation was the best, and whether it is time to stop.

Both are pure functions of the trainer's own history of logs, which checkpoints hold, so a run that
is resumed decides as one that was never stopped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

RISING: Final = frozenset({"exact_match"})
"""Metrics of which more is better; of all others less is."""


@dataclass(frozen=True)
class Best:
    """The best evaluation so far."""

    step: int
    value: float
    since: int
    """Evaluations after it."""


def best_of(history: Iterable[Mapping[str, Any]], metric: str) -> Best | None:
    """The best evaluation in a history of logs, the first one where several are equal.

    Args:
        history: logs with ``step`` and, where they are evaluations, ``eval_<metric>``.
        metric: name without ``eval_``.
    """
    values = {row["step"]: row[f"eval_{metric}"] for row in history if f"eval_{metric}" in row}
    steps = sorted(values)
    usable = [step for step in steps if math.isfinite(values[step])]
    if not usable:
        return None
    sign = 1.0 if metric in RISING else -1.0
    step = max(usable, key=lambda s: (sign * values[s], -s))
    return Best(step, values[step], len(steps) - 1 - steps.index(step))
