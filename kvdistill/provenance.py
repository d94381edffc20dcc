"""Provenance of a run: versions, commit, command, machine and process."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from kvdistill import __version__

PACKAGES: Final = ("torch", "transformers", "accelerate", "tokenizers", "zarr", "zarrs", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python, kvdistill and every package that can change a number."""
    found = {"python": platform.python_version(), "kvdistill": __version__}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def git_commit(folder: Path | None = None) -> str | None:
    """Commit of the checkout that holds ``folder`` (this package's by default), or None.

    Ends in ``+changes`` where tracked files differ from the commit.
    """
    folder = folder or Path(__file__).parent
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if changed else "")


def command(arguments: Sequence[str]) -> str:
    """A process's arguments as they would be typed, without the program's folder."""
    program, package = Path(arguments[0]), Path(__file__).parent
    typed = [program.name]
    if program.is_relative_to(package):
        inside = program.relative_to(package).with_suffix("")
        typed = ["python", "-m", ".".join((package.name, *inside.parts))]
    return shlex.join([*typed, *arguments[1:]])


def machine_identity() -> str:
    """Kernel boot and pid namespace: equal only where pids are comparable."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    if not boot.exists():
        return platform.node()
    return f"{boot.read_text().strip()}/{Path('/proc/self/ns/pid').readlink()}"


def process_start(pid: int) -> int | None:
    """Start time of a running process in clock ticks; None if there is none, or a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the program's name in parentheses and may hold anything.
    state, *rest = stat.rpartition(")")[2].split()
    return None if state in "ZX" else int(rest[18])


def describe() -> dict[str, Any]:
    """The process's entry in ``run.json``."""
    return {
        "command": command(sys.argv),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": platform.node(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "git_commit": git_commit(),
        "versions": versions(),
    }


def _git(folder: Path, *arguments: str) -> str:
    command_line = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command_line, check=True, capture_output=True, text=True).stdout.strip()
