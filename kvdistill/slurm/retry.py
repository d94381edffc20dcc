"""What happens to a unit that failed, and to a worker that was stopped.

- A unit that raises, runs out of memory, does not fit into a whole attempt or kills its worker
  gets one failure on record and is retried by the next worker that meets it. After
  ``QUARANTINE_AFTER`` failures it is quarantined until a person runs ``kvdistill retry``.
- The unit of a crashed worker is taken over by the next worker. The crash counts against the unit
  only if the unit can be the cause: not after a preemption, a cancellation or a lost node.
- A stopped task requeues its own array element, at most ``max_restarts`` times.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Final

from kvdistill.errors import SlurmError
from kvdistill.slurm import client
from kvdistill.slurm.heartbeat import is_alive, job_element
from kvdistill.slurm.ledger import Attempt, Failure, FailureKind, Ledger
from kvdistill.slurm.task import Ending

QUARANTINE_AFTER: Final = 3
"""Failures after which a unit is not retried any more."""

_LOG_SIGNS: Final[tuple[tuple[FailureKind | None, str], ...]] = (
    ("out_of_memory", r"oom[-_ ]?kill|out[-_ ]of[-_ ]memory|exceeded (job |step )?memory limit"),
    ("time_limit", r"DUE TO TIME LIMIT"),
    (None, r"DUE TO (PREEMPTION|NODE FAILURE|JOB REQUEUE)|CANCELLED AT"),
)


def is_quarantined(ledger: Ledger, unit: str) -> bool:
    """Whether a unit has failed too often to be retried automatically."""
    return len(ledger.failures(unit)) >= QUARANTINE_AFTER


def has_crashed(ledger: Ledger, attempt_id: str, me: Attempt, heartbeat_seconds: float) -> bool:
    """Whether the holder of a claim is gone, as attempt ``me`` sees it."""
    holder = ledger.attempt(attempt_id)
    return holder is None or _supersedes(me, holder) or not is_alive(holder, heartbeat_seconds)


def take_over(ledger: Ledger, unit: str, attempt_id: str, me: Attempt) -> None:
    """Claim a crashed attempt's unit; record the crash if the unit may be to blame."""
    crashed = ledger.attempt(attempt_id)
    if crashed is not None and crashed.unit == unit and crashed.ended is None:
        kind = crash_cause(crashed, me.log_offset if me.log == crashed.log else None)
        lost_node = kind == "killed" and _supersedes(me, crashed)
        if kind is not None and not lost_node:
            message = f"worker crashed ({kind.replace('_', ' ')}) on {crashed.host}"
            where = crashed.job, crashed.log, crashed.heartbeat
            ledger.record_failure(Failure(unit, crashed.attempt_id, kind, message, None, *where))
    ledger.reassign(unit, me.attempt_id)


def _supersedes(me: Attempt, other: Attempt) -> bool:
    """Whether Slurm restarted the other attempt's array element as ``me``.

    Slurm has then given the other one up, even if it still runs on an unreachable node; both may
    finish, and the first published copy wins.
    """
    return other.job is not None and other.job == me.job and other.restart < me.restart


def crash_cause(attempt: Attempt, log_end: int | None = None) -> FailureKind | None:
    """Why a crashed attempt died; None where its unit is not to blame.

    Slurm's messages in the log, up to ``log_end``, come first, since out of memory looks like any
    other kill. A time limit counts against a unit only if the unit had the whole attempt.
    """
    text = log_text(attempt, log_end)
    for kind, pattern in _LOG_SIGNS:
        if re.search(pattern, text, re.IGNORECASE):
            return None if kind == "time_limit" and attempt.units_done else kind
    return None if attempt.stop is not None else "killed"


def log_text(attempt: Attempt, end: int | None = None, limit: int = 20_000) -> str:
    """The last ``limit`` bytes of an attempt's own log, decoded; empty if it has none."""
    if attempt.log is None or not Path(attempt.log).exists():
        return ""
    with Path(attempt.log).open("rb") as log:
        last = log.seek(0, os.SEEK_END) if end is None else end
        first = max(attempt.log_offset, last - limit)
        log.seek(first)
        return log.read(max(0, last - first)).decode(errors="replace")


def exit_task(ending: Ending, max_restarts: int) -> None:
    """Exit with a task's code, after requeueing this array element if the task is to be resumed."""
    if ending.again:
        requeue_this_job(max_restarts)
    if ending.exit_code:
        sys.exit(ending.exit_code)


def requeue_this_job(max_restarts: int) -> bool:
    """Requeue this array element alone, unless at ``max_restarts`` or being cancelled."""
    job = job_element(os.environ)
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if job is None:
        return False
    if restarts >= max_restarts:
        print(f"not requeued: {restarts} restarts (max_restarts); submit again", flush=True)
        return False
    try:
        return client.requeue(job)
    except SlurmError as error:
        # Some sites forbid requeueing. Nothing is lost: submitting again picks up what is missing.
        print(f"not requeued: {error}", file=sys.stderr, flush=True)
        return False
