"""Looking after the jobs of an experiment or a store: their state, cancelling, retrying."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvdistill.config.experiment import Experiment
from kvdistill.config.load import load_experiment
from kvdistill.errors import ConfigError, SlurmError
from kvdistill.pipelines.extract_tasks import other_extraction, to_extract
from kvdistill.pipelines.run import training_ledger
from kvdistill.pipelines.run_folder import RunFolder
from kvdistill.slurm import client
from kvdistill.slurm.ledger import Ledger
from kvdistill.slurm.status import UNIT_STATES, Status, read_status
from kvdistill.store.bucket import is_url
from kvdistill.store.format import StorePaths, folder_names
from kvdistill.store.reader import KVStore


@dataclass(frozen=True)
class TeacherOverview:
    """One teacher's extraction."""

    teacher: str
    ledger: Ledger
    status: Status
    stored_bytes: int
    difference: str | None
    """How its stored extraction differs from the config's, if it does."""

    def as_dict(self) -> dict[str, Any]:
        """Everything, JSON-ready."""
        status = self.status
        named = [state for state in UNIT_STATES if state not in ("done", "pending")]
        return {
            **{state: status.count(state) for state in UNIT_STATES},
            "total": len(status.units),
            "units": {state: status.of(state) for state in named},
            "work_per_second": status.work_per_second,
            "eta_seconds": status.eta_seconds,
            "stored_bytes": self.stored_bytes,
            "difference": self.difference,
            "failures": {u: [asdict(f) for f in found] for u, found in status.failures.items()},
            "stale_why": dict(status.stale),
            "broken": [asdict(attempt) for attempt in status.broken],
            "workers": [asdict(attempt) for attempt in status.workers],
            "slurm_error": status.slurm_error,
            "waiting": dict(Counter(job.reason for job in status.waiting)),
        }


@dataclass(frozen=True)
class Overview:
    """A store, and the training job of an experiment where there is one."""

    store: str
    teachers: tuple[TeacherOverview, ...]
    training: str | None
    training_log: Path | None
    """Standard error of the newest training job."""

    @property
    def is_complete(self) -> bool:
        """Whether every teacher has every shard."""
        return all(teacher.status.is_complete for teacher in self.teachers)

    def missing(self) -> dict[str, int]:
        """Number of shards that are not done, by teacher."""
        sizes = {t.teacher: len(t.status.units) - t.status.count("done") for t in self.teachers}
        return {teacher: count for teacher, count in sizes.items() if count}

    def as_dict(self) -> dict[str, Any]:
        """Everything, JSON-ready."""
        return {
            "store": self.store,
            "complete": self.is_complete,
            "training": self.training,
            "teachers": {each.teacher: each.as_dict() for each in self.teachers},
        }


def overview(
    target: Path | str, overrides: Sequence[str] = (), only: Sequence[str] = ()
) -> Overview:
    """Read the state of an experiment (a YAML file) or of a store (a folder or a URL).

    Raises:
        ConfigError: the experiment is invalid, or has no teacher of ``only``.
        StoreError: the store cannot be opened.
    """
    if is_store(target):
        store, experiment = KVStore.open(target), None
        # Folders rather than manifests: a teacher may have tasks and no shard yet.
        names = sorted(
            {*folder_names(store.paths.teachers), *store.place.folders(store.paths.teachers)}
        )
    else:
        experiment = load_experiment(Path(target), overrides)
        store = to_extract(KVStore.open(experiment.store), experiment)
        names = list(experiment.teachers)
    if unknown := set(only) - set(names):
        raise ConfigError(f"{target} has no teacher {sorted(unknown)}; it has {names}")
    teachers = tuple(
        _teacher_overview(store, experiment, name) for name in names if not only or name in only
    )
    training, log = (None, None) if experiment is None else _training_state(experiment)
    return Overview(store.where, teachers, training, log)


def is_store(target: Path | str) -> bool:
    """Whether a target is a store rather than an experiment file."""
    return is_url(target) or Path(target).is_dir()


def cancel_jobs(
    target: Path | str, overrides: Sequence[str] = (), only: Sequence[str] = ()
) -> list[str]:
    """Cancel the queued and running jobs of an experiment or store; returns their ids.

    Of an experiment, the training job too, unless ``only`` names teachers.

    Raises:
        SlurmError: no Slurm here, or it refused.
    """
    client.require()
    ledgers = [each.ledger for each in overview(target, overrides, only).teachers]
    if not is_store(target) and not only:
        ledgers.append(training_ledger(load_experiment(Path(target), overrides)))
    ids = {job.job_id for ledger in ledgers for job in ledger.submissions()}
    queued = sorted({job.partition("_")[0] for job in client.queue(ids)})
    client.cancel(queued)
    return queued


def clear_failures(seen: Overview, units: Sequence[str]) -> list[tuple[str, str, int]]:
    """Delete the failures of ``units`` (of quarantined shards if empty), so that they are retried.

    Returns:
        Teacher, shard and number of failures of every shard that had any.
    """
    cleared = [
        (each.teacher, unit, each.ledger.clear_failures(unit))
        for each in seen.teachers
        for unit in units or each.status.of("quarantined")
    ]
    return [found for found in cleared if found[2]]


def _teacher_overview(store: KVStore, experiment: Experiment | None, name: str) -> TeacherOverview:
    other = None if experiment is None else other_extraction(store, experiment, name)
    done = frozenset() if other else store.committed(name)
    ledger = Ledger(StorePaths(store.paths.root.absolute()).teacher(name))
    status = read_status(ledger, store.shard_ids, done)
    # The size is extrapolated from about 64 commits.
    commits = [store.commit(name, unit) for unit in sorted(done)[:: max(1, len(done) // 64)]]
    sampled = sum(record.size_bytes for commit in commits for record in commit.files.values())
    stored_bytes = sampled * len(done) // max(len(commits), 1)
    return TeacherOverview(name, ledger, status, stored_bytes, other)


def _training_state(experiment: Experiment) -> tuple[str | None, Path | None]:
    """State and log of the newest training job, the state in Slurm's words; None without one."""
    ledger = training_ledger(experiment)
    submissions = ledger.submissions()
    if not submissions:
        return None, None
    newest = submissions[-1].job_id
    log = ledger.log(newest)
    try:
        job = client.queue([newest]).get(newest) if client.is_available() else None
    except SlurmError as error:
        return f"job {newest}: {error}", log
    if job is not None:
        return f"job {newest} is {job.state.lower()} ({job.reason})", log
    folder = RunFolder(experiment.output_dir / experiment.name)
    if folder.read_record().get("finished"):
        return f"finished, in {folder.path}", log
    return f"job {newest} has ended, and the run is not finished", log
