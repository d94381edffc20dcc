"""Dask workers as Slurm jobs (extra ``dask``), for looking at stores larger than one machine.

The scheduler lives in the calling process, so it should be on a node that compute nodes can
reach. Dask is for ``inspect`` and ``verify``, which only read; extraction has its own arrays.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvdistill.config.slurm import SlurmProfile
from kvdistill.errors import MissingExtra
from kvdistill.slurm import client


def cluster_options(profile: SlurmProfile, logs: Path) -> dict[str, Any]:
    """What ``dask_jobqueue.SLURMCluster`` is told for a profile."""
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


@contextmanager
def dask_cluster(profile: SlurmProfile, jobs: int, logs: Path) -> Iterator[str]:
    """Start a scheduler here and ``jobs`` workers on Slurm; yields the scheduler's address.

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
    with SLURMCluster(**cluster_options(profile, logs)) as cluster:
        cluster.scale(jobs=jobs)
        yield cluster.scheduler_address
