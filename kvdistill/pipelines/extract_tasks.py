"""Extraction as work for ``kvdistill.slurm``: a shard is a unit, the store says what is done."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final, TextIO

from kvdistill.config.experiment import Experiment
from kvdistill.config.load import dump_experiment, load_experiment
from kvdistill.errors import Interrupted
from kvdistill.pipelines.stored import is_done, prepare
from kvdistill.slurm.attempts import job_element
from kvdistill.slurm.ledger import Ledger
from kvdistill.slurm.task import Task, partition_round_robin, write_once
from kvdistill.store.format import StorePaths
from kvdistill.store.reader import KVStore

if TYPE_CHECKING:
    from kvdistill.extract.teacher import Teacher


TARGET: Final = "kvdistill.pipelines.extract_tasks:extraction_work"


class ExtractionWork:
    """One teacher reading shards. The teacher is loaded by ``prepare``, not before."""

    def __init__(self, experiment: Experiment, teacher: str) -> None:
        self._experiment = experiment
        self._name = teacher
        # Opened, not prepared: the plan was made where it was submitted, and a compute node may
        # reach neither the corpus nor the hub.
        self._store = KVStore.open(experiment.store)

    @cached_property
    def _teacher(self) -> Teacher:
        from kvdistill.pipelines.extract import open_teacher

        return open_teacher(self._store, self._experiment, self._name)

    def is_done(self, unit: str) -> bool:
        """Committed, by the extraction that the config asks for."""
        return is_done(self._store, self._experiment, self._name, unit)

    def prepare(self) -> None:
        """Load and verify the teacher."""
        _ = self._teacher

    def run(self, unit: str, should_stop: Callable[[], bool]) -> int:
        """Read and publish one shard; returns its tokens. Stops between two batches."""
        from kvdistill.pipelines.extract import extract_shard

        def look_up(_tokens: int) -> None:
            if should_stop():
                raise Interrupted(f"shard {unit} of {self._name} abandoned")

        look_up(0)
        job = job_element(os.environ)
        extracted, _ = extract_shard(
            self._store,
            self._experiment,
            self._teacher,
            unit,
            on_batch=look_up,
            attempt={} if job is None else {"job": job},
        )
        return extracted.num_read

    def clear(self, unit: str) -> None:
        """Remove staging folders of a committed shard; their writers can publish no more."""
        for folder in self._store.paths.temporary(self._name).glob(f"{unit}.*"):
            discard(folder)


def discard(folder: Path) -> None:
    """Delete a staging folder, unless its writer lives after all and publishes it first.

    Moved away before it is emptied: deleting follows an open folder wherever it is renamed to,
    so a writer that publishes meanwhile would have its committed shard deleted file by file.
    """
    doomed = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}")
    try:
        folder.rename(doomed)
    except FileNotFoundError:
        return
    shutil.rmtree(doomed, ignore_errors=True)


def extraction_work(config: str, teacher: str) -> ExtractionWork:
    """The target of extraction tasks; ``config`` is a frozen experiment file."""
    return ExtractionWork(load_experiment(Path(config)), teacher)


def ledger_of(experiment: Experiment, teacher: str) -> Ledger:
    """Where a teacher's tasks leave word."""
    return Ledger(StorePaths(experiment.store.absolute()).teacher(teacher))


def done_units(store: KVStore, experiment: Experiment, teacher: str) -> frozenset[str]:
    """Shards that are committed by the extraction that the config asks for."""
    return frozenset() if is_another(store, experiment, teacher) else store.committed(teacher)


def is_another(store: KVStore, experiment: Experiment, teacher: str) -> bool:
    """Whether what is stored under a teacher's name was extracted by other settings."""
    # One extraction per name, so that one shard speaks for all.
    return not all(
        is_done(store, experiment, teacher, unit) for unit in sorted(store.committed(teacher))[:1]
    )


def extraction_tasks(
    experiment: Experiment,
    teacher: str,
    units: tuple[str, ...],
    num_tasks: int,
    warning_seconds: float = 120.0,
) -> list[Task]:
    """Share units of one teacher out among ``num_tasks`` tasks (fewer if there are fewer units)."""
    ledger = ledger_of(experiment, teacher)
    frozen = freeze(experiment, ledger.jobs)
    arguments = {"config": str(frozen), "teacher": teacher}
    task = Task(TARGET, arguments, ledger.folder, units, warning_seconds=warning_seconds)
    return partition_round_robin(task, units, num_tasks)


def freeze(experiment: Experiment, folder: Path) -> Path:
    """Write an experiment down as it is now, so that a later edit changes no queued job."""
    return write_once(dump_experiment(experiment), folder, "experiment")


@contextmanager
def pool_progress(
    experiment: Experiment, teacher: str, stream: TextIO
) -> Iterator[Callable[[], None]]:
    """Yields what a pool calls a few times a second; says how many shards are there."""
    store = prepare(experiment)
    total = len(store.shard_ids)
    shown = -1

    def tell() -> None:
        nonlocal shown
        count = len(store.committed(teacher))
        if count != shown:
            shown = count
            end = "" if stream.isatty() and count < total else "\n"
            start = "\r" if stream.isatty() else ""
            print(f"{start}{teacher} {count}/{total} shards", end=end, file=stream, flush=True)

    yield tell
    tell()
