"""One task: work through its units, in this process, until they are done or it must stop.

It can be killed at any moment, run twice at once, or come back on another node: done units are
skipped, a dead worker's unit is taken over and counted against that unit, and a unit that failed
three times is left alone, so that one bad text cannot hold up the others.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from dataclasses import dataclass, field
from typing import Final

from kvdistill.errors import Interrupted
from kvdistill.slurm import client
from kvdistill.slurm.attempts import (
    STALE_AFTER,
    Heartbeat,
    condition,
    crash_cause,
    heartbeat,
    new_attempt,
)
from kvdistill.slurm.ledger import Attempt, Failure, FailureKind, Ledger
from kvdistill.slurm.signals import StopFlag, stop_flag
from kvdistill.slurm.task import Ending, Task, Workload
from kvdistill.text import format_duration

FAILURES_IN_A_ROW: Final = 3
"""So many units failing one after another say more about this process than about the units."""


def work(task: Task) -> Ending:
    """Do a task in this process. Never raises for what a unit does; the ledger says it all."""
    ledger = Ledger(task.folder)
    attempt = new_attempt(task.task, task.num_tasks, ledger.jobs, os.environ)
    with (
        stop_flag(task.warning_seconds) as stop,
        heartbeat(ledger, attempt, stop, task.heartbeat_seconds) as heart,
    ):
        shift = _Shift(task, ledger, heart, stop)
        trace = None
        try:
            ending = shift.work_through()
        except Exception as error:
            trace = traceback.format_exc()
            ending = Ending("failed", f"could not start: {_one_line_message(error)}")
        heart.say(
            ended=time.time(),
            outcome=ending.outcome,
            message=ending.message,
            traceback=trace,
            unit=None,
        )
    return ending


@dataclass
class _Shift:
    """The state of one pass over a task's units."""

    task: Task
    ledger: Ledger
    heart: Heartbeat
    stop: StopFlag
    failed_in_a_row: int = 0
    prepared: bool = False
    busy: list[str] = field(default_factory=list)
    """Units that others had in hand."""
    failed: list[str] = field(default_factory=list)
    """Units that failed here."""
    inherited: set[str] = field(default_factory=set)
    """Units taken over from the dead, or from those that seemed so."""

    def work_through(self) -> Ending:
        workload = self.task.workload()
        for unit in self.task.units:
            if self._is_over():
                break
            self._attend(workload, unit)
        for unit in tuple(self.busy):
            if not self._is_over() and self._outlasts(workload, unit):
                self._attend(workload, unit)
        return self._ending(workload)

    def _is_over(self) -> bool:
        return self.stop.requested or self.failed_in_a_row >= FAILURES_IN_A_ROW

    def _attend(self, workload: Workload, unit: str) -> None:
        if workload.is_done(unit):
            self._clear_dead_claim(workload, unit)
            return
        if self.ledger.is_quarantined(unit):
            return
        if not self._take(workload, unit):
            self.busy.append(unit)
            return
        try:
            if not self.ledger.is_quarantined(unit) and not workload.is_done(unit):
                self._prepare(workload)
                self._run(workload, unit)
            if unit in self.inherited and workload.is_done(unit):
                workload.clear(unit)
        finally:
            self.heart.say(unit=None)
            self.ledger.release(unit, self.heart.attempt.attempt_id)

    def _prepare(self, workload: Workload) -> None:
        if not self.prepared:
            workload.prepare()
            self.prepared = True

    def _run(self, workload: Workload, unit: str) -> None:
        self.heart.say(unit=unit)
        began = time.monotonic()
        try:
            amount = workload.run(unit, self.stop.urgent)
        except Interrupted:
            self._blame_time_limit(unit)
        except Exception as error:
            if not self._holds(unit):
                self.busy.append(unit)  # taken over while we were out of sight
            elif not workload.is_done(unit):
                self.failed_in_a_row += 1
                self._record(unit, _kind(error), _one_line_message(error), traceback.format_exc())
        else:
            self.failed_in_a_row = 0
            attempt = self.heart.attempt
            self.heart.say(
                units_done=attempt.units_done + 1,
                work_done=attempt.work_done + amount,
                work_seconds=attempt.work_seconds + time.monotonic() - began,
            )

    def _take(self, workload: Workload, unit: str) -> bool:
        """Claim a unit; a dead holder's claim is taken over, and its death put on record."""
        me = self.heart.attempt.attempt_id
        while not self.ledger.claim(unit, me):
            holder = self.ledger.holder(unit)
            if holder is None:
                continue
            if not self._is_dead(holder):
                return False
            self._bury(unit, holder)
            self.ledger.take_over(unit, me)
            self.inherited.add(unit)
            return True
        return True

    def _is_dead(self, attempt_id: str) -> bool:
        other = self.ledger.attempt(attempt_id)
        if other is None or self._supersedes(other):
            return True
        return condition(other, self.task.heartbeat_seconds) != "running"

    def _supersedes(self, other: Attempt) -> bool:
        """Whether Slurm started this element again after the other run of it.

        It gave that one up, even if it still breathes on a node out of sight; both may finish,
        and the first copy wins.
        """
        me = self.heart.attempt
        return other.job is not None and other.job == me.job and other.restart < me.restart

    def _bury(self, unit: str, attempt_id: str) -> None:
        dead = self.ledger.attempt(attempt_id)
        if dead is not None and dead.unit == unit and dead.ended is None:
            mine = self.heart.attempt
            kind = crash_cause(dead, mine.log_offset if mine.log == dead.log else None)
            lost = kind == "killed" and self._supersedes(dead)  # a node that went away
            if kind is not None and not lost:
                message = f"the worker died of it ({kind.replace('_', ' ')}) on {dead.host}"
                self.ledger.record_failure(
                    Failure(
                        unit, attempt_id, kind, message, None, dead.job, dead.log, dead.heartbeat
                    )
                )

    def _clear_dead_claim(self, workload: Workload, unit: str) -> None:
        holder = self.ledger.holder(unit)
        if holder is not None and self._is_dead(holder):
            workload.clear(unit)
            self.ledger.release(unit, holder)

    def _outlasts(self, workload: Workload, unit: str) -> bool:
        """Whether another's unit became free; a holder that is heard of again keeps it.

        Waits for at most the time after which silence means death.
        """
        holder = self.ledger.holder(unit)
        first = self.ledger.attempt(holder) if holder is not None else None
        end = time.monotonic() + (STALE_AFTER + 1) * self.task.heartbeat_seconds
        while holder is not None and first is not None and time.monotonic() < end:
            if workload.is_done(unit) or self._is_over():
                return False
            if self._is_dead(holder) or self.ledger.holder(unit) != holder:
                return True
            now = self.ledger.attempt(holder)
            if now is not None and now.heartbeat > first.heartbeat:
                return False
            time.sleep(min(1.0, self.task.heartbeat_seconds / 2))
        return True

    def _holds(self, unit: str) -> bool:
        return self.ledger.holder(unit) == self.heart.attempt.attempt_id

    def _blame_time_limit(self, unit: str) -> None:
        """A warned worker that gave its whole attempt to one unit says the unit does not fit."""
        mine = self.heart.attempt
        if self.stop.reason != "SIGUSR2" or mine.units_done:
            return
        left = client.seconds_left(mine.job) if mine.job is not None else None
        # With more time left it was a preemption. Slurm may warn up to a minute early.
        if left is None or left <= self.task.warning_seconds + 60:
            lasted = format_duration(time.time() - mine.started)
            message = f"not finished in the whole of an attempt ({lasted})"
            self._record(unit, "time_limit", message, None)

    def _record(self, unit: str, kind: FailureKind, message: str, trace: str | None) -> None:
        mine = self.heart.attempt
        self.failed.append(unit)
        self.ledger.record_failure(
            Failure(unit, mine.attempt_id, kind, message, trace, mine.job, mine.log, time.time())
        )

    def _ending(self, workload: Workload) -> Ending:
        missing = [unit for unit in self.task.units if not workload.is_done(unit)]
        quarantined = [unit for unit in missing if self.ledger.is_quarantined(unit)]
        if not missing:
            return Ending("complete", f"all {len(self.task.units)} units are there")
        if self.stop.requested:
            return Ending("interrupted", f"{self.stop.reason}; {len(missing)} to go", again=True)
        open_ = set(missing) - set(quarantined)
        theirs = open_ & set(self.busy) - set(self.failed)
        if open_ == theirs and not quarantined:
            return Ending("complete", f"{len(theirs)} units are in other workers' hands")
        message = f"{len(missing)} units missing, {len(quarantined)} of them quarantined"
        return Ending("incomplete", message, again=bool(open_ - theirs))


def _kind(error: Exception) -> FailureKind:
    """Torch's own out-of-memory error is told by name, so that torch need not be imported."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return "out_of_memory" if names & {"MemoryError", "OutOfMemoryError"} else "error"


def _one_line_message(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:500]


def run_task() -> None:
    """Entry point of a pool's worker: a task as JSON on standard input."""
    ending = work(Task.from_json(sys.stdin.read()))
    print(ending.message, flush=True)
    sys.exit(ending.exit_code)


if __name__ == "__main__":
    run_task()
