"""Stopping a training run at a clean point: after a step, with a checkpoint.

Slurm sends SIGTERM before it takes a node away, and SIGUSR1 or SIGUSR2 where a profile asks for
an earlier warning. The first signal saves after the step in hand and ends training; a second one
kills, as it would have. All ranks must save together, so they agree on it after every step.
"""

from __future__ import annotations

import signal
import threading
from typing import Any, Final

import torch
from transformers import TrainerCallback

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
