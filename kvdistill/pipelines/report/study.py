"""What a report is about: arms, each one configuration under several seeds, and a baseline."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class SampleScore:
    """How one held-out text was predicted."""

    nll: float
    """Negative log-likelihood of its tokens, nats."""
    num_tokens: int
    num_chars: int
    correct: bool | None = None
    """Whether the right answer was generated; None where none was asked for."""


@dataclass(frozen=True)
class Run:
    """A finished run, read back from its folder."""

    path: Path
    name: str
    config: dict[str, Any]
    record: dict[str, Any]
    logs: list[dict[str, Any]]
    diagnostics: dict[str, Any]
    samples: dict[str, SampleScore] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        """The seed it was started with."""
        return int(self.record["seed"])

    @property
    def metrics(self) -> dict[str, float]:
        """Its final figures."""
        found: dict[str, float] = self.record["metrics"]
        return found

    def curve(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of one logged quantity; the last value of a step that was redone."""
        points = {row["step"]: row[key] for row in self.logs if key in row}
        return [float(step) for step in sorted(points)], [points[step] for step in sorted(points)]


@dataclass(frozen=True)
class Arm:
    """One configuration under several seeds; a placebo's gain is not knowledge."""

    name: str
    runs: tuple[Run, ...]
    description: str = ""
    placebo: bool = False

    @property
    def config(self) -> dict[str, Any]:
        """The settings of its first run; the others differ in seed and name."""
        return self.runs[0].config

    @property
    def teachers(self) -> tuple[str, ...]:
        """Teachers that it learned from; none for cross-entropy alone."""
        if not self.runs[0].diagnostics and not self.config.get("latent"):
            return ()
        weights = self.config["fusion"].get("weights") or {}
        return tuple(name for name in self.config["teachers"] if weights.get(name, 1) > 0)

    def by_seed(self) -> dict[int, Run]:
        """Its runs by seed."""
        return {run.seed: run for run in self.runs}


@dataclass(frozen=True)
class Study:
    """Arms that are compared with one of them, the baseline."""

    name: str
    arms: tuple[Arm, ...]
    baseline: str
    notes: tuple[str, ...] = ()
    """What a reader must know: runs left out, and why."""

    def arm(self, name: str) -> Arm:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)
