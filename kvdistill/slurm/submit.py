"""Handing tasks to Slurm: arrays through submitit, and what runs inside each element.

submitit pickles one callable per element and runs it under srun. Its own idea of a job's state,
of signals and of results is not used: the element installs its own signal handlers, its result
is in the folder, and it ends by ``sys.exit``, which leaves submitit's bookkeeping untouched.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvdistill.config.slurm import SlurmProfile
from kvdistill.errors import SlurmError
from kvdistill.slurm import batch_script as script
from kvdistill.slurm import client
from kvdistill.slurm.attempts import job_element
from kvdistill.slurm.ledger import Ledger, Submission
from kvdistill.slurm.local_pool import run_pool
from kvdistill.slurm.task import Ending, Task, owned_units
from kvdistill.slurm.worker import work


@dataclass(frozen=True)
class Element:
    """What one array element runs. Its pickle holds a line of JSON and two numbers."""

    task: str
    workers: int
    max_restarts: int

    def __call__(self) -> None:
        """Work, then leave with an exit code; comes again by itself where that makes sense."""
        task = Task.from_json(self.task)
        ending = work(task) if self.workers == 1 else run_pool(split(task, self.workers))
        print(ending.message, flush=True)
        leave(ending, self.max_restarts)


def split(task: Task, workers: int) -> list[Task]:
    """One element's task, shared out among worker processes on its node."""
    num = min(workers, len(task.units)) or 1
    return [
        dataclasses.replace(
            task,
            units=owned_units(task.units, worker, num),
            task=task.task * num + worker,
            num_tasks=task.num_tasks * num,
        )
        for worker in range(num)
    ]


def leave(ending: Ending, max_restarts: int) -> None:
    """Exit with the ending's code, having put this element back into the queue if need be."""
    if ending.again:
        come_again(max_restarts)
    if ending.exit_code:
        sys.exit(ending.exit_code)


def come_again(max_restarts: int) -> bool:
    """Requeue this very element, unless it was restarted too often or is being cancelled."""
    job = job_element(os.environ)
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if job is None:
        return False
    if restarts >= max_restarts:
        print(f"restarted {restarts} times already (max_restarts); submit again", flush=True)
        return False
    try:
        return client.requeue(job)
    except SlurmError as error:
        # Some sites forbid requeueing. Nothing is lost: submitting again picks up what is missing.
        print(f"could not requeue: {error}", file=sys.stderr, flush=True)
        return False


def submit_array(
    tasks: Sequence[Task], profile: SlurmProfile, name: str, dependency: str | None = None
) -> list[str]:
    """Submit tasks of one folder as one array, or as several where one would be too long.

    Returns:
        The job ids.

    Raises:
        SlurmError: no Slurm here, or it refused.
    """
    client.require()
    profile = profile.model_copy(update={"nodes": 1})  # a task is one process, or one node's pool
    longest = client.max_array_size() - 1
    ids: list[str] = []
    for first in range(0, len(tasks), longest):
        part = tasks[first : first + longest]
        calls = [Element(t.to_json(), profile.workers, profile.max_restarts) for t in part]
        job_id = submit_calls(calls, profile, name, Ledger(part[0].folder), dependency)
        submission = Submission(job_id, name, time.time(), tuple(t.units for t in part))
        Ledger(part[0].folder).record_submission(submission)
        ids.append(job_id)
    return ids


def submit_calls(
    calls: Sequence[Callable[[], Any]],
    profile: SlurmProfile,
    name: str,
    ledger: Ledger,
    dependency: str | None = None,
) -> str:
    """Submit callables as one job (an array where there is more than one); its job id.

    Raises:
        SlurmError: no Slurm here, or it refused.
    """
    client.require()
    import submitit

    executor = submitit.SlurmExecutor(ledger.jobs, python=script.python_command(profile))
    try:
        executor.update_parameters(**script.parameters(profile, name, dependency))
        jobs = [executor.submit(calls[0])] if len(calls) == 1 else _batch(executor, calls)
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError,
            ValueError, TypeError, OSError) as error:  # fmt: skip
        said = " ".join(str(error).split())
        raise SlurmError(f"Slurm refused {name}: {said[-400:]}") from error
    return str(jobs[0].job_id).partition("_")[0]


def array_name(job_id: str, element: int, elements: int) -> str:
    """How Slurm names an element; a job of one element is no array."""
    return job_id if elements == 1 else f"{job_id}_{element}"


def _batch(executor: Any, calls: Sequence[Callable[[], Any]]) -> list[Any]:
    with executor.batch():
        return [executor.submit(call) for call in calls]
