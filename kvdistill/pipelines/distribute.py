"""Extraction and training on many processes: a pool here, arrays on Slurm, or scripts to submit.

Every way runs the same worker over the same folder, so they may be mixed: a shard that a pool
has done is not submitted, and what an array left is done by the next command.
"""

from __future__ import annotations

import dataclasses
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvdistill.config.experiment import Experiment
from kvdistill.config.slurm import SlurmProfile
from kvdistill.errors import ConfigError, StoreMismatch, StoreNotFound
from kvdistill.pipelines.extract_tasks import (
    done_units,
    extraction_tasks,
    freeze,
    is_another,
    ledger_of,
)
from kvdistill.pipelines.stored import prepare
from kvdistill.slurm import batch_script as script
from kvdistill.slurm import client
from kvdistill.slurm.launch import Launch
from kvdistill.slurm.ledger import Ledger, Submission
from kvdistill.slurm.local_pool import run_pool
from kvdistill.slurm.submit import array_name, split, submit_array, submit_calls
from kvdistill.slurm.task import Ending, Task, owned_units
from kvdistill.slurm.worker import work
from kvdistill.store.reader import KVStore

MODULE = ("-m", "kvdistill.cli")


@dataclass(frozen=True)
class PendingShards:
    """What is to be done for one teacher."""

    teacher: str
    units: tuple[str, ...]
    """Shards that are missing and that nobody has in the queue."""
    queued: tuple[str, ...]
    """Missing shards that a queued or running array element already owns."""
    quarantined: tuple[str, ...]


@dataclass(frozen=True)
class Submitted:
    """Arrays that were submitted for one teacher."""

    plan: PendingShards
    job_ids: tuple[str, ...]
    elements: int


def choose_profile(experiment: Experiment, name: str | None, role: str) -> SlurmProfile:
    """The profile named on the command line, or the config's own for this role.

    Raises:
        ConfigError: there is no such profile, or none to choose.
    """
    profiles = experiment.slurm.profiles
    chosen = name or getattr(experiment.slurm, role) or (next(iter(profiles), None))
    if chosen is None:
        raise ConfigError("the config has no slurm.profiles; add one, docs/slurm.md shows how")
    if chosen not in profiles:
        raise ConfigError(f"no profile {chosen!r}; slurm.profiles has {sorted(profiles)}")
    return profiles[chosen]


def pending_shards(experiment: Experiment, teacher: str, ask_slurm: bool) -> PendingShards:
    """Find out what one teacher still needs. Creates the store if there is none.

    Raises:
        StoreMismatch: the teacher's shards were extracted by other settings; better said here
            than by every task.
    """
    store = prepare(experiment)
    if is_another(store, experiment, teacher):
        raise StoreMismatch(
            f"{experiment.store}: teacher {teacher!r} was extracted by other settings than the "
            "config's (model, layers, template, dtype, codec, backend, …); give the new extraction "
            "another name, restore the settings, or remove the old one with `kvdistill rm`"
        )
    done = done_units(store, experiment, teacher)
    missing = [unit for unit in store.shard_ids if unit not in done]
    ledger = ledger_of(experiment, teacher)
    in_queue = units_in_queue(ledger) if ask_slurm else set()
    failed = {unit for unit in ledger.failed_units() if ledger.is_quarantined(unit)}
    return PendingShards(
        teacher,
        units=tuple(u for u in missing if u not in in_queue and u not in failed),
        queued=tuple(u for u in missing if u in in_queue),
        quarantined=tuple(u for u in missing if u in failed and u not in in_queue),
    )


def queued_jobs(experiment: Experiment, teachers: Sequence[str]) -> list[str]:
    """Ids of earlier arrays of these teachers that have not ended."""
    ids = {job.job_id for name in teachers for job in ledger_of(experiment, name).submissions()}
    return sorted({job.partition("_")[0] for job in client.queue(ids)})


def units_in_queue(ledger: Ledger) -> set[str]:
    """Units that a queued or running array element owns."""
    submissions = ledger.submissions()
    if not submissions or not client.is_available():
        return set()
    living = client.queue(submission.job_id for submission in submissions)
    return {unit for job in submissions for unit in _owned(job, living)}


def _owned(submission: Submission, living: dict[str, client.QueuedJob]) -> list[str]:
    count = len(submission.elements)
    return [
        unit
        for index, units in enumerate(submission.elements)
        if array_name(submission.job_id, index, count) in living
        for unit in units
    ]


def submit_extraction(
    experiment: Experiment, teachers: Sequence[str], profile: SlurmProfile
) -> list[Submitted]:
    """Submit one array per teacher over its missing shards.

    Raises:
        SlurmError: no Slurm here, or it refused.
        CorpusError, StoreError: the plan cannot be made.
    """
    client.require()
    submitted = []
    for teacher in teachers:
        plan = pending_shards(experiment, teacher, ask_slurm=True)
        warning = float(profile.signal_delay_s)
        tasks = extraction_tasks(experiment, teacher, plan.units, num_tasks(profile), warning)
        ids = submit_array(tasks, profile, f"kv-{teacher}") if plan.units else []
        submitted.append(Submitted(plan, tuple(ids), len(tasks) if ids else 0))
    return submitted


def num_tasks(profile: SlurmProfile) -> int:
    """Array elements per teacher."""
    return profile.tasks or profile.array_parallelism


def extract_share(
    experiment: Experiment, teacher: str, task: int, tasks: int, workers: int
) -> Ending:
    """Do one task's share of all shards on this machine; what written scripts call."""
    store = open_store(experiment)
    whole = extraction_tasks(experiment, teacher, store.shard_ids, 1)[0]
    owned = owned_units(store.shard_ids, task, tasks)
    own = dataclasses.replace(whole, units=owned, task=task, num_tasks=tasks)
    return work(own) if workers == 1 else run_pool(split(own, workers))


def open_store(experiment: Experiment) -> KVStore:
    """Open the store, or make it. Where it is there the corpus is not read again."""
    try:
        return KVStore.open(experiment.store)
    except StoreNotFound:
        return prepare(experiment)


def extract_pool(
    experiment: Experiment,
    teacher: str,
    workers: int,
    on_poll: Callable[[], None] | None = None,
) -> Ending:
    """Extract what one teacher is missing with several worker processes on this machine."""
    plan = pending_shards(experiment, teacher, ask_slurm=False)
    if not plan.units:
        return Ending("complete", "nothing to do")
    tasks: list[Task] = extraction_tasks(experiment, teacher, plan.units, workers)
    return run_pool(tasks, on_poll=on_poll)


def submit_training(
    experiment: Experiment, profile: SlurmProfile, after: Sequence[str] = ()
) -> str:
    """Submit the training job, to start when all of ``after`` have ended, however they ended.

    Training itself refuses an incomplete store.
    """
    ledger = training_ledger(experiment)
    frozen = freeze(experiment, ledger.jobs)
    dependency = client.afterany(after) if after else None
    launch = training_launch(profile, str(frozen))
    name = f"kv-train-{experiment.name}"
    job_id = submit_calls([launch], profile, name, ledger, dependency)
    ledger.record_submission(Submission(job_id, name, time.time(), (("training",),)))
    return job_id


def ensure_training(experiment: Experiment, profile: SlurmProfile, after: Sequence[str]) -> str:
    """See to it that exactly one training job waits for ``after``; says which.

    Two jobs on one run folder would spoil each other's checkpoints, so one that is queued is
    told to wait for the new arrays too, and one that runs is left alone.
    """
    earlier = [job.job_id for job in training_ledger(experiment).submissions()]
    living = list(client.queue(earlier).values())
    if not living:
        job_id = submit_training(experiment, profile, after)
        return f"job {job_id}, after all of the above has ended" if after else f"job {job_id}"
    job = living[-1]
    if job.state == "PENDING" and after:
        client.depend(job.job, after)
        return f"job {job.job} is queued already and waits for all of the above"
    return f"job {job.job} is {job.state.lower()} already"


def training_ledger(experiment: Experiment) -> Ledger:
    """Where the training job's scripts and logs go."""
    return Ledger(experiment.output_dir.absolute() / f"{experiment.name}.slurm")


def training_launch(profile: SlurmProfile, config: str) -> Launch:
    """The training job: plain on one process, behind a check and torchrun on several."""
    processes = max(1, profile.gpus_per_node)
    several = profile.nodes * processes > 1
    return Launch(
        command=(*MODULE, "train", config),
        gate=(*MODULE, "status", config, "--check") if several else (),
        nodes=profile.nodes,
        processes_per_node=processes,
        max_restarts=profile.max_restarts,
        patience_seconds=profile.signal_delay_s / 2,
    )


def make_log_folders(experiment: Experiment, teachers: Sequence[str]) -> None:
    """Slurm makes no folder for a log, it just loses it. The store's plan must be there first."""
    open_store(experiment)
    ledgers = [ledger_of(experiment, name) for name in teachers]
    for ledger in (*ledgers, training_ledger(experiment)):
        ledger.jobs.mkdir(parents=True, exist_ok=True)


def extraction_script(
    experiment: Experiment, teacher: str, profile: SlurmProfile, config: Path
) -> str:
    """A batch script of one teacher's array that needs no Python to submit."""
    profile = profile.model_copy(update={"nodes": 1})
    count = num_tasks(profile)
    arguments = [*MODULE, "extract", str(config.absolute()), "--teacher", teacher]
    workers = [f"--workers={profile.workers}"] if profile.workers > 1 else []
    command = " ".join(
        [
            script.python_command(profile),
            shlex.join(["-u", *arguments]),
            f"--task=$SLURM_ARRAY_TASK_ID --num-tasks={count}",
            *workers,
        ]
    )
    jobs = ledger_of(experiment, teacher).jobs
    return script.render(profile, f"kv-{teacher}", command, jobs, elements=count)


def training_script(experiment: Experiment, profile: SlurmProfile, config: Path) -> str:
    """A batch script of the training job."""
    launch = training_launch(profile, str(config.absolute()))
    command = f"{script.python_command(profile)} -u -m kvdistill.slurm.launch {launch.to_shell()}"
    jobs = training_ledger(experiment).jobs
    return script.render(profile, f"kv-train-{experiment.name}", command, jobs)
