"""Slurm's own commands, with errors of one line.

Every call has a time limit: a client whose controller is down hangs for minutes.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from kvdistill.errors import SlurmError

TIMEOUT_SECONDS: Final = 60
DEFAULT_MAX_ARRAY_SIZE: Final = 1001
"""Slurm's own default."""


@dataclass(frozen=True)
class QueuedJob:
    """One job or array element in ``squeue``."""

    job: str
    state: str
    reason: str
    nodes: str


def is_available() -> bool:
    """Whether this machine has Slurm's commands."""
    return shutil.which("sbatch") is not None


def require() -> None:
    """Raise SlurmError where there is no ``sbatch`` or no ``srun`` on the PATH."""
    for command in ("sbatch", "srun"):
        if shutil.which(command) is None:
            raise SlurmError(
                f"no Slurm on this machine (no {command} on the PATH); run this on a login node, "
                "write scripts with --write-sbatch DIR, or omit --slurm to run on this machine"
            )


def call(command: Sequence[str]) -> str:
    """Run a Slurm command and return its output.

    Raises:
        SlurmError: it is missing, failed, or did not answer within a minute.
    """
    shown = " ".join(command)
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
        )
    except FileNotFoundError:
        raise SlurmError(f"{command[0]} is not on the PATH; run this on a Slurm node") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"`{shown}` did not answer within {TIMEOUT_SECONDS} s") from None
    if done.returncode:
        reason = " ".join((done.stderr or done.stdout).split())[-200:]
        raise SlurmError(f"`{shown}` failed: {reason}")
    return done.stdout


def queue(job_ids: Iterable[str]) -> dict[str, QueuedJob]:
    """Pending and running jobs and array elements of these ids, by element."""
    wanted = ",".join(sorted(set(job_ids)))
    if not wanted:
        return {}
    try:
        text = call(["squeue", "-h", "-r", "-j", wanted, "-o", "%i|%T|%r|%N"])
    except SlurmError as error:
        if "Invalid job id" in str(error):  # all are purged from the controller's memory
            return {}
        raise
    rows = (line.strip().split("|") for line in text.splitlines() if line.count("|") == 3)
    return {row[0]: QueuedJob(*row) for row in rows}


def max_array_size() -> int:
    """``MaxArraySize``: one more than the longest array."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", call(["scontrol", "show", "config"]), re.M)
    return int(found.group(1)) if found else DEFAULT_MAX_ARRAY_SIZE


def seconds_left(job: str) -> int | None:
    """Seconds until a running job's time limit; None if there is no limit or no answer."""
    try:
        text = call(["squeue", "-h", "-j", job, "-o", "%L"]).strip()
    except SlurmError:
        return None  # it only helps to name a cause, and must not stop a worker
    return parse_duration(text)


def parse_duration(text: str) -> int | None:
    """Seconds of Slurm's ``[days-][[hours:]minutes:]seconds``; None for UNLIMITED and the like."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(?:(\d+):)?(\d+):)?(\d+)", text)
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def requeue(job: str) -> bool:
    """Requeue a running job or array element; False if Slurm is ending it for good.

    A cancelled job is listed for a while and could be requeued, which would defeat ``scancel``;
    so only a job in state RUNNING is.
    """
    state = call(["squeue", "-h", "-j", job, "-o", "%T"]).strip()
    if state != "RUNNING":
        return False
    call(["scontrol", "requeue", job])
    return True


def cancel(job_ids: Iterable[str]) -> None:
    """Cancel jobs and arrays."""
    wanted = sorted(set(job_ids))
    if wanted:
        call(["scancel", *wanted])


def afterany(job_ids: Iterable[str]) -> str:
    """A dependency on the end of jobs, whatever their exit codes.

    Not ``afterok``: one failed element of an array would block the dependent job for ever, even
    after it was requeued and completed.
    """
    return f"afterany:{':'.join(job_ids)}"


def depend(job: str, job_ids: Iterable[str]) -> None:
    """Replace the dependency of a queued job by the end of these jobs."""
    call(["scontrol", "update", f"jobid={job}", f"dependency={afterany(job_ids)}"])
