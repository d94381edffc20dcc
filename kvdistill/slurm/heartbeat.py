"""An attempt's identity and liveness, as far as the folder alone shows it.

A worker may be killed, frozen with its node, or run twice. On the same machine its pid decides
whether it is alive; across machines only the age of its heartbeat does, which is why the nodes'
clocks must agree to about a minute.
"""

from __future__ import annotations

import dataclasses
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, Final, Self

from kvdistill.provenance import machine_identity, process_start
from kvdistill.slurm.ledger import Attempt, Ledger
from kvdistill.slurm.signals import StopFlag

HEARTBEAT_SECONDS: Final = 15.0
STALE_AFTER: Final = 6
"""Missed heartbeats after which an attempt on another machine counts as crashed."""


def new_attempt(
    task: int, num_tasks: int, ledger: Ledger, environment: Mapping[str, str]
) -> Attempt:
    """This process as an attempt; Slurm's variables in ``environment`` identify its job."""
    host, pid = socket.gethostname(), os.getpid()
    job = job_element(environment)
    restart = int(environment.get("SLURM_RESTART_COUNT", "0"))
    log = None if job is None else ledger.log(job)
    name = f"{job}.r{restart}" if job else "local"
    now = time.time()
    return Attempt(
        attempt_id=f"{name}.{re.sub('[^A-Za-z0-9-]', '-', host)}.{pid}.{time.time_ns():x}",
        task=task,
        num_tasks=num_tasks,
        host=environment.get("SLURMD_NODENAME", host),
        pid=pid,
        machine=machine_identity(),
        process_start=process_start(pid) or 0,
        job=job,
        restart=restart,
        log=None if log is None else str(log),
        log_offset=log.stat().st_size if log is not None and log.exists() else 0,
        started=now,
        heartbeat=now,
    )


def job_element(environment: Mapping[str, str]) -> str | None:
    """The id of this job or of this array element alone; None outside Slurm.

    ``SLURM_JOB_ID`` is not it: for one element of every array it equals the array's id, and
    requeueing that requeues every element, completed ones included.
    """
    array = environment.get("SLURM_ARRAY_JOB_ID")
    if array is not None:
        return f"{array}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment.get("SLURM_JOB_ID")


def is_alive(attempt: Attempt, heartbeat_seconds: float = HEARTBEAT_SECONDS) -> bool:
    """Whether an attempt is still working: not ended, not killed, and its heartbeat recent."""
    if attempt.ended is not None:
        return False
    same_machine = attempt.machine == machine_identity()
    if same_machine and process_start(attempt.pid) != attempt.process_start:
        return False
    return time.time() - attempt.heartbeat <= STALE_AFTER * heartbeat_seconds


class Heartbeat:
    """Publishes an attempt inside a ``with`` block: at every change, and periodically by a thread.

    ``attempt`` is the newest published state.
    """

    def __init__(
        self, ledger: Ledger, attempt: Attempt, stop: StopFlag, seconds: float = HEARTBEAT_SECONDS
    ) -> None:
        self.attempt = attempt
        self._ledger = ledger
        self._stop = stop
        self._seconds = seconds
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self.update()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def update(self, **changes: Any) -> None:
        """Change fields of the attempt and publish it."""
        with self._lock:
            self.attempt = dataclasses.replace(
                self.attempt, heartbeat=time.time(), stop=self._stop.reason, **changes
            )
            self._ledger.write_attempt(self.attempt)

    def _run(self) -> None:
        # Polls often, so that a signal is on record before the kill that may follow it.
        last, seen = time.monotonic(), self._stop.reason
        while not self._done.wait(min(0.5, self._seconds)):
            if self._stop.reason != seen or time.monotonic() - last >= self._seconds:
                last, seen = time.monotonic(), self._stop.reason
                try:
                    self.update()
                except OSError as error:  # a full or unmounted disk may have recovered next time
                    print(f"heartbeat not written: {error}", file=sys.stderr, flush=True)
