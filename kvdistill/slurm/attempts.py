"""An attempt's life: it says who it is, keeps saying that it lives, and is judged when silent.

A worker may be killed, frozen with its node, or run twice; others must tell from the folder alone
whether it is still there. Within one machine its pid answers that exactly; across machines only
the age of its last word does, which is why clocks must agree to about a minute.
"""

from __future__ import annotations

import dataclasses
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal

from kvdistill.slurm.ledger import Attempt, FailureKind, Ledger
from kvdistill.slurm.signals import StopFlag

HEARTBEAT_SECONDS: Final = 15.0


STALE_AFTER: Final = 6
"""Heartbeats that may be missed before an attempt of another machine counts as dead."""


Condition = Literal["running", "stale", "ended"]


_LOG_SIGNS: Final[tuple[tuple[str, str], ...]] = (
    ("out_of_memory", r"oom[-_ ]?kill|out[-_ ]of[-_ ]memory|exceeded (job |step )?memory limit"),
    ("time_limit", r"DUE TO TIME LIMIT"),
    ("excused", r"DUE TO (PREEMPTION|NODE FAILURE|JOB REQUEUE)|CANCELLED AT"),
)


def new_attempt(
    task: int, num_tasks: int, logs: Path | None, environment: Mapping[str, str]
) -> Attempt:
    """This process, about to work; ``environment`` says whether it is a Slurm job."""
    host, pid, start = socket.gethostname(), os.getpid(), process_start(os.getpid()) or 0
    job = job_element(environment)
    restart = int(environment.get("SLURM_RESTART_COUNT", "0"))
    log = None if job is None or logs is None else logs / f"{job}_0_log.err"
    name = f"{job}.r{restart}" if job else "local"
    now = time.time()
    return Attempt(
        attempt_id=f"{name}.{_safe(host)}.{pid}.{time.time_ns():x}",
        task=task,
        num_tasks=num_tasks,
        host=environment.get("SLURMD_NODENAME", host),
        pid=pid,
        machine=machine_identity(),
        process_start=start,
        job=job,
        restart=restart,
        log=None if log is None else str(log),
        log_offset=log.stat().st_size if log is not None and log.exists() else 0,
        started=now,
        heartbeat=now,
    )


def job_element(environment: Mapping[str, str]) -> str | None:
    """The id that means this array element alone.

    ``SLURM_JOB_ID`` does not: for one element it equals the array's id, and requeueing that
    requeues every element, completed ones included.
    """
    array = environment.get("SLURM_ARRAY_JOB_ID")
    if array is not None:
        return f"{array}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment.get("SLURM_JOB_ID")


def machine_identity() -> str:
    """Names the kernel and the pid namespace; equal only where pids mean the same."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    if not boot.exists():
        return socket.gethostname()
    return f"{boot.read_text().strip()}/{Path('/proc/self/ns/pid').readlink()}"


def process_start(pid: int) -> int | None:
    """Start time of a living process in clock ticks; None if there is none, or a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the program's name in parentheses and may hold anything.
    state, *rest = stat.rpartition(")")[2].split()
    return None if state in "ZX" else int(rest[18])


def condition(attempt: Attempt, heartbeat_seconds: float = HEARTBEAT_SECONDS) -> Condition:
    """Whether an attempt runs, has ended in order, or has fallen silent."""
    if attempt.ended is not None:
        return "ended"
    same_machine = attempt.machine == machine_identity()
    if same_machine and process_start(attempt.pid) != attempt.process_start:
        return "stale"
    silent = time.time() - attempt.heartbeat
    return "stale" if silent > STALE_AFTER * heartbeat_seconds else "running"


def crash_cause(attempt: Attempt, log_end: int | None = None) -> FailureKind | None:
    """Why a silent attempt died; None where the unit in its hand is not to blame.

    Slurm's own words in the log come first, since out of memory looks like any other kill.
    A time limit counts against a unit only if the unit had the whole attempt for itself.
    """
    text = log_text(attempt, log_end)
    for kind, pattern in _LOG_SIGNS:
        if re.search(pattern, text, re.IGNORECASE):
            if kind == "out_of_memory":
                return "out_of_memory"
            if kind == "time_limit":
                return "time_limit" if attempt.units_done == 0 else None
            return None
    return None if attempt.stop is not None else "killed"


def log_text(attempt: Attempt, end: int | None = None, limit: int = 20_000) -> str:
    """The last characters that an attempt left in its log; empty if it has none."""
    if attempt.log is None or not Path(attempt.log).exists():
        return ""
    with Path(attempt.log).open("rb") as log:
        last = log.seek(0, os.SEEK_END) if end is None else end
        first = max(attempt.log_offset, last - limit)
        log.seek(first)
        return log.read(max(0, last - first)).decode(errors="replace")


class Heartbeat:
    """Publishes an attempt: at every change, and every few seconds from a thread of its own."""

    def __init__(self, ledger: Ledger, attempt: Attempt, stop: StopFlag, seconds: float) -> None:
        self._ledger = ledger
        self._attempt = attempt
        self._stop = stop
        self._seconds = seconds
        self._lock = threading.Lock()
        self._done = threading.Event()

    @property
    def attempt(self) -> Attempt:
        """The newest word."""
        return self._attempt

    def say(self, **changes: Any) -> None:
        """Change fields of the attempt and publish it."""
        with self._lock:
            self._attempt = dataclasses.replace(
                self._attempt, heartbeat=time.time(), stop=self._stop.reason, **changes
            )
            self._ledger.write_attempt(self._attempt)

    def beat(self) -> None:
        """Body of the thread. Looks often, so that a signal is on record before the kill."""
        last, heard = time.monotonic(), self._stop.reason
        while not self._done.wait(min(0.5, self._seconds)):
            if self._stop.reason != heard or time.monotonic() - last >= self._seconds:
                last, heard = time.monotonic(), self._stop.reason
                try:
                    self.say()
                except OSError as error:  # a full or absent disk may be well again at the next
                    print(f"no heartbeat: {error}", file=sys.stderr, flush=True)

    def rest(self) -> None:
        """End the thread."""
        self._done.set()


@contextmanager
def heartbeat(
    ledger: Ledger, attempt: Attempt, stop: StopFlag, seconds: float = HEARTBEAT_SECONDS
) -> Iterator[Heartbeat]:
    """Keep an attempt's heart beating inside the block."""
    heart = Heartbeat(ledger, attempt, stop, seconds)
    heart.say()
    thread = threading.Thread(target=heart.beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield heart
    finally:
        heart.rest()
        thread.join()


def _safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9-]", "-", text)
