"""The study file: one experiment, and arms that differ from it in the settings they state.

Only the shape of the file is validated here. What the settings of an arm mean is checked when the
arm's experiment is built.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from kvdistill.config.base import Section, current_name, current_names
from kvdistill.types import Name

AblationPreset = Literal["baselines", "eight-arms", "E1-E5", "leave-one-out"]

Settings = Annotated[dict[str, Any], AfterValidator(current_names)]
"""Nested sections or dotted names; former names are replaced."""

CONTROLLED = ("student", "training", "corpus", "seed", "store", "output_dir")
"""Sections that are the same in all arms: initial student, data order, steps, schedule, student
tokens, evaluation and budget."""


class ArmConfig(Section):
    """One arm: the experiment with some settings changed."""

    settings: Settings = {}
    """Settings by dotted name, such as `losses.key: 10`; a whole section replaces the section."""
    teachers: tuple[Name, ...] | None = None
    """The teachers of this arm; those of the experiment if not given."""
    description: str = ""
    """One line for the report."""
    placebo: bool = False
    """Whether the teachers of this arm carry no information about the text."""


class AblationConfig(Section):
    """One study: arms times seeds, from one store."""

    name: Name
    """Name of the study, and of its folder inside the experiment's `output_dir`."""
    question: str = ""
    """What the study is to find out, in one sentence, for the top of its report."""
    experiment: Path | Settings
    """Experiment file, relative to this one, or its content."""
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1, 2)
    """Every arm is trained once per seed."""
    preset: AblationPreset | None = None
    """Arms of a named design; `arms` and `grid` add to them."""
    arms: dict[Name, ArmConfig] = {}
    """Arms by name."""
    grid: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = {}
    """Values by setting; every combination is an arm."""
    baseline: Name | None = None
    """The arm that all others are compared with; the preset's or the first arm if not given."""
    teachers: dict[Name, dict[str, Any]] = {}
    """Teachers that only some arms use and the experiment does not have."""
    may_differ: tuple[Annotated[str, AfterValidator(current_name)], ...] = ()
    """Controlled settings in which arms may differ nevertheless, such as
    `training.learning_rate`; the report lists them."""

    @model_validator(mode="after")
    def _has_arms(self) -> Self:
        if not (self.preset or self.arms or self.grid):
            raise ValueError("a study needs arms; give `preset`, `arms` or `grid`")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds {self.seeds} contain a duplicate")
        return self
