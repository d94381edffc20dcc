"""Extraction as tasks: one shard of one teacher is a unit, and the store decides what is done.

A pool on this machine, Slurm arrays and written scripts run the same workload over the same folder,
so they may be mixed: a shard that a pool has extracted is not submitted, and the next command
extracts what an array left. Nothing here imports torch; the workload is ``extract.ExtractionWork``.
"""

from __future__ import annotations

import dataclasses
import shlex
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvdistill.config.base import log, log_once
from kvdistill.config.experiment import Experiment
from kvdistill.config.extraction import TeacherConfig
from kvdistill.config.load import dump_experiment
from kvdistill.config.slurm import SlurmProfile
from kvdistill.corpus.readers import load_corpus
from kvdistill.corpus.samples import Sample, cut_into_shards
from kvdistill.errors import ConfigError, Interrupted, KVDistillError, StoreMismatch, StoreNotFound
from kvdistill.slurm import client
from kvdistill.slurm.heartbeat import is_alive
from kvdistill.slurm.ledger import Ledger
from kvdistill.slurm.local_pool import run_pool
from kvdistill.slurm.retry import is_quarantined
from kvdistill.slurm.submit import batch_script, element_id, python_command, submit_array
from kvdistill.slurm.task import Ending, Task, owned_units, partition_round_robin, write_once
from kvdistill.slurm.worker import work
from kvdistill.store.bucket import local_folder
from kvdistill.store.commit import sweep
from kvdistill.store.format import StorePaths
from kvdistill.store.identity import (
    as_stored,
    differences,
    recorded_settings,
    refusal,
    teacher_files,
)
from kvdistill.store.reader import KVStore
from kvdistill.store.writer import create
from kvdistill.text import shorten

TARGET: Final = "kvdistill.pipelines.extract:extraction_work"
MODULE: Final = ("-m", "kvdistill.cli")


def prepare_store(experiment: Experiment) -> KVStore:
    """Create the store of an experiment's corpus, or open the one that is there.

    No teacher is loaded: each registers itself when its first shard is extracted.

    Raises:
        CorpusError: the corpus is missing, empty or malformed.
        ConfigError: a teacher reads a part that the corpus does not have.
        StoreMismatch: the store was made from another corpus, or cut differently.
    """
    shards = list(cut_into_shards(texts_to_extract(experiment), experiment.corpus.shard_chars))
    return to_extract(create(experiment.store, shards), experiment)


def to_extract(store: KVStore, experiment: Experiment) -> KVStore:
    """The shards that stage 1 has to make: all, or the first ones where teachers teach live."""
    if experiment.kv_source == "store":
        return store
    return store.only(live_shards(experiment, ((i, store.samples(i)) for i in store.shard_ids)))


def live_shards(
    experiment: Experiment, shards: Iterable[tuple[str, Sequence[Sample]]]
) -> list[str]:
    """The first shards with enough texts of every live teacher for its statistics and a pilot."""
    wanted = dict.fromkeys(experiment.teachers, 8 * experiment.projection.pilot_batches)
    first = []
    for shard_id, samples in shards:
        if not wanted:
            break
        parts = {name: experiment.teachers[name].parts for name in wanted}
        found = {name: sum(x.is_of(part) for x in samples) for name, part in parts.items()}
        if any(found.values()):
            first.append(shard_id)
        wanted = {name: num - found[name] for name, num in wanted.items() if num > found[name]}
    return first


def texts_to_extract(experiment: Experiment) -> list[Sample]:
    """The corpus but for what is held out.

    Raises:
        CorpusError, ConfigError: as ``prepare_store``.
    """
    samples = load_corpus(experiment.corpus).train
    tasks = {sample.task for sample in samples} - {None}
    for name, teacher in experiment.teachers.items():
        if unknown := sorted({*(teacher.parts or ())} - tasks):
            raise ConfigError(
                f"teachers.{name}.parts: no text of the corpus has task {unknown[0]!r}; its tasks "
                f"are {sorted(filter(None, tasks)) or 'none'}"
            )
    return samples


def open_store(experiment: Experiment) -> KVStore:
    """Open the store without reading the corpus again; create it if there is none."""
    try:
        return to_extract(KVStore.open(experiment.store), experiment)
    except StoreNotFound:
        return prepare_store(experiment)


def other_extraction(
    store: KVStore, experiment: Experiment, name: str, *, model: bool = True
) -> str | None:
    """How a teacher's stored shards differ from the config's, as a message; None if they do not.

    Settings are compared and, unless not ``model``, the files of the model: weights by checksum,
    config and tokenizer by what they mean. A model that is not on this machine is trusted.
    """
    if not store.has_teacher(name):
        return None
    settings = recorded_settings(as_stored(experiment, store.teacher(name)), name)
    date = experiment.teachers[name].template_date
    requested = {
        "settings": settings,
        **{key: settings[key] for key in ("dtype", "codec")},
        "backend": experiment.extraction.backend,
        "template_date": None if date is None else date.isoformat(),
    }
    found = differences(store, name, requested)
    found = found or (_other_model(store, name, experiment.teachers[name]) if model else [])
    return refusal(store, name, found) if found else None


def _other_model(store: KVStore, name: str, config: TeacherConfig) -> list[str]:
    stored = store.teacher(name)
    there = stored.model_files or {}
    names = f"model: stored {stored.model!r}, requested {config.model!r}"
    try:
        here = teacher_files(config, there)
        if config.weights == "trained" and not {"weights"} <= here.keys() & there.keys():
            renamed = (stored.model, stored.revision) != (config.model, config.revision)
            (log_once if renamed else log.info)(f"teacher {name!r}: weights not compared; {names}")
        elif here.get("weights") != there.get("weights"):
            return [f"{names}, whose weights are other ones"]
        if "other" not in here or here["other"] == there.get("other"):
            return []
        from kvdistill.extract.teacher import facts_without_weights  # not above: it imports torch

        return differences(store, name, facts_without_weights(name, config, stored.template_date))
    except (KVDistillError, OSError, ValueError, LookupError) as error:  # half a model
        log_once(f"teacher {name!r} is not compared with {names}: {shorten(str(error))}")
        return []


def extraction_ledger(experiment: Experiment, teacher: str) -> Ledger:
    """The ledger of a teacher's tasks: inside the store, its jobs beside the user's own runs."""
    jobs = experiment.output_dir.absolute() / f"{experiment.name}.slurm" / f"extract-{teacher}"
    return Ledger(StorePaths(local_folder(experiment.store).absolute()).teacher(teacher), jobs)


def clear_debris(store: KVStore, experiment: Experiment, teacher: str) -> None:
    """Once a teacher has all shards, remove what killed workers left: staged files, claims."""
    if store.missing(teacher):
        return
    paths, ledger = store.paths, extraction_ledger(experiment, teacher)
    own = paths.teacher(teacher), paths.temporary(teacher)
    for folder in (paths.root, paths.root / "tmp", *own):
        sweep(folder)
    sweep(paths.root.absolute().parent, f".{paths.root.name}.")
    ledger.sweep()
    live = {attempt.attempt_id for attempt in ledger.attempts() if is_alive(attempt)}
    for unit, holder in ledger.claims().items():
        if holder not in live:
            ledger.release(unit, holder)


def freeze(experiment: Experiment, folder: Path) -> Path:
    """Write the experiment as it is now, so that later edits change no queued job."""
    return write_once(dump_experiment(experiment), folder, "experiment")


def extraction_tasks(
    experiment: Experiment,
    teacher: str,
    units: tuple[str, ...],
    num_tasks: int,
    warning_seconds: float = 120.0,
) -> list[Task]:
    """Partition shards of one teacher among ``num_tasks`` tasks, or as many as there are shards."""
    ledger = extraction_ledger(experiment, teacher)
    arguments = {"config": str(freeze(experiment, ledger.open_jobs())), "teacher": teacher}
    task = Task(
        TARGET, arguments, ledger.folder, units,
        warning_seconds=warning_seconds, jobs_folder=ledger.jobs_folder,
    )  # fmt: skip
    return partition_round_robin(task, num_tasks)


@dataclass(frozen=True)
class PendingShards:
    """What one teacher lacks."""

    units: tuple[str, ...]
    """Missing shards that are neither queued nor quarantined."""
    queued: tuple[str, ...]
    """Missing shards that a queued or running array element owns."""
    quarantined: tuple[str, ...]


def pending_shards(experiment: Experiment, teacher: str, ask_slurm: bool) -> PendingShards:
    """Determine what one teacher lacks. Creates the store if there is none.

    Raises:
        StoreMismatch: the teacher was extracted differently; raised here once rather than by
            every task.
    """
    store = prepare_store(experiment)
    if (other := other_extraction(store, experiment, teacher)) is not None:
        raise StoreMismatch(other)
    missing = store.missing(teacher)
    ledger = extraction_ledger(experiment, teacher)
    in_queue = units_in_queue(ledger) if ask_slurm else set()
    failed = {unit for unit in ledger.failed_units() if is_quarantined(ledger, unit)}
    return PendingShards(
        units=tuple(u for u in missing if u not in in_queue and u not in failed),
        queued=tuple(u for u in missing if u in in_queue),
        quarantined=tuple(u for u in missing if u in failed and u not in in_queue),
    )


def units_in_queue(ledger: Ledger) -> set[str]:
    """Units that a queued or running array element owns."""
    submissions = ledger.submissions()
    if not submissions or not client.is_available():
        return set()
    queued = client.queue(submission.job_id for submission in submissions)
    return {
        unit
        for job in submissions
        for index, units in enumerate(job.elements)
        if element_id(job.job_id, index, len(job.elements)) in queued
        for unit in units
    }


def extract_pool(
    experiment: Experiment, teacher: str, workers: int, on_poll: Callable[[int, int], None]
) -> tuple[int, list[str]]:
    """Extract what one teacher lacks with several worker processes on this machine.

    ``on_poll`` is called a few times a second with the number of committed and of all shards.

    Returns:
        Number of missing shards, quarantined ones included, and the distinct messages of workers
        that could not start and of failed shards.

    Raises:
        Interrupted: a signal stopped the workers; committed shards stay.
    """
    began = time.time()
    pending = pending_shards(experiment, teacher, ask_slurm=False)
    store = open_store(experiment)

    def poll() -> None:
        on_poll(len(store.committed(teacher)), len(store.shard_ids))

    ending = Ending("complete", "nothing to do")
    if pending.units:
        tasks = extraction_tasks(experiment, teacher, pending.units, workers)
        ending = run_pool(tasks, on_poll=poll)
    poll()
    if ending.outcome == "interrupted":
        raise Interrupted(f"{ending.message}; run the same command again to continue")
    ledger = extraction_ledger(experiment, teacher)
    failed = [a for a in ledger.attempts() if a.started >= began and a.outcome == "failed"]
    failures = [f for found in ledger.failed_units().values() for f in found if f.time >= began]
    messages = dict.fromkeys([*(str(a.message) for a in failed), *(f.message for f in failures)])
    clear_debris(store, experiment, teacher)
    return len(store.missing(teacher)), list(messages)


def extract_share(
    experiment: Experiment, teacher: str, task: int, num_tasks: int, workers: int
) -> Ending:
    """Extract one task's share of all shards on this machine, as written scripts do."""
    shard_ids = open_store(experiment).shard_ids
    whole = extraction_tasks(experiment, teacher, shard_ids, 1)[0]
    owned = owned_units(shard_ids, task, num_tasks)
    share = dataclasses.replace(whole, units=owned, task=task, num_tasks=num_tasks)
    return work(share) if workers == 1 else run_pool(partition_round_robin(share, workers))


def submit_extraction(
    experiment: Experiment, teachers: Sequence[str], profile: SlurmProfile
) -> dict[str, tuple[PendingShards, list[str], int]]:
    """Submit one array per teacher over its missing shards.

    Returns:
        By teacher: what it lacks, the ids of its jobs, and the number of their array elements.

    Raises:
        SlurmError: no Slurm here, or it refused.
        CorpusError, StoreError: the store cannot be created or opened.
    """
    client.require()
    submitted = {}
    for teacher in teachers:
        pending = pending_shards(experiment, teacher, ask_slurm=True)
        clear_debris(KVStore.open(experiment.store), experiment, teacher)
        warning = float(profile.signal_delay_s)
        count = num_array_tasks(profile)
        tasks = extraction_tasks(experiment, teacher, pending.units, count, warning)
        ids = submit_array(tasks, profile, f"kv-{teacher}") if pending.units else []
        submitted[teacher] = (pending, ids, len(tasks))
    return submitted


def num_array_tasks(profile: SlurmProfile) -> int:
    """Array elements per teacher (or per study)."""
    return profile.tasks or profile.array_parallelism


def extraction_script(
    experiment: Experiment, teacher: str, profile: SlurmProfile, config: Path
) -> str:
    """A batch script of one teacher's array, to be submitted by hand."""
    profile = profile.model_copy(update={"nodes": 1})
    count = num_array_tasks(profile)
    arguments = ["-u", *MODULE, "extract", str(config.absolute()), "--teacher", teacher]
    workers = f" --workers={profile.workers}" if profile.workers > 1 else ""
    command = (
        f"{python_command(profile)} {shlex.join(arguments)} "
        f"--task=$SLURM_ARRAY_TASK_ID --num-tasks={count}{workers}"
    )
    ledger = extraction_ledger(experiment, teacher)
    return batch_script(profile, f"kv-{teacher}", command, ledger, elements=count)
