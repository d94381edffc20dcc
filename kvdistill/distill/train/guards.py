"""Looks at every step before the optimizer moves: is it finite, and is it like the others?

A loss or gradient that is no number ends the run, while the weights are still those of the step
before; a loss far above the running median is named, and its step may be left out. Both say which
samples were in the batch, since a broken text is the usual reason. What was seen is kept on the
device and read once per optimizer step.
"""

from __future__ import annotations

import logging
import math
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

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


SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class StopOnSignal(TrainerCallback):  # type: ignore[misc]
    """Saves and stops after the step during which a signal came; ``name`` says which one."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._before: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Listen, where this is the main thread (Python allows it nowhere else)."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._note)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End the run here if any rank was told to."""
        if _any_rank(self.name is not None, args.device):
            self.name = self.name or "a signal to another rank"
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Put the handlers back that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: Any) -> None:
        self.name = signal.Signals(number).name
        signal.signal(number, self._before.get(number) or signal.SIG_DFL)


def _any_rank(told: bool, device: torch.device) -> bool:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return told
    flag = torch.tensor(float(told), device=device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return bool(flag)


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


# MERGED-DOC distill.interruption
# Stopping a training run at a clean point: after a step, with a checkpoint.
#
# Slurm sends SIGTERM before it takes a node away, and SIGUSR1 or SIGUSR2 where a profile asks for
# an earlier warning. The first signal saves after the step in hand and ends training; a second one
# kills, as it would have. All ranks must save together, so they agree on it after every step.


# MERGED-DOC distill.best
# Which evaluation was the best, and whether it is time to stop.
#
# Both are pure functions of the trainer's own history of logs, which checkpoints hold, so a run
# that
# is resumed decides as one that was never stopped.
