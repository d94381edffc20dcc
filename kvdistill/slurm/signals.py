"""A request to stop, as a flag that work checks between two steps.

SIGTERM, SIGINT and SIGUSR1 are urgent: Slurm kills what still runs ``KillWait`` (30 s) later.
SIGUSR2 is the early warning before a time limit or a preemption (``--signal=USR2@120``): the unit
in progress may use half of the warning time, and none is started.
A flag rather than an exception, which out of a signal handler can strike inside any ``finally``.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final

WARNING: Final = signal.SIGUSR2

STOPPING: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, WARNING)


class StopFlag:
    """Set by a signal: ``requested`` at once, ``urgent`` when the unit must be abandoned.

    ``reason`` is the signal's name.
    """

    def __init__(self, warning_seconds: float) -> None:
        self._patience = warning_seconds / 2
        self._urgent_at: float | None = None
        self.reason: str | None = None

    @property
    def requested(self) -> bool:
        """Whether to start nothing new."""
        return self._urgent_at is not None

    def urgent(self) -> bool:
        """Whether to abandon the unit in progress; workloads get this as ``should_stop``."""
        return self._urgent_at is not None and time.monotonic() >= self._urgent_at

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """The signal handler; an earlier deadline is never moved back."""
        deadline = time.monotonic() + (self._patience if number == WARNING else 0.0)
        if self._urgent_at is None or deadline < self._urgent_at:
            self._urgent_at = deadline
            self.reason = signal.Signals(number).name


Handler = Callable[[int, FrameType | None], Any]


@contextmanager
def handling(handler: Handler = signal.default_int_handler) -> Iterator[None]:
    """Handle signals that ask to stop, by KeyboardInterrupt unless another handler is given.

    In the main thread; Python allows no other.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in STOPPING}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextmanager
def stop_flag(warning_seconds: float) -> Iterator[StopFlag]:
    """A flag that this process's signals set; the earlier handlers are restored afterwards."""
    flag = StopFlag(warning_seconds)
    with handling(flag.handle):
        yield flag
