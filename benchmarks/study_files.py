"""What the studies of this folder share: how they write their files and call kvdistill."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml


def write_yaml(path: Path, body: dict[str, Any]) -> Path:
    """Write a settings file and return its path."""
    path.write_text(yaml.safe_dump(body, sort_keys=False), encoding="utf-8")
    return path


def write_study(
    folder: Path,
    name: str,
    experiment: dict[str, Any],
    arms: dict[str, Any],
    seeds: Iterable[int],
    **more: Any,
) -> Path:
    """Write ``folder/name.yaml`` and return its path; arms may differ in their learning rates."""
    body = {"name": name, "experiment": experiment, **more, "seeds": list(seeds), "arms": arms}
    return write_yaml(folder / f"{name}.yaml", body | {"may_differ": ["training.learning_rate"]})


def kvdistill(*arguments: str | Path) -> str:
    """Run a command of kvdistill; with ``--json``, returns what it prints."""
    command = [sys.executable, "-m", "kvdistill.cli", *map(str, arguments)]
    output = subprocess.PIPE if "--json" in arguments else None
    return subprocess.run(command, check=True, stdout=output, text=True).stdout or ""


def ablate(path: Path, workers: int, *options: str) -> None:
    """Run a study; finished runs and extracted teachers are reused."""
    kvdistill("ablate", path, *options, "--workers", str(workers))
