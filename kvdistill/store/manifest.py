"""The three JSON documents of a store, as frozen pydantic models.

``kvstore.json``                   the plan: corpus fingerprint and shards. Written once.
``teachers/<name>/teacher.json``   provenance and geometry of a teacher's keys and values.
``teachers/<name>/shards/<shard>/COMMIT.json``   counts and checksums of a committed shard.

Teachers are found by listing folders and not recorded in ``kvstore.json``: array tasks of several
teachers start at once, and concurrent rewrites of one file lose updates. Every document carries
a checksum of itself, so a flipped byte is an error.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from kvdistill.errors import StoreFormatError
from kvdistill.text import brief, parse_json, shorten
from kvdistill.types import (
    KINDS,
    Backend,
    CodecSpec,
    Kind,
    LayerGroup,
    Name,
    StoredEviction,
)

FORMAT_VERSION: Final = 3
"""2: values in int4 have scales and zeros of a byte (``int4_v1`` is what 1 called ``int4``).
3: codec klt. Nothing else changed."""

MAX_AXIS: Final = 2**31 - 1

MAX_LAYERS: Final = 4096

MAX_SIZE: Final = 65_536

MAX_VOCABULARY: Final = 2**22

Axis = Annotated[int, Field(ge=1, le=MAX_SIZE)]


def json_object(text: str | bytes) -> dict[str, Any]:
    """The JSON object in a document.

    Raises:
        ValueError: it is something else, in a few words.
    """
    found = parse_json(text)
    if not isinstance(found, dict):
        raise ValueError(f"expected a JSON object, got {type(found).__name__}")
    return found


def sealed_json(body: dict[str, Any]) -> str:
    """Indented JSON with a ``checksum`` of everything else in it."""
    body = json.loads(json.dumps(body))  # as it will be read: keys are text
    return json.dumps({**body, "checksum": _document_checksum(body)}, indent=1, ensure_ascii=False)


def unsealed_json(text: str | bytes) -> dict[str, Any]:
    """What ``sealed_json`` wrote, or a version without checksum; ValueError if it has changed."""
    body = json_object(text)
    if body.pop("checksum", None) not in (None, _document_checksum(body)):
        raise ValueError("its content does not match its checksum")
    return body


class Document(BaseModel):
    """A frozen JSON document without unknown fields, with a checksum of itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def to_json(self) -> str:
        """Indented JSON with a ``checksum`` of everything else in it."""
        return sealed_json(self.model_dump(mode="json"))

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Self:
        """Parse and validate; ``where`` names the file in errors.

        Raises:
            StoreFormatError: not JSON, a wrong checksum, unknown fields, impossible values,
                or a format version newer than this package reads.
        """
        try:
            body = json_object(text)
        except ValueError as error:
            raise StoreFormatError(f"{where}: {error}; run `kvdistill verify`") from None
        version = body.get("format_version")
        if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
            raise StoreFormatError(
                f"{where}: format version {brief(version)}, but this kvdistill reads up to "
                f"{FORMAT_VERSION}; upgrade kvdistill if the store is newer"
            )
        stated = body.pop("checksum", None)
        if stated != _document_checksum(body):
            raise StoreFormatError(
                f"{where}: checksum does not match its content; run `kvdistill verify`"
            )
        try:
            return cls.model_validate(body)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise StoreFormatError(f"{where}: {field}: {shorten(first['msg'])}") from None


class ShardPlan(BaseModel):
    """A shard: ``num_samples`` consecutive samples of the corpus, the same for every teacher."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shard_id: Name
    first_sample: int = Field(ge=0)
    num_samples: int = Field(ge=1, le=MAX_AXIS)
    num_chars: int = Field(ge=0)
    sha256: str
    """SHA-256 of ``corpus/<shard_id>.jsonl``."""


class StoreManifest(Document):
    """``kvstore.json``: which corpus, cut into which shards. Never rewritten."""

    format_version: int = FORMAT_VERSION
    created_by: str
    corpus_fingerprint: str
    """SHA-256 over every sample's id, segments and labels, in order."""
    shards: tuple[ShardPlan, ...]


class RotarySpec(BaseModel):
    """Rotary embedding of one layer, enough to rotate its stored keys again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rotary_dim: int
    """How many channels of a head are rotated (``head_dim`` unless partial)."""
    inv_freq: tuple[float, ...]
    """``rotary_dim / 2`` angular frequencies, radians per position, after any scaling."""
    attention_scaling: float = 1.0
    interleaved: bool = False
    """True where channel pairs are (0,1), (2,3), … (GPT-J) instead of halves (Llama)."""
    rotary_start: int = 0
    """First rotated channel: 0 but for latent attention (DeepSeek), which rotates the last ones."""
    trained_length: int | None = None
    """Texts of more tokens are rotated by ``long_inv_freq``, or with ``dynamic_factor``."""
    long_inv_freq: tuple[float, ...] | None = None
    """longrope: frequencies of a long text."""
    dynamic_factor: float | None = None
    """Dynamic NTK: the factor ``s`` of ``rotary.scale_frequencies`` for a long text."""


class TeacherManifest(Document):
    """``teacher.json``: provenance and geometry of one teacher's stored keys and values."""

    format_version: int = FORMAT_VERSION
    name: Name
    model: str
    revision: str | None
    model_type: str
    kind: Literal["decoder", "encoder", "encoder_decoder"]
    stream: Literal["self", "encoder", "decoder", "cross"] = "self"
    weights_fingerprint: str
    tokenizer_fingerprint: str
    template: str | None
    template_date: str | None = None
    """ISO date that the chat template prints; None where it prints none."""
    extraction_fingerprint: str
    """Id of ``settings``, which every commit repeats; different extractions never mix."""
    settings: dict[str, Any] | None = None
    """By name (``store/identity.py``); this and the next three are None in earlier stores."""
    architecture: dict[str, Any] | None = None
    """Parts of the model's config that can change what it computes."""
    state_fingerprint: str | None = None
    model_files: dict[str, str] | None = None
    """Checksums of the model's files, to compare without loading."""
    versions: dict[str, str]
    dtype: Literal["float32", "bfloat16", "float16"]
    attn_implementation: str
    backend: Backend
    codec: CodecSpec
    transform: str | None = None
    """Codec klt: checksum of its bases."""
    groups: tuple[LayerGroup, ...]
    kept_heads: tuple[int, ...] | None = None
    """If only some KV heads are stored: position ``i`` of the head axis is ``kept_heads[i]``."""
    eviction: StoredEviction | None = None
    """If only some tokens are stored: token axes of shards are then slots (``kept``)."""
    skipped_layers: dict[int, str] = {}
    """Layers without keys and values, and why (hybrid models)."""
    position_encoding: Literal["rotary", "absolute", "relative", "none"]
    rotary: dict[int, RotarySpec] = {}
    """Per stored layer; empty where positions are not rotary."""
    key_norm: bool = False
    """Keys are normed before the rotation (Qwen3, Gemma 3), and stored normed."""
    hidden_size: Axis
    has_importance: bool = False
    has_hidden_at_cue: bool = False
    has_summaries: bool = False
    """Shards hold ``hidden_summary``: every sample's mean and first hidden state."""
    has_hidden: bool = False
    """Shards hold every layer's output, beside its keys and values."""
    has_confidence: bool = False
    """Shards hold ``nll`` and ``entropy`` of every token."""
    num_logits: int = Field(0, ge=0, le=MAX_VOCABULARY)
    """Most likely tokens that shards hold in place of every token (``top_ids``)."""
    parts: tuple[str, ...] | None = None
    """If only texts with these task tags were read; others are stored without tokens."""
    own_text: bool = False
    """The teacher generated its own rationales; its shards carry that text."""
    adapter: str
    """The capture adapter."""
    adapter_error: float
    """Relative error with which the adapter was verified."""

    @model_validator(mode="before")
    @classmethod
    def _from_earlier_format(cls, body: Any) -> Any:
        """Upgrade on reading, so that copies are written in the newest format."""
        if not isinstance(body, dict) or body.get("format_version", FORMAT_VERSION) > 2:
            return body
        if body["format_version"] == 2:
            return {**body, "format_version": FORMAT_VERSION}
        codecs = body.get("codec")
        if isinstance(codecs, dict):
            codecs = {kind: "int4_v1" if name == "int4" else name for kind, name in codecs.items()}
        return {**body, "format_version": FORMAT_VERSION, "codec": codecs}

    @field_validator("groups")
    @classmethod
    def _plausible(cls, groups: tuple[LayerGroup, ...]) -> tuple[LayerGroup, ...]:
        """Refuse repeated layers, and sizes that would make a reader allocate absurdly."""
        layers = [layer for group in groups for layer in group.layers]
        in_range = set(layers) <= set(range(MAX_LAYERS))
        if not layers or len(set(layers)) != len(layers) or not in_range:
            raise ValueError(
                f"expected different layers from 0 to {MAX_LAYERS - 1}, got {layers[:8]}"
            )
        for group in groups:
            sizes = (group.num_key_value_heads, group.key_head_dim, group.value_head_dim)
            if list(group.layers) != sorted(group.layers) or not group.layers:
                raise ValueError(f"layers of a group must ascend, got {group.layers[:8]}")
            if not all(1 <= size <= MAX_SIZE for size in sizes):
                raise ValueError(f"heads and head dims must be 1 to {MAX_SIZE}, got {sizes}")
        return groups

    @property
    def predicts_text(self) -> bool:
        """Whether what is read are tokens that the model predicts; no encoder's are."""
        return self.kind != "encoder" and self.stream in ("self", "decoder")

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """What is stored of every layer and token."""
        return (*KINDS, "hidden") if self.has_hidden else KINDS

    def shape(self, group: LayerGroup, kind: Kind) -> tuple[int, int]:
        """Heads and channels of a kind in one group."""
        if kind == "hidden":
            return 1, self.hidden_size
        return group.num_key_value_heads, group.head_dim(kind)

    @property
    def layers(self) -> tuple[int, ...]:
        """All stored layers, ascending."""
        return tuple(sorted(layer for group in self.groups for layer in group.layers))


class FileRecord(BaseModel):
    """Size and checksum of one file of a shard."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size_bytes: int = Field(ge=0)
    xxh3: str


class Commit(Document):
    """``COMMIT.json``: what a committed shard holds. Written last, published by one rename."""

    format_version: int = FORMAT_VERSION
    shard_id: Name
    teacher: Name
    extraction_fingerprint: str
    num_samples: int = Field(ge=1, le=MAX_AXIS)
    num_tokens: int = Field(ge=0, le=MAX_AXIS)
    num_blocks: int = Field(ge=0, le=MAX_AXIS)
    """Quantisation blocks of 64 tokens; they restart at every sample."""
    raw_bytes: int = Field(ge=0)
    """Bytes the keys and values would take as bfloat16."""
    files: dict[str, FileRecord]
    """Every other file of the shard, by path relative to the shard's folder."""
    tensors: dict[str, str] = {}
    """safetensors only: XXH3 of every tensor's bytes, so that each can be verified by itself."""
    seconds: float = 0.0
    """Wall time of this shard's extraction."""
    attempt: dict[str, Any] = {}
    """Where it was made (host, pid, Slurm ids). Informational."""


def _document_checksum(body: dict[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
