"""What a run tells while it trains: a progress bar, and logs for scripts and for people."""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any, Final

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

from kvdistill.text import format_duration

PACKAGE: Final = "kvdistill"


TIME: Final = "%Y-%m-%d %H:%M:%S"


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


class HumanLog(TrainerCallback):  # type: ignore[misc]
    """Appends to ``training.log`` what a person wants to read: losses, evaluations, warnings."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self._handlers: list[logging.Handler] = []
        self._start = (0.0, 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Say that it starts, and take warnings of this package into the file from now on."""
        self._start = (time.monotonic(), state.global_step)
        if state.is_world_process_zero:
            self.write(f"{self.name}: from step {state.global_step} to {state.max_steps}")
            file = logging.FileHandler(self.path, encoding="utf-8", delay=True)
            file.setFormatter(logging.Formatter("%(asctime)s  %(levelname)s: %(message)s", TIME))
            self._listen(file)
            if not logging.getLogger().handlers:  # a handler silences Python's own last resort
                self._listen(logging.StreamHandler(sys.stderr))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """One line per log."""
        if state.is_world_process_zero and logs:
            self.write(f"step {state.global_step}/{state.max_steps}  {self._figures(state, logs)}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Let go of the package's warnings."""
        logger = logging.getLogger(PACKAGE)
        for handler in self._handlers:
            logger.removeHandler(handler)
            handler.close()
        self._handlers = []

    def write(self, text: str) -> None:
        """Append a line with the time."""
        with self.path.open("a", encoding="utf-8") as lines:
            lines.write(f"{time.strftime(TIME)}  {text}\n")

    def _figures(self, state: Any, logs: dict[str, Any]) -> str:
        if "loss" not in logs:
            return "  ".join(f"{_spoken(key)} {_short_value(value)}" for key, value in logs.items())
        seconds = max(time.monotonic() - self._start[0], 1e-9)
        rate = (state.global_step - self._start[1]) / seconds
        left = (state.max_steps - state.global_step) / rate if rate else 0.0
        parts = "  ".join(
            f"{_spoken(key.removeprefix('loss_'))} {_short_value(value)}"
            for key, value in logs.items()
            if key not in ("loss", "epoch")
        )
        return (
            f"loss {_short_value(logs['loss'])}  ({parts})  {rate:.2f} steps/s, "
            f"{format_duration(left)} left"
        )

    def _listen(self, handler: logging.Handler) -> None:
        handler.setLevel(logging.WARNING)
        logging.getLogger(PACKAGE).addHandler(handler)
        self._handlers.append(handler)


def _spoken(key: str) -> str:
    return key.removeprefix("eval_").replace("_", " ")


def _short_value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


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
