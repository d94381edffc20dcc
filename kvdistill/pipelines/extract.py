"""Stage 1: every teacher reads every shard once, and the store remembers.

The truth is the store's folders: a shard is done when it is committed. So running again does
nothing, a killed run is completed by running it again, and any number of processes may work at
once: task ``i`` of ``n`` owns shards ``u % n == i``, and of two copies the first wins.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kvdistill.config.experiment import Experiment
from kvdistill.errors import ConfigError, Interrupted
from kvdistill.extract.extract_shard import ExtractedShard, extract_samples
from kvdistill.extract.teacher import Teacher, load_teacher
from kvdistill.pipelines.stored import is_done, prepare
from kvdistill.store.prototypes import make_prototypes
from kvdistill.store.reader import KVStore
from kvdistill.store.writer import add_teacher, publish_shard


@dataclass(frozen=True)
class Progress:
    """Told after every batch and every shard."""

    teacher: str
    shard_id: str
    shards_done: int
    shards_total: int
    """Shards this task owns for this teacher, committed ones included."""
    tokens: int
    """Tokens read since the last word."""
    committed: bool
    """True when this is word of a shard that was just published."""


@dataclass(frozen=True)
class TeacherReport:
    """What one run did for one teacher."""

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
    skipped: int = 0

    @property
    def done(self) -> int:
        """Shards of this task's share that are there."""
        return self.shards + self.duplicates + self.already_done


@dataclass(frozen=True)
class ExtractionReport:
    """What one run did."""

    store: Path
    teachers: tuple[TeacherReport, ...] = ()
    missing: dict[str, int] = field(default_factory=dict)
    """Shards still missing per teacher, other tasks' shares included."""

    @property
    def complete(self) -> bool:
        """Whether every teacher has every shard."""
        return not any(self.missing.values())


OnProgress = Callable[[Progress], None]


ShouldStop = Callable[[], bool]


def extract(
    experiment: Experiment,
    teachers: Sequence[str] | None = None,
    task: int = 0,
    num_tasks: int = 1,
    *,
    progress: OnProgress | None = None,
    should_stop: ShouldStop | None = None,
) -> ExtractionReport:
    """Extract all missing shards that this task owns, teacher by teacher.

    Raises:
        ConfigError: an unknown teacher, or a task outside ``0 <= task < num_tasks``.
        TeacherError, CorpusError, StoreError: see ``load_teacher``, ``prepare``, ``publish_shard``.
        Interrupted: ``should_stop`` said so; everything published so far stays.
    """
    if not 0 <= task < num_tasks:
        raise ConfigError(f"task {task} of {num_tasks}: expected 0 <= task < num_tasks")
    names = _names(experiment, teachers)
    store = prepare(experiment)
    run = _Run(store, experiment, progress, should_stop)
    owned = store.shard_ids[task::num_tasks]
    reports = tuple(_extract_teacher(run, name, owned) for name in names)
    missing = {name: len(store.missing(name)) for name in names}
    return ExtractionReport(store.paths.root, reports, missing)


def open_teacher(store: KVStore, experiment: Experiment, name: str) -> Teacher:
    """Load a teacher and register it in the store.

    Raises:
        TeacherError: it cannot be loaded or verified.
        StoreMismatch: the store holds another extraction under this name.
    """
    teacher = load_teacher(name, experiment)
    add_teacher(store, teacher.manifest)
    return teacher


def extract_shard(
    store: KVStore,
    experiment: Experiment,
    teacher: Teacher,
    shard_id: str,
    *,
    on_batch: Callable[[int], None] | None = None,
    attempt: dict[str, Any] | None = None,
) -> tuple[ExtractedShard, bool]:
    """Read one shard with one teacher and publish it; False if another copy was first.

    Raises:
        TeacherError: a sample cannot be read by this teacher.
        NonFiniteError: NaN or infinity; names layer, head and sample.
        StoreError: nothing could be written; nothing was published.
    """
    extracted = read_shard(store, experiment, teacher, shard_id, on_batch=on_batch)
    return extracted, publish(store, experiment, teacher, shard_id, extracted, attempt=attempt)


def read_shard(
    store: KVStore,
    experiment: Experiment,
    teacher: Teacher,
    shard_id: str,
    *,
    on_batch: Callable[[int], None] | None = None,
) -> ExtractedShard:
    """Read one shard with one teacher, and publish nothing."""
    return extract_samples(
        teacher,
        store.samples(shard_id),
        batch_tokens=experiment.extraction.batch_tokens,
        long_text=experiment.extraction.long_text,
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
    """Publish a shard that was read; the last one of a teacher also makes its prototypes."""
    name = teacher.manifest.name
    published = publish_shard(
        store,
        name,
        shard_id,
        extracted.shard,
        extracted.statistics,
        seconds=extracted.seconds,
        attempt={
            "truncated": list(extracted.truncated),
            "skipped": list(extracted.skipped),
            **(attempt or {}),
        },
    )
    if teacher.manifest.has_summaries and not store.missing(name):
        make_prototypes(store, name, experiment.extraction.prototypes)
    return published


@dataclass(frozen=True)
class _Run:
    store: KVStore
    experiment: Experiment
    progress: OnProgress | None
    should_stop: ShouldStop | None

    def check_stop(self) -> None:
        if self.should_stop is not None and self.should_stop():
            raise Interrupted(
                f"asked to stop; finished shards stay in {self.store.paths.root}: run the same "
                "command again to continue"
            )

    def tell(self, teacher: str, shard_id: str, done: int, total: int) -> Callable[..., None]:
        def tell(tokens: int, committed: bool = False) -> None:
            if self.progress is not None:
                now = done + committed
                self.progress(Progress(teacher, shard_id, now, total, tokens, committed))

        return tell


def _extract_teacher(run: _Run, name: str, owned: Sequence[str]) -> TeacherReport:
    store, experiment = run.store, run.experiment
    pending = [shard_id for shard_id in owned if not is_done(store, experiment, name, shard_id)]
    report = TeacherReport(name, already_done=len(owned) - len(pending))
    if not pending:
        return report
    teacher = open_teacher(store, experiment, name)
    started = time.monotonic()
    waiting: deque[tuple[str, ExtractedShard, Future[bool]]] = deque()
    # Compressing and writing run beside the next shard's forward passes; a shard that waits
    # holds its codes in memory, so few may wait.
    with ThreadPoolExecutor(experiment.extraction.writers) as pool:
        for shard_id in pending:
            run.check_stop()
            tell = run.tell(name, shard_id, report.done, len(owned))
            extracted = read_shard(store, experiment, teacher, shard_id, on_batch=tell)
            task = pool.submit(publish, store, experiment, teacher, shard_id, extracted)
            waiting.append((shard_id, extracted, task))
            while waiting and (len(waiting) > experiment.extraction.writers or _is_over(waiting)):
                report = _settle(run, report, waiting, len(owned))
        while waiting:
            report = _settle(run, report, waiting, len(owned))
    return replace(report, seconds=time.monotonic() - started)


def _is_over(waiting: deque[tuple[str, ExtractedShard, Future[bool]]]) -> bool:
    return waiting[0][2].done()


def _settle(
    run: _Run,
    report: TeacherReport,
    waiting: deque[tuple[str, ExtractedShard, Future[bool]]],
    total: int,
) -> TeacherReport:
    """Wait for the shard that was handed over first, and count it."""
    shard_id, extracted, task = waiting.popleft()
    published = task.result()
    run.tell(report.teacher, shard_id, report.done, total)(0, committed=True)
    return replace(
        report,
        shards=report.shards + published,
        duplicates=report.duplicates + (not published),
        tokens=report.tokens + extracted.num_read,
        truncated=report.truncated + len(extracted.truncated),
        skipped=report.skipped + len(extracted.skipped),
    )


def _names(experiment: Experiment, teachers: Sequence[str] | None) -> list[str]:
    names = list(experiment.teachers) if teachers is None else list(dict.fromkeys(teachers))
    unknown = [name for name in names if name not in experiment.teachers]
    if unknown or not names:
        raise ConfigError(
            f"no teacher {unknown or ''}; the config has {sorted(experiment.teachers)}"
        )
    return names
