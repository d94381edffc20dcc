"""Being asked to stop, as a flag that work looks at between two steps.

SIGTERM and SIGINT mean now: Slurm kills what is still there ``KillWait`` (30 s) later.
SIGUSR2 is the early warning before a time limit or a preemption (``--signal=USR2@120``): the
unit in hand may be finished if half of the warning time is enough, but none is begun.
A flag, not an exception: an exception out of a signal handler can strike inside any ``finally``.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

URGENT: Final = (signal.SIGTERM, signal.SIGINT)


WARNING: Final = signal.SIGUSR2


class StopFlag:
    """Set by a signal; ``requested`` at once, ``urgent`` when the work in hand must be left."""

    def __init__(self, warning_seconds: float) -> None:
        self._patience = warning_seconds / 2
        self._urgent_at: float | None = None
        self.reason: str | None = None

    @property
    def requested(self) -> bool:
        """Begin nothing new."""
        return self._urgent_at is not None

    def urgent(self) -> bool:
        """Leave what is in hand. Workloads get this as ``should_stop``."""
        return self._urgent_at is not None and time.monotonic() >= self._urgent_at

    def set(self, reason: str, patience: float = 0.0) -> None:
        """Ask to stop; an earlier deadline is never moved back."""
        deadline = time.monotonic() + patience
        if self._urgent_at is None or deadline < self._urgent_at:
            self._urgent_at = deadline
            self.reason = reason

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """The signal handler."""
        patience = self._patience if number == WARNING else 0.0
        self.set(signal.Signals(number).name, patience)


@contextmanager
def stop_flag(warning_seconds: float) -> Iterator[StopFlag]:
    """A flag that this process's signals set, replacing any handlers for the time being."""
    flag = StopFlag(warning_seconds)
    before = {number: signal.signal(number, flag.handle) for number in (*URGENT, WARNING)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
