"""What ``kvdistill status`` knows: every teacher of an experiment or a store, and the training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from kvdistill.config.experiment import Experiment
from kvdistill.config.load import load_experiment
from kvdistill.errors import SlurmError
from kvdistill.pipelines.distribute import training_ledger
from kvdistill.pipelines.extract_tasks import done_units, is_another
from kvdistill.pipelines.run_folder import RunFolder
from kvdistill.slurm import client
from kvdistill.slurm.ledger import Ledger
from kvdistill.slurm.status import UNIT_STATES, Status, read_status
from kvdistill.store.format import StorePaths
from kvdistill.store.reader import KVStore

SAMPLED_COMMITS: Final = 64
"""Commits that are read to tell a store's size; the rest is extrapolated."""


@dataclass(frozen=True)
class TeacherOverview:
    """One teacher's extraction."""

    teacher: str
    status: Status
    stored_bytes: int
    is_another: bool = False
    """Its shards were extracted by other settings than the config's."""


@dataclass(frozen=True)
class Overview:
    """A store, and the training job of an experiment where there is one."""

    store: Path
    teachers: tuple[TeacherOverview, ...]
    training: str | None
    training_log: Path | None
    """Standard error of the newest training job."""

    @property
    def is_complete(self) -> bool:
        """Whether every teacher has every shard."""
        return all(teacher.status.is_complete for teacher in self.teachers)

    def missing(self) -> dict[str, int]:
        """Shards that are not done, by teacher."""
        sizes = {t.teacher: len(t.status.units) - t.status.count("done") for t in self.teachers}
        return {teacher: count for teacher, count in sizes.items() if count}

    def as_dict(self) -> dict[str, Any]:
        """Everything, for a script."""
        return {
            "store": str(self.store),
            "complete": self.is_complete,
            "training": self.training,
            "teachers": {t.teacher: _teacher_dict(t) for t in self.teachers},
        }


def overview(target: Path, overrides: Sequence[str] = (), only: Sequence[str] = ()) -> Overview:
    """Read the state of an experiment (a YAML file) or of a store (a folder).

    Raises:
        ConfigError, StoreError: neither can be read.
    """
    if target.is_dir():
        store, experiment = KVStore.open(target), None
        names = _marked_teachers(store)
    else:
        experiment = load_experiment(target, overrides)
        store, names = KVStore.open(experiment.store), list(experiment.teachers)
    teachers = tuple(
        _teacher_overview(store, experiment, name) for name in names if not only or name in only
    )
    training = None if experiment is None else _training_state(experiment)
    log = None if experiment is None else _training_log(experiment)
    return Overview(store.paths.root, teachers, training, log)


def _marked_teachers(store: KVStore) -> list[str]:
    """Teachers of a store, those included whose tasks have not published anything yet."""
    folders = store.paths.teachers.iterdir() if store.paths.teachers.is_dir() else ()
    return sorted(folder.name for folder in folders if folder.is_dir())


def _teacher_overview(store: KVStore, experiment: Experiment | None, name: str) -> TeacherOverview:
    done = store.committed(name) if experiment is None else done_units(store, experiment, name)
    ledger = Ledger(StorePaths(store.paths.root.absolute()).teacher(name))
    status = read_status(ledger, store.shard_ids, done)
    another = experiment is not None and is_another(store, experiment, name)
    return TeacherOverview(name, status, _stored_bytes(store, name, sorted(done)), another)


def _stored_bytes(store: KVStore, name: str, done: Sequence[str]) -> int:
    step = max(1, len(done) // SAMPLED_COMMITS)
    commits = [store.commit(name, unit) for unit in done[::step]]
    sampled = sum(record.size_bytes for commit in commits for record in commit.files.values())
    return sampled * len(done) // len(commits) if commits else 0


def _training_state(experiment: Experiment) -> str | None:
    """State of the newest training job, in Slurm's words; None if none was submitted."""
    submissions = training_ledger(experiment).submissions()
    if not submissions:
        return None
    newest = submissions[-1].job_id
    try:
        job = client.queue([newest]).get(newest) if client.is_available() else None
    except SlurmError as error:
        return f"job {newest}: {error}"
    if job is not None:
        return f"job {newest} is {job.state.lower()} ({job.reason})"
    folder = RunFolder(experiment.output_dir / experiment.name)
    if folder.read_record().get("finished"):
        return f"finished, in {folder.path}"
    return f"job {newest} has ended, and the run is not finished"


def _training_log(experiment: Experiment) -> Path | None:
    ledger = training_ledger(experiment)
    submissions = ledger.submissions()
    return ledger.jobs / f"{submissions[-1].job_id}_0_log.err" if submissions else None


def _teacher_dict(overview: TeacherOverview) -> dict[str, Any]:
    status = overview.status
    return {
        **{state: status.count(state) for state in UNIT_STATES},
        "total": len(status.units),
        "units": {
            state: status.of(state) for state in UNIT_STATES if state not in ("done", "pending")
        },
        "work_per_second": status.work_per_second,
        "eta_seconds": status.eta_seconds,
        "stored_bytes": overview.stored_bytes,
        "is_another": overview.is_another,
        "failures": {u: [asdict(f) for f in found] for u, found in status.failures.items()},
        "stale_why": dict(status.stale),
        "broken": [asdict(attempt) for attempt in status.broken],
        "workers": [asdict(attempt) for attempt in status.workers],
        "slurm_error": status.slurm_error,
        "waiting": dict(Counter(job.reason for job in status.waiting)),
    }
