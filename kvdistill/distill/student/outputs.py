"""What one forward pass of the student gives to the losses."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvdistill.types import Kind


@dataclass(frozen=True, eq=False)
class StudentView:
    """What one forward pass of the student gives; keys and queries are not rotated."""

    logits: Tensor
    query_BLQTD: Tensor
    key_BLHTD: Tensor
    value_BLHTD: Tensor
    hidden: Tensor | None
    """Last hidden state ``[B, T, E]``, where something asked for it."""

    def kind(self, kind: Kind) -> Tensor:
        """Keys or values ``[B, L, H, T, D]``."""
        return self.key_BLHTD if kind == "key" else self.value_BLHTD
