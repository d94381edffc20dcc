"""Type aliases and value types shared by the whole package.

Axis legend, used as suffixes in mathematical code (``teacher_k_BLHTD``):

    B samples   L layers   H key/value heads   T tokens   D head dim   E hidden size   V vocabulary

``H`` counts *key/value* heads (``num_key_value_heads``), never query heads. Masks are True where a
position counts. Character offsets index the whole text of a sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

Kind = Literal["key", "value", "hidden"]
"""What is stored of every layer and token; ``hidden`` is the layer's output, as one head."""
KINDS: Final[tuple[Kind, Kind]] = ("key", "value")
"""What every store has."""
PLURALS: Final[dict[Kind, str]] = {"key": "keys", "value": "values", "hidden": "hidden states"}

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
"""A name that is also a folder: no separators and no leading dot, so it stays inside its parent."""

StoreURL = Annotated[str, Field(pattern=r"^[a-z0-9]+://[^\s?#]+$")]
"""A store in a bucket: ``s3://BUCKET/PREFIX``, ``gs://``, ``az://`` or ``file://``."""

CorpusFormat = Literal["auto", "text", "segments", "chat", "gsm8k"]
"""Row format of a corpus file."""

LongText = Literal["error", "truncate", "window", "skip"]
SegmentName = Literal["text", "prompt", "rationale", "answer"]
SEGMENT_IDS: Final[dict[SegmentName, int]] = {"text": 0, "prompt": 1, "rationale": 2, "answer": 3}
SEGMENT_SPECIAL: Final = -1
"""Segment id of a token that covers no character of the sample: BOS, template, padding."""

Stream = Literal["self", "encoder", "decoder", "cross"]
"""Which attention of a teacher is read; ``self`` unless it is an encoder-decoder."""

Backend = Literal["zarr", "safetensors"]
"""File format of the shards of a store."""

CodecName = Literal["bf16", "fp16", "int8", "int4", "fp8_e4m3", "klt", "int4_v1"]
"""Stored representation of keys or values; ``int4_v1`` is that of stores of format 1."""

TimeMethod = Literal["tokens", "segments", "global", "latent"]
"""How student positions map to teacher positions: by characters, resampling, or eviction."""

TokenMethod = Literal["iou", "overlap", "nearest"]
"""How a student token weights the teacher tokens that share its characters."""

LayerMethod = Literal["ratio", "uniform", "skip", "last_aligned", "cka", "explicit"]
"""How student layers map to teacher layers."""

RopeMethod = Literal["none", "student", "linear", "ntk", "dynamic"]
"""How position-free teacher keys are rotated where a loss needs rotated keys."""

ProjectionMode = Literal[
    "student_to_teacher", "frozen", "task", "joint", "shared_space", "identity"
]
"""Which side of the K/V loss is trained; with ``joint``, the target can collapse to the student."""

ProjectionInit = Literal["grouped_mean", "orthogonal", "pca", "ridge"]
"""Initial weights of a projection."""

FusionMethod = Literal["fixed", "similarity", "confidence", "mlp", "gate", "attention"]
"""Source of the fusion weights of several teachers."""

Granularity = Literal["sample", "segment", "layer", "token"]
"""Unit that a learned router, or fusion by confidence, weights separately."""

Similarity = Literal["cosine", "dot", "l2"]
"""Similarity of hidden states and prototypes; ``l2`` is the negative distance."""

Distance = Literal["mse", "smooth_l1"]
"""Pointwise error between student and target."""

EvictionMethod = Literal[
    "full", "right_crop", "uniform", "random", "importance", "rkv", "rkv_original"
]
"""Which teacher tokens are kept when the budget is smaller than the text."""
RANKED_EVICTIONS: Final = ("importance", "rkv", "rkv_original")
"""Methods that rank tokens by the attention that they receive."""


_OF_KLT: Final = {"key_bits", "value_bits", "block_layers", "pilot_tokens"}


class CodecSpec(BaseModel):
    """Codecs of keys and values; ``store/codecs`` defines them."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    key: CodecName = "int8"
    """Codec of keys."""
    value: CodecName = "int8"
    """Codec of values."""
    hidden: Literal["bf16", "fp16", "int8", "int4", "fp8_e4m3"] = "int8"
    """Codec of hidden states, with `extraction.hidden`; scales are those of keys."""
    key_bits: Annotated[float, Field(gt=0, le=8)] = 1.7
    """Bits per element of keys in `klt`."""
    value_bits: Annotated[float, Field(gt=0, le=8)] = 2.5
    """Bits per element of values in `klt`."""
    block_layers: Annotated[int, Field(gt=0)] = 10
    """Layers that `klt` transforms together, at most: more layers in fewer bits, and more to read
    for one of them."""
    pilot_tokens: Annotated[int, Field(gt=0)] = 16_384
    """Tokens of the corpus that the transform of `klt` is fitted on."""

    @property
    def transforms(self) -> bool:
        """Whether keys or values are stored in `klt`."""
        return "klt" in (self.key, self.value)

    @model_validator(mode="after")
    def _of_klt(self) -> Self:
        if not self.transforms and (given := sorted(self.model_fields_set & _OF_KLT)):
            raise ValueError(f"`{given[0]}` is for codec klt; got {self.key}/{self.value}")
        return self

    @model_serializer(mode="wrap")
    def _without_unused(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what earlier stores did not have: settings of ``klt`` where nothing is stored in
        it, and ``hidden`` at its default.
        """
        unused = set() if self.transforms else set(_OF_KLT)
        unused |= {"hidden"} if self.hidden == "int8" else set()
        return {name: value for name, value in dump(self).items() if name not in unused}


class StoredEviction(BaseModel):
    """Keep only some tokens of a teacher, chosen per layer and head during extraction.

    The other tokens are lost: stage 2 can align this teacher in time `latent` only.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    method: Literal["right_crop", "uniform", "random", "importance", "rkv", "rkv_original"] = "rkv"
    """How tokens are ranked; `importance` and the R-KV methods need `extraction.importance`."""
    budget: Annotated[int, Field(gt=0)] = 24
    """Tokens that are kept of every sample, in each layer and head."""
    mix: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Weight of importance in the R-KV scores, lambda."""
    segment: SegmentName = "rationale"
    """Segment to choose from; in samples without it, all of the text but the answer."""

    @property
    def ranks(self) -> bool:
        """Whether tokens are ranked by the attention that they receive."""
        return self.method in RANKED_EVICTIONS


@dataclass(frozen=True)
class LayerGroup:
    """Layers of one teacher with the same geometry, stored as one array.

    Most models have one group. ``layers`` are the teacher's own layer indices, ascending; position
    ``i`` of the array's layer axis holds layer ``layers[i]``.
    """

    layers: tuple[int, ...]
    num_key_value_heads: int
    key_head_dim: int
    value_head_dim: int

    def head_dim(self, kind: Kind) -> int:
        """Head dim of keys or of values (they differ in a few architectures)."""
        return self.key_head_dim if kind == "key" else self.value_head_dim
