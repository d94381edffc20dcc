"""Words and shapes that every layer of the package shares.

Axis legend, used as suffixes in mathematical code (``teacher_k_BLHTD``):

    B samples   L layers   H key/value heads   T tokens   D head dim   E hidden size   V vocabulary

``H`` counts *key/value* heads (``num_key_value_heads``), never query heads.
Masks are True where a position counts. Character offsets index a sample's whole text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

Kind = Literal["key", "value"]


KINDS: Final[tuple[Kind, Kind]] = ("key", "value")


Stream = Literal["self", "encoder", "decoder", "cross"]
"""Which attention of a teacher is read; ``self`` unless it is an encoder-decoder."""


SegmentName = Literal["text", "prompt", "rationale", "answer"]


SEGMENT_IDS: Final[dict[SegmentName, int]] = {"text": 0, "prompt": 1, "rationale": 2, "answer": 3}


SEGMENT_SPECIAL: Final = -1
"""Segment id of a token that stands for no character of the sample: BOS, template, padding."""


TokenMethod = Literal["iou", "overlap", "nearest"]
"""How a student token weighs the teacher tokens that share its characters."""


TimeMethod = Literal["tokens", "segments", "global", "latent"]
"""How student positions find teacher positions: by characters, by resampling, or by eviction."""


LayerMethod = Literal["ratio", "uniform", "skip", "last_aligned", "cka", "explicit"]
"""How student layers find teacher layers."""


RopeMethod = Literal["none", "student", "linear", "ntk", "dynamic"]
"""How position-free teacher keys are rotated where a loss needs rotated keys."""


ProjectionMode = Literal[
    "student_to_teacher", "frozen", "task", "joint", "shared_space", "identity"
]
"""Who may move: only ``joint`` lets the target come to the student, and warns about it."""


ProjectionInit = Literal["grouped_mean", "orthogonal", "pca", "ridge"]
"""Initial weights of a projection."""


FusionMethod = Literal["fixed", "similarity", "mlp", "gate", "attention"]
"""How the weights of several teachers are found."""


Granularity = Literal["sample", "layer", "token"]
"""What a learnable router gives its own weights to."""


Similarity = Literal["cosine", "dot", "l2"]


EvictionMethod = Literal[
    "full", "right_crop", "uniform", "random", "importance", "rkv", "rkv_original"
]
"""Which teacher tokens are kept when a budget is smaller than the text."""


Distance = Literal["mse", "smooth_l1"]
"""Pointwise error between student and target."""


Backend = Literal["zarr", "safetensors"]
"""How a store's shards are laid out on disk."""


CodecName = Literal["bf16", "fp16", "int8", "int4", "fp8_e4m3", "int4_v1"]
"""How a number of a key or value is stored; ``int4_v1`` is for stores of format 1."""


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
"""A name that is also a folder: no separators, no leading dot, so it cannot leave its parent."""


class CodecSpec(BaseModel):
    """How keys and values are stored. Codecs are defined in ``store/codecs``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: CodecName = "int8"
    value: CodecName = "int8"


class StoredEviction(BaseModel):
    """Keep only some tokens of a teacher, chosen per layer and head while it is read.

    What is dropped is gone: stage 2 can then align this teacher in time `latent` alone.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    method: Literal["right_crop", "uniform", "random", "importance", "rkv", "rkv_original"] = "rkv"
    """How tokens are ranked; `importance` and the R-KV methods need `extraction.importance`."""
    budget: Annotated[int, Field(gt=0)] = 24
    """Tokens that are kept of every sample, in each layer and head."""
    mix: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of importance in the R-KV scores, lambda."""
    segment: SegmentName = "rationale"
    """What is chosen from; a sample without it is chosen from all of its text but the answer."""

    @property
    def ranks(self) -> bool:
        """Whether tokens are ranked by the attention that they receive."""
        return self.method in ("importance", "rkv", "rkv_original")


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


CorpusFormat = Literal["auto", "text", "segments", "gsm8k"]
