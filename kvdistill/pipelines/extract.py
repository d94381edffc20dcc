"""Stage 1: every teacher reads every shard once, and the store keeps the result.

A shard is done when it is committed in the store. So running again does nothing, a killed run is
completed by running it again, and any number of processes may work at once (``extract_tasks``):
of two copies the first wins.
"""

from __future__ import annotations

import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final

import torch

from kvdistill.config.experiment import Experiment
from kvdistill.config.load import load_experiment
from kvdistill.errors import ConfigError, Interrupted, StoreMismatch
from kvdistill.extract.encode import fit_bases
from kvdistill.extract.extract_shard import ExtractedShard, extract_samples
from kvdistill.extract.teacher import Teacher, load_teacher
from kvdistill.pipelines.extract_tasks import clear_debris, other_extraction, prepare_store
from kvdistill.slurm.heartbeat import job_element
from kvdistill.store.commit import discard
from kvdistill.store.derived import load_transforms, published_bases
from kvdistill.store.identity import as_stored
from kvdistill.store.prototypes import teacher_prototypes
from kvdistill.store.reader import KVStore
from kvdistill.store.writer import add_teacher, publish_shard

PILOT_SHARDS: Final = 16
"""Shards, evenly spaced, whose texts codec klt is fitted on."""


@dataclass(frozen=True)
class Progress:
    """Reported after every batch and every committed shard."""

    teacher: str
    shard_id: str
    shards_done: int
    shards_total: int
    tokens: int
    """Tokens read since the last report."""
    committed: bool
    """Whether ``shard_id`` was just committed."""


OnProgress = Callable[[Progress], None]


@dataclass
class TeacherReport:
    """What one run did for one teacher; counts grow as shards are published."""

    teacher: str
    shards: int = 0
    """Shards published by this run."""
    already_done: int = 0
    duplicates: int = 0
    """Shards that another process published while this run read them."""
    tokens: int = 0
    seconds: float = 0.0
    """Wall time of reading, encoding and writing, without loading the teacher."""
    truncated: int = 0
    windowed: int = 0
    skipped: int = 0

    @property
    def done(self) -> int:
        """Committed shards."""
        return self.shards + self.duplicates + self.already_done


@dataclass(frozen=True)
class ExtractionReport:
    """What one run did."""

    store: str
    teachers: tuple[TeacherReport, ...] = ()
    missing: dict[str, int] = field(default_factory=dict)
    """Shards still missing, per teacher."""

    @property
    def complete(self) -> bool:
        """Whether every teacher has every shard."""
        return not any(self.missing.values())


def extract(
    experiment: Experiment,
    teachers: Sequence[str] | None = None,
    *,
    progress: OnProgress = lambda news: None,
) -> ExtractionReport:
    """Extract all missing shards in this process, teacher by teacher.

    Raises:
        ConfigError: the config has no such teacher.
        TeacherError, CorpusError, StoreError: see ``load_teacher``, ``prepare_store`` and
            ``publish_shard``. Shards published earlier stay.
    """
    names = list(experiment.teachers if teachers is None else dict.fromkeys(teachers))
    unknown = [name for name in names if name not in experiment.teachers]
    if unknown or not names:
        raise ConfigError(
            f"no teacher {unknown or ''}; the config has {sorted(experiment.teachers)}"
        )
    store = prepare_store(experiment)
    reports = tuple(_extract_teacher(store, experiment, name, progress) for name in names)
    missing = {name: len(store.missing(name)) for name in names}
    return ExtractionReport(store.where, reports, missing)


def _extract_teacher(
    store: KVStore, experiment: Experiment, name: str, progress: OnProgress
) -> TeacherReport:
    total, pending = len(store.shard_ids), store.missing(name)
    report = TeacherReport(name, already_done=total - len(pending))
    if not pending and other_extraction(store, experiment, name) is None:
        clear_debris(store, experiment, name)
        return report
    teacher = open_teacher(store, experiment, name)  # which compares what is loaded
    if teacher.is_sharded:
        (pending,) = _of_first([pending])
    started = time.monotonic()
    writing: deque[tuple[str, ExtractedShard, Future[bool]]] = deque()

    def finish_oldest() -> None:
        shard_id, extracted, task = writing.popleft()
        published = task.result()
        report.shards += published
        report.duplicates += not published
        report.tokens += extracted.num_read
        report.truncated += len(extracted.truncated)
        report.windowed += len(extracted.windowed)
        report.skipped += len(extracted.skipped)
        progress(Progress(name, shard_id, report.done, total, 0, committed=True))

    # Shards are compressed and written while the next one is read; a waiting shard holds its
    # codes in memory, so few may wait.
    writers = experiment.extraction.writers
    with ThreadPoolExecutor(writers) as pool:
        for shard_id in pending:

            def on_batch(tokens: int, shard_id: str = shard_id, done: int = report.done) -> None:
                progress(Progress(name, shard_id, done, total, tokens, committed=False))

            extracted = read_shard(store, experiment, teacher, shard_id, on_batch=on_batch)
            task = pool.submit(publish, store, experiment, teacher, shard_id, extracted)
            writing.append((shard_id, extracted, task))
            while len(writing) > writers or (writing and writing[0][2].done()):
                finish_oldest()
        while writing:
            finish_oldest()
    if teacher.is_sharded:
        _of_first([None])  # its shards are written
    report.seconds = time.monotonic() - started
    clear_debris(store, experiment, name)
    return report


def _of_first(found: list[Any]) -> list[Any]:
    """What the first of the processes that read a teacher together has found; all wait for it."""
    torch.distributed.broadcast_object_list(found)
    return found


def open_teacher(store: KVStore, experiment: Experiment, name: str) -> Teacher:
    """Load a teacher and register it in the store.

    Raises:
        TeacherError: it cannot be loaded or verified.
        StoreMismatch: the store holds another extraction under this name.
    """
    if (other := other_extraction(store, experiment, name, model=False)) is not None:
        raise StoreMismatch(other)  # before hours of loading
    day, is_known = _recorded_date(store, name), store.has_teacher(name)
    known = as_stored(experiment, store.teacher(name)) if is_known else experiment
    teacher = _with_transforms(store, experiment, load_teacher(name, known, day))
    try:
        add_teacher(store, teacher.manifest)
    except StoreMismatch:
        in_its_own = experiment.teachers[name].dtype == "auto" and not is_known
        if _recorded_date(store, name) == day and not in_its_own:
            raise
        # Another process has registered the teacher meanwhile, on another day or device.
        return open_teacher(store, experiment, name)
    return teacher


def _with_transforms(store: KVStore, experiment: Experiment, teacher: Teacher) -> Teacher:
    """The teacher with its codecs, if it is stored in ``klt``: fitted once, by the first task.

    Raises:
        ShardCorrupt: a registered teacher's file of bases is missing or damaged.
    """
    manifest, name = teacher.manifest, teacher.manifest.name
    if not manifest.codec.transforms:
        return teacher
    if store.has_teacher(name):
        checksum = store.teacher(name).transform
    else:
        spread = store.shard_ids[:: max(1, len(store.shard_ids) // PILOT_SHARDS)]
        samples = itertools.chain.from_iterable(map(store.samples, spread))
        origin = f"{manifest.extraction_fingerprint} {manifest.weights_fingerprint}"
        fit = partial(fit_bases, teacher, samples, experiment.extraction.batch_tokens)
        checksum = published_bases(store.place, name, origin, fit)
    manifest = manifest.model_copy(update={"transform": checksum})
    transforms = load_transforms(store.place, manifest)
    return replace(teacher, manifest=manifest, transforms=transforms)


def _recorded_date(store: KVStore, name: str) -> date | None:
    """The date that a stored teacher's chat template printed, if any."""
    known = store.has_teacher(name)
    recorded = store.teacher(name).template_date if known else None
    return None if recorded is None else date.fromisoformat(recorded)


def read_shard(
    store: KVStore,
    experiment: Experiment,
    teacher: Teacher,
    shard_id: str,
    *,
    on_batch: Callable[[int], None] | None = None,
) -> ExtractedShard:
    """Read one shard with one teacher, without publishing it.

    Raises:
        TeacherError: this teacher cannot read a sample.
        NonFiniteError: NaN or infinity; names layer, head and sample.
    """
    return extract_samples(
        teacher,
        store.samples(shard_id),
        batch_tokens=experiment.extraction.batch_tokens,
        on_batch=on_batch,
    )


def publish(
    store: KVStore,
    experiment: Experiment,
    teacher: Teacher,
    shard_id: str,
    extracted: ExtractedShard,
    *,
    attempt: dict[str, Any] | None = None,
) -> bool:
    """Publish a shard; the last one of a teacher also gives its prototypes.

    Of the processes that read a teacher together, the first publishes.

    Returns:
        False if another process published the shard first.

    Raises:
        StoreError: the shard could not be written; nothing was published.
    """
    name = teacher.manifest.name
    if teacher.is_sharded and torch.distributed.get_rank() > 0:
        return True  # by the first
    published = publish_shard(
        store,
        name,
        shard_id,
        extracted.shard,
        extracted.statistics,
        seconds=extracted.seconds,
        attempt={
            "truncated": list(extracted.truncated),
            "windowed": list(extracted.windowed),
            "skipped": list(extracted.skipped),
            **(attempt or {}),
        },
    )
    if teacher.manifest.has_summaries and not store.missing(name):
        teacher_prototypes(store, name, experiment.extraction.prototypes)
    return published


class ExtractionWork:
    """The workload: one teacher reading shards. ``prepare`` loads the teacher."""

    def __init__(self, experiment: Experiment, teacher: str) -> None:
        if experiment.teachers[teacher].tp_plan is not None:
            raise ConfigError(
                f"teachers.{teacher}.tp_plan: its processes read every shard together; use "
                "`torchrun … extract` without --workers, --task and Slurm arrays"
            )
        self._experiment = experiment
        self._name = teacher
        # Opened, not created: compute nodes may reach neither the corpus nor the hub.
        self._store = KVStore.open(experiment.store)

    @cached_property
    def _teacher(self) -> Teacher:
        return open_teacher(self._store, self._experiment, self._name)

    def is_done(self, unit: str) -> bool:
        """Whether the shard is committed, with the settings of the config. Reads no model."""
        store, name = self._store, self._name
        is_there = store.is_committed(name, unit)
        return is_there and other_extraction(store, self._experiment, name, model=False) is None

    def prepare(self) -> None:
        """Load and verify the teacher."""
        _ = self._teacher

    def run(self, unit: str, should_stop: Callable[[], bool]) -> int:
        """Read and publish one shard; returns its tokens. Stops between two batches."""

        def check_stop(_tokens: int) -> None:
            if should_stop():
                raise Interrupted(f"shard {unit} of {self._name} abandoned")

        check_stop(0)
        job = job_element(os.environ)
        read = (self._store, self._experiment, self._teacher, unit)
        extracted = read_shard(*read, on_batch=check_stop)
        publish(*read, extracted, attempt={} if job is None else {"job": job})
        clear_debris(self._store, self._experiment, self._name)
        return extracted.num_read

    def clear(self, unit: str) -> None:
        """Remove staging folders of a committed shard; their writers can publish no more."""
        for folder in self._store.paths.temporary(self._name).glob(f"{unit}.*"):
            discard(folder)


def extraction_work(config: str, teacher: str) -> ExtractionWork:
    """The target of extraction tasks; ``config`` is a frozen experiment file."""
    return ExtractionWork(load_experiment(Path(config)), teacher)
