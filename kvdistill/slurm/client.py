"""Slurm's own commands, behind functions that say in one line what is wrong.

Every call has a time limit: a client without its controller hangs for minutes.
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
"""Slurm's own default, for scripts that are written where no Slurm can be asked."""


@dataclass(frozen=True)
class QueuedJob:
    """What ``squeue`` says of one job or array element."""

    job: str
    state: str
    reason: str
    nodes: str


def is_available() -> bool:
    """Whether this machine can talk to a Slurm."""
    return shutil.which("sbatch") is not None


def require() -> None:
    """Refuse, in one line, to do what needs Slurm where there is none.

    Raises:
        SlurmError: no ``sbatch`` on the PATH.
    """
    if not is_available():
        raise SlurmError(
            "Slurm is not here (no sbatch on the PATH): run this on a login node, write scripts "
            "with --write-sbatch DIR, or leave --slurm away to work on this machine"
        )


def call(command: Sequence[str]) -> str:
    """Run a Slurm client and return what it prints.

    Raises:
        SlurmError: it is missing, refused, or did not answer in a minute.
    """
    shown = " ".join(command)
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
        )
    except FileNotFoundError:
        raise SlurmError(f"{command[0]} is not on the PATH; is this a Slurm machine?") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"`{shown}` did not answer within {TIMEOUT_SECONDS} s") from None
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())[-200:]
        raise SlurmError(f"`{shown}` failed: {said}")
    return done.stdout


def queue(job_ids: Iterable[str]) -> dict[str, QueuedJob]:
    """Living jobs and array elements of these ids, by element; finished ones are not listed."""
    wanted = ",".join(sorted(set(job_ids)))
    if not wanted:
        return {}
    try:
        text = call(["squeue", "-h", "-r", "-j", wanted, "-o", "%i|%T|%r|%N"])
    except SlurmError as error:
        if "Invalid job id" in str(error):  # all of them are gone from the controller's memory
            return {}
        raise
    rows = (line.strip().split("|") for line in text.splitlines() if line.count("|") == 3)
    return {row[0]: QueuedJob(*row) for row in rows}


def max_array_size() -> int:
    """Longest array this Slurm takes, plus one."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", call(["scontrol", "show", "config"]), re.M)
    return int(found.group(1)) if found else DEFAULT_MAX_ARRAY_SIZE


def seconds_left(job: str) -> int | None:
    """Seconds until a running job's time limit; None if there is no limit or no answer."""
    try:
        text = call(["squeue", "-h", "-j", job, "-o", "%L"]).strip()
    except SlurmError:
        return None  # asked only to name a cause; not knowing it must not stop a worker
    return parse_duration(text)


def parse_duration(text: str) -> int | None:
    """Seconds of Slurm's ``[days-][[hours:]minutes:]seconds``; None for UNLIMITED and the like."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(?:(\d+):)?(\d+):)?(\d+)", text)
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def requeue(job: str) -> bool:
    """Put this running element back into the queue; False if Slurm is ending it for good.

    A job that was cancelled is still shown for a while and could be requeued; doing so would make
    ``scancel`` useless, so only a job that Slurm calls RUNNING asks to come again.
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
    """A dependency on the end of jobs, however they end.

    Not ``afterok``: one failed element of an array would block the dependent for ever, even once
    that element was requeued and completed.
    """
    return f"afterany:{':'.join(job_ids)}"


def depend(job: str, job_ids: Iterable[str]) -> None:
    """Make a queued job wait for the end of these jobs instead of what it waited for."""
    call(["scontrol", "update", f"jobid={job}", f"dependency={afterany(job_ids)}"])
