"""Looks at every step before the optimizer moves: is it finite, and is it like the others?

A loss or gradient that is no number ends the run, while the weights are still those of the step
before; a loss far above the running median is named, and its step may be left out. Both say which
samples were in the batch, since a broken text is the usual reason. What was seen is kept on the
device and read once per optimizer step.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import Final

import torch
from torch import Tensor, nn

from kvdistill.errors import NonFiniteError

log = logging.getLogger(__name__)

REMEMBERED: Final = 64
"""Steps whose losses the median is taken over."""
NEEDED: Final = 8
"""Steps before the median says anything."""
NAMED: Final = 8
"""Samples that a message names; a batch may hold hundreds."""
Sum = Callable[[Tensor], Tensor]


class StepGuard:
    """Checks the losses of each optimizer step; remembers the last ones."""

    def __init__(self, run: str, spike_factor: float) -> None:
        self.run, self.spike_factor = run, spike_factor
        self.losses: deque[float] = deque(maxlen=REMEMBERED)
        self._seen: list[tuple[Sequence[str], tuple[str, ...], Tensor]] = []

    def note(self, sample_ids: Sequence[str], parts: Mapping[str, Tensor]) -> None:
        """Remember one micro-batch: the samples, and ``loss`` and its parts (scalars)."""
        values = torch.stack([value.detach().float() for value in parts.values()])
        self._seen.append((sample_ids, tuple(parts), values))

    def check(self, step: int, grad_norm: float | None, total: Sum) -> bool:
        """Judge the step; forgets its micro-batches.

        Args:
            step: number of the step, from 1.
            grad_norm: of this step, before clipping; None where it means nothing yet (fp16).
            total: sums a scalar over ranks.

        Returns:
            Whether the step's loss is a spike.

        Raises:
            NonFiniteError: names the step, the parts of the loss and the samples.
        """
        seen, self._seen = self._seen, []
        if not seen:
            return False
        rows = torch.stack([values for _, _, values in seen]).tolist()
        for (sample_ids, names, _), row in zip(seen, rows, strict=True):
            bad = [name for name, value in zip(names, row, strict=True) if not math.isfinite(value)]
            if bad:
                self._refuse(step, f"{', '.join(bad)} became NaN or infinite", sample_ids)
        if grad_norm is not None and not math.isfinite(grad_norm):
            everything = [sample_id for sample_ids, _, _ in seen for sample_id in sample_ids]
            self._refuse(step, "the gradient became NaN or infinite", everything)
        loss = float(total(torch.stack([values[0] for _, _, values in seen]).sum()))
        usual = median(self.losses) if len(self.losses) >= NEEDED else 0.0
        if usual > 0 and loss > self.spike_factor * usual:
            worst = max(range(len(seen)), key=lambda i: rows[i][0])
            log.warning(
                "%s: step %d: the loss is %.4g, %.1f times the median of the last %d steps; %s",
                self.run, step, loss, loss / usual, len(self.losses), _named(seen[worst][0]),
            )  # fmt: skip
            return True
        self.losses.append(loss)
        return False

    def state_dict(self) -> list[float]:
        """The losses that the median is taken over."""
        return list(self.losses)

    def load_state_dict(self, losses: Iterable[float]) -> None:
        """Go on with the losses of another process."""
        self.losses.clear()
        self.losses.extend(losses)
        self._seen = []

    def _refuse(self, step: int, what: str, sample_ids: Sequence[str]) -> None:
        raise NonFiniteError(
            f"{self.run}: step {step}: {what}; {_named(sample_ids)}. Look at these texts; if "
            "nothing is wrong with them, lower training.learning_rate or training.max_grad_norm, "
            "or use bfloat16 or float32, and go on from the last checkpoint under another name"
        )


def broken_gradients(model: nn.Module) -> list[str]:
    """Names of parameters whose gradient is not finite."""
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not bool(parameter.grad.isfinite().all())
    ]


def _named(sample_ids: Sequence[str]) -> str:
    if not sample_ids:
        return "this rank had no samples"
    more = f" and {len(sample_ids) - NAMED} more" if len(sample_ids) > NAMED else ""
    return f"samples {', '.join(sample_ids[:NAMED])}{more}"
