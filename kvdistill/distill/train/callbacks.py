"""Progress of a run: a progress bar, and logs for scripts and for people."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback
from transformers.integrations import (
    MLflowCallback,
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
)

from kvdistill.store.commit import commit_folder, replace_file
from kvdistill.store.format import COMMIT
from kvdistill.text import format_duration, shorten

TIME_FORMAT: Final = "%Y-%m-%d %H:%M:%S"
package_log = logging.getLogger("kvdistill")


class JsonLines(TrainerCallback):  # type: ignore[misc]
    """Appends every log of the Trainer to ``training_log.jsonl``, one object per line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Make the log that of the checkpoint: without later steps, and without damage."""
        if state.is_world_process_zero:
            head = dict.fromkeys(("step", "epoch", "time"))  # in this order
            rows = (json.dumps(head | row) + "\n" for row in state.log_history)
            replace_file(self.path, "".join(rows))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Append one line."""
        if state.is_world_process_zero:
            row = {"step": state.global_step, "epoch": state.epoch, "time": time.time(), **logs}
            state.log_history[-1]["time"] = row["time"]  # checkpoints hold this history
            with self.path.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(row) + "\n")


class Commits(TrainerCallback):  # type: ignore[misc]
    """Commits every checkpoint once all ranks have written it, then removes the oldest ones."""

    def __init__(self, run: Path, num_kept: int) -> None:
        self.run, self.num_kept = run, num_kept

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Commit the checkpoint of this step."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()
        if not state.is_world_process_zero:
            return
        commit_folder(self.run / f"checkpoint-{state.global_step}")
        named = (p for p in self.run.glob("checkpoint-*") if p.name.split("-", 1)[1].isdecimal())
        ordered = sorted(named, key=lambda path: int(path.name.split("-")[1]))
        for path in ordered[: -self.num_kept]:
            (path / COMMIT).unlink(missing_ok=True)  # first: half a checkpoint is none
            shutil.rmtree(path, ignore_errors=True)


class _StepRate:
    """Steps per second since training began or was resumed."""

    def __init__(self, step: int) -> None:
        self._start = (time.monotonic(), step)

    def at(self, step: int) -> float:
        return (step - self._start[1]) / max(time.monotonic() - self._start[0], 1e-9)


class HumanLog(TrainerCallback):  # type: ignore[misc]
    """Appends losses, evaluations and the package's warnings to ``training.log``."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self._handlers: list[logging.Handler] = []
        self._rate = _StepRate(0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Log the start, and send warnings of this package to the file from now on."""
        self._rate = _StepRate(state.global_step)
        if state.is_world_process_zero:
            self.write(f"{self.name}: from step {state.global_step} to {state.max_steps}")
            file = logging.FileHandler(self.path, encoding="utf-8", delay=True)
            line = "%(asctime)s  %(levelname)s: %(message)s"
            file.setFormatter(logging.Formatter(line, TIME_FORMAT))
            self._handlers = [file]
            if not logging.getLogger().handlers:  # a handler silences Python's last resort
                self._handlers.append(logging.StreamHandler(sys.stderr))
            for handler in self._handlers:
                handler.setLevel(logging.WARNING)
                package_log.addHandler(handler)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Append one line."""
        if state.is_world_process_zero and logs:
            self.write(f"step {state.global_step}/{state.max_steps}  {self._figures(state, logs)}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Detach from the package's warnings."""
        for handler in self._handlers:
            package_log.removeHandler(handler)
            handler.close()
        self._handlers = []

    def write(self, text: str) -> None:
        """Append a line with the time."""
        with self.path.open("a", encoding="utf-8") as lines:
            lines.write(f"{time.strftime(TIME_FORMAT)}  {text}\n")

    def _figures(self, state: Any, logs: dict[str, Any]) -> str:
        loss = logs.get("loss")
        shown = logs if loss is None else {k: logs[k] for k in logs if k not in ("loss", "epoch")}
        parts = "  ".join(
            f"{key.removeprefix('loss_').removeprefix('eval_').replace('_', ' ')} {_short(value)}"
            for key, value in shown.items()
        )
        if loss is None:
            return parts
        rate = self._rate.at(state.global_step)
        left = format_duration((state.max_steps - state.global_step) / rate if rate else 0.0)
        return f"loss {_short(loss)}  ({parts})  {rate:.2f} steps/s, {left} left"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class ProgressBar(TrainerCallback):  # type: ignore[misc]
    """One line per run: steps, rate, time left, the loss and the last evaluation."""

    def __init__(self, name: str) -> None:
        self.status: dict[str, str] = {}
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=Console(stderr=True),
        )
        self.task = self.progress.add_task(f"train {name}", total=None, rate="", status="")
        self._rate = _StepRate(0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Show the bar."""
        if state.is_world_process_zero:
            self._rate = _StepRate(state.global_step)
            self.progress.update(self.task, total=state.max_steps, completed=state.global_step)
            self.progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Advance the bar."""
        rate = f"{self._rate.at(state.global_step):.2f} steps/s"
        self.progress.update(self.task, completed=state.global_step, rate=rate)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Show the newest loss and bits per character."""
        for key, name in (("loss", "loss"), ("eval_bits_per_character", "held-out bits/char")):
            if key in logs:
                self.status[name] = f"{name} {logs[key]:.3f}"
        self.progress.update(self.task, status="  ".join(self.status.values()))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Remove the bar."""
        self.progress.stop()


class _Tracker(TrainerCallback):  # type: ignore[misc]
    """A tracker's callback, of one run: what comes next in a subclass's bases.

    A failure of the tracker is one warning, after which the run goes on without it. Its run ends
    at ``close``: the last evaluation comes after the end of training.
    """

    def __init__(self, run: Path) -> None:
        super().__init__()
        self._has_failed = False
        self._end: Callable[[], None] = lambda: None

    def _attempt(self, write: Callable[[], None]) -> None:
        try:
            if not self._has_failed:
                write()
        except Exception as error:  # whatever the tracker, its server or its disk raises
            self._has_failed = True
            name = next(name for name, kind in TRACKERS.items() if isinstance(self, kind))
            reason = shorten(f"{type(error).__name__}: {error}", 300)
            package_log.warning("report_to: %s gets no more curves (%s)", name, reason)

    def on_train_begin(self, *args: Any, **rest: Any) -> None:
        """Open the tracker's run."""
        self._attempt(lambda: super(_Tracker, self).on_train_begin(*args, **rest))

    def on_log(self, *args: Any, **rest: Any) -> None:
        """Send the figures."""
        self._attempt(lambda: super(_Tracker, self).on_log(*args, **rest))

    def on_train_end(self, *args: Any, **rest: Any) -> None:
        """Put off the end."""
        self._end = lambda: super(_Tracker, self).on_train_end(*args, **rest)

    def close(self) -> None:
        """End the tracker's run."""
        self._attempt(self._end)


class RunTensorBoard(_Tracker, TensorBoardCallback):  # type: ignore[misc]
    """Writes to the run's own folder: a process may train many runs, one after another.

    The folder is ``tensorboard`` of the run's, or the run's name in ``TENSORBOARD_LOGGING_DIR``.
    """

    def __init__(self, run: Path) -> None:
        super().__init__(run)
        shared = os.environ.get("TENSORBOARD_LOGGING_DIR")
        folder = run / "tensorboard" if shared is None else Path(shared).expanduser() / run.name
        self.logging_dir = str(folder)
        self._hook = threading.excepthook
        threading.excepthook = self._of_thread

    def _of_thread(self, failed: Any) -> None:
        """Drop the writer thread's traceback: the next call to the writer raises the same error."""
        of_writer = type(failed.thread).__module__.startswith("tensorboard.")
        if not (of_writer and isinstance(failed.exc_value, OSError)):
            self._hook(failed)

    def close(self) -> None:
        """Close the file."""
        super().close()
        threading.excepthook = self._hook


class RunWandb(_Tracker, WandbCallback):  # type: ignore[misc]
    """Gives every training run a Weights & Biases run of its own, unless the user opened one."""

    def setup(self, args: Any, state: Any, model: Any, **rest: Any) -> None:
        """Open a run, or use the user's."""
        self.is_own = self._wandb.run is None
        super().setup(args, state, model, **rest)

    def close(self) -> None:
        """End the run, so that the next one of this process does not continue it."""
        super().close()
        if self._initialized and self.is_own:
            self._attempt(self._wandb.finish)


class RunMLflow(_Tracker, MLflowCallback):  # type: ignore[misc]
    """MLflow as its environment configures it; within a run that the user opened, if any."""


class RunTrackio(_Tracker, TrackioCallback):  # type: ignore[misc]
    """Trackio: on this machine, or in the Space that its environment names."""


TRACKERS: Final[dict[str, Any]] = {
    "tensorboard": RunTensorBoard,
    "wandb": RunWandb,
    "mlflow": RunMLflow,
    "trackio": RunTrackio,
}
"""By name in ``report_to``, which is also that of the package."""
