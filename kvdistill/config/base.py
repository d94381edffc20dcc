"""What every section of the experiment file is made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]


NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]


PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Base of every part: frozen, unknown keys refused, docstrings become the schema's text."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
