"""What became of the work: read from the folder alone, with Slurm asked only for its reasons.

Every unit is in exactly one state:

    done          its result is published
    running       a living worker has it in hand
    stale         a worker has it in hand that fell silent
    quarantined   failed too often to be tried again without a person
    failed        failed, and will be tried again
    pending       nobody has touched it yet, or it was put back
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from kvdistill.errors import SlurmError
from kvdistill.slurm import client
from kvdistill.slurm.attempts import HEARTBEAT_SECONDS, condition, crash_cause
from kvdistill.slurm.ledger import QUARANTINE_AFTER, Attempt, Failure, Ledger, Submission
from kvdistill.text import format_duration

UnitState = Literal["done", "running", "stale", "quarantined", "failed", "pending"]


UNIT_STATES: Final[tuple[UnitState, ...]] = (
    "done",
    "running",
    "stale",
    "quarantined",
    "failed",
    "pending",
)


@dataclass(frozen=True)
class Status:
    """One folder's state at one moment."""

    units: Mapping[str, UnitState]
    failures: Mapping[str, Sequence[Failure]]
    """Of units that are not done."""
    stale: Mapping[str, str]
    """Why a silent worker probably died, by unit."""
    workers: Sequence[Attempt]
    """Living attempts."""
    broken: Sequence[Attempt]
    """Attempts that could not even start, where their task was not tried again since."""
    waiting: Sequence[client.QueuedJob]
    """Array elements that Slurm has not started, with its reason."""
    slurm_error: str | None
    """Why Slurm could not be asked; everything else here is known without it."""
    work_per_second: float
    """All living workers together, in the workload's measure."""
    eta_seconds: float | None

    def count(self, state: UnitState) -> int:
        """How many units are in a state."""
        return sum(found == state for found in self.units.values())

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
        done: Those whose result is published; the caller's truth, never guessed from here.
        ask_slurm: Ask ``squeue`` for reasons, where there is one and jobs were submitted.
        heartbeat_seconds: How often workers say that they live.
    """
    attempts = {attempt.attempt_id: attempt for attempt in ledger.attempts()}
    living = {a for a, seen in attempts.items() if condition(seen, heartbeat_seconds) == "running"}
    claims, jobs = ledger.claims(), ledger.submissions()
    failures = {u: f for u, f in ledger.failed_units().items() if u not in done}
    states = {
        unit: _state(unit in done, claims.get(unit), living, len(failures.get(unit, ())))
        for unit in units
    }
    silent = [unit for unit, found in states.items() if found == "stale"]
    workers = [attempts[attempt_id] for attempt_id in attempts if attempt_id in living]
    waiting, slurm_error = _waiting(jobs) if ask_slurm and client.is_available() else ([], None)
    speed = sum(_speed(attempt) for attempt in workers)
    return Status(
        units=states,
        failures=failures,
        stale={unit: _silence(attempts.get(claims[unit])) for unit in silent},
        workers=workers,
        broken=_broken(attempts.values(), max((j.submitted for j in jobs), default=0.0)),
        waiting=waiting,
        slurm_error=slurm_error,
        work_per_second=speed,
        eta_seconds=_eta(states, workers),
    )


def _state(done: bool, holder: str | None, living: Collection[str], failures: int) -> UnitState:
    if done:
        return "done"
    if holder is not None:
        return "running" if holder in living else "stale"
    if failures >= QUARANTINE_AFTER:
        return "quarantined"
    return "failed" if failures else "pending"


def _silence(attempt: Attempt | None) -> str:
    if attempt is None:
        return "its worker left no word"
    age = time.time() - attempt.heartbeat
    cause = crash_cause(attempt)
    named = cause.replace("_", " ") if cause else "interrupted"
    return f"{named}; last word {format_duration(age)} ago from {attempt.host}"


def _speed(attempt: Attempt) -> float:
    return attempt.work_done / attempt.work_seconds if attempt.work_seconds else 0.0


def _eta(states: Mapping[str, UnitState], workers: Sequence[Attempt]) -> float | None:
    """Seconds until the open units are done, at the pace of the workers that live now."""
    pace = sum(a.units_done / a.work_seconds for a in workers if a.work_seconds and a.units_done)
    left = sum(state not in ("done", "quarantined") for state in states.values())
    if not left:
        return 0.0
    return left / pace if pace else None


def _broken(attempts: Iterable[Attempt], since: float) -> list[Attempt]:
    """Tasks whose latest attempt failed outside any unit, as far as the newest submission goes."""
    latest = {(a.task, a.num_tasks): a for a in attempts if a.started >= since}
    return [attempt for attempt in latest.values() if attempt.outcome == "failed"]


def _waiting(submissions: Iterable[Submission]) -> tuple[list[client.QueuedJob], str | None]:
    try:
        jobs = client.queue(submission.job_id for submission in submissions)
    except SlurmError as error:
        return [], str(error)
    return [job for job in jobs.values() if job.state == "PENDING"], None
