"""Batch scripts: one profile of the config, one script, whether it is submitted or written out.

submitit makes the text, so that a script written for a site that forbids submission from Python
asks for the very resources that a submission would. Parameters carry sbatch's names.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from kvdistill.config.slurm import SlurmProfile
from kvdistill.errors import SlurmError


def parameters(profile: SlurmProfile, name: str, dependency: str | None = None) -> dict[str, Any]:
    """What submitit's executor is told; options that the profile leaves open are left out.

    ``--cpus-per-task`` is repeated for srun, which does not take it from sbatch since 22.05.
    """
    srun = [f"--cpus-per-task={profile.cpus_per_task}"]
    if profile.container is not None:
        srun.append(f"--container-image={profile.container}")
    if profile.container_mounts:
        srun.append(f"--container-mounts={','.join(profile.container_mounts)}")
    extra = {option: value or True for option, value in profile.extra.items()}
    optional = {
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
        "mem": f"{profile.memory_gb}GB",
        "time": profile.time_min,
        "signal_delay_s": profile.signal_delay_s,
        "array_parallelism": profile.array_parallelism,
        "srun_args": srun,
        "wckey": None,  # submitit's own; sites that check wckeys refuse it
        "additional_parameters": {"requeue": True, "chdir": str(Path.cwd()), **extra},
        **{key: value for key, value in optional.items() if value is not None},
    }


def render(
    profile: SlurmProfile,
    name: str,
    command: str,
    folder: Path,
    *,
    elements: int | None = None,
    dependency: str | None = None,
) -> str:
    """The text of a batch script; ``elements`` makes it an array. Needs no Slurm.

    Raises:
        SlurmError: submitit refused a parameter.
    """
    from submitit.slurm.slurm import _make_sbatch_string

    try:
        text: str = _make_sbatch_string(
            command=command,
            folder=folder,
            map_count=elements,
            **parameters(profile, name, dependency),
        )
    except (TypeError, ValueError) as error:
        raise SlurmError(f"no batch script can be made of this profile: {error}") from error
    return text


def python_command(profile: SlurmProfile) -> str:
    """The Python that jobs run, quoted for the shell."""
    return shlex.quote(profile.python or sys.executable)
