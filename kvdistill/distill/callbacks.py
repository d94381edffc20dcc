"""What a run tells people while it trains: a progress bar, and a log that scripts can read."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback


class JsonLines(TrainerCallback):  # type: ignore[misc]
    """Appends every log of the trainer to ``training_log.jsonl``, one object per line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Write one line."""
        if state.is_world_process_zero:
            row = {"step": state.global_step, "epoch": state.epoch, "time": time.time(), **logs}
            with self.path.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(row) + "\n")


class ProgressBar(TrainerCallback):  # type: ignore[misc]
    """One line per run: steps, rate, time left, the loss and the last evaluation."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.status: dict[str, str] = {}
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=Console(stderr=True),
        )
        self.task = self.progress.add_task(f"train {name}", total=None, rate="", status="")
        self._start = (0.0, 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Show the bar."""
        if state.is_world_process_zero:
            self._start = (time.monotonic(), state.global_step)
            self.progress.update(self.task, total=state.max_steps, completed=state.global_step)
            self.progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Move the bar."""
        seconds = time.monotonic() - self._start[0]
        rate = (state.global_step - self._start[1]) / max(seconds, 1e-9)
        self.progress.update(self.task, completed=state.global_step, rate=f"{rate:.2f} steps/s")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Show the newest loss and bits per character."""
        for key, name in (("loss", "loss"), ("eval_bits_per_character", "held-out bits/char")):
            if key in logs:
                self.status[name] = f"{name} {logs[key]:.3f}"
        self.progress.update(self.task, status="  ".join(self.status.values()))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take the bar down."""
        self.progress.stop()
