"""One task: run its units in this process until they are done or it must stop.

It may be killed at any moment, run twice at once, or restarted on another node: done units are
skipped, a crashed worker's unit is taken over, and a unit that failed three times is skipped
(``retry``), so that one bad sample cannot block the others.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from dataclasses import dataclass, field
from typing import Final

from kvdistill.errors import FolderInUse, Interrupted
from kvdistill.slurm import client
from kvdistill.slurm.heartbeat import STALE_AFTER, Heartbeat, new_attempt
from kvdistill.slurm.ledger import Failure, FailureKind, Ledger
from kvdistill.slurm.retry import has_crashed, is_quarantined, take_over
from kvdistill.slurm.signals import StopFlag, stop_flag
from kvdistill.slurm.task import Ending, Task, Workload
from kvdistill.text import format_duration

FAILURES_IN_A_ROW: Final = 3
"""After so many consecutive failures the process is suspect, not the units: it ends."""


def work(task: Task) -> Ending:
    """Run a task in this process. A failing unit raises nothing; the ledger records it."""
    ledger = task.ledger
    attempt = new_attempt(task.task, task.num_tasks, ledger, os.environ)
    with (
        stop_flag(task.warning_seconds) as stop,
        Heartbeat(ledger, attempt, stop, task.heartbeat_seconds) as heart,
    ):
        trace = None
        try:
            ending = _TaskRun(task, ledger, heart, stop).run_all()
        except Exception as error:
            trace = traceback.format_exc()
            ending = Ending("failed", f"could not start: {_one_line_message(error)}")
        heart.update(
            ended=time.time(),
            outcome=ending.outcome,
            message=ending.message,
            traceback=trace,
            unit=None,
        )
    return ending


@dataclass
class _TaskRun:
    """The state of one pass over a task's units."""

    task: Task
    ledger: Ledger
    heart: Heartbeat
    stop: StopFlag
    failed_in_a_row: int = 0
    prepared: bool = False
    busy: list[str] = field(default_factory=list)
    """Units that other workers held."""
    failed: list[str] = field(default_factory=list)
    """Units that failed in this pass."""
    taken_over: set[str] = field(default_factory=set)

    def run_all(self) -> Ending:
        workload = self.task.workload()
        for unit in self.task.units:
            if self._is_over():
                break
            self._visit(workload, unit)
        for unit in tuple(self.busy):
            if not self._is_over() and self._wait_for(workload, unit):
                self._visit(workload, unit)
        return self._ending(workload)

    def _is_over(self) -> bool:
        return self.stop.requested or self.failed_in_a_row >= FAILURES_IN_A_ROW

    def _has_crashed(self, holder: str) -> bool:
        seconds = self.task.heartbeat_seconds
        return has_crashed(self.ledger, holder, self.heart.attempt, seconds)

    def _visit(self, workload: Workload, unit: str) -> None:
        """Run a unit, unless it is done, quarantined or held by a live worker."""
        if workload.is_done(unit):
            holder = self.ledger.holder(unit)
            if holder is not None and self._has_crashed(holder):
                workload.clear(unit)
                self.ledger.release(unit, holder)
            return
        if is_quarantined(self.ledger, unit):
            return
        if not self._claim(unit):
            self.busy.append(unit)
            return
        try:
            if not is_quarantined(self.ledger, unit) and not workload.is_done(unit):
                if not self.prepared:
                    workload.prepare()
                    self.prepared = True
                self._run(workload, unit)
            if unit in self.taken_over and workload.is_done(unit):
                workload.clear(unit)
        finally:
            self.heart.update(unit=None)
            self.ledger.release(unit, self.heart.attempt.attempt_id)

    def _claim(self, unit: str) -> bool:
        me = self.heart.attempt
        while not self.ledger.claim(unit, me.attempt_id):
            holder = self.ledger.holder(unit)
            if holder is None:
                continue
            if not self._has_crashed(holder):
                return False
            take_over(self.ledger, unit, holder, me)
            self.taken_over.add(unit)
            return True
        return True

    def _run(self, workload: Workload, unit: str) -> None:
        self.heart.update(unit=unit)
        began = time.monotonic()
        try:
            amount = workload.run(unit, self.stop.urgent)
        except Interrupted:
            self._blame_time_limit(unit)
        except FolderInUse:
            self.busy.append(unit)
        except Exception as error:
            if self.ledger.holder(unit) != self.heart.attempt.attempt_id:
                self.busy.append(unit)  # taken over while this process was frozen
            elif not workload.is_done(unit):
                self.failed_in_a_row += 1
                message = _one_line_message(error)
                # By name, because torch need not be imported to recognise its own error.
                names = {kind.__name__ for kind in type(error).__mro__}
                memory = names & {"MemoryError", "OutOfMemoryError"}
                kind: FailureKind = "out_of_memory" if memory else "error"
                self._record(unit, kind, message, traceback.format_exc())
        else:
            self.failed_in_a_row = 0
            attempt = self.heart.attempt
            self.heart.update(
                units_done=attempt.units_done + 1,
                work_done=attempt.work_done + amount,
                work_seconds=attempt.work_seconds + time.monotonic() - began,
            )

    def _wait_for(self, workload: Workload, unit: str) -> bool:
        """Wait until another worker's unit is free; False if it is done or its holder is alive.

        Waits no longer than the silence after which a worker counts as crashed.
        """
        holder = self.ledger.holder(unit)
        first = self.ledger.attempt(holder) if holder is not None else None
        end = time.monotonic() + (STALE_AFTER + 1) * self.task.heartbeat_seconds
        while holder is not None and first is not None and time.monotonic() < end:
            if workload.is_done(unit) or self._is_over():
                return False
            if self._has_crashed(holder) or self.ledger.holder(unit) != holder:
                return True
            now = self.ledger.attempt(holder)
            if now is not None and now.heartbeat > first.heartbeat:
                return False
            time.sleep(min(1.0, self.task.heartbeat_seconds / 2))
        return True

    def _blame_time_limit(self, unit: str) -> None:
        """Record that a unit does not fit the time limit if it had the whole attempt to itself."""
        mine = self.heart.attempt
        if self.stop.reason != "SIGUSR2" or mine.units_done:
            return
        left = client.seconds_left(mine.job) if mine.job is not None else None
        # With more time left it was a preemption. Slurm may warn up to a minute early.
        if left is None or left <= self.task.warning_seconds + 60:
            lasted = format_duration(time.time() - mine.started)
            message = f"not finished within a whole attempt ({lasted})"
            self._record(unit, "time_limit", message, None)

    def _record(self, unit: str, kind: FailureKind, message: str, trace: str | None) -> None:
        mine = self.heart.attempt
        self.failed.append(unit)
        self.ledger.record_failure(
            Failure(unit, mine.attempt_id, kind, message, trace, mine.job, mine.log, time.time())
        )

    def _ending(self, workload: Workload) -> Ending:
        missing = [unit for unit in self.task.units if not workload.is_done(unit)]
        quarantined = [unit for unit in missing if is_quarantined(self.ledger, unit)]
        if not missing:
            return Ending("complete", f"all {len(self.task.units)} units are done")
        if self.stop.requested:
            return Ending("interrupted", f"{self.stop.reason}; {len(missing)} to go", again=True)
        open_ = set(missing) - set(quarantined)
        theirs = open_ & set(self.busy) - set(self.failed)
        if open_ == theirs and not quarantined:
            return Ending("complete", f"{len(theirs)} units are held by other workers")
        message = f"{len(missing)} units missing, {len(quarantined)} of them quarantined"
        return Ending("incomplete", message, again=bool(open_ - theirs))


def _one_line_message(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:500]


if __name__ == "__main__":  # a pool's worker: standard input is a task as JSON
    ending = work(Task.from_json(sys.stdin.read()))
    print(ending.message, flush=True)
    sys.exit(ending.exit_code)
