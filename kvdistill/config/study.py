"""A study as frozen data: one experiment, and the arms that differ from it in what they state.

Only the shape of the file is checked here; what an arm's settings mean is the experiment's
business, and ``pipelines/ablate.py`` puts the two together.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from kvdistill.config.base import Section, current_name, current_names
from kvdistill.types import Name

AblationPreset = Literal["eight-arms", "E1-E5", "leave-one-out"]


Settings = Annotated[dict[str, Any], AfterValidator(current_names)]
"""Settings under any of their names, by present name once they are read."""


CONTROLLED = ("student", "training", "corpus", "seed", "store", "output_dir")
"""Sections in which arms may not differ: same initial student, same order of the data, same
steps, schedule and student tokens, same evaluation, same budget."""


class ArmConfig(Section):
    """One arm: the experiment, with some settings changed."""

    settings: Settings = {}
    """Settings by dotted name, such as `losses.key: 10`; a whole section replaces the section."""
    teachers: tuple[Name, ...] | None = None
    """Only these of the study's teachers; the experiment's own if not given."""
    description: str = ""
    """One line for the report."""
    placebo: bool = False
    """Whether what this arm gains is no knowledge."""


class AblationConfig(Section):
    """One study: arms times seeds, from one store."""

    name: Name
    """Names the study's folder inside the experiment's `output_dir`."""
    experiment: Path | Settings
    """Experiment file, relative to this one, or its content."""
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1, 2)
    """Every arm runs under each of them."""
    preset: AblationPreset | None = None
    """Arms of a known design; those of `arms` and `grid` are added to them."""
    arms: dict[Name, ArmConfig] = {}
    """Arms by name."""
    grid: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = {}
    """Values by setting; every combination is an arm."""
    baseline: Name | None = None
    """The arm that others are compared with; the preset's, or else the first."""
    teachers: dict[Name, dict[str, Any]] = {}
    """Teachers that some arms have and the experiment has not."""
    may_differ: tuple[Annotated[str, AfterValidator(current_name)], ...] = ()
    """Settings in which arms may differ although a fair comparison holds them equal, such as
    `training.learning_rate`; the report names them."""

    @model_validator(mode="after")
    def _has_arms(self) -> Self:
        if not (self.preset or self.arms or self.grid):
            raise ValueError("a study needs arms; give `preset`, `arms` or `grid`")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds {self.seeds} holds one of them twice")
        return self
