"""The runs of a study: what they need of the store, and training them here, in a pool or on Slurm.

A run is one unit of work of ``kvdistill.slurm``; its folder records whether it is done.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import yaml

from kvdistill.errors import ConfigError, IncompleteStore, Interrupted, StoreNotFound
from kvdistill.pipelines.extract_tasks import num_array_tasks, to_extract, units_in_queue
from kvdistill.pipelines.run import choose_profile
from kvdistill.slurm import client
from kvdistill.slurm.ledger import Ledger
from kvdistill.slurm.local_pool import run_pool
from kvdistill.slurm.submit import submit_array
from kvdistill.slurm.task import Task, partition_round_robin, write_once
from kvdistill.store.reader import KVStore
from kvdistill.studies.design import StudyDesign, StudyRun, load_study

TARGET: Final = "kvdistill.studies.runs:ablation_work"


def extract_teachers(design: StudyDesign) -> None:
    """Extract what the store lacks of every teacher that an arm learns from."""
    from kvdistill.pipelines.extract import extract

    experiment = design.experiment_of_all_teachers()
    if experiment.teachers:
        extract(experiment)


def require_teachers(design: StudyDesign, study: Path) -> None:
    """Refuse to start runs whose teachers are not in the store, once for all of them.

    Raises:
        StoreNotFound: there is no store.
        IncompleteStore: a teacher's shards are missing.
    """
    experiment = design.experiment_of_all_teachers()
    remedy = f"run `kvdistill ablate {study} --extract`"
    try:
        store = to_extract(KVStore.open(experiment.store), experiment)
    except StoreNotFound:
        raise StoreNotFound(f"{study}: no store at {experiment.store}; {remedy}") from None
    for name in experiment.teachers:
        if name not in store.teachers() or store.missing(name):
            raise IncompleteStore(
                f"{store.where} lacks shards of teacher {name!r}, which arms of {study} learn "
                f"from; {remedy}"
            )


def train_runs(
    design: StudyDesign, todo: Sequence[StudyRun], workers: int, log: Callable[[str], None]
) -> None:
    """Train runs on this machine, one after another or ``workers`` at a time.

    Raises:
        Interrupted: stopped by a signal.
        ConfigError: runs of a pool failed.
    """
    if workers <= 1 or len(todo) <= 1:
        from kvdistill.pipelines.train import train

        for number, run in enumerate(todo, start=1):
            log(f"run {number} of {len(todo)}: {run.arm}, seed {run.seed}")
            train(run.experiment)
        return
    ending = run_pool(ablation_tasks(design, todo, workers))
    if ending.outcome == "interrupted":
        raise Interrupted(f"{ending.message}; run the same command again to continue")
    left = [run.name for run in todo if not run.is_finished]
    for name in left:
        for failure in Ledger(design.folder).failures(name)[-1:]:
            log(f"{name}: {failure.message}")
    if left:
        raise ConfigError(
            f"{len(left)} of {len(todo)} runs did not finish (first: {left[0]}); see the messages "
            f"above and {design.folder / 'failures'}"
        )


def submit_runs(
    design: StudyDesign,
    todo: Sequence[StudyRun],
    profile_name: str | None,
    log: Callable[[str], None],
) -> bool:
    """Submit runs to Slurm as one array, without those already queued; False if none is left.

    Raises:
        SlurmError: no Slurm here, or it refused.
        ConfigError: there is no such profile.
    """
    client.require()
    profile = choose_profile(design.runs[0].experiment, profile_name, "train")
    queued = units_in_queue(Ledger(design.folder.absolute()))
    if queued:
        log(f"{len(queued)} runs are queued already")
    runs = [run for run in todo if run.name not in queued]
    if not runs:
        log("nothing to submit")
        return False
    tasks = ablation_tasks(design, runs, num_array_tasks(profile), float(profile.signal_delay_s))
    job_ids = submit_array(tasks, profile, f"kv-{design.config.name}")
    log(f"job {', '.join(job_ids)}: {len(runs)} runs in {len(tasks)} tasks")
    return True


def ablation_tasks(
    design: StudyDesign, runs: Sequence[StudyRun], num_tasks: int, warning_seconds: float = 120.0
) -> list[Task]:
    """Partition runs round-robin over ``num_tasks`` tasks (fewer if there are fewer runs)."""
    ledger = Ledger(design.folder.absolute())
    body = design.config.model_dump(mode="json", exclude_defaults=True)
    study = {**body, "experiment": design.body}  # inline, so that later edits change no queued job
    text = yaml.safe_dump(study, sort_keys=False, allow_unicode=True)
    units = tuple(run.name for run in runs)
    arguments = {"config": str(write_once(text, ledger.open_jobs(), "study"))}
    task = Task(TARGET, arguments, ledger.folder, units, warning_seconds=warning_seconds)
    return partition_round_robin(task, num_tasks)


def ablation_work(config: str) -> AblationWork:
    """The target of a study's tasks; ``config`` is a frozen study file."""
    return AblationWork(load_study(Path(config)))


class AblationWork:
    """The training runs of one study as a ``Workload``; each resumes from its own checkpoint."""

    def __init__(self, design: StudyDesign) -> None:
        self._runs = {run.name: run for run in design.runs}

    def is_done(self, unit: str) -> bool:
        """Whether the run has finished."""
        return self._runs[unit].is_finished

    def prepare(self) -> None:
        """Nothing: runs share no model."""

    def run(self, unit: str, should_stop: Callable[[], bool]) -> int:
        """Train one run; returns its steps. Training saves and stops on a signal by itself."""
        from kvdistill.pipelines.train import train

        run = self._runs[unit]
        if should_stop():
            raise Interrupted(f"run {unit} was not started")
        try:
            train(run.experiment)
        except Interrupted:
            # Training consumed the signal; the worker must receive it as well.
            signal.raise_signal(signal.SIGTERM)
            raise
        return int(run.folder.read_record()["steps"])

    def clear(self, unit: str) -> None:
        """Nothing: a run's folder is its own."""
