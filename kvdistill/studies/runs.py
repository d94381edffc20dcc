"""A study as work for ``kvdistill.slurm``: a run is a unit, its folder says what is done."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import yaml

from kvdistill.errors import Interrupted
from kvdistill.slurm.ledger import Ledger
from kvdistill.slurm.task import Task, partition_round_robin, write_once
from kvdistill.studies.study import StudyPlan, StudyRun, load_study

TARGET: Final = "kvdistill.studies.runs:ablation_work"


class AblationWork:
    """Training runs of one study. Every run goes on from its own checkpoint, if it has one."""

    def __init__(self, plan: StudyPlan) -> None:
        self._runs = {run.name: run for run in plan.runs}

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
            raise Interrupted(f"run {unit} was not begun")
        try:
            train(run.experiment)
        except Interrupted:
            # Training took the signal for itself; the worker must know of it too.
            signal.raise_signal(signal.SIGTERM)
            raise
        return int(run.folder.read_record()["steps"])

    def clear(self, unit: str) -> None:
        """Nothing: a run's folder is its own."""


def ablation_work(config: str) -> AblationWork:
    """The target of a study's tasks; ``config`` is a frozen study file."""
    return AblationWork(load_study(Path(config)))


def ablation_tasks(
    plan: StudyPlan, runs: Sequence[StudyRun], num_tasks: int, warning_seconds: float = 120.0
) -> list[Task]:
    """Share runs out among ``num_tasks`` tasks (fewer if there are fewer runs)."""
    ledger = Ledger(plan.folder.absolute())
    body = plan.config.model_dump(mode="json", exclude_defaults=True)
    text = yaml.safe_dump({**body, "experiment": plan.body}, sort_keys=False, allow_unicode=True)
    frozen = write_once(text, ledger.jobs, "study")  # its experiment inside it
    units = tuple(run.name for run in runs)
    arguments = {"config": str(frozen)}
    task = Task(TARGET, arguments, ledger.folder, units, warning_seconds=warning_seconds)
    return partition_round_robin(task, units, num_tasks)
