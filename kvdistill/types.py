"""Words and shapes that every layer of the package shares.

Axis legend, used as suffixes in mathematical code (``teacher_k_BLHTD``):

    B samples   L layers   H key/value heads   T tokens   D head dim   E hidden size   V vocabulary

``H`` counts *key/value* heads (``num_key_value_heads``), never query heads.
Masks are True where a position counts. Character offsets index a sample's whole text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Kind = Literal["key", "value"]
KINDS: Final[tuple[Kind, Kind]] = ("key", "value")

SegmentName = Literal["text", "prompt", "rationale", "answer"]
SEGMENT_IDS: Final[dict[SegmentName, int]] = {"text": 0, "prompt": 1, "rationale": 2, "answer": 3}
SEGMENT_SPECIAL: Final = -1
"""Segment id of a token that stands for no character of the sample: BOS, template, padding."""


@dataclass(frozen=True)
class LayerGroup:
    """Layers of one teacher that share a geometry, and are therefore one array.

    Most models have one group. ``layers`` are the teacher's own layer indices, ascending;
    position ``i`` on the array's layer axis holds layer ``layers[i]``.
    """

    layers: tuple[int, ...]
    num_key_value_heads: int
    key_head_dim: int
    value_head_dim: int

    def head_dim(self, kind: Kind) -> int:
        """Head dim of keys or of values (they differ in a few architectures)."""
        return self.key_head_dim if kind == "key" else self.value_head_dim
