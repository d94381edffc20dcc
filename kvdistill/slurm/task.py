"""What a worker gets: units by name, and a callable that makes the workload for them.

A task is plain data that fits a line of JSON, so that it is frozen at submission and readable by a
person. Tasks partition units round-robin: task ``i`` of ``n`` owns the units ``u % n == i``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from kvdistill.errors import SlurmError
from kvdistill.slurm.heartbeat import HEARTBEAT_SECONDS
from kvdistill.slurm.ledger import Ledger, Outcome
from kvdistill.store.commit import replace_file

TRY_AGAIN: Final = 75
"""Exit code (``EX_TEMPFAIL``): run the same task again."""


class Workload(Protocol):
    """What a task does. Created by the task's callable; cheap until ``prepare``."""

    def is_done(self, unit: str) -> bool:
        """Whether the unit's result is published, which alone makes a unit done."""

    def prepare(self) -> None:
        """Load what every unit needs; called once, and only if a unit is to be run."""

    def run(self, unit: str, should_stop: Callable[[], bool]) -> int:
        """Do and publish one unit; returns the amount of work, in the workload's own measure.

        Raises:
            Interrupted: ``should_stop`` returned True and the unit was abandoned.
        """

    def clear(self, unit: str) -> None:
        """Remove what crashed workers left unfinished of a unit that is done.

        Never called earlier: a worker that only seemed to have crashed might still publish it.
        """


@dataclass(frozen=True)
class Task:
    """Units for one worker, as plain data."""

    target: str
    """``package.module:function`` that returns a ``Workload``."""
    arguments: Mapping[str, Any]
    folder: Path
    """The ledger's folder."""
    units: tuple[str, ...]
    task: int = 0
    num_tasks: int = 1
    heartbeat_seconds: float = HEARTBEAT_SECONDS
    warning_seconds: float = 120.0
    """How long before a time limit Slurm sends USR2."""
    jobs_folder: Path | None = None
    """The ledger's folder of jobs; None if it is in ``folder``."""

    def to_json(self) -> str:
        """One line; ``from_json`` reads it back."""
        return json.dumps(dataclasses.asdict(self), default=str)

    @staticmethod
    def from_json(line: str) -> Task:
        """The inverse of ``to_json``."""
        body = json.loads(line)
        jobs = body["jobs_folder"] and Path(body["jobs_folder"])
        units = tuple(body["units"])
        return Task(**{**body, "folder": Path(body["folder"]), "jobs_folder": jobs, "units": units})

    @property
    def ledger(self) -> Ledger:
        """Where attempts, claims, failures and jobs are recorded."""
        return Ledger(self.folder, self.jobs_folder)

    def workload(self) -> Workload:
        """Import the target and call it.

        Raises:
            SlurmError: the target cannot be imported.
        """
        module, _, name = self.target.partition(":")
        try:
            factory = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise SlurmError(f"task target {self.target!r} cannot be imported: {error}") from error
        made: Workload = factory(**self.arguments)
        return made


def owned_units(units: Sequence[str], task: int, num_tasks: int) -> tuple[str, ...]:
    """The units that task ``task`` of ``num_tasks`` owns.

    Raises:
        SlurmError: ``task`` is outside ``0 <= task < num_tasks``.
    """
    if not 0 <= task < num_tasks:
        raise SlurmError(f"task {task} of {num_tasks}: tasks count from 0 to {num_tasks - 1}")
    return tuple(units[task::num_tasks])


def partition_round_robin(task: Task, num_parts: int) -> list[Task]:
    """Partition a task's units among ``num_parts`` tasks (fewer if there are fewer units)."""
    num = max(1, min(num_parts, len(task.units)))
    return [
        dataclasses.replace(
            task,
            units=owned_units(task.units, part, num),
            task=task.task * num + part,
            num_tasks=task.num_tasks * num,
        )
        for part in range(num)
    ]


def write_once(text: str, folder: Path, stem: str) -> Path:
    """Freeze settings in a file named by their hash, so that later edits change no queued job."""
    path = folder / f"{stem}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.yaml"
    if not path.exists():
        replace_file(path, text)
    return path


@dataclass(frozen=True)
class Ending:
    """How a task ended. ``again``: a fresh process should resume it."""

    outcome: Outcome
    message: str
    again: bool = False

    @property
    def exit_code(self) -> int:
        """0 complete, 75 try again, 1 needs a person."""
        if self.outcome == "complete":
            return 0
        return TRY_AGAIN if self.again else 1
