"""What all sections share: the base class, constrained numbers, and former names of keys."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from kvdistill.text import brief

log = logging.getLogger(__name__)

# Bounded by what fits into 32 bits, and by what a float32 keeps some digits of.
Positive = Annotated[int, Field(gt=0, lt=2**31)]
NonNegative = Annotated[int, Field(ge=0, lt=2**31)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=1e30, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, le=1e30, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
DropoutRate = Annotated[float, Field(ge=0, lt=1)]


def _one_line(text: str) -> str:
    if any(char in text for char in "\r\n"):
        raise ValueError(f"expected one line, got {brief(text)}")
    return text


OneLine = Annotated[str, AfterValidator(_one_line)]
"""Text that must not become two lines of a script."""

RENAMED: Final = {
    "losses.fade_by": "losses.anneal_by",
    "losses.inject_opening": "losses.inject_gate_init",
    "losses.inject_text": "losses.inject_fraction",
    "training.figure_steps": "training.diagnostic_steps",
    "training.read_ahead": "training.prefetch_threads",
    "training.steps_ahead": "training.prefetch_steps",
}
"""Former names of settings. They still work, with a warning, wherever a setting can be given."""


class Section(BaseModel):
    """Base of every section: frozen, unknown keys refused, field docstrings in the schema."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def current_name(dotted: str, *, warn: bool = True) -> str:
    """The present dotted name of a setting; a former name is warned about once per process."""
    name = RENAMED.get(dotted, dotted)
    if warn and name != dotted:
        log_once(f"setting {dotted} is deprecated; use {name}")
    return name


def current_names(
    settings: Mapping[str, Any], prefix: str = "", *, warn: bool = True
) -> dict[str, Any]:
    """Settings with every former name replaced; values are not checked.

    Args:
        settings: nested sections, dotted names, or both: ``{"losses.key": 1, "training": {…}}``.
        prefix: dotted name of the section that holds them, with a trailing dot.
        warn: log a warning for every former name. False for files that kvdistill itself wrote.

    Raises:
        ValueError: a setting is given under both its names.
    """
    renamed: dict[str, Any] = {}
    for key, value in settings.items():
        dotted = f"{prefix}{key}"
        name = current_name(dotted, warn=warn)
        present = key if name == dotted else name.removeprefix(prefix)
        if present != key and present in settings:
            raise ValueError(f"{dotted} is the former name of {name}; give {name} alone")
        nested = isinstance(value, Mapping)
        renamed[present] = current_names(value, f"{dotted}.", warn=warn) if nested else value
    return renamed


@cache
def log_once(message: str) -> None:
    """A warning, once per process."""
    log.warning("%s", message)
