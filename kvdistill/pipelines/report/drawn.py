"""A figure with its words and its runs, and how arms are named in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from matplotlib.figure import Figure

from kvdistill.pipelines.report.study import Arm, Run, Study

T = TypeVar("T")


@dataclass(frozen=True)
class Drawn:
    """A figure, what it shows and how to read it, and the runs that it is made from."""

    name: str
    """Unique in a report, and fit for a file's name."""
    words: str
    figure: Figure
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Section:
    """Figures under one heading."""

    heading: str
    figures: tuple[Drawn, ...]
    folded: bool = False
    """Shown only to who asks."""


def shown(arm: Arm) -> str:
    """An arm's name; a placebo is called one wherever it appears."""
    return f"{arm.name} (placebo)" if arm.placebo and "placebo" not in arm.name else arm.name


def named(study: Study, by_arm: Mapping[str, T]) -> dict[str, T]:
    """What is kept by an arm's name, by its shown name and in the order of the arms."""
    return {shown(arm): by_arm[arm.name] for arm in study.arms if arm.name in by_arm}


def runs_of(study: Study, by_arm: Mapping[str, object] | None = None) -> tuple[Run, ...]:
    """Runs of the arms named, or of all."""
    arms = [arm for arm in study.arms if by_arm is None or arm.name in by_arm]
    return tuple(run for arm in arms for run in arm.runs)
