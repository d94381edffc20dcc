"""Without Slurm: the same tasks in a bounded pool of worker processes on this machine.

Processes rather than threads, so that a crash affects one worker alone: it is restarted, and the
crash counts against the unit that it was running. GPUs are assigned explicitly, worker ``w`` gets
GPU ``w % gpus``, and the workers share the cores evenly.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from kvdistill.slurm.signals import stop_flag
from kvdistill.slurm.task import TRY_AGAIN, Ending, Task

MAX_RESTARTS: Final = 20
POLL_SECONDS: Final = 0.2


@dataclass
class _Slot:
    """One place in the pool, and the process that fills it."""

    task: Task
    environment: dict[str, str]
    process: subprocess.Popen[str]
    restarts: int = 0


def run_pool(
    tasks: Sequence[Task],
    *,
    gpus: Sequence[str] | None = None,
    on_poll: Callable[[], None] | None = None,
    max_restarts: int = MAX_RESTARTS,
) -> Ending:
    """Run every task in its own process, all at once, until all have ended.

    A signal to this process is forwarded to the workers, and all workers are waited for.

    Args:
        tasks: One per worker.
        gpus: Values for ``CUDA_VISIBLE_DEVICES``; those visible here if not given.
        on_poll: Called a few times a second, for progress.
        max_restarts: How often one worker may be restarted.
    """
    devices = visible_gpus() if gpus is None else list(gpus)
    with stop_flag(tasks[0].warning_seconds) as stop, _run_slots(tasks, devices) as slots:
        forwarded: str | None = None
        codes: list[int] = []
        while slots:
            if stop.reason != forwarded:
                forwarded = stop.reason
                _signal_all(slots, signal.SIGUSR2 if forwarded == "SIGUSR2" else signal.SIGTERM)
            for slot in list(slots):
                code = slot.process.poll()
                if code is None:
                    continue
                if _is_restartable(code) and not stop.requested and slot.restarts < max_restarts:
                    slot.restarts += 1
                    slot.process = _start_worker(slot.task, slot.environment)
                else:
                    slots.remove(slot)
                    codes.append(code)
            if on_poll is not None:
                on_poll()
            time.sleep(POLL_SECONDS)
        return _pool_ending(codes, stop.reason)


def visible_gpus() -> list[str]:
    """GPUs that this process may assign to workers, as ``CUDA_VISIBLE_DEVICES`` names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [device for device in named.split(",") if device not in ("", "-1", "NoDevFiles")]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


@contextlib.contextmanager
def _run_slots(tasks: Sequence[Task], gpus: Sequence[str]) -> Iterator[list[_Slot]]:
    cores = max(1, len(os.sched_getaffinity(0)) // len(tasks))
    slots: list[_Slot] = []
    try:
        for worker, task in enumerate(tasks):
            environment = dict(os.environ)
            environment.setdefault("OMP_NUM_THREADS", str(cores))
            if gpus:
                environment["CUDA_VISIBLE_DEVICES"] = gpus[worker % len(gpus)]
            slots.append(_Slot(task, environment, _start_worker(task, environment)))
        yield slots
    finally:
        _signal_all(slots, signal.SIGTERM)
        for slot in slots:
            slot.process.wait()


def _start_worker(task: Task, environment: dict[str, str]) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "kvdistill.slurm.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    assert process.stdin is not None  # requested above
    with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
        pipe.write(task.to_json())
    return process


def _signal_all(slots: Sequence[_Slot], number: signal.Signals) -> None:
    for slot in slots:
        slot.process.send_signal(number)


def _is_restartable(code: int) -> bool:
    """Whether a worker requested a fresh process, or was killed; an ordinary failure is final."""
    return code == TRY_AGAIN or code < 0


def _pool_ending(codes: Sequence[int], reason: str | None) -> Ending:
    if not any(codes):
        return Ending("complete", "all workers finished")
    if reason is not None:
        return Ending("interrupted", f"stopped by {reason}", again=True)
    return Ending(
        "incomplete",
        f"{sum(map(bool, codes))} of {len(codes)} workers left units undone",
        again=any(_is_restartable(code) for code in codes),
    )
