"""The state of every unit, from the folder alone; ``squeue`` adds why jobs are pending.

done          its result is published
running       a live worker holds it
stale         its worker crashed or stopped sending heartbeats
quarantined   failed too often to be retried automatically
failed        failed, and will be retried
pending       not started, or abandoned by a stopped worker
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

from kvdistill.errors import SlurmError
from kvdistill.slurm import client
from kvdistill.slurm.heartbeat import HEARTBEAT_SECONDS, is_alive
from kvdistill.slurm.ledger import Attempt, Failure, Ledger
from kvdistill.slurm.retry import QUARANTINE_AFTER, crash_cause
from kvdistill.text import format_duration

UnitState = Literal["done", "running", "stale", "quarantined", "failed", "pending"]
UNIT_STATES: Final[tuple[UnitState, ...]] = get_args(UnitState)


@dataclass(frozen=True)
class Status:
    """One folder's state at one moment."""

    units: Mapping[str, UnitState]
    failures: Mapping[str, Sequence[Failure]]
    """Of units that are not done."""
    stale: Mapping[str, str]
    """Why the worker of a stale unit probably died, by unit."""
    workers: Sequence[Attempt]
    """Live attempts."""
    broken: Sequence[Attempt]
    """Attempts that could not even start, where their task was not tried again since."""
    waiting: Sequence[client.QueuedJob]
    """Array elements that Slurm has not started, with its reason."""
    slurm_error: str | None
    """Why ``squeue`` failed; everything else here is independent of it."""
    work_per_second: float
    """All live workers together, in the workload's measure."""
    eta_seconds: float | None

    def count(self, state: UnitState) -> int:
        """How many units are in a state."""
        return len(self.of(state))

    def of(self, state: UnitState) -> list[str]:
        """The units in a state."""
        return [unit for unit, found in self.units.items() if found == state]

    @property
    def is_complete(self) -> bool:
        """Whether every unit is done."""
        return self.count("done") == len(self.units)


def read_status(
    ledger: Ledger,
    units: Sequence[str],
    done: Collection[str],
    *,
    ask_slurm: bool = True,
    heartbeat_seconds: float = HEARTBEAT_SECONDS,
) -> Status:
    """Read a folder's state.

    Args:
        ledger: The folder.
        units: All units, in order.
        done: Units whose result is published, as the caller's workload defines it.
        ask_slurm: Run ``squeue`` for reasons, where there is one and jobs were submitted.
        heartbeat_seconds: The workers' heartbeat interval.
    """
    attempts = {attempt.attempt_id: attempt for attempt in ledger.attempts()}
    live = {a: seen for a, seen in attempts.items() if is_alive(seen, heartbeat_seconds)}
    claims, jobs = ledger.claims(), ledger.submissions()
    failures = {u: f for u, f in ledger.failed_units().items() if u not in done}
    states = {
        unit: _state(unit in done, claims.get(unit), live, len(failures.get(unit, ())))
        for unit in units
    }
    stale = [unit for unit, found in states.items() if found == "stale"]
    workers = list(live.values())
    waiting, slurm_error = list[client.QueuedJob](), None
    if ask_slurm and client.is_available():
        try:
            queued = client.queue(job.job_id for job in jobs).values()
            waiting = [job for job in queued if job.state == "PENDING"]
        except SlurmError as error:
            slurm_error = str(error)
    # Of tasks' latest attempts since the newest submission, those that failed outside any unit.
    since = max((job.submitted for job in jobs), default=0.0)
    latest = {(a.task, a.num_tasks): a for a in attempts.values() if a.started >= since}
    return Status(
        units=states,
        failures=failures,
        stale={unit: _stale_reason(attempts.get(claims[unit])) for unit in stale},
        workers=workers,
        broken=[attempt for attempt in latest.values() if attempt.outcome == "failed"],
        waiting=waiting,
        slurm_error=slurm_error,
        work_per_second=sum(a.work_done / a.work_seconds for a in workers if a.work_seconds),
        eta_seconds=_eta(states, workers),
    )


def _state(done: bool, holder: str | None, live: Collection[str], failures: int) -> UnitState:
    if done:
        return "done"
    if holder is not None:
        return "running" if holder in live else "stale"
    if failures >= QUARANTINE_AFTER:
        return "quarantined"
    return "failed" if failures else "pending"


def _stale_reason(attempt: Attempt | None) -> str:
    if attempt is None:
        return "its worker left no record"
    age = time.time() - attempt.heartbeat
    cause = crash_cause(attempt)
    named = cause.replace("_", " ") if cause else "interrupted"
    return f"{named}; last heartbeat {format_duration(age)} ago on {attempt.host}"


def _eta(states: Mapping[str, UnitState], workers: Sequence[Attempt]) -> float | None:
    """Seconds until the open units are done, at the pace of the live workers."""
    pace = sum(a.units_done / a.work_seconds for a in workers if a.work_seconds and a.units_done)
    left = sum(state not in ("done", "quarantined") for state in states.values())
    if not left:
        return 0.0
    return left / pace if pace else None
