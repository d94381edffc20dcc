"""Every file that tasks write about themselves, below one folder.

    attempts/<attempt>.json           host, pid, unit in progress, latest heartbeat
    claims/<unit>.json                the attempt that works on a unit
    failures/<unit>/<attempt>.json    one file per failure, so that no two writers share a count
    submissions/submission-<job>.json submitted jobs, and the units of their array elements
    jobs/                             frozen settings, logs, submitit's pickles: private

Folders of a ledger may be shared, as a store's are; the one of jobs may lie elsewhere, and is its
owner's alone, because unpickling runs code.

None of it decides whether a unit is done: its published result does, and two workers on one unit
are harmless. Claims save work; attempts and failures explain what happened. Every file appears
whole or not at all (temporary file, then rename or link), and none is ever appended to.
"""

from __future__ import annotations

import errno
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from kvdistill.errors import SlurmError
from kvdistill.store.commit import staged_name, sweep

Outcome = Literal["complete", "incomplete", "interrupted", "failed"]
FailureKind = Literal["error", "out_of_memory", "time_limit", "killed"]


@dataclass(frozen=True)
class Attempt:
    """One process working through the units of one task."""

    attempt_id: str
    task: int
    num_tasks: int
    host: str
    pid: int
    machine: str
    """Kernel and pid namespace; pids are comparable only within the same one."""
    process_start: int
    """Start time of the pid in clock ticks, which exposes a recycled pid."""
    job: str | None
    """``<array>_<element>`` or a plain job id; None outside Slurm."""
    restart: int
    log: str | None
    log_offset: int
    """Slurm appends to a requeued job's log; this attempt's lines begin here."""
    started: float
    heartbeat: float
    unit: str | None = None
    units_done: int = 0
    work_done: int = 0
    """In the workload's own measure: tokens, for extraction."""
    work_seconds: float = 0.0
    stop: str | None = None
    """The signal that requested a stop."""
    ended: float | None = None
    outcome: Outcome | None = None
    message: str | None = None
    traceback: str | None = None


@dataclass(frozen=True)
class Failure:
    """Why one attempt at one unit failed."""

    unit: str
    attempt_id: str
    kind: FailureKind
    message: str
    traceback: str | None
    job: str | None
    log: str | None
    time: float


@dataclass(frozen=True)
class Submission:
    """One submitted Slurm job, and the units that each of its array elements owns."""

    job_id: str
    name: str
    submitted: float
    elements: tuple[tuple[str, ...], ...]


Record = TypeVar("Record", Attempt, Failure, Submission)


@dataclass(frozen=True)
class Ledger:
    """Owner of every file name below one folder, and of the folder of its jobs."""

    folder: Path
    jobs_folder: Path | None = None
    """Where jobs are kept if not in ``folder``, which others may be able to write."""

    @property
    def jobs(self) -> Path:
        """Batch scripts, logs, frozen settings and submitit's pickles."""
        return self.jobs_folder or self.folder / "jobs"

    def open_jobs(self) -> Path:
        """Create the folder of jobs, for its owner alone: its pickles are run as its owner.

        Raises:
            SlurmError: it belongs to somebody else, or others may write in it.
        """
        self.jobs.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = self.jobs.stat()
        if found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise SlurmError(
                f"{self.jobs}: jobs run what this folder holds, but others may write in it; make "
                "it yours alone (chmod 700), or set another output_dir"
            )
        return self.jobs

    def log(self, job: str) -> Path:
        """Standard error of a job or array element (of its first node), as submitit names it."""
        return self.jobs / f"{job}_0_log.err"

    def write_attempt(self, attempt: Attempt) -> None:
        """Publish the newest state of an attempt, replacing the one before."""
        _replace(self._attempt_path(attempt.attempt_id), asdict(attempt))

    def attempt(self, attempt_id: str) -> Attempt | None:
        """An attempt by its id; None if it was never published."""
        return _read(Attempt, self._attempt_path(attempt_id))

    def attempts(self) -> list[Attempt]:
        """All attempts, oldest first."""
        found = (_read(Attempt, path) for path in _files(self.folder / "attempts"))
        return sorted((a for a in found if a is not None), key=lambda a: a.started)

    def claim(self, unit: str, attempt_id: str) -> bool:
        """Claim a unit; False if another attempt holds it."""
        return _create(self._claim_path(unit), attempt_id)

    def reassign(self, unit: str, attempt_id: str) -> None:
        """Give a unit's claim to another attempt; the holder must have crashed."""
        _replace(self._claim_path(unit), attempt_id)

    def holder(self, unit: str) -> str | None:
        """Id of the attempt that holds a unit; empty if a crash left the claim unreadable."""
        body = _load(self._claim_path(unit))
        return body if body is None or isinstance(body, str) else ""

    def claims(self) -> dict[str, str]:
        """Attempt id by unit, for every claimed unit."""
        units = [path.stem for path in _files(self.folder / "claims")]
        held = ((unit, self.holder(unit)) for unit in units)
        return {unit: holder for unit, holder in held if holder is not None}

    def release(self, unit: str, attempt_id: str) -> None:
        """Drop the claim on a unit, unless another attempt has taken it over meanwhile."""
        if self.holder(unit) == attempt_id:
            self._claim_path(unit).unlink(missing_ok=True)

    def forget(self, attempt_id: str) -> None:
        """Delete an attempt's record."""
        self._attempt_path(attempt_id).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove what killed writers left half-written."""
        for folder in ("attempts", "claims", "submissions", "failures", "failures/*"):
            for found in self.folder.glob(folder):
                sweep(found, ".")

    def record_failure(self, failure: Failure) -> None:
        """Record a failure once, however many workers report it."""
        _create(self._failures_of(failure.unit) / f"{failure.attempt_id}.json", asdict(failure))

    def failures(self, unit: str) -> list[Failure]:
        """Failures of one unit, oldest first."""
        found = (_read(Failure, path) for path in _files(self._failures_of(unit)))
        return sorted((f for f in found if f is not None), key=lambda f: f.time)

    def failed_units(self) -> dict[str, list[Failure]]:
        """Failures of every unit that has any."""
        folder = self.folder / "failures"
        units = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        found = {unit: self.failures(unit) for unit in units}
        return {unit: failures for unit, failures in found.items() if failures}

    def clear_failures(self, unit: str) -> int:
        """Delete a unit's failures, so that it is retried; how many there were."""
        paths = _files(self._failures_of(unit))
        for path in paths:
            path.unlink(missing_ok=True)
        return len(paths)

    def record_submission(self, submission: Submission) -> None:
        """Record a submitted job for ``status`` and ``cancel``."""
        path = self.folder / "submissions" / f"submission-{submission.job_id}.json"
        _create(path, asdict(submission))

    def submissions(self) -> list[Submission]:
        """All submitted jobs, oldest first."""
        folders = self.folder / "submissions", self.folder / "jobs"  # the latter until 0.2
        paths = [p for f in folders for p in _files(f) if p.name.startswith("submission-")]
        found = (_read(Submission, path) for path in paths)
        return sorted((s for s in found if s is not None), key=lambda s: s.submitted)

    def _attempt_path(self, attempt_id: str) -> Path:
        return self.folder / "attempts" / f"{attempt_id}.json"

    def _claim_path(self, unit: str) -> Path:
        return self.folder / "claims" / f"{unit}.json"

    def _failures_of(self, unit: str) -> Path:
        return self.folder / "failures" / unit


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix == ".json")


def _load(path: Path) -> Any:
    """A file's JSON; None if there is no file, ``{}`` if it is not JSON.

    A power failure may leave an empty file. None is worth stopping for: an attempt without a
    record counts as crashed, and a claim without a holder as free.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    except OSError as error:
        # NFS: the file was replaced between open and read; the next read finds the new one.
        if error.errno == errno.ESTALE:
            return None
        raise


def _read(kind: type[Record], path: Path) -> Record | None:
    body = _load(path)
    if not isinstance(body, dict) or not body:
        return None
    if kind is Submission:
        body["elements"] = tuple(tuple(units) for units in body["elements"])
    known = {field.name for field in fields(kind)}
    return kind(**{key: value for key, value in body.items() if key in known})


def _temporary(path: Path, body: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(staged_name(f".{path.name}"))
    temporary.write_text(json.dumps(body, ensure_ascii=False), encoding="utf-8")
    return temporary


def _replace(path: Path, body: Any) -> None:
    _temporary(path, body).replace(path)


def _create(path: Path, body: Any) -> bool:
    """Create a file whole; False if there is one. link() is exclusive on NFS too."""
    temporary = _temporary(path, body)
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True
