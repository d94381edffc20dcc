"""A workload without models, whose units misbehave by name.

``slow-*`` take their time, ``fail-*`` raise, ``die-*`` kill their process, ``once-*`` fail the
first time, ``memory-*`` raise MemoryError, ``eat-*`` take 400 MB while ``seconds`` is not 0;
everything else just works.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvdistill.errors import Interrupted
from kvdistill.slurm.ledger import Ledger
from kvdistill.slurm.task import Task


@dataclass
class Toy:
    results: Path
    seconds: float = 0.0
    broken: bool = False

    def is_done(self, unit: str) -> bool:
        return (self.results / unit).exists()

    def prepare(self) -> None:
        if self.broken:
            raise ValueError("no such model")

    def run(self, unit: str, should_stop: Callable[[], bool]) -> int:
        self._misbehave(unit)
        draft = self.results / f"half.{unit}.{os.getpid()}"
        draft.write_text(f"{os.getpid()} {os.environ.get('CUDA_VISIBLE_DEVICES')}")
        eaten = bytearray(b"x" * 400_000_000) if unit.startswith("eat") and self.seconds else b""
        end = time.monotonic() + (self.seconds if unit.startswith("slow") or eaten else 0)
        while time.monotonic() < end:
            if should_stop():
                draft.unlink()
                raise Interrupted(unit)
            time.sleep(0.02)
        try:
            (self.results / unit).hardlink_to(draft)
        finally:
            draft.unlink(missing_ok=True)
        return 10

    def clear(self, unit: str) -> None:
        assert self.is_done(unit), "clearing before it is done may spoil a living writer's work"
        for half in self.results.glob(f"half.{unit}.*"):
            half.unlink()

    def _misbehave(self, unit: str) -> None:
        (self.results / f"half.{unit}.{os.getpid()}").write_text("begun")
        if unit.startswith("die"):
            os.kill(os.getpid(), signal.SIGKILL)
        if unit.startswith("memory"):
            raise MemoryError
        first = self.results / f"tried.{unit}"
        if unit.startswith("fail") or (unit.startswith("once") and not first.exists()):
            first.touch()
            raise RuntimeError(f"cannot do {unit}")


def toy(results: str, seconds: float = 0.0, broken: bool = False) -> Toy:
    Path(results).mkdir(parents=True, exist_ok=True)
    return Toy(Path(results), seconds, broken)


def toy_task(folder: Path, *units: str, seconds: float = 0.0, broken: bool = False) -> Task:
    return Task(
        target="tests.slurm.toy:toy",
        arguments={"results": str(folder / "results"), "seconds": seconds, "broken": broken},
        folder=folder,
        units=units,
        heartbeat_seconds=0.3,
        warning_seconds=1.0,
    )


def ledger(folder: Path) -> Ledger:
    return Ledger(folder)


def done(folder: Path) -> set[str]:
    results = folder / "results"
    if not results.is_dir():
        return set()
    return {p.name for p in results.iterdir() if not p.name.startswith(("half.", "tried."))}


def leftovers(folder: Path) -> list[Path]:
    """What a finished run must not leave: drafts, hidden files, claims."""
    hidden = [p for p in folder.rglob(".*") if p.is_file() and "jobs" not in p.parts]
    return [*hidden, *folder.glob("results/half.*"), *folder.glob("claims/*")]
