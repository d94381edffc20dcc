"""Extraction, then training, as one command: in this process, on Slurm, or as batch scripts.

On Slurm the arrays come first and a training job starts when all of them have ended, however they
ended; training itself refuses an incomplete store (exit code 3).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from kvdistill.config.experiment import Experiment
from kvdistill.config.slurm import SlurmProfile
from kvdistill.errors import ConfigError
from kvdistill.pipelines.extract_tasks import (
    MODULE,
    extraction_ledger,
    extraction_script,
    freeze,
    open_store,
    prepare_store,
)
from kvdistill.slurm import client
from kvdistill.slurm.launch import Launch
from kvdistill.slurm.ledger import Ledger, Submission
from kvdistill.slurm.submit import batch_script, python_command, submit_job
from kvdistill.store.commit import replace_file

if TYPE_CHECKING:
    from kvdistill.pipelines.extract import ExtractionReport, OnProgress
    from kvdistill.pipelines.train import TrainingReport


def run(
    experiment: Experiment,
    progress: AbstractContextManager[OnProgress],
    on_extracted: Callable[[ExtractionReport], None],
) -> TrainingReport:
    """Extract with every teacher, then train, in this process. Both skip what is done.

    Raises:
        StudentError: the student cannot be trained; found before anything is extracted.
        MissingExtra: a tracker of ``report_to`` is not installed; found before that, too.
        KVDistillError: see ``extract`` and ``train``.
    """
    # Not above: these import torch, which a submission does without.
    from kvdistill.distill.train.set_up import trackers
    from kvdistill.pipelines.extract import extract
    from kvdistill.pipelines.train import require_trainable_student, train

    trackers(experiment)
    require_trainable_student(experiment)
    if experiment.teachers:
        with progress as on_progress:
            report = extract(experiment, progress=on_progress)
        on_extracted(report)
    else:
        prepare_store(experiment)  # the corpus alone: cross-entropy needs no teacher
    return train(experiment)


def choose_profile(experiment: Experiment, name: str | None, role: str) -> SlurmProfile:
    """The profile ``name``, or the config's own for ``role`` (``extract`` or ``train``).

    Raises:
        ConfigError: there is no such profile, or none at all.
    """
    profiles = experiment.slurm.profiles
    chosen = name or getattr(experiment.slurm, role) or next(iter(profiles), None)
    if chosen is None:
        raise ConfigError("the config has no slurm.profiles; add one, docs/slurm.md shows how")
    if chosen not in profiles:
        raise ConfigError(f"no profile {chosen!r}; slurm.profiles has {sorted(profiles)}")
    return profiles[chosen]


def batch_scripts(
    experiment: Experiment,
    config: Path,
    teachers: Sequence[str],
    profile: str | None,
    *,
    train: bool,
) -> dict[str, str]:
    """Batch scripts by file name: one array per teacher, and the training job if ``train``."""
    extracting = choose_profile(experiment, profile, "extract")
    scripts = {
        f"extract-{name}.sbatch": extraction_script(experiment, name, extracting, config)
        for name in teachers
    }
    if train:
        training = choose_profile(experiment, profile, "train")
        launch = training_launch(training, str(config.absolute()))
        python = python_command(training)
        command = f"{python} -u -m kvdistill.slurm.launch {launch.to_shell()}"
        ledger, name = training_ledger(experiment), f"kv-train-{experiment.name}"
        scripts["train.sbatch"] = batch_script(training, name, command, ledger)
    return scripts


def write_scripts(
    experiment: Experiment, scripts: dict[str, str], teachers: Sequence[str], folder: Path
) -> None:
    """Write batch scripts, and what they need: the store's plan, and folders for their logs."""
    open_store(experiment)
    ledgers = [extraction_ledger(experiment, name) for name in teachers]
    for ledger in (*ledgers, training_ledger(experiment)):
        ledger.open_jobs()  # Slurm loses the log of a missing folder
    for name, text in scripts.items():
        replace_file(folder / name, text)


def training_ledger(experiment: Experiment) -> Ledger:
    """The ledger of the training job, beside the run's folder."""
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


def submit_training(
    experiment: Experiment, profile: SlurmProfile, after: Sequence[str] = ()
) -> str:
    """Submit the training job, to start when all jobs of ``after`` have ended, however they ended.

    Returns:
        The job id.
    """
    ledger = training_ledger(experiment)
    launch = training_launch(profile, str(freeze(experiment, ledger.open_jobs())))
    name = f"kv-train-{experiment.name}"
    dependency = client.afterany(after) if after else None
    job_id = submit_job([launch], profile, name, ledger, dependency)
    ledger.record_submission(Submission(job_id, name, time.time(), (("training",),)))
    return job_id


def ensure_training(
    experiment: Experiment, teachers: Sequence[str], profile: str | None, arrays: Sequence[str]
) -> str:
    """Submit training behind ``arrays`` and earlier arrays, unless it is queued; describes the job.

    Two jobs on one run folder would overwrite each other's checkpoints: a pending one gets the
    new dependency instead, a running one is left alone.
    """
    ledgers = [extraction_ledger(experiment, name) for name in teachers]
    ids = {job.job_id for ledger in ledgers for job in ledger.submissions()}
    after = sorted({*arrays, *(job.partition("_")[0] for job in client.queue(ids))})
    earlier = [job.job_id for job in training_ledger(experiment).submissions()]
    queued = list(client.queue(earlier).values())
    if not queued:
        job_id = submit_training(experiment, choose_profile(experiment, profile, "train"), after)
        return f"job {job_id}, after all of the above have ended" if after else f"job {job_id}"
    job = queued[-1]
    if job.state == "PENDING" and after:
        client.depend(job.job, after)
        return f"job {job.job} is already queued and waits for all of the above"
    return f"job {job.job} is already {job.state.lower()}"
