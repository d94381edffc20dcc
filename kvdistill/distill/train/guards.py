"""Guards of a training run: bad steps, signals, and the best evaluation.

``StepGuard`` looks at every step before the optimizer moves. A non-finite loss or gradient ends
the run while the weights are still those of the step before; a loss far above the running median
is a spike, whose step may be skipped. Both are reported with the samples of the batch, since a
malformed text is the usual cause. ``StopOnSignal`` ends a run with a checkpoint. ``best_of`` is a
pure function of the Trainer's log history, so a resumed run decides as an uninterrupted one does.
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
from torch import Tensor
from transformers import TrainerCallback

from kvdistill.errors import NonFiniteError

log = logging.getLogger(__name__)

WINDOW: Final = 64
"""Steps of the running median."""

MIN_STEPS: Final = 8
"""Steps before the median is compared with."""

MAX_NAMED: Final = 8
"""Samples listed in a message; a batch may hold hundreds."""

SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

RISING: Final = frozenset({"exact_match"})
"""Metrics of which more is better; of all others less is."""


@dataclass(frozen=True)
class StepReport:
    """What one step did, the same on every rank."""

    parts: Mapping[str, float]
    """``loss`` and its parts, summed over micro-batches and ranks."""
    grad_norm: float | None
    spike: bool
    stop: bool
    """Whether any rank asked to stop."""


class StepGuard:
    """Checks the losses of each optimizer step against finiteness and the running median.

    Losses stay on the device until the step's check, which sums them over ranks and reads them and
    the gradient norm at once. Ranks judge the same sums: if one raised alone, the others would wait
    for it for ever.
    """

    def __init__(self, run: str, spike_factor: float) -> None:
        self.run, self.spike_factor = run, spike_factor
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self._recorded: list[tuple[Sequence[str], tuple[str, ...], Tensor]] = []

    def record(self, sample_ids: Sequence[str], parts: Mapping[str, Tensor]) -> None:
        """Record one micro-batch: its samples, and ``loss`` with its parts (scalars)."""
        values = torch.stack([value.detach().float() for value in parts.values()])
        self._recorded.append((sample_ids, tuple(parts), values))

    def check(
        self,
        step: int,
        grad_norm: Tensor | None,
        sum_over_ranks: Callable[[Tensor], Tensor],
        *,
        stop: bool = False,
        may_overflow: bool = False,
    ) -> StepReport:
        """Judge the recorded micro-batches, one step, and clear them.

        Args:
            step: number of the step, from 1.
            grad_norm: before clipping, a scalar that is the same on all ranks.
            sum_over_ranks: sums a vector over ranks.
            stop: whether this rank asks all to stop after the step.
            may_overflow: the norm may be infinite (fp16).

        Raises:
            NonFiniteError: on every rank; names the step, the parts of the loss and, on the rank
                that has them, the samples.
        """
        recorded, self._recorded = self._recorded, []
        if not recorded:
            return StepReport({}, None, spike=False, stop=False)
        names = recorded[0][1]
        sums = torch.stack([values for _, _, values in recorded]).sum(0)
        shared = sum_over_ranks(torch.cat([sums, sums.new_full((1,), float(stop))]))
        norm = shared.new_zeros(1) if grad_norm is None else grad_norm.reshape(1)
        *values, stops, read_norm = torch.cat([shared, norm.to(shared)]).tolist()
        if bad := [name for name, x in zip(names, values, strict=True) if not math.isfinite(x)]:
            broken = [ids for ids, _, row in recorded if not row.isfinite().all()]
            self._refuse(step, f"{', '.join(bad)} became NaN or infinite", broken[:1])
        if not may_overflow and not math.isfinite(read_norm):
            self._refuse(step, "the gradient became NaN or infinite", [r[0] for r in recorded])
        return StepReport(
            dict(zip(names, values, strict=True)),
            None if grad_norm is None else read_norm,
            self._is_spike(step, values[0], recorded),
            stops > 0,
        )

    def _is_spike(
        self,
        step: int,
        loss: float,
        recorded: Sequence[tuple[Sequence[str], tuple[str, ...], Tensor]],
    ) -> bool:
        usual = median(self.losses) if len(self.losses) >= MIN_STEPS else 0.0
        if usual > 0 and loss > self.spike_factor * usual:
            worst = max(recorded, key=lambda record: float(record[2][0]))
            log.warning(
                "%s: step %d: the loss is %.4g, %.1f times the median of the last %d steps; %s",
                self.run, step, loss, loss / usual, len(self.losses), _named(worst[0]),
            )  # fmt: skip
            return True
        self.losses.append(loss)
        return False

    def state_dict(self) -> list[float]:
        """Losses of the running median, oldest first."""
        return list(self.losses)

    def load_state_dict(self, losses: Iterable[float]) -> None:
        """Continue from ``state_dict``."""
        self.losses = deque(losses, maxlen=WINDOW)

    def _refuse(self, step: int, what: str, batches: Sequence[Sequence[str]]) -> None:
        sample_ids = [sample_id for batch in batches for sample_id in batch]
        raise NonFiniteError(
            f"{self.run}: step {step}: {what}; {_named(sample_ids)}. Check these texts; if they "
            "are sound, lower training.learning_rate or training.max_grad_norm, or use bfloat16 "
            "or float32, and continue from the last checkpoint under another name"
        )


def _named(sample_ids: Sequence[str]) -> str:
    if not sample_ids:
        return "the samples are named by another rank"
    more = f" and {len(sample_ids) - MAX_NAMED} more" if len(sample_ids) > MAX_NAMED else ""
    return f"samples {', '.join(sample_ids[:MAX_NAMED])}{more}"


class StopOnSignal(TrainerCallback):  # type: ignore[misc]
    """Saves and stops after the step during which a signal arrives; ``name`` is the signal's.

    Slurm sends SIGTERM before it takes a node away, and SIGUSR1 or SIGUSR2 where a profile
    configures an earlier warning. A second signal has its usual effect. A checkpoint needs all
    ranks, so they agree: with the ``StepGuard``'s check, after which ``agreed`` is set on all.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.agreed = False
        self._previous: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Install the handlers, where this is the main thread (Python allows no other)."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop with a checkpoint if any rank received a signal."""
        if self.agreed or (self.name is not None and args.world_size == 1):
            self.name = self.name or "a signal to another rank"
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Restore the previous handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _handle(self, number: int, frame: Any) -> None:
        self.name = signal.Signals(number).name
        signal.signal(number, self._previous.get(number) or signal.SIG_DFL)


@dataclass(frozen=True)
class Best:
    """The best evaluation so far."""

    step: int
    value: float
    since: int
    """Number of later evaluations."""


def best_of(history: Iterable[Mapping[str, Any]], metric: str) -> Best | None:
    """The best evaluation in a log history, the first of several equal ones; None if there is none.

    Every row has a ``step``, evaluations also ``eval_<metric>``.
    """
    values = {row["step"]: row[f"eval_{metric}"] for row in history if f"eval_{metric}" in row}
    steps = sorted(values)
    finite = [step for step in steps if math.isfinite(values[step])]
    if not finite:
        return None
    sign = 1.0 if metric in RISING else -1.0
    step = max(finite, key=lambda s: (sign * values[s], -s))
    return Best(step, values[step], len(steps) - 1 - steps.index(step))
