"""From a profile of the config to Slurm: arrays, single jobs, batch scripts, Dask workers.

submitit submits: it pickles one callable per array element and runs it under srun. Its view of a
job's state, signals and results is not used: an element installs its own signal handlers, its
result is in the folder, and it ends by ``sys.exit``, which leaves submitit's files untouched.

submitit has no public way to write a batch script without submitting it, so ``batch_script``
renders the same parameters itself, for ``--dry-run`` and for sites that forbid submission from
Python.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kvdistill.config.slurm import SlurmProfile
from kvdistill.errors import MissingExtra, SlurmError
from kvdistill.slurm import client
from kvdistill.slurm.ledger import Ledger, Submission
from kvdistill.slurm.local_pool import run_pool
from kvdistill.slurm.retry import exit_task
from kvdistill.slurm.task import Task, partition_round_robin
from kvdistill.slurm.worker import work

_NO_OPTIONS: Final = {
    "additional_parameters", "array_parallelism", "setup", "signal_delay_s", "srun_args", "wckey",
}  # fmt: skip
"""Parameters of submitit that are not options of sbatch."""


@dataclass(frozen=True)
class ArrayElement:
    """What one array element runs. Its pickle holds a line of JSON and two numbers."""

    task: str
    workers: int
    max_restarts: int

    def __call__(self) -> None:
        """Run the task, requeue this element if the task is to be resumed, exit with its code."""
        task = Task.from_json(self.task)
        parts = partition_round_robin(task, self.workers)
        ending = work(task) if self.workers == 1 else run_pool(parts)
        print(ending.message, flush=True)
        exit_task(ending, self.max_restarts)


def submit_array(
    tasks: Sequence[Task], profile: SlurmProfile, name: str, dependency: str | None = None
) -> list[str]:
    """Submit tasks of one folder as one array, or as several where it exceeds MaxArraySize.

    Returns:
        The job ids.

    Raises:
        SlurmError: no Slurm here, or it refused.
    """
    client.require()
    profile = profile.model_copy(update={"nodes": 1})  # a task is one process, or one node's pool
    longest = max(1, client.max_array_size() - 1)  # a job of one task is no array
    ids: list[str] = []
    for first in range(0, len(tasks), longest):
        part = tasks[first : first + longest]
        calls = [ArrayElement(t.to_json(), profile.workers, profile.max_restarts) for t in part]
        job_id = submit_job(calls, profile, name, part[0].ledger, dependency)
        submission = Submission(job_id, name, time.time(), tuple(t.units for t in part))
        part[0].ledger.record_submission(submission)
        ids.append(job_id)
    return ids


def submit_job(
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
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    executor = submitit.SlurmExecutor(ledger.open_jobs(), python=python_command(profile))
    try:
        executor.update_parameters(**_parameters(profile, name, dependency))
        if len(calls) == 1:
            jobs = [executor.submit(calls[0])]
        else:
            with executor.batch():
                jobs = [executor.submit(call) for call in calls]
    except (FailedJobError, FailedSubmissionError, ValueError, TypeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise SlurmError(f"Slurm refused {name}: {reason[-400:]}") from error
    return str(jobs[0].job_id).partition("_")[0]


def element_id(job_id: str, element: int, num_elements: int) -> str:
    """Slurm's id of an array element; a job of one element is no array."""
    return job_id if num_elements == 1 else f"{job_id}_{element}"


def batch_script(
    profile: SlurmProfile, name: str, command: str, ledger: Ledger, *, elements: int | None = None
) -> str:
    """The text of a batch script; ``elements`` makes it an array. Needs no Slurm."""
    parameters = _parameters(profile, name)
    log = f"{ledger.jobs.absolute()}/{'%j' if elements is None else '%A_%a'}"
    options = {key: value for key, value in parameters.items() if key not in _NO_OPTIONS}
    options |= {
        "signal": f"USR2@{profile.signal_delay_s}",
        "output": f"{log}_0_log.out",
        "error": f"{log}_0_log.err",
        "open-mode": "append",
    }
    if elements is not None:
        options["array"] = f"0-{elements - 1}%{min(elements, profile.array_parallelism)}"
    options |= parameters["additional_parameters"]
    directives = [
        f"--{key.replace('_', '-')}" + ("" if value is True else f"={shlex.quote(str(value))}")
        for key, value in options.items()
    ]
    # srun's own log options: it does not inherit sbatch's file name pattern. %t is the node.
    logs = [f"--output={log}_%t_log.out", f"--error={log}_%t_log.err"]
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {directive}" for directive in sorted(directives)),
        *profile.setup,
        f"{shlex.join(['srun', '--unbuffered', *logs, *parameters['srun_args']])} {command}",
    ]
    return "\n".join(lines) + "\n"


def python_command(profile: SlurmProfile) -> str:
    """The Python that jobs run, quoted for the shell."""
    return shlex.quote(profile.python or sys.executable)


def _parameters(profile: SlurmProfile, name: str, dependency: str | None = None) -> dict[str, Any]:
    """Parameters of submitit's executor; options that the profile leaves open are omitted."""
    # Repeated for srun, which does not take it from sbatch since 22.05.
    srun = [f"--cpus-per-task={profile.cpus_per_task}"]
    if profile.container is not None:
        srun.append(f"--container-image={profile.container}")
    if profile.container_mounts:
        srun.append(f"--container-mounts={','.join(profile.container_mounts)}")
    extra = {option: value or True for option, value in profile.extra.items()}
    optional = {
        "mem": None if profile.memory_gb is None else f"{profile.memory_gb}GB",
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "gpus_per_node": profile.gpus_per_node or None,
        "setup": list(profile.setup) or None,
        "dependency": dependency,
    }
    return {
        "job_name": name,
        "nodes": profile.nodes,
        "ntasks_per_node": 1,
        "cpus_per_task": profile.cpus_per_task,
        "time": profile.time_min,
        "signal_delay_s": profile.signal_delay_s,
        "array_parallelism": profile.array_parallelism,
        "srun_args": srun,
        "wckey": None,  # submitit's default; sites that check wckeys refuse it
        "additional_parameters": {"requeue": True, "chdir": str(Path.cwd()), **extra},
        **{key: value for key, value in optional.items() if value is not None},
    }


@contextmanager
def dask_cluster(profile: SlurmProfile, jobs: int, logs: Path) -> Iterator[str]:
    """Run a Dask scheduler here and ``jobs`` workers on Slurm; yields the scheduler's address.

    For ``inspect`` and ``verify``. Compute nodes must be able to reach this machine.

    Raises:
        SlurmError: no Slurm here.
        MissingExtra: ``dask-jobqueue`` is not installed.
    """
    client.require()
    try:
        from dask_jobqueue import SLURMCluster
    except ImportError as error:
        raise MissingExtra(
            "Dask on Slurm needs the extra 'dask': pip install 'kvdistill[dask]'"
        ) from error
    with SLURMCluster(**dask_options(profile, logs)) as cluster:
        cluster.scale(jobs=jobs)
        yield cluster.scheduler_address


def dask_options(profile: SlurmProfile, logs: Path) -> dict[str, Any]:
    """Arguments of ``dask_jobqueue.SLURMCluster`` for a profile.

    Raises:
        SlurmError: the profile states no memory, which Dask's workers need.
    """
    if profile.memory_gb is None:
        raise SlurmError("Dask workers need a memory limit: set memory_gb in the Slurm profile")
    named = {"qos": profile.qos, "constraint": profile.constraint, **profile.extra}
    directives = [f"--{k}={v}" if v else f"--{k}" for k, v in named.items() if v is not None]
    return {
        "queue": profile.partition,
        "account": profile.account,
        "cores": profile.cpus_per_task,
        "processes": 1,
        "memory": f"{profile.memory_gb}GB",
        "walltime": f"{profile.time_min // 60:02}:{profile.time_min % 60:02}:00",
        "job_extra_directives": directives,
        "job_script_prologue": list(profile.setup),
        "log_directory": str(logs),
        "python": profile.python or sys.executable,
    }
